"""How the pattern and the decay of pruned weights change while a model trains: pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from leanstep.sparsity.patterns import NM

STRUCTURES = ("sdgf-stepwise", "sdgf-geometric")
DECAYS = ("mdgf-linear", "mdgf-exponential")
KINDS = ("constant", *DECAYS, *STRUCTURES, *(f"{structure}+{decay}" for structure in STRUCTURES for decay in DECAYS))

# a decayed weight this small beside its neighbours is a zero that costs a dense product
_ZERO = 1e-6


class Stage(NamedTuple):
    """What holds at one step.

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
    """When a model is dense, how it becomes N:M sparse, and how long it is tuned afterwards.

    With d = int(dense * total_steps), f = int(finetune * total_steps), span = total_steps - d - f and j = step - d:

    * ``constant``: the target N:M from step d on (STE, SR-STE).
    * ``mdgf-linear``: alpha = max(0, 1 - c * j). ``mdgf-exponential``: alpha = exp(-c * j). Below 1e-6 it is exactly 0.
    * ``sdgf-stepwise``: (M-1):M, then M/2:M, M/4:M, ... (rounded down), and N:M last; F frames of span / F steps.
    * ``sdgf-geometric``: kN:kM for k = ``coarsest``, ..., 4, 2, 1; as many frames.
    * ``sdgf-...+mdgf-...``: both at once.

    Frame i begins at j = int(i * span / F). From j = span on the pattern is N:M and alpha is 0, whatever the kind.
    Every function is pure: what holds at a step depends on the step alone, so a resumed run goes on as it was.

    Args:
        kind: one of the above.
        total_steps: optimizer steps of the run, >= 1. Later steps are as the last phase.
        dense: fraction of the steps at the start without any pruning, 0 <= dense.
        finetune: fraction at the end that trains the final pattern, 0 <= finetune, dense + finetune <= 1.
        decay: c > 0, per step, for mdgf kinds. None: from ``alpha_end``.
        alpha_end: alpha after ``span`` steps, 0 < alpha_end < 1 (linear: 0 as well), from which c follows. None: 0
            for mdgf-linear and 1e-4 for mdgf-exponential.
        coarsest: factor of the first frame of sdgf-geometric, a power of two >= 1.
        freeze_mask_in_finetune: whether masks stay as they are in the last phase, rather than follow the weights.

    Raises:
        ValueError: for values out of range, a decay without an mdgf kind, or ``decay`` and ``alpha_end`` together.

    Notes:
        Where M / N is no power of two, the published code of stepwise SDGF ends at a denser pattern (3:8 at 4:8); here
        N:M is always the last frame. Its j counts from a hundredth of the dense phase on; here, as in the paper, from
        its end. Its frames begin where an epoch's number is met exactly, and are lost on resuming; here they follow
        from the step.

    References:
        Bambhaniya, Yazdanbakhsh, Subramanian, Kao, Agrawal, Evci, Krishna, "Progressive Gradient Flow for Robust N:M
        Sparsity Training in Transformers", arXiv 2402.04744.

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
            raise ValueError(f"Schedule: kind {self.kind!r} is none of {', '.join(KINDS)}")
        lowest = 0.0 if "mdgf-linear" in self.kind else math.ulp(0.0)
        power = isinstance(self.coarsest, int) and self.coarsest >= 1 and self.coarsest & (self.coarsest - 1) == 0
        for name, accepted, expected in (
            ("total_steps", isinstance(self.total_steps, int) and self.total_steps >= 1, "an integer >= 1"),
            ("dense", 0 <= self.dense <= 1, "a fraction in [0, 1]"),
            ("finetune", 0 <= self.finetune <= 1 - self.dense, "a fraction in [0, 1 - dense]"),
            ("decay", self.decay is None or 0 < self.decay < math.inf, "> 0, or None"),
            ("alpha_end", self.alpha_end is None or lowest <= self.alpha_end < 1, "in (0, 1), or None"),
            ("coarsest", power, "a power of two >= 1"),
        ):
            if not accepted:
                raise ValueError(f"Schedule: {name} must be {expected}, got {getattr(self, name)!r}")
        if self.decay is not None and self.alpha_end is not None:
            raise ValueError("Schedule: decay and alpha_end say the same thing; give one of them")
        if (self.decay is not None or self.alpha_end is not None) and "mdgf" not in self.kind:
            raise ValueError(f"Schedule: decay and alpha_end are for mdgf kinds; {self.kind!r} decays nothing")

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
        return self.total_steps - self.dense_steps - self.finetune_steps

    def frames(self, target: NM) -> list[NM]:
        """The patterns on the way to ``target``, in order; ``target`` is the last."""
        if self.kind.startswith("sdgf-stepwise"):
            return _stepwise(target)
        if self.kind.startswith("sdgf-geometric"):
            return [target.scaled(self.coarsest >> i) for i in range(self.coarsest.bit_length())]
        return [target]

    def at(self, step: int, target: NM) -> Stage:
        """What holds at ``step`` (the first is 0) on the way to ``target``.

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
        frames = self.frames(target)
        # int(i * span / F) <= j for the last time
        frame = max(i for i in range(len(frames)) if i * self.span // len(frames) <= j)
        return Stage(frames[frame], self._alpha(j), "sparse")

    def _alpha(self, j: int) -> float:
        """Factor of pruned weights, j steps after the dense phase."""
        if "mdgf-linear" in self.kind:
            alpha = max(0.0, 1 - self._rate(0.0) * j)
        elif "mdgf-exponential" in self.kind:
            alpha = math.exp(-self._rate(1e-4) * j)
        else:
            return 0.0
        return alpha if alpha >= _ZERO else 0.0

    def _rate(self, default_end: float) -> float:
        """The c of the decay."""
        if self.decay is not None:
            return self.decay
        end = default_end if self.alpha_end is None else self.alpha_end
        return (1 - end) / self.span if "mdgf-linear" in self.kind else -math.log(end) / self.span


def _stepwise(target: NM) -> list[NM]:
    """(M-1):M, floor(M/2):M, floor(M/4):M, ... as long as they are denser than N:M, and N:M."""
    n, m = target.n, target.m
    kept = [m - 1, *(m >> i for i in range(1, m.bit_length()))]
    return [NM(k, m) for k in dict.fromkeys(kept) if k > n] + [target]
