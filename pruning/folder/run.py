"""Prune a checkpoint folder: check everything first, and write a complete folder or none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanstep._checkpoint import check_apart, check_output, new_folder
from leanstep._files import remove_partials
from leanstep._version import __version__
from leanstep.pruning.folder.checkpoint import copy_others, write_weights
from leanstep.pruning.folder.loading import (
    Checkpoint,
    checkpoint_values,
    encoding,
    load_model,
    open_checkpoint,
    open_tokenizer,
    position_count,
    stored_parameters,
)
from leanstep.pruning.measure.batches import as_batches
from leanstep.pruning.measure.measure import evaluating
from leanstep.pruning.measure.metrics import check_runs, cross_entropy_sums, summarise
from leanstep.pruning.measure.points import Progress
from leanstep.pruning.prune import check_choices, prune
from leanstep.pruning.result import PruneResult

SIDECAR = "sparsity.json"
REPORT = "report.html"


@dataclass(frozen=True)
class CalibrationText:
    """Text to calibrate a language model with, and how much of it.

    Attributes:
        documents: the texts, in order.
        label: name of the texts in messages and in the report.
        samples: sequences for the scores.
        curve_samples: number of these sequences for the curves.
        held_out: sequences for the comparison with uniform sparsity, and for perplexity; disjoint from the others.
        held_out_documents: texts for the held-out sequences; None: ``documents``.
        seq_len: tokens of a sequence; None: the tokenizer's ``model_max_length``, at most 2048.
        seed: of the random choice of sequences.

    Raises:
        ValueError: for numbers of sequences below 1, or more sequences for the curves than for the scores.
    """

    documents: tuple[str, ...]
    label: str = "text"
    samples: int = 128
    curve_samples: int = 16
    held_out: int = 8
    held_out_documents: tuple[str, ...] | None = None
    seq_len: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.samples, self.curve_samples, self.held_out) < 1 or self.curve_samples > self.samples:
            raise ValueError(
                "expected samples, curve_samples and held_out of at least 1, and curve_samples <= samples; got "
                f"{self.samples}, {self.curve_samples} and {self.held_out}"
            )


def prune_checkpoint(
    source: str | Path,
    out: str | Path,
    data: CalibrationText | Any = None,
    *,
    held_out: Any = None,
    evaluate: bool = False,
    resume: bool = False,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    **settings: Any,
) -> PruneResult:
    """Prune a Hugging Face checkpoint into a new folder of the same files, names and dtypes, with exact zeros.

    ``out`` gets the weights as dense safetensors in the same number of files, copies of tokenizer and configuration,
    ``sparsity.json`` (the result, with sparsity per tensor and the curves), and ``report.html``. It opens in
    transformers, and its logits are those of the pruned model bit for bit.

    Args:
        source: a folder, or the name of a model on the hub.
        out: the folder to create; it must not exist. It appears when all files are written.
        data: a :class:`CalibrationText` for language models, or data as for :func:`prune`.
        held_out: as for :func:`prune`; ignored with a :class:`CalibrationText`, which has its own.
        evaluate: measure perplexity on the held-out sequences before and after.
        resume: continue with the curves of an interrupted run, from ``OUT.curves.jsonl``. If that run had finished
            ``out``, removes them, and raises the error of an ``out`` that exists.
        device: of the model during calibration.
        progress: see :func:`measure_curves`.
        **settings: those of :func:`prune`.

    Raises:
        ValueError: for an incomplete or quantised checkpoint, too little text, contradictory settings, a target out of
            reach, an ``out`` that exists or lies in ``source``, or curves of an interrupted run without ``resume``.
        OSError: if the disk is full. After any error, ``source`` is unchanged and ``out`` does not exist.

    Notes:
        Memory: the model, and the memory of :func:`prune` without its copy of the dense weights, which are read again
        from the files. Weights are memory-mapped until they are pruned. Weights from files of ``torch.save``, and
        those that transformers fuses or renames on loading, such as experts, are copied.
    """
    check_choices(data=data, **settings)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {str(device)!r} is not available: {str(error).splitlines()[0]}") from None
    out = Path(out).expanduser()
    partial = out.with_name(f"{out.name}.curves.jsonl")
    if resume and (out / SIDECAR).is_file():
        # the interrupted run had written its folder and was about to remove these
        partial.unlink(missing_ok=True)
    check_output(out)
    if partial.exists() and not resume:
        raise ValueError(
            f"{partial} holds curves that an interrupted run measured: go on with it (--resume), or remove it to "
            f"begin again"
        )
    checkpoint = open_checkpoint(source)
    check_output(out, checkpoint.size)
    check_apart(out, checkpoint.folder)
    sequences = _sequences(checkpoint, data) if isinstance(data, CalibrationText) else None
    model = load_model(checkpoint, device)
    content: dict[str, Any] = {"leanstep": __version__, "source": str(source)}
    if sequences is not None:
        assert isinstance(data, CalibrationText)
        scores, held_out = sequences
        settings = {"curve_data": scores[: data.curve_samples], **settings}
        content["calibration_text"] = (
            f"{data.label}, {len(scores)} x {scores.shape[1]} tokens, seed {data.seed}; curves {data.curve_samples}"
        )
        data = scores
    perplexity: dict[str, Any] = {}
    if evaluate:
        if held_out is None:
            raise ValueError("perplexity needs held-out sequences: give a text")
        perplexity["before"], perplexity["tokens"] = _perplexity(model, held_out)
    stored = stored_parameters(checkpoint, model)
    result = prune(model, data, held_out=held_out, resume=partial, progress=progress, stored=stored, **settings)
    if evaluate:
        perplexity["after"], _ = _perplexity(model, held_out)
        result.perplexity = perplexity
    from leanstep.pruning.folder.report import report_page

    content |= result.to_dict()
    with new_folder(out) as folder:
        values = checkpoint_values(checkpoint, model)
        changed = write_weights(checkpoint, values, folder)
        copy_others(checkpoint, folder)
        content["tensors"] = _tensor_rows(changed, result)
        (folder / SIDECAR).write_text(json.dumps(content, indent=1), encoding="utf-8")
        (folder / REPORT).write_text(report_page(content), encoding="utf-8")
    partial.unlink(missing_ok=True)
    remove_partials(partial)
    return result


def _tensor_rows(changed: Mapping[str, float], result: PruneResult) -> dict[str, dict[str, Any]]:
    """Sparsity and pattern of each changed tensor, under the keys that ``leanstep verify`` reads."""
    rows: dict[str, dict[str, Any]] = {name: {"sparsity": zeros} for name, zeros in changed.items()}
    for group in result.groups:
        pattern = result.allocation.patterns.get(group.name)
        for target in group.targets:
            if pattern and target.expert is None and target.parameter in rows:
                rows[target.parameter] |= {"pattern": pattern, "dim": int(target.layout != "in_out")}
    return rows


def _sequences(checkpoint: Checkpoint, text: CalibrationText) -> tuple[Tensor, Tensor]:
    """Calibration and held-out sequences, int64 [samples, tokens], by the checkpoint's tokenizer."""
    tokenizer = open_tokenizer(checkpoint.folder)
    positions = position_count(checkpoint.config, checkpoint.folder) or 2048
    length = min(tokenizer.model_max_length, positions, 2048) if text.seq_len is None else text.seq_len
    if not 2 <= length <= positions:
        raise ValueError(f"seq_len must be from 2 to the model's {positions} positions, got {length}")
    vocabulary = checkpoint.config.get("vocab_size")

    def encode(document: str) -> Sequence[int]:
        with encoding(checkpoint.folder):
            return tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]

    def cut(documents: tuple[str, ...], count: int) -> Tensor:
        sequences = token_sequences(
            encode,
            documents,
            count,
            length,
            end=tokenizer.eos_token_id,
            seed=text.seed,
        )
        if isinstance(vocabulary, int) and int(sequences.max()) >= vocabulary:
            raise ValueError(
                f"{checkpoint.folder}: its tokenizer has more tokens than the model, which has {vocabulary}"
            )
        return sequences

    if text.held_out_documents is not None:
        return cut(text.documents, text.samples), cut(text.held_out_documents, text.held_out)
    sequences = cut(text.documents, text.samples + text.held_out)
    return sequences[text.held_out :], sequences[: text.held_out]


