"""Metrics: distortion of a model's output per sample, between the dense model and the pruned one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.checkpoint import checkpoint

from leanstep._files import one_line
from leanstep._torch import output_head
from leanstep.pruning.measure.batches import Batch, batches_hash

__all__ = ["Distortion", "Metric", "kl_divergence", "make_metric", "metric_name", "summarise"]


class Distortion(NamedTuple):
    """A mean and its standard error."""

    mean: float
    stderr: float

    @property
    def is_finite(self) -> bool:
        """Whether mean and error are finite; the error of a single sample is not known."""
        return math.isfinite(self.mean) and not math.isinf(self.stderr)


class Metric:
    """A distortion D = sum over samples of ``sums`` / sum over samples of ``counts``.

    :meth:`reference` reduces the dense model's output to the values that :meth:`compare` needs. :meth:`compare` returns
    ``sums`` and ``counts`` per sample of the batch, in fp64. Equal outputs give exactly 0.
    """

    name = ""

    @property
    def identity(self) -> str:
        """The name with those settings that are not the defaults, such as ``kl_topk(k=2)``.

        Distortions of different identities are never mixed. The settings are the parameters of ``__init__``, read from
        the attributes of the same names. Override it for a metric that stores them otherwise.
        """
        settings = [
            f"{name}={_plain(getattr(self, name))}"
            for name, parameter in inspect.signature(type(self).__init__).parameters.items()
            if hasattr(self, name) and _plain(getattr(self, name)) != _plain(parameter.default)
        ]
        return f"{self.name}({', '.join(settings)})" if settings else self.name

    def reference(self, output: Any, batch: Batch) -> Any:
        """The values of the dense output that :meth:`compare` needs."""
        raise NotImplementedError

    def compare(self, reference: Any, output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """``sums`` and ``counts``, fp64 [batch], on the CPU."""
        raise NotImplementedError

    def root(self, output: Any, batch: Batch) -> list[Tensor]:
        """A square root of the distortion near an output: u [tokens, k] of each sample, with a gradient.

        For a small change of the output, the distortion is ``|change of u|^2 / 2``, a mean over tokens.

        Raises:
            ValueError: for a metric that defines none.
        """
        raise ValueError(
            f"the metric {self.name!r} defines no root, the form of second order that Fisher curves need; use "
            "curves='measured', or define Metric.root"
        )

    def root_shape(self, output: Any, batch: Batch) -> tuple[int, int]:
        """Tokens and k of :meth:`root` for the first sample."""
        tokens, k = self.root(output, batch)[0].shape
        return tokens, k

    def projected_root(self, output: Any, batch: Batch, directions: Callable[[tuple[int, int]], Tensor]) -> Tensor:
        """Sum over :meth:`root` of the first sample times directions, for a backward pass.

        Args:
            directions: from the shape of the root to signs, int8.
        """
        root = self.root(output, batch)[0]
        return (root * directions((root.shape[0], root.shape[1])).to(root)).sum()

    @property
    def has_root(self) -> bool:
        """Whether :meth:`root` is defined."""
        return type(self).root is not Metric.root

    def prepare(self, model: nn.Module) -> None:
        """Set up the metric for a model; called before the first measurement, and perhaps again later."""


def _plain(value: Any) -> str:
    """Text of a setting; of a tensor its hash, of other objects the class, whose text may hold an address."""
    if isinstance(value, Tensor):
        return batches_hash([Batch((value,))])[:12]
    if isinstance(value, (str, int, float, tuple, list, dict)) or value is None:
        return repr(value)
    return type(value).__name__


class _TokenMetric(Metric):
    """Mean over unmasked tokens of a value per token. A classifier's output counts as one token per sample."""

    def reference(self, output: Any, batch: Batch) -> list[Any]:
        return [self._reference_of(rows) for rows in token_rows(values_of(output), batch)]

    def compare(self, reference: list[Any], output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        # sample by sample: a copy of the logits of a whole batch in fp32 would be the peak of memory
        pairs = zip(reference, token_rows(values_of(output), batch), strict=True)
        values = [self._values(dense, rows).double() for dense, rows in pairs]
        sums = torch.stack([value.sum() for value in values]).cpu()
        return sums, torch.tensor([float(len(value)) for value in values], dtype=torch.float64)

    def root(self, output: Any, batch: Batch) -> list[Tensor]:
        """See :meth:`Metric.root`; in fp32, or fp64 for logits in fp64."""
        return [self._root(_wide(logits)) for logits in token_rows(values_of(output), batch)]

    def root_shape(self, output: Any, batch: Batch) -> tuple[int, int]:
        """See :meth:`Metric.root_shape`; computes the root of one token."""
        rows = token_rows(values_of(output), batch)[0]
        with torch.no_grad():
            return len(rows), self._root(_wide(rows[:1])).shape[-1]

    def projected_root(self, output: Any, batch: Batch, directions: Callable[[tuple[int, int]], Tensor]) -> Tensor:
        """See :meth:`Metric.projected_root`. The roots of some tokens at a time are in memory, in both passes."""

        def part(rows: Tensor, signs: Tensor) -> Tensor:
            root = self._root(_wide(rows))
            return (root * signs.to(root)).sum()

        rows = token_rows(values_of(output), batch)[0]
        signs = directions(self.root_shape(output, batch))
        together = max(1, ROOTS_TOGETHER // max(1, rows.shape[-1]))
        parts = zip(rows.split(together), signs.split(together), strict=True)
        return torch.stack([checkpoint(part, *both, use_reentrant=False) for both in parts]).sum()

    def _reference_of(self, rows: Tensor) -> Any:
        raise NotImplementedError

    def _values(self, dense: Any, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def _root(self, rows: Tensor) -> Tensor:
        raise NotImplementedError


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# logits whose roots are computed together for a backward pass, about 30 bytes for each
ROOTS_TOGETHER = 1 << 21
# most probable entries that kl_topk compares
TOP_LOGITS = 512
# below this |d|, expm1(d) - d is evaluated by its series: the subtraction would lose the leading digits of d^2 / 2
_SERIES = 1 / 16
# logits per call of kl_divergence. Without gradients on a CPU, its temporaries stay in a core's cache; elsewhere a call
# starts kernels, or is computed again
_TOGETHER_IN_CACHE, LOGITS_TOGETHER = 1 << 17, 1 << 19
# a larger log(q / p) is left to the form for all values: p would underflow where q does not
_MOST_RATIO = 40.0


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p || q) = sum_v p_v (expm1(d_v) - d_v)`` over the last dimension, with ``d = log q - log p``.

    For normalized p and q this equals ``-sum_v p_v d_v``. Every term is at least 0, and a rounding error e of d changes
    a term by about ``p d e``, not by ``p e``: nearby distributions keep their digits, and no sum is negative.

    Args:
        log_p, log_q: log-probabilities [..., V], floating; -inf is allowed.

    Returns:
        [...], of their dtype; inf where q is 0 and p is not.
    """
    # on a GPU, the condition below would wait for it
    if log_p.device.type == "cpu" and log_p.numel() and not torch.is_grad_enabled():
        d = log_q - log_p
        least, most = d.aminmax()
        if least > -torch.inf and most < _MOST_RATIO:
            # the errors of the logarithms, |log p| 2^-24 and more, outweigh what this subtraction loses
            return d.expm1().sub_(d).clamp_(min=0.0).mul_(log_p.exp()).sum(-1)
    p, q = log_p.exp(), log_q.exp()
    # where p is 0, d is not needed: -inf less -inf would make the gradient NaN
    d = (log_q - log_p).masked_fill(p == 0, 0.0)
    series = p * d.square() * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d / 120)))
    terms = torch.where(d.abs() < _SERIES, series, (q - p) - p * d)
    return torch.where(p == 0, q, terms).sum(-1)


def _fisher_root(log_p: Tensor) -> Tensor:
    """u = ``sqrt(p) log p`` with the first factor constant: its Jacobian J gives J^T J = diag(p) - p p^T."""
    # finite where p is 0: 0 times -inf is NaN
    return log_p.detach().exp().sqrt() * log_p.clamp(min=torch.finfo(log_p.dtype).min)


def _recomputed(values: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """Values that a backward pass computes again: their temporaries would take several times the logits."""
    return checkpoint(values, *given, use_reentrant=False) if torch.is_grad_enabled() else values(*given)


def _kl_from(log_p: Tensor, logits: Tensor) -> Tensor:
    return kl_divergence(log_p, logits.float().log_softmax(-1))


class KL(_TokenMetric):
    """Mean over tokens of KL(softmax(z) || softmax(z~)) in fp32. Keeps the log-probabilities, 4 bytes each."""

    name = "kl"

    def _reference_of(self, rows: Tensor) -> Tensor:
        return rows.float().log_softmax(-1)

    def _values(self, dense: Tensor, rows: Tensor) -> Tensor:
        in_cache = rows.device.type == "cpu" and not torch.is_grad_enabled()
        together = max(1, (_TOGETHER_IN_CACHE if in_cache else LOGITS_TOGETHER) // rows.shape[-1])
        pairs = zip(dense.split(together), rows.split(together), strict=True)
        return torch.cat([_recomputed(_kl_from, log_p, logits) for log_p, logits in pairs])

    def _root(self, rows: Tensor) -> Tensor:
        return _fisher_root(rows.log_softmax(-1))


class KLTopK(_TokenMetric):
    """KL over the k most probable entries of the dense model and one entry for all others. Keeps 2k + 1 numbers."""

    name = "kl_topk"

    def __init__(self, k: int = TOP_LOGITS) -> None:
        self.k = k

    def _reference_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        log_probabilities = rows.float().log_softmax(-1)
        top_indices = log_probabilities.topk(min(self.k, rows.shape[-1]), dim=-1).indices
        return top_indices, _bucketed(log_probabilities, top_indices)

    def _values(self, dense: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
        top_indices, log_p = dense

        def values(logits: Tensor) -> Tensor:
            return kl_divergence(log_p, _bucketed(logits.float().log_softmax(-1), top_indices))

        return _recomputed(values, rows)

    def _root(self, rows: Tensor) -> Tensor:
        log_p = rows.log_softmax(-1)
        if self.k >= rows.shape[-1]:  # the bucket of the others would be empty
            return _fisher_root(log_p)
        return _fisher_root(_bucketed(log_p, log_p.detach().topk(self.k, dim=-1).indices))


def _bucketed(log_probabilities: Tensor, top_indices: Tensor) -> Tensor:
    """Log-probabilities at ``top_indices``, and of all other entries together (-inf if there are none)."""
    top = log_probabilities.gather(-1, top_indices)
    # summed over the others themselves: 1 - sum(top) would leave rounding errors of the top entries
    others = log_probabilities.scatter(-1, top_indices, -torch.inf)
    # the gradient of a sum over -inf alone would be NaN
    none = others.amax(-1, keepdim=True) == -torch.inf
    rest = others.masked_fill(none, 0.0).logsumexp(-1, keepdim=True).masked_fill(none, -torch.inf)
    return torch.cat([top, rest], dim=-1)


class MSELogits(_TokenMetric):
    """Mean over tokens and logits of (z - z~)^2, the distortion of Xu et al.

    A language model's logits are centred first, because softmax ignores a number added to all logits of a token.
    """

    name = "mse_logits"

    def __init__(self) -> None:
        self.centred = False

    def prepare(self, model: nn.Module) -> None:
        self.centred = output_head(model) is not None

    def _reference_of(self, rows: Tensor) -> Tensor:
        rows = rows.float()
        return rows - rows.mean(-1, keepdim=True) if self.centred else rows

    def _values(self, dense: Tensor, rows: Tensor) -> Tensor:
        return _recomputed(lambda logits: (dense - self._reference_of(logits)).square().mean(-1), rows)

    def _root(self, rows: Tensor) -> Tensor:
        centred = rows - rows.mean(-1, keepdim=True) if self.centred else rows
        return centred * math.sqrt(2 / rows.shape[-1])


class Cosine(Metric):
    """1 - cosine of the pooled outputs e = pool(h), e~ of a sample: ``|e / |e| - e~ / |e~||^2 / 2``, in fp32.

    Args:
        pooling: of the last hidden states of the unmasked tokens: one of :data:`POOLINGS`. Outputs [batch, width] are
            taken as they are.
    """

    name = "cosine"

    def __init__(self, pooling: str = "mean") -> None:
        self.pooling = pooling

    def embeddings(self, output: Any, batch: Batch) -> Tensor:
        """The embeddings, of length 1, [batch, width]."""
        pool = POOLINGS[self.pooling]
        return torch.stack([normalize(pool(_wide(rows)), dim=-1) for rows in token_rows(values_of(output), batch)])

    def reference(self, output: Any, batch: Batch) -> Tensor:
        """See :meth:`Metric.reference`."""
        return self.embeddings(output, batch)

    def compare(self, reference: Tensor, output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """See :meth:`Metric.compare`."""
        # the square of the difference keeps the digits of a cosine near 1
        distances = (self.embeddings(output, batch) - reference).double().square().sum(-1) / 2
        return distances.cpu(), torch.ones(len(distances), dtype=torch.float64)

    def root(self, output: Any, batch: Batch) -> list[Tensor]:
        """See :meth:`Metric.root`; the embedding itself, as one token."""
        return [row[None] for row in self.embeddings(output, batch)]


#: how an embedding [width] is made from the hidden states [tokens, width]
POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda rows: rows.mean(0),
    "cls": lambda rows: rows[0],
    "max": lambda rows: rows.amax(0),
    "lasttoken": lambda rows: rows[-1],
}
METRICS: dict[str, Callable[[], Metric]] = {"kl": KL, "kl_topk": KLTopK, "mse_logits": MSELogits, "cosine": Cosine}
EMBEDDING, CLASSIFIER = "embedding model", "classifier"
#: kinds of models that predict no next token -> the metric of their outputs
KIND_METRICS = {EMBEDDING: "cosine", CLASSIFIER: "kl"}
_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")


def kind_of(model_class: type | None, config: Any) -> str:
    """What a class of transformers computes: :data:`EMBEDDING`, :data:`CLASSIFIER`, or "" for all others.

    An embedding model reads text and has no head. A classifier gives logits of two classes or more, one of which is
    right: regression and several right classes are others.
    """
    name = "" if model_class is None else model_class.__name__
    if name.endswith(_CLASSIFIERS):
        is_other = getattr(config, "problem_type", None) in ("regression", "multi_label_classification")
        return CLASSIFIER if config.num_labels > 1 and not is_other else ""
    reads_text = getattr(model_class, "main_input_name", "") == "input_ids"
    if "For" in name or not reads_text or getattr(config, "is_encoder_decoder", False):
        return ""
    outputs = [{field.name for field in fields(one)} for one in _declared_outputs(model_class)]
    is_embedding = any("last_hidden_state" in names and "logits" not in names for names in outputs)
    return EMBEDDING if is_embedding else ""


def make_metric(metric: str | Metric | None, model: nn.Module) -> Metric:
    """Make and prepare the metric of a name; None: the default of :func:`metric_name`.

    Raises:
        ValueError: for an unknown name.
    """
    if metric is None or isinstance(metric, str):
        name = metric_name(metric, model)
        if name not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {name!r}")
        metric = METRICS[name]()
    metric.prepare(model)
    return metric


def metric_name(metric: str | Metric | None, model: nn.Module) -> str:
    """Identity of a metric.

    The default is ``kl`` for language models and classifiers, ``cosine`` for embedding models, ``mse_logits`` for
    others.
    """
    if metric is None:
        kind = kind_of(type(model), model.config) if hasattr(model, "main_input_name") else ""
        if kind:
            return KIND_METRICS[kind]
        return "kl" if output_head(model) is not None else "mse_logits"
    return metric if isinstance(metric, str) else metric.identity


def summarise(per_batch: Iterable[tuple[Tensor, Tensor]]) -> Distortion:
    """Mean and standard error over samples of a ratio of sums; the error is NaN for a single sample."""
    pairs = list(per_batch)
    sums = torch.cat([pair[0] for pair in pairs])
    counts = torch.cat([pair[1] for pair in pairs])
    total, samples = float(counts.sum()), len(sums)
    if total == 0:
        raise ValueError("the data has no token that counts")
    mean = float(sums.sum()) / total
    if samples < 2:
        return Distortion(mean, math.nan)
    spread = float((sums - mean * counts).square().sum())
    return Distortion(mean, math.sqrt(samples / (samples - 1) * spread) / total)


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(
        f"expected a model that gives logits (a tensor, or an output with .logits), got {type(output).__name__}"
    )


def may_give_logits(model: nn.Module) -> bool:
    """Whether a model gives logits, by the types of outputs that its forward declares; True where these do not tell."""
    outputs = _declared_outputs(type(model))
    if "For" in (name := type(model).__name__):  # with a head; some declare the output of the model below it
        of_heads = "transformers.modeling_outputs"
        outputs = [
            one
            for one in outputs
            if one.__name__ == f"{name}Output" or (one.__module__ == of_heads and "ModelOutput" not in one.__name__)
        ]
    return not outputs or any("logits" in (field.name for field in fields(one)) for one in outputs)


def _declared_outputs(model_class: Any) -> list[Any]:
    """The types of outputs that a model's forward declares; none where these do not tell."""
    try:
        declared = get_type_hints(model_class.forward).get("return")
    except (NameError, TypeError, AttributeError):  # a name that is known to type checkers alone
        return []
    return [one for one in get_args(declared) or (declared,) if isinstance(one, type) and is_dataclass(one)]


def values_of(output: Any) -> Tensor:
    """The logits in a model's output; the last hidden states of a model without a head."""
    hidden = getattr(output, "last_hidden_state", None)
    if isinstance(hidden, Tensor) and getattr(output, "logits", None) is None:
        return hidden
    return logits_of(output)


def check_runs(model: nn.Module, batch: Batch) -> None:
    """Run one sample; raise ValueError if the model cannot run on it, or gives nothing that can be compared."""
    sample = batch.sample(0)
    try:
        with torch.no_grad():
            values_of(sample.run(model))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model's: of any type
        given = ", ".join(sample.kwargs) or "one tensor"
        inputs = ", ".join(inspect.signature(model.forward).parameters)
        raise ValueError(
            f"{type(model).__name__} could not be measured on the data ({given}): {one_line(error)}. Expected a "
            f"language model, a classifier or a model without a head, and all inputs that it needs, of: {inputs}"
        ) from error


def token_rows(values: Tensor, batch: Batch) -> list[Tensor]:
    """[tokens, width] of each sample, without masked tokens; of values [batch, width], one row per sample."""
    if values.dim() == 2:
        return [row[None] for row in values]
    rows = [sample.flatten(0, -2) for sample in values]
    return rows if batch.mask is None else [row[mask] for row, mask in zip(rows, batch.mask, strict=True)]


def cross_entropy_sums(output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """(sums, counts) of a language model's loss per sample, fp64: each token is predicted from those before it."""
    logits, labels = values_of(output), batch.labels
    if labels is None or logits.dim() != 3:
        raise ValueError("perplexity needs a model that predicts the next token, and batches with labels")
    if batch.mask is not None:
        labels = labels.masked_fill(~batch.mask, -100)
    targets = labels[:, 1:]
    losses = [
        cross_entropy(row[:-1].float(), target, ignore_index=-100, reduction="sum")
        for row, target in zip(logits, targets, strict=True)
    ]
    return torch.stack(losses).double().cpu(), (targets != -100).sum(-1).double().cpu()
