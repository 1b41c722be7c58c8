"""Make token sequences from a recipe's ``data`` section: read, tokenise, hold out, pack or pad, order."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from leanstep.recipes.config.schema import trained_size
from leanstep.recipes.data.sources import Corpus, open_corpus, open_validation
from leanstep.recipes.data.tokens import TokenFile, load_tokenizer, tokenise, tokenizer_fingerprint, vocabulary_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerFast

    from leanstep.recipes.config.schema import DataConfig

IGNORED = -100  # label of a position without a target, as torch's cross_entropy and transformers have it

# bytes of text per held-out token, an upper estimate: the tokenizer must not train on this text, and its tokens are
# counted later. On English prose, a vocabulary of 16,384 reaches 5.1.
_BYTES_HELD_OUT = 8
_MOST_TRAINED_ON = 256 << 20  # bytes from the start of the text; more change few merges and take minutes


class PackedSequences(Dataset):
    """Consecutive sequences of ``seq_len`` tokens from documents joined by end-of-text tokens.

    Each begins with the tokens ``begin``, which ``seq_len`` counts. Item i is ``{"input_ids": int64 [seq_len],
    "labels": int64 [seq_len]}`` with ``labels`` equal to ``input_ids``: the model shifts them. The last, shorter
    sequence is dropped; with ``keep_rest`` it is padded, with labels -100.
    """

    def __init__(
        self,
        file: TokenFile,
        start: int,
        stop: int,
        seq_len: int,
        *,
        pad_id: int,
        keep_rest: bool = False,
        begin: Sequence[int] = (),
    ) -> None:
        self.file, self.start, self.stop, self.seq_len, self.pad_id = file, start, stop, seq_len, pad_id
        self.begin, self.step = begin, seq_len - len(begin)
        tokens = stop - start
        # a sequence of one token has no target
        self.length = tokens // self.step + int(keep_rest and tokens % self.step > (0 if begin else 1))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = checked_index(index, self.length)
        first = self.start + index * self.step
        tokens = self.file.tokens[first : min(first + self.step, self.stop)]
        return as_sequence(tokens, self.seq_len, self.pad_id, self.begin)


class PaddedDocuments(Dataset):
    """One sequence per document, cut to ``seq_len`` tokens or padded on the right, as in published C4 runs.

    Items are as in :class:`PackedSequences`, ``begin`` before each document. A cut document keeps its end-of-text
    token. Padding has labels -100, and causal attention needs no mask for padding on the right.
    """

    def __init__(
        self, file: TokenFile, start: int, stop: int, seq_len: int, *, pad_id: int, begin: Sequence[int] = ()
    ) -> None:
        self.file, self.start, self.stop, self.seq_len, self.pad_id = file, start, stop, seq_len, pad_id
        self.begin = begin

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        document = self.start + checked_index(index, len(self))
        first, end = (int(self.file.ends[document - 1]) if document else 0), int(self.file.ends[document])
        tokens = cut_document(self.file.tokens[first:end], self.seq_len - len(self.begin))
        return as_sequence(tokens, self.seq_len, self.pad_id, self.begin)


def cut_document(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """Cut a document to ``seq_len`` tokens; the last one is its end-of-text token."""
    return tokens if len(tokens) <= seq_len else np.concatenate([tokens[: seq_len - 1], tokens[-1:]])


def checked_index(index: int, length: int) -> int:
    """Return the index from 0 on. Raises IndexError, which ends a loop over a dataset."""
    if not -length <= index < length:
        raise IndexError(f"sequence {index} of {length}")
    return index % length


def as_sequence(tokens: np.ndarray, seq_len: int, pad_id: int, begin: Sequence[int] = ()) -> dict[str, torch.Tensor]:
    """Make ``input_ids`` and ``labels`` of ``begin`` and at most ``seq_len`` minus its length tokens.

    Both are padded on the right; padding and ``begin`` have labels -100.
    """
    input_ids = torch.from_numpy(np.concatenate([np.array(begin, np.int64), tokens.astype(np.int64)]))
    labels = input_ids.clone()
    labels[: len(begin)] = IGNORED
    missing = seq_len - len(input_ids)
    if missing:
        input_ids = torch.nn.functional.pad(input_ids, (0, missing), value=pad_id)
        labels = torch.nn.functional.pad(labels, (0, missing), value=IGNORED)
    return {"input_ids": input_ids, "labels": labels}


def padding(tokenizer: Any) -> int:
    """The token that pads sequences: the tokenizer's own, else its end of text."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def sequence_begin(tokenizer: Any, seq_len: int) -> tuple[int, ...]:
    """The tokens before every sequence, as the tokenizer begins a text. Raises ValueError if they fill ``seq_len``."""
    from leanstep.pruning.folder.loading import begin_tokens

    begin = begin_tokens(tokenizer)
    if seq_len < len(begin) + 2:
        raise ValueError(
            f"data.seq_len: expected at least {len(begin) + 2}, of which the tokenizer's begin of text takes "
            f"{len(begin)}; got {seq_len}"
        )
    return begin


