"""The methods of N:M training by name: what of a schedule, a gradient rule and a term each one is made of."""

from __future__ import annotations

from dataclasses import dataclass

from leanstep.sparsity.schedules import DECAYS, STRUCTURES, Schedule

# Zhou et al., arXiv 2102.04010, give it for every model
SRSTE_LAMBDA = 2e-4


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        kind: the kind of schedule it has by definition; None: it goes with any.
        grad_flow, srste_lambda: as :func:`leanstep.sparsity.sparse_weight` takes them.
        fixed: whether a mask, once made for a pattern, stays.
        continuous: whether it computes with S-STE's function of the weight instead of a mask.
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
    """The method and the schedule that two arguments mean together.

    Raises:
        TypeError: for a schedule that is none.
        ValueError: for an unknown method, one whose kind is not the schedule's, or one that needs a schedule.
    """
    if method is not None and method not in METHODS:
        raise ValueError(f"sparsify: expected a method of {', '.join(METHODS)}, got {method!r}")
    if method is None:
        kind = schedule.kind if isinstance(schedule, Schedule) else "constant"
        chosen = METHODS.get(kind, METHODS["ste"])
    else:
        chosen = METHODS[method]
    wanted = chosen.kind or "constant"
    if isinstance(schedule, Schedule):
        if chosen.kind is not None and chosen.kind != schedule.kind:
            raise ValueError(
                f"sparsify: method {method!r} has a schedule of kind {chosen.kind!r}, got {schedule.kind!r}; give that "
                "kind, or method 'ste', 'srste' or 'fixed', which go with any"
            )
        return chosen, schedule
    if schedule is None:
        if wanted != "constant":
            raise ValueError(
                f"sparsify: method {method!r} needs to know how long training is; give schedule=STEPS, or "
                f"Schedule(kind={wanted!r}, total_steps=STEPS, ...)"
            )
        return chosen, Schedule(total_steps=1)
    if isinstance(schedule, bool) or not isinstance(schedule, int):
        raise TypeError(f"sparsify: expected a Schedule, a number of steps or None, got {type(schedule).__name__}")
    return chosen, Schedule(kind=wanted, total_steps=schedule)
