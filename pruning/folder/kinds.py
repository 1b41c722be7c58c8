"""Embedding models and classifiers of folders: how they pool, and how good they are, by labels or beside another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from leanstep._checkpoint.files import checked_file, read_json
from leanstep._files import gguf_file, one_line, parse_json
from leanstep.pruning.config import Progress
from leanstep.pruning.folder.loading import open_config
from leanstep.pruning.measure.batches import Batch, as_batches, evaluating
from leanstep.pruning.measure.metrics import (
    CLASSIFIER,
    EMBEDDING,
    POOLINGS,
    Cosine,
    Metric,
    check_runs,
    kind_of,
    kl_divergence,
    logits_of,
    summarise,
)
from leanstep.pruning.result import finite_values
from leanstep.sparsity.inference.load import named_class

# of fewer texts, each has the same neighbour in any model, or none
_FEWEST_NEIGHBOURS = 3


class Outputs(NamedTuple):
    """What a model gives for samples: embeddings or logits, fp32 [samples, width], and labels, int64 [samples]."""

    rows: Tensor
    labels: Tensor | None


@dataclass(frozen=True)
class Kind:
    """A kind of models: measures of each sample, from its outputs alone and labels, or beside those of another model.

    Attributes:
        labelled: (rows, labels) -> name of a measure -> [samples]; None: it has no labels.
        compared: (rows, the dense model's) -> the same.
    """

    labelled: Callable[[Tensor, Tensor], Mapping[str, Tensor]] | None
    compared: Callable[[Tensor, Tensor], Mapping[str, Tensor]]


def _by_labels(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {
        "cross-entropy": cross_entropy(logits, labels, reduction="none"),
        "accuracy": (logits.argmax(-1) == labels).float(),
    }


def _by_classes(logits: Tensor, dense: Tensor) -> dict[str, Tensor]:
    return {
        "KL": kl_divergence(dense.log_softmax(-1), logits.log_softmax(-1)),
        "same class": (logits.argmax(-1) == dense.argmax(-1)).float(),
    }


def _by_embeddings(rows: Tensor, dense: Tensor) -> dict[str, Tensor]:
    distances = {"1 - cosine": (rows - dense).square().sum(-1) / 2}
    if len(rows) < _FEWEST_NEIGHBOURS:
        return distances
    return distances | {"same neighbour": (_neighbours(rows) == _neighbours(dense)).float()}


def _neighbours(rows: Tensor) -> Tensor:
    """The index of the nearest other row of each."""
    return (rows @ rows.T).fill_diagonal_(-math.inf).argmax(-1)


KINDS = {EMBEDDING: Kind(None, _by_embeddings), CLASSIFIER: Kind(_by_labels, _by_classes)}


class Judge:
    """Judges the embedding model or the classifier of a folder. See :func:`judge_of`.

    Attributes:
        model_class: of transformers.
        cosine: the metric of embeddings, pooled as the folder says.
    """

    def __init__(self, name: str, model_class: type, pooling: str = "mean") -> None:
        self.name, self.model_class = name, model_class
        self.kind, self.cosine = KINDS[name], Cosine(pooling)

    def metric(self, asked: str | Metric | None) -> str | Metric | None:
        """The metric of pruning: the folder's own pooling where 1 - cosine is measured."""
        return self.cosine if asked == Cosine.name or (asked is None and self.name == EMBEDDING) else asked

    def outputs(self, model: nn.Module, data: Any, progress: Progress | None = None) -> Outputs:
        """What a model gives for data, as of :func:`leanstep.pruning.measure.batches.as_batches`.

        ``progress`` is called with (batches done, batches in all, "evaluation").
        """
        rows, labels = list[Tensor](), list[Tensor]()
        with evaluating(model):
            batches = as_batches(data, model)
            check_runs(model, batches[0])
            for number, batch in enumerate(batches):
                if progress is not None:
                    progress(number, len(batches), "evaluation")
                rows.append(self._rows(batch.run(model), batch).cpu())
                labels += [] if batch.labels is None else [batch.labels.cpu()]
        outputs = Outputs(torch.cat(rows), torch.cat(labels) if labels and self.kind.labelled is not None else None)
        if outputs.labels is not None and not 0 <= int(outputs.labels.min()) <= int(outputs.labels.max()) < (
            classes := outputs.rows.shape[1]
        ):
            raise ValueError(
                f"the labels go from {int(outputs.labels.min())} to {int(outputs.labels.max())}: expected "
                f"classes from 0 to {classes - 1}"
            )
        return outputs

    def _rows(self, output: Any, batch: Batch) -> Tensor:
        return self.cosine.embeddings(output, batch) if self.name == EMBEDDING else logits_of(output).float()

    def measures(self, outputs: Outputs, dense: Outputs | None = None) -> dict[str, Any]:
        """Mean and standard error of each measure, in plain values; by labels where there are some.

        Raises:
            ValueError: for outputs of another shape than the dense model's.
        """
        if dense is not None and dense.rows.shape != outputs.rows.shape:
            raise ValueError(
                f"the model has outputs {(*outputs.rows.shape,)}, and those of the dense model are "
                f"{(*dense.rows.shape,)}: expected the model that it was made of"
            )
        values = dict[str, Tensor]()
        if outputs.labels is not None and self.kind.labelled is not None:
            values |= self.kind.labelled(outputs.rows, outputs.labels)
        if dense is not None:
            values |= self.kind.compared(outputs.rows, dense.rows)
        means = {name: summarise([(value.double(), torch.ones(len(value)))]) for name, value in values.items()}
        return {name: finite_values(one._asdict()) for name, one in means.items()}


def judge_of(folder: Path) -> Judge | None:
    """The judge of a folder's model; None for models that are neither embedding models nor classifiers.

    Raises:
        ValueError: for a ``modules.json`` with another pooling than those of :data:`POOLINGS`.
    """
    if gguf_file(folder) is not None:  # opened as a language model
        return None
    config = open_config(folder)
    model_class = named_class(getattr(config, "architectures", None))
    if not (name := kind_of(model_class, config)):
        return None
    return Judge(name, model_class, pooling_of(folder)) if name == EMBEDDING else Judge(name, model_class)


def pooling_of(folder: Path) -> str:
    """The pooling that the ``modules.json`` of sentence-transformers names; "mean" without one."""
    if not (folder / "modules.json").is_file():
        return "mean"
    modules = parse_json(checked_file(folder / "modules.json").read_text("utf-8"))
    rows = [row for row in modules if isinstance(row, dict)] if isinstance(modules, list) else []
    paths = [str(row.get("path")) for row in rows if str(row.get("type", "")).endswith("Pooling")]
    if not paths:
        return "mean"
    if Path(paths[0]).name != paths[0]:  # nothing outside of the folder is read
        raise ValueError(f"{folder}: modules.json names the folder {one_line(paths[0])}, expected one inside")
    config = read_json(folder / paths[0] / "config.json")
    # the second is the form of older versions
    modes = config.get("pooling_mode", [k.removeprefix("pooling_mode_") for k, on in config.items() if on is True])
    names = [{"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max"}.get(mode, mode) for mode in
             ([modes] if isinstance(modes, str) else modes) if mode != "include_prompt"]  # fmt: skip
    if len(names) != 1 or names[0] not in POOLINGS:
        raise ValueError(
            f"{folder}: its sentence embeddings are pooled by {one_line(' and '.join(map(str, names))) or 'nothing'}; "
            f"expected one of {', '.join(POOLINGS)}"
        )
    return str(names[0])