def shuffled(length: int, seed: int, *position: int) -> torch.Tensor:
    """Return the order of an epoch or a block, a permutation of ``range(length)``, int64 ``[length]``.

    It depends only on the arguments and uses no global random state, so a resumed run can reproduce it.
    """
    mixed = np.random.SeedSequence([seed, *position]).generate_state(1, np.uint64)[0]
    return torch.randperm(length, generator=torch.Generator().manual_seed(int(mixed) % 2**63))


@dataclass(frozen=True)
class LoadedData:
    """Data ready for training.

    Attributes:
        tokenizer: a transformers fast tokenizer with an end-of-text token. A trained one is limited to ``seq_len``.
        train: map-style dataset of sequences, or an iterable one when ``stream`` is True.
        validation: map-style dataset; of length 0 when ``val_tokens`` is 0 and there is no validation text.
        bytes_per_token: UTF-8 bytes per token of the validation sequences, end-of-text tokens included;
            ``loss / ln 2 / bytes_per_token`` is bits per byte. None without validation text.
        stream: whether ``train`` is a :class:`leanstep.recipes.data.streaming.StreamedSequences`.
        facts: the lines of :meth:`summary`, by name.
        identity: what must be the same in a run that resumes: a hash of the tokenizer, and of the text unless streamed.
        largest_id: the largest token id of the data, where special tokens may be in it, else 0.
    """

    tokenizer: "PreTrainedTokenizerFast"
    train: Any
    validation: Any
    bytes_per_token: float | None
    stream: bool = False
    facts: dict[str, str] = field(default_factory=dict)
    identity: dict[str, str] = field(default_factory=dict)
    largest_id: int = 0

    @property
    def vocabulary(self) -> int:
        """The smallest vocabulary of a model that this data can train."""
        return max(vocabulary_size(self.tokenizer), self.largest_id + 1)

    def summary(self) -> str:
        """Describe source, tokenizer, training and validation data, one line each."""
        width = max(map(len, self.facts), default=0)
        return "\n".join(f"{name:<{width}}  {fact}" for name, fact in self.facts.items())


