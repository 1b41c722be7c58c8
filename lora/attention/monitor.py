"""A monitor that measures for each head whether low-rank attention would be accurate enough and cheaper."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from leanstep.kernels.op import outside_dispatch_modes
from leanstep.kernels.poly.tables import MAX_FEATURES, feature_count
from leanstep.lora.attention.attention import needed_degree
from leanstep.lora.attention.cost import AttentionShape, break_even, cost_ratio
from leanstep.lora.attention.interface import AttentionInputs, Call, attach, detach
from leanstep.lora.attention.norms import NON_FINITE, HeadNorms, ProjectionNorms, head_norms

# best first
STATUSES = ("certified-fast", "measured-fast", "bounded-but-slow", "not-certified")

# degrees to consider, and the queries and sequences to sample
DEGREES, ROWS, SEQUENCES = (2, 4), 256, 2

_ADVICE = {
    "X": "the layer's input has large entries: normalise it (pre-norm), or train without outliers",
    "W*": "they come from the frozen weights: normalise queries and keys (QK-norm), or clip the weights",
    "sBA": "they come from the adapter: use a smaller alpha / r, or weight decay on its factors",
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
        gamma_q, gamma_k: the theorem's norms: largest entries of ``sqrt(scale) Q`` and ``sqrt(scale) K``.
        gamma_full: the theorem's third norm, needed if K is adapted too: largest entry of ``scale X W_Q W_K``, on
            sampled queries and before rotary embeddings; None if the weights are unreadable.
        threshold: ``sqrt(ln length)``. The theorem compares the norms with it, up to unknown constants.
        rho: the larger norm divided by the threshold. Above 1 is evidence for large norms, not proof.
        certified, sampled: upper bound on all logits, and largest sampled logit, with centred keys.
        logit: largest sampled logit, with its sign and keys that are not centred.
        certified_degree, degree: smallest even degrees that keep softmax weights within the tolerance for logits up to
            ``certified`` and ``sampled``; None beyond 64.
        error: relative error of the output on the sampled queries, at ``degree`` or at the highest degree tried.
        cost: predicted cost relative to exact attention at that degree, forward and backward.
        pays_from: sequence length from which ``cost`` is below 1.
        of: the projection with the larger norm, "q" or "k", which the following numbers describe.
        input, base, adapter: largest entries of X, of ``sqrt(scale) X W*`` and of ``sqrt(scale) s X A^T B^T``; DoRA
            multiplies the last two by magnitude / norm. None if the projections are unknown.
        dominant: "X", "W*" or "sBA", for the largest of ``|X|``, ``|X W*| / |X|`` and ``|s X A^T B^T| / |X|``.
        drift: gamma divided by its first measured value.
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
    sampled: float
    logit: float
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
    """Measures the theorem's norms in every head, and whether low-rank attention is accurate enough and cheaper.

    The theorem (Hu et al., 2024, after Alman and Song) says: attention and the gradients of its adapters take nearly
    linear time if the entries of Q and K are ``o(sqrt(log L))``; for larger entries, no truly subquadratic algorithm
    exists. The theorem is asymptotic, leaves constants open, and covers unmasked attention. At a finite length, the
    monitor measures the same question: the largest logit S gives the degree of the polynomial, the degree gives the
    cost, and a sample of queries gives the error. A head is

    * ``certified-fast`` if the bound ``S <= scale * max |q| * max |k|`` gives a degree that keeps its weights within
      the tolerance, at a predicted cost below exact attention's;
    * ``measured-fast`` if the sampled logits give such a degree, and the sampled output is within the tolerance too;
    * ``bounded-but-slow`` if the error is within the tolerance, but the cost is not below exact attention's;
    * ``not-certified`` if it needs a degree above 4, or the sampled error exceeds the tolerance.

    Args:
        model: a transformers model (LLaMA, GPT-2 and others that call attention by name), with or without adapters of
            leanstep or PEFT. :meth:`close` restores its attention implementation.
        tolerance: largest accepted relative error of softmax weights, and of the output on the sampled queries.
        speed: seconds per operation relative to exact attention, from
            :func:`leanstep.lora.attention.cost.measure_speed`; 1 compares operations.

    Raises:
        ValueError: for a model without such layers, or a setting out of range; the model is unchanged.

    Notes:
        A measured pass reads q and k of two sequences once in every layer and compares 256 queries with all keys,
        which is linear in the length. Other passes cost nothing. Recomputation by activation checkpointing is not
        measured again.

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
        tolerance: float = 0.05,
        speed: float = 1.0,
    ) -> None:
        if not tolerance > 0 or not speed > 0:
            raise ValueError(f"NormMonitor: expected tolerance > 0 and speed > 0, got {tolerance} and {speed}")
        self.model, self.tolerance, self.speed = model, tolerance, speed
        self.generator = torch.Generator().manual_seed(0)
        self._armed, self._active = False, False
        self._called: set[nn.Module] = set()
        self.skipped: dict[str, str] = {}
        self._reports: dict[str, list[HeadReport]] = {}
        self._first: dict[str, Tensor] = {}
        self._logits: dict[str, Tensor] = {}
        self._taps = attach(model)
        self._projections = {layer: ProjectionNorms(layer) for layer in self._taps}
        for tap in self._taps.values():
            tap.observers.append(self.observe)
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
            tap.observers.remove(self.observe)
        if self._taps:
            detach(self.model)
        self._handles, self._taps, self._projections = [], {}, {}

    def arm(self) -> None:
        """Measure the next forward pass, in training or evaluation."""
        self._armed = True

    def layers(self) -> dict[str, nn.Module]:
        """The measured attention layers by name."""
        return {tap.name: layer for layer, tap in self._taps.items()}

    def logits(self) -> dict[str, Tensor]:
        """Map layers to the largest logit of each head, [heads] on the CPU, in the last measured pass alone."""
        return dict(self._logits)

    def report(self) -> list[HeadReport]:
        """The last measurement of every head, in the model's order; empty before the first measurement.

        ``skipped`` maps each layer that could not be measured to the reason: a window or another mask, capped logits,
        attention sinks, a bias by position, or a forward of its own. A pass that measures no layer warns.
        """
        return [row for rows in self._reports.values() for row in rows]

    def rows_of_report(self) -> list[dict[str, Any]]:
        """The report as plain dicts, for JSON."""
        return [asdict(row) for row in self.report()]

    def diagnostics(self) -> dict[str, float]:
        """Numbers for a log: ``NAME/LAYER`` of each layer's worst head, and the counts ``heads/STATUS``."""
        numbers = {
            f"{log_name}/{layer}": max(float(getattr(row, key)) for row in rows)
            for key, log_name in _LOG_NAMES.items()
            for layer, rows in self._reports.items()
        }
        counts = Counter(row.status for row in self.report())
        return numbers | {f"heads/{status}": float(counts[status]) for status in STATUSES if counts}

    # --- one pass -----------------------------------------------------------------------------------------------------

    def _begin(self, *_: Any) -> None:
        self._active, self._armed = self._armed, False
        if self._active:
            self._logits, self._called = {}, set()
        for norms in self._projections.values():
            norms.on, norms.largest, norms.full = self._active, {}, None

    def _end(self, *_: Any) -> None:
        if self._active:
            silent = [tap.name for layer, tap in self._taps.items() if layer not in self._called]
            self.skipped |= dict.fromkeys(silent, "its attention was not called by name in transformers' registry")
        if self._active and self.skipped and not self._reports:
            reasons = "; ".join(dict.fromkeys(self.skipped.values()))
            warnings.warn(
                f"NormMonitor: no attention layer of {type(self.model).__name__} could be measured: {reasons}",
                stacklevel=2,
            )
        self._active = False
        for norms in self._projections.values():
            norms.on = False

    def observe(self, call: Call) -> None:
        """Measure one layer in a measured pass; called by the layer's attention."""
        if not self._active:
            return
        name = self._taps[call.layer].name
        self._called.add(call.layer)
        if call.unsupported_mask or call.special or call.inputs.query.shape[2] < 2:
            self.skipped[name] = call.unsupported_mask or ", ".join(call.special) or "a single query"
            return
        self.skipped.pop(name, None)
        inputs = call.inputs.sequences(slice(SEQUENCES))
        norms = outside_dispatch_modes(lambda: head_norms(inputs, degrees=DEGREES, rows=ROWS, generator=self.generator))
        first = self._first.setdefault(name, torch.maximum(norms.gamma_q, norms.gamma_k).cpu())
        logits = norms.logit.float().cpu()
        # a layer may run several times in a pass
        self._logits[name] = torch.maximum(self._logits.get(name, logits), logits)
        self._reports[name] = list(self._judge(name, inputs, norms, first, self._projections[call.layer]))

    def _judge(
        self, name: str, inputs: AttentionInputs, norms: HeadNorms, first: Tensor, projections: ProjectionNorms
    ) -> Iterable[HeadReport]:
        values = HeadNorms(*(x.double().cpu() for x in norms))
        (_, heads, length, dim), key_heads = inputs.query.shape, inputs.key.shape[1]
        shape = AttentionShape(heads, key_heads, length, dim, inputs.value.shape[-1], inputs.causal)
        # degree 2 always, higher ones if their features fit in memory
        degrees = [g for g in DEGREES if g == 2 or feature_count(dim, g) <= MAX_FEATURES]
        costs = {degree: cost_ratio(shape, degree, speed=self.speed) for degree in degrees}
        pays_from = {degree: break_even(shape, degree, speed=self.speed) for degree in degrees}
        threshold = math.sqrt(math.log(length))
        for head in range(heads):
            gamma_q, gamma_k, certified, sampled = (float(x[head]) for x in values[:4])
            # without a finite bound on all logits, no degree is enough, even if the sampled logits are finite
            needed = [
                needed_degree(s, self.tolerance) if math.isfinite(certified) and math.isfinite(s) else None
                for s in (certified, sampled)
            ]
            tried = needed[1] if needed[1] in costs else max(costs)
            error = float(values.errors[tried // 2 - 1, head])
            status, degree = judge(needed[0], needed[1], error, costs, self.tolerance)
            gamma, of = max((gamma_q, "q"), (gamma_k, "k"))
            x, base, adapter, dominant = _largest_factors(
                projections.largest.get(of), head if of == "q" else head * key_heads // heads, abs(inputs.scale) ** 0.5
            )
            row = HeadReport(
                layer=name, head=head, length=length, gamma_q=gamma_q, gamma_k=gamma_k,
                gamma_full=None if projections.full is None else abs(inputs.scale) * float(projections.full[head]),
                threshold=threshold, rho=gamma / threshold, certified=certified, sampled=sampled,
                logit=float(values.logit[head]),
                certified_degree=needed[0], degree=needed[1], error=error, cost=costs[degree],
                pays_from=pays_from[degree], input=x, base=base, adapter=adapter, dominant=dominant, of=of,
                drift=gamma / max(float(first[head]), 1e-30), status=status, why="",
            )  # fmt: skip
            yield replace(row, why=_why(row, degree, self.tolerance))


def judge(
    certified: int | None, sampled: int | None, error: float, costs: dict[int, float], tolerance: float
) -> tuple[str, int]:
    """The status of a head, and the degree behind it.

    Args:
        certified, sampled: degrees needed for the certified bound and for the sampled logits.
        error: error measured at the sampled degree.
        costs: predicted cost of every allowed degree.
        tolerance: largest accepted error.
    """
    if certified is not None and certified in costs and costs[certified] < 1:
        return "certified-fast", certified
    if sampled is None or sampled not in costs or not error <= tolerance:
        return "not-certified", max(costs)
    return ("measured-fast" if costs[sampled] < 1 else "bounded-but-slow"), sampled


def _largest_factors(
    norms: dict[str, Tensor] | None, head: int, root: float
) -> tuple[float | None, float | None, float | None, str]:
    """``input``, ``base``, ``adapter`` and ``dominant`` of a head's :class:`HeadReport`."""
    if not norms:
        return None, None, None, "unknown"
    x, base, adapter = (float(t.flatten()[head if t.dim() else 0]) for t in norms.values())
    size = max(x, 1e-30)
    dominant = max((x, "X"), (base / size, "W*"), (adapter / size, "sBA"))[1]
    return x, root * base, root * adapter, dominant


def _why(row: HeadReport, degree: int, tolerance: float) -> str:
    price, logits = f"costs {row.cost:.2g} of exact attention at length {row.length:,}", f"{row.sampled:.3g}"
    if row.status == "certified-fast":
        return (
            f"no logit exceeds {row.certified:.3g}, so degree {degree} keeps weights within {tolerance:g}; it {price}"
        )
    if row.status == "measured-fast":
        return f"sampled logits reach {logits}, degree {degree} has an error of {row.error:.2g} there; it {price}"
    if row.status == "bounded-but-slow":
        return f"logits up to {logits} need only degree {degree}, but it {price} and pays from {row.pays_from:,} on"
    if not (math.isfinite(row.certified) and math.isfinite(row.sampled)):
        return f"{NON_FINITE}: NaN, an infinity, or entries whose products are too large for fp32"
    if row.degree is not None and row.degree <= DEGREES[-1]:
        return f"logits up to {logits} need degree {row.degree}, but its error of {row.error:.2g} is over {tolerance:g}"
    needed = "more than 64" if row.degree is None else str(row.degree)
    name = {"q": "queries", "k": "keys"}[row.of]
    return (
        f"logits up to {logits} would need degree {needed}, above {DEGREES[-1]}. Large {name}: {_ADVICE[row.dominant]}"
    )
