"""One matrix, prunable to any number of levels: what all scores have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from leanstep.pruning.score.masks import check_keep
from leanstep.sparsity import NM


class Pruned(NamedTuple):
    """A pruned matrix.

    Attributes:
        weight: [out, in], of the weight's dtype, exactly 0 where the mask is False. A new tensor.
        mask: bool [out, in], True where a weight is kept.
    """

    weight: Tensor
    mask: Tensor


class LayerPruner(ABC):
    """Prunes one matrix [out, in] to any level; made by :func:`leanstep.pruning.layer_pruner`. Never writes the weight.

    What is zero already is pruned before anything else, so that a later, sparser level keeps earlier zeros.
    """

    def __init__(self, weight: Tensor):
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(f"expected a floating weight [out, in], got {tuple(weight.shape)} of {weight.dtype}")
        self.given = weight.detach()
        # computed with; float64 only where it is given
        self.weight = self.given.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)

    @torch.no_grad()
    def prune(self, keep: int | NM | str) -> Pruned:
        """The matrix with ``keep`` weights, or with at most N in every M along its inputs.

        Raises:
            ValueError: for a count out of range, a text that is no pattern, or groups that do not fill a row.
            TypeError: for anything else.
        """
        pattern = NM.parse(keep) if isinstance(keep, str) else keep
        if isinstance(pattern, NM):
            if self.weight.shape[1] % pattern.m:
                raise ValueError(
                    f"groups of {pattern.m} do not fill the {self.weight.shape[1]} inputs of a matrix of shape "
                    f"{tuple(self.weight.shape)}: use another pattern, or leave this matrix out"
                )
            weight, mask = self._prune_pattern(pattern)
        else:
            weight, mask = self._prune_count(check_keep(pattern, self.weight.numel()))
        # zeros of either sign, and what an update left where nothing may be
        return Pruned(weight.to(self.given.dtype).masked_fill(~mask, 0), mask)

    @property
    @abstractmethod
    def scores(self) -> Tensor:
        """[out, in], >= 0: what a weight is worth; comparable within the matrix."""

    @abstractmethod
    def _prune_count(self, keep: int) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _prune_pattern(self, pattern: NM) -> tuple[Tensor, Tensor]: ...


def zeros_first(scores: Tensor, weight: Tensor) -> Tensor:
    """Scores with -1 where a weight is zero already: no other is below 0."""
    return torch.where(weight == 0, -1.0, scores)