def load_data(config: "DataConfig", *, seed: int, rank: int = 0, world_size: int = 1) -> LoadedData:
    """Load the data of a recipe; the first call tokenises and caches, later ones map the cache.

    The validation text is ``data.val_path``, or the source's validation split, or the last ``val_tokens`` tokens of the
    text, which neither model nor tokenizer trains on. All processes of a run may call this at once.

    Args:
        config: the ``data`` section.
        seed: decides the order of streamed data. Map-style data is not shuffled here; see :func:`shuffled`.
        rank, world_size: select this process's share of a stream.

    Raises:
        ValueError: missing, empty or binary text, an unknown column, fewer tokens than one sequence.
        ConnectionError, ModuleNotFoundError, OSError: no network, a missing package, a cache that cannot be written.
    """
    if config.streaming:
        from leanstep.recipes.data.streaming import load_stream

        return load_stream(config, seed=seed, rank=rank, world_size=world_size)
    if config.source == "chat":
        from leanstep.recipes.data.chat import load_chat

        return load_chat(config)
    corpus = open_corpus(config)
    separate = open_validation(config)
    tokenizer, file = _tokenise_held_out(config, corpus, 0 if separate else config.val_tokens)
    if trained_size(config.tokenizer) is not None:
        tokenizer.model_max_length = config.seq_len  # of one that was opened, others rely on its own
    facts = {"data": f"{corpus.label}: {len(file.ends):,} documents, {len(file):,} tokens"}
    facts["tokenizer"] = f"{config.tokenizer}, {len(tokenizer):,} tokens"
    boundary = len(file)
    if separate:
        train, _ = _split(config, tokenizer, file, boundary)
        validation, bytes_per_token, facts["validation"] = load_validation(config, separate, tokenizer)
    else:
        boundary = _boundary(config, file, config.val_tokens)
        train, validation = _split(config, tokenizer, file, boundary)
        bytes_per_token = _bytes_per_token(config, tokenizer, file, boundary)
        facts["validation"] = _describe_tail(corpus, file, boundary, validation)
        if corpus.in_time_order and len(validation):
            facts["held out"] = "newer than all training text, which is harder than a random split"
    if len(train) == 0:
        raise ValueError(
            f"data: '{corpus.label}' leaves {boundary:,} tokens to train on, fewer "
            f"than one sequence of data.seq_len {config.seq_len}; give more text, or lower seq_len or val_tokens"
        )
    facts["training"] = f"{len(train):,} documents, each cut or padded to {config.seq_len} tokens"
    if config.packing:
        tokens = f"{len(train) * config.seq_len:,} tokens an epoch"
        facts["training"] = f"{len(train):,} sequences of {config.seq_len} tokens ({tokens})"
    begin = sequence_begin(tokenizer, config.seq_len)
    text = file.identity + (f", each sequence after {list(begin)}" if begin else "")
    identity = {"tokenizer": tokenizer_fingerprint(tokenizer), "text": text}
    return LoadedData(tokenizer, train, validation, bytes_per_token, facts=facts, identity=identity)


