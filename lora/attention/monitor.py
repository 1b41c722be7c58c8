"""Measures, for each head of a model, whether low-rank attention would be close enough and cheaper, and why not."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leanstep.kernels._modes import outside_dispatch_modes
from leanstep.kernels.poly.tables import MAX_FEATURES, feature_count
from leanstep.lora.attention.cost import AttentionShape, break_even, cost_ratio
from leanstep.lora.attention.gate_checks import NON_FINITE
from leanstep.lora.attention.interface import AttentionInputs, Call, attach, detach
from leanstep.lora.attention.norms import HeadNorms, ProjectionNorms, head_norms
from leanstep.lora.attention.polynomials import needed_degree

__all__ = ["STATUSES", "HeadReport", "NormMonitor", "judge"]

# from the best to the worst
STATUSES = ("certified-fast", "measured-fast", "bounded-but-slow", "not-certified")

_ADVICE = {
    "X": "the layer's input has large entries: normalise it (pre-norm), or train without outliers",
    "W*": "the frozen weights make them: normalise queries and keys (QK-norm), or clip the weights",
    "sBA": "the adapter makes them: a smaller alpha / r, or weight decay on its factors",
    "unknown": "normalise queries and keys (QK-norm)",
}
_LOG_NAMES = {
    "rho": "norm over threshold",
    "certified": "certified logit",
    "sampled": "sampled logit",
    "error": "low-rank error",
}


@dataclass(frozen=True)
class HeadReport:
    """The last measurement of one head.

    Attributes:
        layer, head, length: the layer's name, the head's index, and the number of tokens.
        gamma_q, gamma_k: the theorem's norms, largest entries of ``sqrt(scale) Q`` and ``sqrt(scale) K``.
        gamma_full: the norm that the theorem needs in addition where K is adapted too, the largest entry of
            ``scale X W_Q W_K``, on sampled queries and before rotary embeddings; None where the weights are unreadable.
        threshold: ``sqrt(ln length)``, which the theorem compares the norms with, up to constants that it leaves open.
        rho: the larger norm over the threshold. Above 1 is evidence for large norms, not proof.
        certified, certified_raw: upper bounds of all logits, with and without centred keys; sampled, sampled_raw: the
            largest of the sampled logits.
        certified_degree, degree: the even degrees that keep softmax weights within the tolerance for logits up to
            ``certified`` and ``sampled``; None beyond 64.
        error: relative error of the output on the sampled queries, at ``degree`` or at the highest degree tried.
        cost: predicted cost of low-rank over exact attention at that degree, forward and backward; pays_from: the
            length from which it is below 1.
        input, base, adapter: largest entries of X, and of ``sqrt(scale)`` times X W* and s X A^T B^T, with DoRA both
            times magnitude / norm, for whichever of q and k is larger; None where the projections are unknown.
        dominant: "X", "W*" or "sBA", the largest of ``|X|``, ``|X W*| / |X|`` and ``|s X A^T B^T| / |X|``; of: whether
            it is of "q" or "k".
        drift: gamma over its value when this head was first measured.
        status, why: one of :data:`STATUSES`, and the reason in words.
    """

    layer: str
    head: int
    length: int
    gamma_q: float
    gamma_k: float
    gamma_full: float | None
    threshold: float
    rho: float
    certified: float
    certified_raw: float
    sampled: float
    sampled_raw: float
    certified_degree: int | None
    degree: int | None
    error: float
    cost: float
    pays_from: int
    input: float | None
    base: float | None
    adapter: float | None
    dominant: str
    of: str
    drift: float
    status: str
    why: str


class NormMonitor:
    """Measures the theorem's norms in every layer and head, and whether low-rank attention is close enough and cheaper.

    The theorem (Hu et al., 2024, after Alman and Song): attention and the gradients of its adapters take nearly linear
    time if entries of Q and K are ``o(sqrt(log L))``; if they may be larger, no truly subquadratic algorithm exists. It
    is asymptotic, has no constants, and is about unmasked attention. At a finite length, this is measurable: the
    largest logit S gives the degree that a polynomial needs, the degree gives the cost, and a sample of queries gives
    the error. A head is

    * ``certified-fast`` if the bound ``S <= scale * max |q| * max |k|`` gives a degree that keeps its weights within
      the tolerance, at a predicted cost below exact attention's;
    * ``measured-fast`` if the sampled logits give such a degree, and the sampled output is within the tolerance too;
    * ``bounded-but-slow`` if the error is within the tolerance and the cost is not below exact attention's;
    * ``not-certified`` if it needs a degree above ``max_degree``, or the sampled error is above the tolerance.

    Args:
        model: a transformers model (LLaMA, GPT-2 and others that call attention by name), with or without adapters of
            leanstep or PEFT. Until :meth:`close`, its attention implementation is called through a name of leanstep's.
        every: measure every so many forward passes in training; None: only the passes after :meth:`arm`.
        tolerance: of the relative error of softmax weights, and of the output on the sampled queries.
        max_degree: the highest degree considered, even.
        rows: number of sampled queries per sequence; sequences: number of sequences of a batch that are measured.
        speed: seconds per operation relative to exact attention, as
            :func:`leanstep.lora.attention.cost.measure_speed` measures it; 1 compares operations.
        seed: of the sample.

    Raises:
        ValueError: for a model without such layers, or a setting out of range; the model is unchanged.

    Notes:
        A measured pass costs, in every layer, one pass over q and k and ``rows`` queries against all keys: linear in
        the length. Other passes cost nothing. A pass that is recomputed for activation checkpointing is not measured
        again.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from leanstep.lora import NormMonitor
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2))
        >>> with NormMonitor(model) as monitor:
        ...     monitor.arm()
        ...     _ = model(torch.randint(64, (1, 40)))
        >>> [row.status for row in monitor.report()]
        ['bounded-but-slow', 'bounded-but-slow']
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int | None = None,
        tolerance: float = 0.05,
        max_degree: int = 4,
        rows: int = 256,
        sequences: int = 2,
        speed: float = 1.0,
        seed: int = 0,
    ) -> None:
        if every is not None and every < 1:
            raise ValueError(f"NormMonitor: expected every >= 1 or None, got {every}")
        if not tolerance > 0 or not speed > 0:
            raise ValueError(f"NormMonitor: expected tolerance > 0 and speed > 0, got {tolerance} and {speed}")
        if max_degree < 2 or max_degree % 2 or rows < 1 or sequences < 1:
            raise ValueError(
                "NormMonitor: expected an even max_degree >= 2, rows >= 1 and sequences >= 1, got "
                f"{max_degree}, {rows} and {sequences}"
            )
        self.model, self.every, self.tolerance, self.max_degree = model, every, tolerance, max_degree
        self.rows, self.sequences, self.speed = rows, sequences, speed
        self.generator = torch.Generator().manual_seed(seed)
        self.passes, self._armed, self._active = 0, False, False
        self.skipped: dict[str, str] = {}
        self._reports: dict[str, list[HeadReport]] = {}
        self._first: dict[str, Tensor] = {}
        self._taps = attach(model)
        self._projections = {layer: ProjectionNorms(layer) for layer in self._taps}
        for tap in self._taps.values():
            tap.observers.append(self)
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def __enter__(self) -> NormMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove all hooks and restore the model's attention implementation. Reports stay."""
        for handle in self._handles:
            handle.remove()
        for layer, tap in self._taps.items():
            self._projections[layer].remove()
            if self in tap.observers:
                tap.observers.remove(self)
        if self._taps:
            detach(self.model)
        self._handles, self._taps, self._projections = [], {}, {}

    def arm(self) -> None:
        """Measure the next forward pass, in training or not."""
        self._armed = True

    def report(self) -> list[HeadReport]:
        """The last measurement of every head, in the order of the layers; empty before the first.

        Layers that could not be measured are in ``skipped``, with the reason; there is a warning if all are.
        """
        return [row for rows in self._reports.values() for row in rows]

    def rows_of_report(self) -> list[dict[str, Any]]:
        """The report as plain dicts, for JSON."""
        return [asdict(row) for row in self.report()]

    def diagnostics(self) -> dict[str, float]:
        """Numbers for a log: ``NAME/layer`` of the worst head of each layer, and counts ``heads/STATUS``; or empty."""
        numbers = {
            f"{log_name}/{layer}": max(float(getattr(row, key)) for row in rows)
            for key, log_name in _LOG_NAMES.items()
            for layer, rows in self._reports.items()
        }
        counts = Counter(row.status for row in self.report())
        return numbers | {f"heads/{status}": float(counts[status]) for status in STATUSES if counts}

    # --- one pass -----------------------------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self.passes += module.training
        due = self.every is not None and module.training and (self.passes - 1) % self.every == 0
        self._active, self._armed = self._armed or due, False
        for norms in self._projections.values():
            norms.on, norms.largest, norms.full = self._active, {}, None

    def _end(self, *_: Any) -> None:
        if self._active and self.skipped and not self._reports:
            reasons = "; ".join(dict.fromkeys(self.skipped.values()))
            warnings.warn(
                f"NormMonitor: no attention layer of {type(self.model).__name__} could be measured, which have: "
                f"{reasons}",
                stacklevel=2,
            )
        self._active = False
        for norms in self._projections.values():
            norms.on = False

    def see(self, call: Call) -> None:
        """Measure one layer, if this pass is to be measured; called by the layer's attention."""
        if not self._active:
            return
        name = self._taps[call.layer].name
        if call.unsupported_mask or call.special or call.inputs.query.shape[2] < 2:
            self.skipped[name] = call.unsupported_mask or ", ".join(call.special) or "a single query"
            return
        self.skipped.pop(name, None)
        inputs = call.inputs.sequences(slice(self.sequences))
        degrees = range(2, self.max_degree + 1, 2)
        norms = outside_dispatch_modes(
            lambda: head_norms(inputs, degrees=degrees, rows=self.rows, generator=self.generator)
        )
        first = self._first.setdefault(name, torch.maximum(norms.gamma_q, norms.gamma_k).cpu())
        self._reports[name] = list(self._judge(name, inputs, norms, first, self._projections[call.layer]))

    def _judge(
        self, name: str, inputs: AttentionInputs, norms: HeadNorms, first: Tensor, projections: ProjectionNorms
    ) -> Iterable[HeadReport]:
        values = HeadNorms(*(x.double().cpu() for x in norms))
        (_, heads, length, dim), key_heads = inputs.query.shape, inputs.key.shape[1]
        shape = AttentionShape(heads, key_heads, length, dim, inputs.value.shape[-1], inputs.causal)
        degrees = _allowed_degrees(self.max_degree, dim)
        costs = {degree: cost_ratio(shape, degree, speed=self.speed) for degree in degrees}
        pays_from = {degree: break_even(shape, degree, speed=self.speed) for degree in degrees}
        threshold = math.sqrt(math.log(length))
        for head in range(heads):
            q, k, certified, certified_raw, sampled, sampled_raw = (float(x[head]) for x in values[:6])
            # logits without a finite bound have no degree, even if the sampled ones are finite
            needed = [
                needed_degree(s, self.tolerance) if math.isfinite(certified) and math.isfinite(s) else None
                for s in (certified, sampled)
            ]
            tried = needed[1] if needed[1] in costs else max(costs)
            error = float(values.errors[tried // 2 - 1, head])
            status, degree = judge(needed[0], needed[1], error, costs, self.tolerance)
            gamma, of = max((q, "q"), (k, "k"))
            x, base, adapter, dominant = _largest_factors(
                projections.largest.get(of), head if of == "q" else head * key_heads // heads, abs(inputs.scale) ** 0.5
            )
            yield HeadReport(
                layer=name, head=head, length=length, gamma_q=q, gamma_k=k,
                gamma_full=None if projections.full is None else abs(inputs.scale) * float(projections.full[head]),
                threshold=threshold, rho=gamma / threshold, certified=certified, certified_raw=certified_raw,
                sampled=sampled, sampled_raw=sampled_raw, certified_degree=needed[0], degree=needed[1], error=error,
                cost=costs[degree], pays_from=pays_from[degree], input=x, base=base, adapter=adapter,
                dominant=dominant, of=of, drift=gamma / max(float(first[head]), 1e-30), status=status,
                why=_why(status, degree, needed[1], (certified, sampled), error, costs[degree], pays_from[degree],
                         length, self.tolerance, self.max_degree, dominant, of),
            )  # fmt: skip


def judge(
    certified: int | None, sampled: int | None, error: float, costs: dict[int, float], tolerance: float
) -> tuple[str, int]:
    """Status of a head, and the degree that it is about.

    Args:
        certified, sampled: needed degrees by the certified bound and by the sampled logits.
        error: measured at the sampled degree.
        costs: predicted cost of every degree that is allowed.
        tolerance: of the measured error.
    """
    if certified is not None and certified in costs and costs[certified] < 1:
        return "certified-fast", certified
    if sampled is None or sampled not in costs or not error <= tolerance:
        return "not-certified", max(costs)
    return ("measured-fast" if costs[sampled] < 1 else "bounded-but-slow"), sampled


def _allowed_degrees(max_degree: int, dim: int) -> list[int]:
    """Even degrees up to the highest whose features fit in memory; degree 2 always."""
    degrees = range(2, max_degree + 1, 2)
    return [degree for degree in degrees if degree == 2 or feature_count(dim, degree) <= MAX_FEATURES]


def _largest_factors(
    norms: dict[str, Tensor] | None, head: int, root: float
) -> tuple[float | None, float | None, float | None, str]:
    """Largest entries of X and of the scaled parts of q or k of a head, and which factor is the largest."""
    if not norms:
        return None, None, None, "unknown"
    x, base, adapter = (float(t.flatten()[head if t.dim() else 0]) for t in norms.values())
    size = max(x, 1e-30)
    dominant = max((x, "X"), (base / size, "W*"), (adapter / size, "sBA"))[1]
    return x, root * base, root * adapter, dominant


def _why(
    status: str, degree: int, needed: int | None, logits: tuple[float, float], error: float, cost: float,
    pays_from: int, length: int, tolerance: float, max_degree: int, dominant: str, of: str,
) -> str:  # fmt: skip
    price = f"costs {cost:.2g} of exact attention at length {length:,}"
    if status == "certified-fast":
        return f"no logit exceeds {logits[0]:.3g}, so degree {degree} keeps weights within {tolerance:g}; it {price}"
    if status == "measured-fast":
        return f"sampled logits reach {logits[1]:.3g}, degree {degree} has an error of {error:.2g} there; it {price}"
    if status == "bounded-but-slow":
        return f"logits up to {logits[1]:.3g} take degree {degree} only, but it {price} and pays from {pays_from:,} on"
    if not (math.isfinite(logits[0]) and math.isfinite(logits[1])):
        return f"{NON_FINITE}: NaN, an infinity, or entries whose products are too large for fp32"
    if needed is not None and needed <= max_degree:
        return f"logits up to {logits[1]:.3g} take degree {needed}, but its error of {error:.2g} is over {tolerance:g}"
    wanted = "more than 64" if needed is None else str(needed)
    name = {"q": "queries", "k": "keys"}[of]
    return (
        f"logits up to {logits[1]:.3g} would take degree {wanted}, above {max_degree}. Large {name}: "
        f"{_ADVICE[dominant]}"
    )
