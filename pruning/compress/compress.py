"""Compress a model or a checkpoint to a size: each matrix to the level of a menu that hurts least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from leanstep.pruning.allocate.budgets import Budget
from leanstep.pruning.allocate.knapsack import InfeasibleBudget
from leanstep.pruning.compress.menu import MenuGroup
from leanstep.pruning.config import MENUS, Execution, PruneConfig, read_config, read_fields, takes_fields
from leanstep.pruning.planner import groups_of, targets_of
from leanstep.pruning.prune import prune
from leanstep.pruning.result import PruneResult
from leanstep.pruning.score.targets import Group, Target


def menu_of(format: str) -> PruneConfig:
    """The settings of compressing to a format of files, where none are given."""
    return PruneConfig(pattern="sparse" if format == "sparse" else "ggml", score="gptq")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the result may be; one of the three.

    Attributes:
        bytes: fraction of the dense size, in (0, 1).
        bits_per_weight: mean over the matrices, scales included.
        size: bytes of the whole result.

    Raises:
        ValueError: for none or several, or a number out of range.
    """

    bytes: float | None = None
    bits_per_weight: float | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1 or not all(0 < value < math.inf for value in given.values()) or (self.bytes or 0) >= 1:
            shown = ", ".join(f"{name}={value:g}" for name, value in given.items()) or "none"
            raise ValueError(
                "expected one size: bytes, a fraction of the dense size below 1 (--bytes 0.25), bits_per_weight "
                f"(--bits-per-weight 4), or size, in bytes (--size 90MB), above 0; got {shown}"
            )

    def budget(self, groups: Sequence[Group], others: int, dense: int) -> Budget:
        """The bytes that the matrices may have.

        Args:
            groups: the matrices.
            others: bytes of everything else in the result.
            dense: bytes of the dense model.

        Raises:
            InfeasibleBudget: for a size out of reach; the message gives the range in reach.
        """
        weights = sum(target.layer.numel for group in groups for target in group.targets)
        least, most = sizes_of(groups)
        if self.bits_per_weight is not None:
            target = int(self.bits_per_weight * weights / 8)
        else:
            target = (int(self.bytes * dense) if self.bytes is not None else self.size or 0) - others
        if not least <= target < most:
            asked = size_text(target, others, weights)
            raise InfeasibleBudget(f"a size of {asked} is out of reach: {reach_of(groups, others)}", least, most)
        return Budget("size", target)


def sizes_of(groups: Sequence[Group]) -> tuple[int, int]:
    """Bytes of the matrices at their last levels, and at their first ones."""
    levels = [group.menu for group in groups if isinstance(group, MenuGroup)]
    return sum(row[-1][0] for row in levels), sum(row[0][0] for row in levels)


def reach_of(groups: Sequence[Group], others: int) -> str:
    """The sizes that a model can have, with ``others`` bytes besides its matrices."""
    weights = sum(target.layer.numel for group in groups for target in group.targets)
    low, high = (size_text(end, others, weights) for end in sizes_of(groups))
    return f"from {low} to below {high}"


def size_text(matrices: int, others: int, weights: int) -> str:
    """A size from bytes, in the unit of ``--size``, rounded up, and the bits of a weight of the matrices."""
    return f"{-(-(matrices + others) // 1000) / 1000:,.3f} MB ({8 * max(matrices, 0) / weights:.2f} bits per weight)"


def menu_groups(targets: Sequence[Target], config: PruneConfig) -> list[Group]:
    """The matrices with their levels. Raises ValueError for a pattern that is no menu."""
    if config.menu is None:
        raise ValueError(f"pattern must be {' or '.join(MENUS)}, got {config.pattern}")
    return groups_of(targets, config)


@takes_fields(Size, Execution, PruneConfig)
def compress(model: nn.Module, data: Any, config: PruneConfig | None = None, **options: Any) -> PruneResult:
    """Compress a model in place to a size: bits are given to the matrices where they lower the loss most.

    The levels of a matrix are the formats of GGUF files that its rows fill (:data:`leanstep._gguf.ggml.TYPES`), made by
    ggml with the inputs' mean squares as importance, with rounding errors compensated as by GPTQ. With the pattern
    ``sparse`` they are those of sparse files: int8 and int4 beside zeros; masks, scales and codes are chosen in one
    sweep, as by SparseGPT. Embedding and head are among the matrices. Curves, dynamic programming over bytes, the
    search on joint distortion and the comparison with the best uniform format on held-out data are those of
    :func:`leanstep.pruning.prune`; the weights get the values that an engine reads from the file, rounded to their
    dtype.

    Args:
        model, data, config: as for :func:`leanstep.pruning.prune`.
        **options: one of the fields of :class:`Size`; of :class:`leanstep.pruning.PruneConfig`, whose ``pattern`` is
            ``ggml`` (default) or ``sparse`` and whose ``score`` is ``gptq`` or ``nearest``; and of
            :class:`leanstep.pruning.Execution`, and ``held_out`` and ``curve_data``.

    Returns:
        :class:`PruneResult`; ``encoded`` has the bytes of each matrix (its scales with ``sparse``),
        ``allocation.patterns`` its format.

    Raises:
        ImportError: without the packages of the extra ``gguf``, for the pattern ``ggml``.
        ValueError: as :func:`leanstep.pruning.prune`, and for a size out of reach.

    Notes:
        Time of a level: about ``out * in^2`` multiply-adds. Memory: as for :func:`leanstep.pruning.prune` with
        SparseGPT, and the bytes of the result.

    References:
        Xu et al., arXiv 2308.10438, for the allocation; Frantar et al., "GPTQ", arXiv 2210.17323, algorithm 1;
        Frantar, Alistarh, "SparseGPT", arXiv 2301.00774, section 3.5.
    """
    size, data_options = read_fields(Size, options), {n: options.pop(n, None) for n in ("held_out", "curve_data")}
    execution = vars(read_fields(Execution, options))
    config = read_config("compress", config or menu_of("gguf"), options)
    groups = menu_groups(targets_of(model, config), config)
    dense = sum(parameter.nbytes for parameter in model.parameters())
    inside = sum(target.weight.nbytes for group in groups for target in group.targets)
    budget = size.budget(groups, dense - inside, dense)
    return prune(model, data, replace(config, budget=budget), **data_options, **execution)
