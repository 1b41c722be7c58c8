"""The table of the methods of N:M training."""

from __future__ import annotations

from dataclasses import dataclass

from leanstep.sparsity.training.schedules import DECAYS, STRUCTURES, Schedule

# Zhou et al., arXiv 2102.04010, use it for every model
SRSTE_LAMBDA = 2e-4


@dataclass(frozen=True)
class Method:
    """One method: a schedule, a gradient rule and SR-STE's factor.

    Attributes:
        kind: the schedule's kind; None: any.
        grad_flow: argument of :func:`leanstep.sparsity.sparse_weight`.
        srste_lambda: factor of SR-STE's term.
        fixed: whether the mask changes only with the pattern.
        continuous: whether layers use S-STE's function of the weight instead of a mask.
    """

    kind: str | None = None
    grad_flow: str = "ste"
    srste_lambda: float = 0.0
    fixed: bool = False
    continuous: bool = False


METHODS = {
    "ste": Method(),
    "srste": Method(srste_lambda=SRSTE_LAMBDA),
    "fixed": Method(grad_flow="fixed", fixed=True),
    "mdgf-linear": Method("mdgf-linear"),
    "mdgf-exponential": Method("mdgf-exponential"),
    "sdgf-stepwise": Method("sdgf-stepwise"),
    "sdgf-geometric": Method("sdgf-geometric"),
    **{f"{structure}+{decay}": Method(f"{structure}+{decay}") for structure in STRUCTURES for decay in DECAYS},
    "s-ste": Method("constant", continuous=True),
}


def resolve_schedule(schedule: Schedule | int | None, method: str | None) -> tuple[Method, Schedule]:
    """Resolve the arguments ``schedule`` and ``method`` of :func:`sparsify`.

    Raises:
        TypeError: for anything but a schedule, a number of steps or None.
        ValueError: for an unknown method, a schedule of the wrong kind for the method, or a missing schedule.
    """
    if method is not None and method not in METHODS:
        raise ValueError(f"sparsify: method must be one of {', '.join(METHODS)}, got {method!r}")
    name = method or (schedule.kind if isinstance(schedule, Schedule) else "ste")
    resolved = METHODS.get(name, METHODS["ste"])
    kind = resolved.kind or "constant"
    if isinstance(schedule, Schedule):
        if resolved.kind not in (None, schedule.kind):
            raise ValueError(
                f"sparsify: method {method!r} has a schedule of kind {kind!r}, got {schedule.kind!r}; use that "
                "kind, or method 'ste', 'srste' or 'fixed', which accept any"
            )
        return resolved, schedule
    if schedule is None:
        if kind != "constant":
            raise ValueError(
                f"sparsify: method {method!r} needs to know how long training is; give schedule=STEPS, or "
                f"Schedule(kind={kind!r}, total_steps=STEPS, ...)"
            )
        return resolved, Schedule(total_steps=1)
    if isinstance(schedule, bool) or not isinstance(schedule, int):
        raise TypeError(f"sparsify: expected a Schedule, a number of steps or None, got {type(schedule).__name__}")
    return resolved, Schedule(kind=kind, total_steps=schedule)
