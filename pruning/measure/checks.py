"""Whether distortions add up: what several pruned matrices do together, beside the sum of what each does alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from leanstep.pruning.allocate.allocation import Allocation
from leanstep.pruning.measure.groups import Group
from leanstep.pruning.measure.measure import Measurement, evaluating
from leanstep.pruning.measure.metrics import Distortion
from leanstep.pruning.measure.snapshot import Originals
from leanstep.pruning.score.pruners import Pruning, prune_group

__all__ = ["Additivity", "apply_allocation", "chosen_levels", "joint_of", "measure_additivity"]


@dataclass(frozen=True)
class Additivity:
    """What an allocation costs on data that it was not chosen by.

    Attributes:
        method: of the allocation.
        joint, joint_stderr: distortion with all matrices pruned.
        summed: sum of the distortions with one matrix pruned at a time, at the same levels.
        ratio: joint / summed; 1 where distortions add up, NaN where nothing is distorted. The paper's theorem says 1;
            far from it, a sum does not tell which allocation is better.
    """

    method: str
    joint: float
    joint_stderr: float
    summed: float

    @property
    def ratio(self) -> float:
        """joint / summed."""
        if self.summed:
            return self.joint / self.summed
        return math.inf if self.joint else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; None for what is no number."""
        values = asdict(self) | {"ratio": self.ratio}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def chosen_levels(allocation: Allocation, groups: Sequence[Group]) -> dict[str, tuple[int, str]]:
    """Kept weights and N:M pattern (or "") of every group."""
    return {group.name: (allocation.kept[group.name], allocation.patterns.get(group.name, "")) for group in groups}


def apply_allocation(
    groups: Sequence[Group], chosen: Mapping[str, tuple[int, str]], pruning: Pruning, *, sequential: bool = True
) -> None:
    """Prune the model, in place.

    ``sequential`` prunes from the first block to the last, and takes the statistics of each from a model whose earlier
    blocks are pruned already, as they will be. Otherwise all come from the model as it is.
    """
    pruning.cache.reset()
    starts: dict[int, list[Group]] = {}
    for group in groups:
        start = min(pruning.cache.start(target.module) for target in group.targets)
        starts.setdefault(start if sequential else 0, []).append(group)
    with evaluating(pruning.cache.model):
        for start, members in sorted(starts.items()):
            pruners = pruning.pruners(members, start)
            for group in members:
                for target, weight in prune_group(group, pruners, *chosen[group.name]):
                    target.weight.copy_(weight)
                pruners.release(group)
    pruning.cache.reset()


def joint_of(
    measurement: Measurement,
    groups: Sequence[Group],
    chosen: Mapping[str, tuple[int, str]],
    pruning: Pruning,
    originals: Originals | None = None,
    *,
    stay: bool = False,
) -> Distortion:
    """Distortion of an allocation; the weights are those of before afterwards, or with ``stay`` the pruned ones."""
    if originals is None:
        originals = Originals([target for group in groups for target in group.targets])
    originals.before_changes()
    with evaluating(measurement.model), nullcontext() if stay else originals.kept():
        apply_allocation(groups, chosen, pruning)
        return measurement.joint()


def measure_additivity(
    measurement: Measurement,
    groups: Sequence[Group],
    allocation: Allocation,
    pruning: Pruning,
    originals: Originals | None = None,
    *,
    stay: bool = False,
) -> Additivity:
    """Joint and summed distortion of an allocation on the measurement's data.

    One matrix alone is pruned with the statistics of the dense model, all together with those of
    :func:`apply_allocation`. The weights are kept, or with ``stay`` the model is pruned so afterwards.
    """
    chosen = chosen_levels(allocation, groups)
    with evaluating(measurement.model):
        alone = measurement.singles(groups, chosen, pruning)
    joint = joint_of(measurement, groups, chosen, pruning, originals, stay=stay)
    summed = sum(point.mean for point in alone.values())
    return Additivity(allocation.method, joint.mean, joint.stderr, summed)