def token_sequences(
    encode: Callable[[str], Sequence[int]], texts: Iterable[str], count: int, length: int, *, end: int | None, seed: int
) -> Tensor:
    """Cut ``count`` sequences of ``length`` tokens from text, at random and without overlap.

    Joins documents by the end-of-text token, cuts them into consecutive pieces, and draws ``count`` of these.

    Args:
        encode: a text -> its token numbers, without special tokens.
        texts: the documents.
        count: number of sequences.
        length: tokens per sequence.
        end: the token appended to every document; None appends nothing.
        seed: of the random choice and order of the pieces.

    Returns:
        int64 [count, length].

    Raises:
        ValueError: for too little text; the message gives both numbers of tokens.
    """
    tokens: list[int] = []
    for text in texts:
        tokens += encode(text)
        if end is not None:
            tokens.append(end)
    pieces = len(tokens) // length
    if pieces < count:
        raise ValueError(
            f"the text is too short: {count} sequences of {length} tokens take {count * length:,} tokens, it has "
            f"{len(tokens):,}; give more text, or ask for fewer or shorter sequences"
        )
    drawn = torch.randperm(pieces, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.tensor(tokens[: pieces * length], dtype=torch.int64).view(pieces, length)[drawn]


def _perplexity(model: nn.Module, sequences: Any) -> tuple[float, int]:
    """Perplexity over some sequences, and the number of predicted tokens."""
    with evaluating(model):
        batches = as_batches(sequences, model, batch_size=4)
        check_runs(model, batches[0])
        per_batch = [cross_entropy_sums(batch.run(model), batch) for batch in batches]
    return math.exp(summarise(per_batch).mean), int(sum(float(counts.sum()) for _, counts in per_batch))
