"""Matrices that share one level: fewer curves to measure, where measuring each would take too long."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from leanstep.pruning.score.layers import Layer
from leanstep.pruning.score.targets import Target

__all__ = ["GRANULARITIES", "Group", "make_groups", "split_kept"]

GRANULARITIES = ("matrix", "role", "block")
# matrices of a transformer block that read the same input, or whose errors are of one kind
_ROLES = (
    ("qk", re.compile(r"\.(q_proj|k_proj|query|key)\.weight$")),
    ("vo", re.compile(r"\.(v_proj|o_proj|value|out_proj|dense)\.weight$")),
    ("up", re.compile(r"\.(gate_proj|up_proj|fc1|c_fc|gate_up_proj|w1|w3)(\.weight)?(\[\d+\])?$")),
)


@dataclass(frozen=True)
class Group:
    """Targets that are pruned to one sparsity, and the layer that allocations take them for."""

    layer: Layer
    targets: tuple[Target, ...]

    @property
    def name(self) -> str:
        """Name of the group: of a single matrix its own."""
        return self.layer.name

    @property
    def sizes(self) -> list[int]:
        """Weights of each target."""
        return [target.layer.numel for target in self.targets]


def make_groups(targets: Sequence[Target], granularity: str = "matrix") -> list[Group]:
    """Group targets: each ``"matrix"`` alone; a block's q and k, v and o, up and gate, and the rest by name
    (``"role"``); or a whole ``"block"``. What is in no block stays alone.

    Raises:
        ValueError: for another granularity.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    members: dict[str, list[Target]] = {}
    for target in targets:
        name = target.name
        if target.layer.block is not None and granularity != "matrix":
            role = _role(name) if granularity == "role" else "all"
            name = f"block {target.layer.block}: {role}"
        members.setdefault(name, []).append(target)
    return [Group(_joined(name, parts), tuple(parts)) for name, parts in members.items()]


def _role(name: str) -> str:
    for role, pattern in _ROLES:
        if pattern.search(name):
            return role
    return re.sub(r"\[\d+\]$", "", name.removesuffix(".weight")).rpartition(".")[2]


def _joined(name: str, parts: Sequence[Target]) -> Layer:
    if len(parts) == 1:
        return parts[0].layer
    total = sum(part.layer.numel for part in parts)
    return replace(parts[0].layer, name=name, shape=(total, 1))


def split_kept(kept: int, sizes: Sequence[int]) -> list[int]:
    """Deal ``kept`` weights to matrices in proportion to their sizes, to the exact sum, none more than it has."""
    total = sum(sizes)
    shares = [kept * size // total for size in sizes]
    # what rounding down left over goes to the largest remainders
    order = sorted(range(len(sizes)), key=lambda index: -(kept * sizes[index] % total))
    for index in order[: kept - sum(shares)]:
        shares[index] += 1
    return shares