def _tokenise_held_out(config: "DataConfig", corpus: Corpus, val_tokens: int) -> tuple[Any, TokenFile]:
    """Make tokenizer and tokens; the tokenizer does not train on the last ``val_tokens`` tokens."""
    if trained_size(config.tokenizer) is None:
        tokenizer = load_tokenizer(config.tokenizer, corpus.documents, "", config.cache_dir)
        file = tokenise(corpus, tokenizer, config.cache_dir)
        _check_held_out(corpus, file, val_tokens)
        return tokenizer, file
    spare = val_tokens * _BYTES_HELD_OUT
    counted = _count_bytes(corpus.documents(), _MOST_TRAINED_ON + 2 * spare)
    held_out = min(spare, counted // 2)
    while True:
        keep = min(counted - held_out, _MOST_TRAINED_ON)
        identity = f"first {keep} bytes of {corpus.fingerprint}"
        texts = partial(_first_bytes_of, corpus, keep)
        tokenizer = load_tokenizer(config.tokenizer, texts, identity, config.cache_dir)
        file = tokenise(corpus, tokenizer, config.cache_dir)
        _check_held_out(corpus, file, val_tokens)
        after = _text_bytes_after(file, tokenizer, _boundary(config, file, val_tokens))
        if keep <= int(file.text_bytes.sum()) - after:
            return tokenizer, file
        if held_out == counted // 2:
            raise ValueError(
                f"data.val_tokens: the last {val_tokens:,} tokens are more than half of the text of "
                f"'{corpus.label}' ({len(file):,} tokens); lower it, or give data.val_path"
            )
        held_out = min(2 * held_out, counted // 2)


def _count_bytes(texts: "Any", most: int) -> int:
    """Count the UTF-8 bytes of texts; stop after the text that reaches ``most``."""
    count = 0
    for text in texts:
        count += len(text.encode("utf-8", "surrogatepass"))
        if count >= most:
            break
    return count


def _first_bytes_of(corpus: Corpus, keep: int) -> "Iterator[str]":
    """Yield texts up to ``keep`` bytes in all, the last one cut."""
    for text in corpus.documents():
        raw = text.encode("utf-8", "surrogatepass")
        if len(raw) >= keep:
            yield raw[:keep].decode("utf-8", "ignore")
            return
        keep -= len(raw)
        yield text


def _check_held_out(corpus: Corpus, file: TokenFile, val_tokens: int) -> None:
    if val_tokens >= len(file):
        raise ValueError(
            f"data.val_tokens: {val_tokens:,} tokens cannot be held out from '{corpus.label}', which has "
            f"{len(file):,} tokens in all; lower it, or give data.val_path"
        )


def _boundary(config: "DataConfig", file: TokenFile, val_tokens: int) -> int:
    """Index of the first held-out token: ``val_tokens`` before the end; the start of its document without packing."""
    boundary = len(file) - val_tokens
    if config.packing or val_tokens == 0:
        return boundary
    document = int(np.searchsorted(file.ends, boundary, side="right"))
    return int(file.ends[document - 1]) if document else 0


def _text_bytes_after(file: TokenFile, tokenizer: Any, boundary: int) -> int:
    """Count the bytes of text from token ``boundary`` on; exact unless it cuts a character."""
    if boundary >= len(file):
        return 0
    first = int(np.searchsorted(file.ends, boundary, side="right"))
    begin, end = (int(file.ends[first - 1]) if first else 0), int(file.ends[first])
    size = int(file.text_bytes[first])
    if boundary > begin:
        ids = file.tokens[boundary : end - 1].astype(np.int64).tolist()  # without its end of text
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        size = min(size, len(text.encode("utf-8", "surrogatepass")))
    return size + int(file.text_bytes[first + 1 :].sum())


def _split(config: "DataConfig", tokenizer: Any, file: TokenFile, boundary: int) -> tuple[Any, Any]:
    """Make training sequences before token ``boundary`` and validation sequences from it on."""
    settings: dict[str, Any] = {"pad_id": padding(tokenizer), "begin": sequence_begin(tokenizer, config.seq_len)}
    if config.packing:
        train = PackedSequences(file, 0, boundary, config.seq_len, **settings)
        return train, PackedSequences(file, boundary, len(file), config.seq_len, keep_rest=True, **settings)
    document = int(np.searchsorted(file.ends, boundary, side="right"))
    documents = PaddedDocuments(file, 0, document, config.seq_len, **settings)
    return documents, PaddedDocuments(file, document, len(file.ends), config.seq_len, **settings)


def _bytes_per_token(config: "DataConfig", tokenizer: Any, file: TokenFile, boundary: int) -> float | None:
    """Bytes per token of the sequences after ``boundary``, without the cut text of padded documents."""
    if boundary >= len(file):
        return None
    if config.packing:
        return _text_bytes_after(file, tokenizer, boundary) / (len(file) - boundary)
    first = int(np.searchsorted(file.ends, boundary, side="right"))
    begins, ends = np.concatenate([[0], file.ends[:-1]])[first:], file.ends[first:]
    most = config.seq_len - len(sequence_begin(tokenizer, config.seq_len))
    is_cut = ends - begins > most
    shown = [file.tokens[begin : begin + most - 1].astype(np.int64).tolist() for begin in begins[is_cut]]
    texts = tokenizer.backend_tokenizer.decode_batch(shown)
    size = int(file.text_bytes[first:][~is_cut].sum()) + sum(len(text.encode("utf-8", "replace")) for text in texts)
    return size / int(np.minimum(ends - begins, most).sum())


def load_validation(config: "DataConfig", corpus: Corpus, tokenizer: Any) -> tuple[Any, float | None, str]:
    """Tokenise a separate validation text; return (dataset, bytes per token, description).

    Takes all of ``data.val_path``, but only ``val_tokens`` tokens of a validation split.
    """
    file = tokenise(corpus, tokenizer, config.cache_dir, at_most=None if config.val_path else config.val_tokens)
    _, validation = _split(config, tokenizer, file, 0)
    bytes_per_token = _bytes_per_token(config, tokenizer, file, 0)
    return validation, bytes_per_token, f"{corpus.label}: {len(file):,} tokens, {len(validation):,} sequences"


def _describe_tail(corpus: Corpus, file: TokenFile, boundary: int, validation: Any) -> str:
    if boundary >= len(file):
        return "none (data.val_tokens: 0)"
    text = f"last {len(file) - boundary:,} tokens, {len(validation):,} sequences"
    if corpus.names:
        first = corpus.names[int(np.searchsorted(file.ends, boundary, side="right"))]
        text += f", from {first} to {corpus.names[-1]}" if first != corpus.names[-1] else f", of {first}"
    return text
