"""Schedules of the pattern and of the decay of pruned weights: the rules of MDGF and SDGF, as pure functions.

Training has d dense steps at the start and f fine-tuning steps at the end; span = total - d - f and j = step - d.
:meth:`Schedule.at` calls, in this order,

    frame               max { i : int(i span / F) <= j } of F frames      :func:`frame_at`
    SDGF-stepwise       (M-1):M, floor(M/2):M, floor(M/4):M, ..., N:M     :func:`stepwise_patterns`
    SDGF-geometric      kN:kM for k = coarsest, ..., 4, 2, 1              :func:`geometric_patterns`
    MDGF-linear         alpha = max(0, 1 - c j)                           :func:`linear_alpha`
                        c = (1 - alpha_end) / span                        :func:`linear_rate`
    MDGF-exponential    alpha = exp(-c j)                                 :func:`exponential_alpha`
                        c = -ln(alpha_end) / span                         :func:`exponential_rate`

and the layer computes with W * (P + (1 - P) alpha), where the mask P obeys the pattern
(:mod:`leanstep.sparsity.functional`).

Bambhaniya, Yazdanbakhsh, Subramanian, Kao, Agrawal, Evci, Krishna, "Progressive Gradient Flow for Robust N:M Sparsity
Training in Transformers", arXiv 2402.04744.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from leanstep.sparsity.patterns import NM

STRUCTURES = ("sdgf-stepwise", "sdgf-geometric")
DECAYS = ("mdgf-linear", "mdgf-exponential")
KINDS = ("constant", *DECAYS, *STRUCTURES, *(f"{structure}+{decay}" for structure in STRUCTURES for decay in DECAYS))

# a smaller alpha becomes 0: the weights no longer matter, and only exact zeros save work
NEGLIGIBLE_ALPHA = 1e-6
# 0.1 is more than 1 - 0.9 in floating point
_ROUNDING = 1e-9


def frame_at(j: int, span: int, frames: int) -> int:
    """The index of the frame at step j, if ``span`` steps are split into ``frames`` frames of equal length."""
    return max(i for i in range(frames) if i * span // frames <= j)


def stepwise_patterns(target: NM) -> list[NM]:
    """SDGF-stepwise: (M-1):M, floor(M/2):M, floor(M/4):M, ... while they are denser than N:M, and N:M last."""
    n, m = target.n, target.m
    counts = [m - 1, *(m >> i for i in range(1, m.bit_length()))]
    return [NM(count, m) for count in dict.fromkeys(counts) if count > n] + [target]


def geometric_patterns(target: NM, coarsest: int) -> list[NM]:
    """SDGF-geometric: kN:kM for k = ``coarsest`` (a power of two), ..., 4, 2, 1."""
    return [target.scaled(coarsest >> i) for i in range(coarsest.bit_length())]


def linear_alpha(j: int, c: float) -> float:
    """MDGF-linear: max(0, 1 - c j)."""
    return max(0.0, 1 - c * j)


def exponential_alpha(j: int, c: float) -> float:
    """MDGF-exponential: exp(-c j)."""
    return math.exp(-c * j)


def linear_rate(alpha_end: float, span: int) -> float:
    """The c with which :func:`linear_alpha` is ``alpha_end`` after ``span`` steps."""
    return (1 - alpha_end) / span


def exponential_rate(alpha_end: float, span: int) -> float:
    """The c with which :func:`exponential_alpha` is ``alpha_end`` after ``span`` steps."""
    return -math.log(alpha_end) / span


# decay -> alpha, rate, default alpha_end
_DECAY_RULES = {
    "mdgf-linear": (linear_alpha, linear_rate, 0.0),
    "mdgf-exponential": (exponential_alpha, exponential_rate, 1e-4),
}


class Stage(NamedTuple):
    """The schedule's values at one step.

    Attributes:
        pattern: the pattern that masks obey.
        alpha: factor of pruned weights in the forward pass; 1 is dense, 0 prunes.
        phase: "dense" (nothing is pruned yet), "sparse", or "finetune".
    """

    pattern: NM
    alpha: float
    phase: Literal["dense", "sparse", "finetune"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The schedule of one run: a dense phase, the way to N:M, and a fine-tuning phase.

    ``kind`` is "constant" (the target N:M from step d on: STE, SR-STE), "mdgf-linear", "mdgf-exponential",
    "sdgf-stepwise", "sdgf-geometric", or an sdgf and an mdgf kind: "sdgf-stepwise+mdgf-linear". The module's functions
    are the rules, with d = int(dense * total_steps) and f = int(finetune * total_steps). An alpha below 1e-6 is exactly
    0. From j = span on, the pattern is N:M and alpha is 0 for every kind. All values depend only on the step, so a
    resumed run continues exactly.

    Args:
        kind: one of the kinds above.
        total_steps: optimizer steps of the run, >= 1. Later steps continue the last phase.
        dense: fraction of steps at the start without pruning, 0 <= dense.
        finetune: fraction of steps at the end with the final pattern, 0 <= finetune, dense + finetune <= 1.
        decay: rate c > 0 per step, for mdgf kinds. None: computed from ``alpha_end``.
        alpha_end: alpha after ``span`` steps, which sets c; 0 < alpha_end < 1, or 0 for mdgf-linear. None: 0 for
            mdgf-linear and 1e-4 for mdgf-exponential.
        coarsest: factor of the first frame of sdgf-geometric, a power of two >= 1.
        freeze_mask_in_finetune: whether masks are fixed in the last phase instead of following the weights.

    Raises:
        ValueError: for values out of range, a decay without an mdgf kind, or ``decay`` and ``alpha_end`` together.

    Notes:
        The published code of stepwise SDGF differs in three points. If M / N is not a power of two, it ends at a denser
        pattern (3:8 at 4:8); here N:M is always the last frame. Its j starts after a hundredth of the dense phase;
        here, as in the paper, after the whole phase. Its frames begin only at exact epoch numbers, so a resumed run can
        miss them; here frames depend only on the step.

    Example:
        >>> schedule = Schedule(kind="sdgf-stepwise", total_steps=80)
        >>> [str(schedule.at(step, NM(1, 8)).pattern) for step in (0, 20, 40, 60)]
        ['7:8', '4:8', '2:8', '1:8']
    """

    kind: str = "constant"
    total_steps: int
    dense: float = 0.0
    finetune: float = 0.0
    decay: float | None = None
    alpha_end: float | None = None
    coarsest: int = 8
    freeze_mask_in_finetune: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Schedule: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        lowest = 0.0 if self._decay_kind == "mdgf-linear" else math.ulp(0.0)
        power = isinstance(self.coarsest, int) and self.coarsest >= 1 and self.coarsest & (self.coarsest - 1) == 0
        for name, accepted, expected in (
            ("total_steps", isinstance(self.total_steps, int) and self.total_steps >= 1, "an integer >= 1"),
            ("dense", 0 <= self.dense <= 1, "a fraction in [0, 1]"),
            ("finetune", 0 <= self.finetune <= 1 - self.dense + _ROUNDING, "a fraction in [0, 1 - dense]"),
            ("decay", self.decay is None or 0 < self.decay < math.inf, "> 0, or None"),
            ("alpha_end", self.alpha_end is None or lowest <= self.alpha_end < 1, "in (0, 1), or None"),
            ("coarsest", power, "a power of two >= 1"),
        ):
            if not accepted:
                raise ValueError(f"Schedule: {name} must be {expected}, got {getattr(self, name)!r}")
        if self.decay is not None and self.alpha_end is not None:
            raise ValueError("Schedule: decay and alpha_end set the same rate; give one of them")
        if (self.decay is not None or self.alpha_end is not None) and self._decay_kind is None:
            raise ValueError(f"Schedule: decay and alpha_end are for mdgf kinds; {self.kind!r} has no decay")

    @property
    def dense_steps(self) -> int:
        """Steps of the dense phase, d."""
        return int(self.dense * self.total_steps)

    @property
    def finetune_steps(self) -> int:
        """Steps of the last phase, f."""
        return int(self.finetune * self.total_steps)

    @property
    def span(self) -> int:
        """Steps between the dense and the last phase."""
        return max(self.total_steps - self.dense_steps - self.finetune_steps, 0)

    def frames(self, target: NM) -> list[NM]:
        """The patterns that lead to ``target``, in order; ``target`` is the last."""
        if self.kind.startswith("sdgf-stepwise"):
            return stepwise_patterns(target)
        if self.kind.startswith("sdgf-geometric"):
            return geometric_patterns(target, self.coarsest)
        return [target]

    def alpha(self, j: int) -> float:
        """The factor of pruned weights, j steps after the dense phase."""
        if self._decay_kind is None:
            return 0.0
        rule, rate, default_end = _DECAY_RULES[self._decay_kind]
        c = self.decay
        if c is None:
            c = rate(default_end if self.alpha_end is None else self.alpha_end, self.span)
        alpha = rule(j, c)
        return alpha if alpha >= NEGLIGIBLE_ALPHA else 0.0

    def at(self, step: int, target: NM) -> Stage:
        """The pattern, alpha and phase at ``step`` (the first is 0) for a layer with the final pattern ``target``.

        Raises:
            ValueError: for a negative step.
        """
        if step < 0:
            raise ValueError(f"Schedule.at: step must be >= 0, got {step}")
        j = step - self.dense_steps
        if j < 0:
            return Stage(NM(target.m, target.m), 1.0, "dense")
        if j >= self.span:
            return Stage(target, 0.0, "finetune" if self.finetune_steps else "sparse")
        patterns = self.frames(target)
        return Stage(patterns[frame_at(j, self.span, len(patterns))], self.alpha(j), "sparse")

    @property
    def _decay_kind(self) -> str | None:
        last = self.kind.rpartition("+")[2]
        return last if last in DECAYS else None
