"""Calibration text: how much of which, its sequences of tokens, and perplexity on them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from leanstep._checkpoint.files import read_json
from leanstep._files import one_line
from leanstep.pruning.config import Progress
from leanstep.pruning.folder.files import Checkpoint
from leanstep.pruning.folder.kinds import judge_of
from leanstep.pruning.folder.loading import (
    LONGEST,
    begin_tokens,
    encoding,
    open_config,
    open_tokenizer,
    position_count,
    special_tokens,
)
from leanstep.pruning.measure.batches import as_batches, evaluating
from leanstep.pruning.measure.metrics import check_runs, cross_entropy_sums, summarise
from leanstep.pruning.score.targets import abbreviate


@dataclass(frozen=True)
class CalibrationText:
    """Text to calibrate a model with, and how much of it.

    A language model reads the documents one after another, cut into sequences of equal length. An embedding model or a
    classifier reads a document alone, between the tokens that its tokenizer puts around a text: a longer one is cut
    into several of the whole length, and with labels to its begin.

    Attributes:
        documents: the texts, in order. They are read one by one, more than once: an iterable that reads a file needs no
            memory for all, and an iterator becomes a tuple.
        label: name of the texts in messages and in the report.
        samples: sequences for the scores.
        curve_samples: number of these sequences for the curves.
        refine_samples: sequences that judge exchanges, besides ``samples``.
        labels: for a classifier, the class of each document: its number, or its name in the model's configuration.
        held_out: sequences for the comparison with uniform sparsity, and for perplexity; disjoint from the others.
        held_out_documents: texts for the held-out sequences; None: ``documents``.
        seq_len: tokens of a sequence; None: the least of the tokenizer's ``model_max_length``, the model's positions
            and 512.
        seed: of the random choice of sequences.

    Raises:
        ValueError: for numbers of sequences below 1, below 2 for ``refine_samples``, more sequences for the curves than
            for the scores, a text in place of a sequence of texts, or a seed that is not of 63 bits.
    """

    documents: Iterable[str]
    label: str = "text"
    samples: int = 32
    curve_samples: int = 4
    held_out: int = 8
    held_out_documents: Iterable[str] | None = None
    seq_len: int | None = None
    seed: int = 0
    refine_samples: int = 32
    labels: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        for name in ("documents", "held_out_documents"):
            texts = getattr(self, name)
            if isinstance(texts, str):
                raise ValueError(f"{name}: expected a sequence of texts, got one text; put it into a tuple")
            if isinstance(texts, Iterator):  # they are read more than once
                object.__setattr__(self, name, tuple(texts))
        if min(self.samples, self.curve_samples, self.held_out) < 1 or self.curve_samples > self.samples:
            raise ValueError(
                "expected samples, curve_samples and held_out of at least 1, and curve_samples <= samples; got "
                f"{self.samples}, {self.curve_samples} and {self.held_out}"
            )
        if self.refine_samples < 2:
            raise ValueError(f"expected refine_samples of at least 2, got {self.refine_samples}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"expected a seed from 0 to 2^63 - 1, got {self.seed}")


def sequences_of(checkpoint: Checkpoint, text: CalibrationText, *, refine: bool = False) -> tuple[Any, Any, Any]:
    """Calibration and held-out sequences, and with ``refine`` those that judge, by the checkpoint's tokenizer.

    Each int64 [samples, tokens]; for embedding models and classifiers, of texts of several lengths or with labels, a
    list with a batch for each text. The first two do not depend on ``refine``.
    """
    tokenizer = open_tokenizer(checkpoint.folder)
    length = sequence_length(checkpoint.folder, checkpoint.config, tokenizer, text.seq_len)
    judge = judge_of(checkpoint.folder)
    vocabulary = checkpoint.config.get("vocab_size")

    with encoding(checkpoint.folder):
        begin = begin_tokens(tokenizer)

    def encode(document: str) -> Sequence[int]:
        with encoding(checkpoint.folder):
            return tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]

    def cut(documents: Iterable[str], count: int) -> Any:
        if judge is not None:
            return TextSamples(tokenizer, length, checkpoint.folder).drawn(documents, text.labels, count, text.seed)
        sequences = token_sequences(
            encode,
            documents,
            count,
            length,
            begin=begin,
            end=tokenizer.eos_token_id,
            seed=text.seed,
        )
        if isinstance(vocabulary, int) and int(sequences.max()) >= vocabulary:
            raise ValueError(
                f"{checkpoint.folder}: its tokenizer has more tokens than the model, which has {vocabulary}"
            )
        return sequences

    count = text.samples + (text.refine_samples if refine else 0)
    if text.held_out_documents is not None:
        sequences, held_out = cut(text.documents, count), cut(text.held_out_documents, text.held_out)
    else:
        sequences = cut(text.documents, count + text.held_out)
        held_out, sequences = sequences[: text.held_out], sequences[text.held_out :]
    return sequences[: text.samples], held_out, sequences[text.samples :]


def longest(sequences: Any) -> int:
    """Tokens of the longest of some sequences, as of :func:`sequences_of`."""
    if isinstance(sequences, Tensor):
        return sequences.shape[1]
    return max((one if isinstance(one, Tensor) else one[0]).shape[1] for one in sequences)


@dataclass(frozen=True)
class TextSamples:
    """Texts that a model reads one by one.

    Attributes:
        length: most tokens of a text, those that the tokenizer puts around it among them.
        folder: of the model, for its classes and for messages.
    """

    tokenizer: Any
    length: int
    folder: Path

    def drawn(self, documents: Iterable[str], labels: Sequence[Any] | None, count: int | None, seed: int = 0) -> Any:
        """Draw texts at random, or with ``count=None`` take all: see :func:`sequences_of` for the result.

        Raises:
            ValueError: for too few texts, and a label that is no class of the model.
        """
        with encoding(self.folder):
            samples = [ids for document in documents for ids in self._pieces(document, labels is not None)]
        if len(samples) < (asked := len(samples) if count is None else count) or not samples:
            raise ValueError(
                f"the text is too short: {asked} texts of at most {self.length} tokens were asked for, it has "
                f"{len(samples)}; give more text, or ask for fewer"
            )
        indices = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:asked].tolist()
        if count is None:
            indices.sort()
        if labels is not None:
            classes = self._classes(labels)
            return [(samples[index][None], classes[index][None]) for index in indices]
        # without a token for padding, decoders with a head for classes take one text at a time
        together = getattr(open_config(self.folder), "pad_token_id", None) is not None
        if together and len({len(samples[index]) for index in indices}) == 1:
            return torch.stack([samples[index] for index in indices])
        return [samples[index][None] for index in indices]

    def _pieces(self, document: str, labelled: bool) -> Iterator[Tensor]:
        begin, end = special_tokens(self.tokenizer)
        if (room := self.length - len(begin) - len(end)) < 1:
            raise ValueError(f"{self.length} tokens leave no room between those that the tokenizer puts around a text")
        ids = self.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        # of a long text, the rest that fills no sequence is left out
        last = 1 if labelled else max(1, len(ids) - room + 1)
        for first in range(0, last, room) if ids or labelled else ():
            yield torch.tensor([*begin, *ids[first : first + room], *end])

    def _classes(self, labels: Sequence[Any]) -> Tensor:
        config = open_config(self.folder)
        numbers = {
            **{name: number for name, number in config.label2id.items()},
            **{n: n for n in range(config.num_labels)},
        }
        for label in labels:
            if isinstance(label, bool) or label not in numbers:
                raise ValueError(
                    f"the label {one_line(str(label))} is no class of {self.folder}: expected a number from 0 to "
                    f"{config.num_labels - 1}, or a name of its config.json ({abbreviate([*config.label2id], 3)})"
                )
        return torch.tensor([numbers[label] for label in labels])


def sequence_length(folder: Path, config: Mapping[str, Any], tokenizer: Any, asked: int | None) -> int:
    """Tokens of a sequence: as asked for, or as trained, at most :data:`LONGEST`. ValueError for one out of range."""
    positions = position_count(config, folder) or LONGEST
    file = folder / "sentence_bert_config.json"
    trained = (read_json(file).get("max_seq_length") if file.is_file() else None) or LONGEST
    length = min(tokenizer.model_max_length, positions, LONGEST, trained) if asked is None else asked
    if not isinstance(length, int) or not 2 <= length <= positions:
        raise ValueError(f"seq_len must be from 2 to the model's {positions} positions, got {length} (--seq-len)")
    return length


def token_sequences(
    encode: Callable[[str], Sequence[int]],
    texts: Iterable[str],
    count: int,
    length: int,
    *,
    begin: Sequence[int] = (),
    end: int | None,
    seed: int,
) -> Tensor:
    """Cut ``count`` sequences of ``length`` tokens from text, at random and without overlap.

    Joins documents by the end-of-text token, cuts them into consecutive pieces, draws ``count`` of these, and puts
    ``begin`` before each.

    Args:
        encode: a text -> its token numbers, without special tokens.
        texts: the documents.
        count: number of sequences.
        length: tokens per sequence, those of ``begin`` among them.
        begin: the tokens before every sequence; see :func:`leanstep.pruning.folder.loading.begin_tokens`.
        end: the token appended to every document; None appends nothing.
        seed: of the random choice and order of the pieces.

    Returns:
        int64 [count, length].

    Raises:
        ValueError: for too little text, with both numbers of tokens, or a ``length`` that ``begin`` fills.

    Notes:
        Memory: 4 bytes per token of the text, and one document with its tokens.
    """
    if (length_of_text := length - len(begin)) < 1:
        raise ValueError(f"expected sequences of more than the {len(begin)} tokens before a text, got {length}")
    # which pieces are drawn depends on their number, which only the end of the text tells: all tokens are stored until
    # then, as compactly as their numbers allow
    tokens = array("i")
    for text in texts:
        tokens.extend(encode(text))
        if end is not None:
            tokens.append(end)
    pieces = len(tokens) // length_of_text
    if pieces < count:
        raise ValueError(
            f"the text is too short: {count} sequences of {length} tokens take {count * length_of_text:,} tokens of "
            f"text, it has {len(tokens):,}; give more text, or ask for fewer or shorter sequences"
        )
    drawn = torch.randperm(pieces, generator=torch.Generator().manual_seed(seed))[:count]
    # a view of the array; indexing copies what is drawn
    cut = torch.frombuffer(tokens, dtype=torch.int32, count=pieces * length_of_text).view(pieces, length_of_text)
    return torch.cat([torch.tensor(begin, dtype=torch.int64).expand(count, len(begin)), cut[drawn].long()], dim=1)


def held_out_hash(held_out: Any) -> str | None:
    """SHA-256 of held-out sequences or images; None for other data."""
    if not isinstance(held_out, Tensor):
        return None
    values = held_out.detach().cpu().contiguous()
    return sha256(
        f"{values.dtype}{tuple(values.shape)}".encode() + values.view(torch.uint8).numpy().tobytes()
    ).hexdigest()


class Perplexity(NamedTuple):
    """Perplexity, infinite where fp64 does not hold it, its standard error over the sequences, and predicted tokens."""

    value: float
    stderr: float
    tokens: int

    def named(self, name: str) -> dict[str, Any]:
        """The entries of ``perplexity`` in sparsity.json, under the name of a state of the model."""
        return {name: self.value, f"{name}_stderr": self.stderr, "tokens": self.tokens}


def perplexity_of(model: nn.Module, sequences: Any, progress: Progress | None = None) -> Perplexity:
    """Perplexity over some sequences; the error is that of the loss times the perplexity, NaN for a single sequence.

    ``progress`` is called with (batches done, batches in all, "perplexity").
    """
    with evaluating(model):
        batches = as_batches(sequences, model, batch_size=4)
        check_runs(model, batches[0])
        per_batch = []
        for number, batch in enumerate(batches):
            if progress is not None:
                progress(number, len(batches), "perplexity")
            per_batch.append(cross_entropy_sums(batch.run(model), batch))
    loss, tokens = summarise(per_batch), int(sum(float(counts.sum()) for _, counts in per_batch))
    try:
        value = math.exp(loss.mean)
    except OverflowError:
        value = math.inf
    return Perplexity(value, value * loss.stderr, tokens)
