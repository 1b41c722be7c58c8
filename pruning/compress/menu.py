"""Menus: the levels of a matrix that are no counts of weights, what each costs in bytes, and how a matrix is changed.

The name of a level stands where N:M patterns have theirs, and its bytes where others have a count of weights: curves,
the knapsack and the search take them as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from leanstep.pruning.score.base import LayerPruner, LayerStatistics, Pruned
from leanstep.pruning.score.sparsegpt import SparseGPTPruner
from leanstep.pruning.score.targets import Group, Layer, Target
from leanstep.sparsity import NM

# the types of a file, most bits first: of those with as many bits, the one with the smallest errors
_TYPES: tuple[str, ...] = ("Q8_0", "Q6_K", "Q5_1", "Q5_K", "Q5_0", "Q4_1", "Q4_K", "IQ4_NL", "IQ4_XS", "MXFP4")
_TYPES += ("Q3_K", "IQ3_XXS", "Q2_K", "IQ2_XS", "IQ2_XXS")


@dataclass(frozen=True)
class MenuGroup(Group):
    """A matrix whose levels are of a menu; ``layer.numel`` is its bytes at the first level, which changes nothing.

    Attributes:
        menu: bytes and name of each level, in falling order.
    """

    menu: tuple[tuple[int, str], ...] = ()

    @property
    def is_end(self) -> bool:
        """Whether it is outside of all blocks, as embedding and head are: they are few, and may have many rows."""
        return self.layer.block is None

    def nonzero(self) -> int:
        """The bytes of the first level: any level is open to the matrix."""
        return self.layer.numel


def menu_group(target: Target, menu: str) -> MenuGroup:
    """The group of one matrix, sized in bytes."""
    from leanstep.pruning.compress import sparse

    levels = tuple(_ggml_levels(target) if menu == "ggml" else sparse.sparse_levels(target))
    return MenuGroup(replace(target.layer, shape=(levels[0][0], 1)), (target,), levels)


def _ggml_levels(target: Target) -> list[tuple[int, str]]:
    """(bytes, name) of each level of a matrix, in falling order. The first is the matrix in 16 bits."""
    from leanstep._gguf.ggml import TYPES, bytes_of, ggml_library

    ggml_library()  # where it is missing, that is said before anything is measured
    rows, columns = target.weight.shape
    dense = "BF16" if target.weight.dtype == torch.bfloat16 else "F16"
    fitting = [
        name
        for name in (dense, *_TYPES)
        if columns % TYPES[name].block == 0 and (target.input_modules or not TYPES[name].needs_importance)
    ]
    by_size = {bytes_of(name, rows, columns): name for name in reversed(fitting)}
    return sorted(by_size.items(), reverse=True)


def rounding_identity(groups: Iterable[Group]) -> dict[str, str]:
    """On what levels depend beside the settings: for ggml's, on its version."""
    from leanstep.pruning.compress import sparse

    if not any(isinstance(group, MenuGroup) and group.menu[0][1] != sparse.DENSE for group in groups):
        return {}
    from leanstep._gguf.ggml import ggml_version

    return {"ggml": ggml_version()}


def constraint_of(name: str, data: Tensor, weight: Tensor, *, is_transposed: bool) -> Any:
    """What keeps a weight in training at a level with some bytes; None for levels whose values have no codes."""
    from leanstep.pruning.compress import sparse

    if name.startswith(sparse.CODED):
        return sparse.OnScales.of(name, data, weight, is_transposed=is_transposed)
    if name == sparse.DENSE:
        return None
    from leanstep.pruning.compress.rounding import OnGrid

    return OnGrid.of(name, data, is_transposed=is_transposed)


class LayerCompressor(LayerPruner):
    """Changes a matrix to the named levels of a menu.

    Args:
        weight: [out, in].
        statistics: with ``gram`` (errors are compensated) or ``square_sum`` (they are not); without rows, the matrix is
            rounded by itself.
        is_transposed: whether the matrix is stored as [in, out].
        damping: see :class:`leanstep.pruning.score.sparsegpt.SparseGPTPruner`.
    """

    def __init__(
        self, weight: Tensor, statistics: LayerStatistics, *, is_transposed: bool = False, damping: float = 0.01
    ) -> None:
        super().__init__(weight)
        self._statistics, self._is_transposed = statistics, is_transposed
        self._plain, self._sweeper = self.weight.cpu().float(), None
        if statistics.count and statistics.gram is not None:
            self._sweeper = SparseGPTPruner(self._plain, statistics.gram.cpu(), damping=damping)

    @torch.no_grad()
    def prune(self, keep: int | NM | str) -> Pruned:
        """The matrix at the level of this name."""
        from leanstep.pruning.compress import sparse

        name = str(keep)
        if name == sparse.DENSE:
            values, self.encoded = self.given, (name, torch.empty(0))
        elif name.startswith(sparse.CODED):
            level, transposed = sparse.Level.parse(name), self._is_transposed
            values, scales = sparse.code_matrix(
                self._plain, level, self._statistics, self._sweeper, is_transposed=transposed
            )
            self.encoded = name, scales
        else:
            values, data = self._by_ggml(name)
            self.encoded = name, data
        return Pruned(values.to(self.given), torch.ones_like(self.given, dtype=torch.bool))

    def _by_ggml(self, type: str) -> tuple[Tensor, Tensor]:
        from leanstep._gguf.ggml import TYPES
        from leanstep.pruning.compress.rounding import rounded

        importance = self._importance
        if importance is None and TYPES[type].needs_importance:  # an expert that no token reached
            importance = torch.ones(self.weight.shape[1])
        # 16 bits leave no error to compensate
        factor = self._sweeper.factor if self._sweeper is not None and TYPES[type].block > 1 else None
        return rounded(self._plain, type, importance, factor)

    @property
    def _importance(self) -> Tensor | None:
        sums = self._statistics.square_sum
        if self._statistics.gram is not None:
            sums = self._statistics.gram.diagonal()
        return sums / self._statistics.count if self._statistics.count and sums is not None else None

    @property
    def scores(self) -> Tensor:
        """Magnitudes."""
        return self.weight.abs()

    def _prune_count(self, keep: int) -> tuple[Tensor, Tensor]:
        raise TypeError("a menu has named levels")

    _prune_nm: Any = _prune_count


def ends_of(model: nn.Module, taken: set[str], exclude: Iterable[str]) -> list[Target]:
    """The input embedding and the head, unless they are taken or excluded."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    modules: dict[str, list[Any]] = {}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, getter, lambda: None)()
        except NotImplementedError:  # as of models of images
            continue
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and id(weight) in names:
            modules.setdefault(names[id(weight)], []).append(module)
    return [
        Target(
            Layer(name, tuple(owners[0].weight.shape), itemsize=owners[0].weight.element_size()),
            name,
            tuple(owners),
            "weight",
            "out_in",
        )
        for name, owners in modules.items()
        if name not in taken and not any(fnmatchcase(name, rule) for rule in exclude)
    ]
