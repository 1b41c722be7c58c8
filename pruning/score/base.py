"""Shared by all scores: statistics of a layer, rankings of its weights, and the interface of a pruner."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from leanstep.sparsity import NM

# fields of LayerStatistics by score
NEEDS: dict[str, tuple[str, ...]] = {
    "magnitude": (),
    "wanda": ("square_sum",),
    "sparsegpt": ("gram",),
    "alps": ("gram",),
    "mfac": ("gradients",),
    "gptq": ("gram",),
    "nearest": ("square_sum",),
}
# most samples whose gradients are collected
GRADIENTS = 128
# by which score Fisher curves of another are computed: a level of ALPS takes ten times SparseGPT's time and more
FISHER_SCORES = {"alps": "sparsegpt"}
# scores that change the remaining weights, so that a level of a matrix takes more than its ranking
UPDATES_WEIGHTS = frozenset(score for score, fields in NEEDS.items() if {"gram", "gradients"} & {*fields})


def has_statistics(allocation: str, *scores: str) -> bool:
    """Whether a pass over the calibration data is needed for a score, or for the outliers of OWL."""
    return any(NEEDS[score] for score in scores) or allocation == "owl"


class NonFiniteInputsError(ValueError):
    """The inputs of a matrix overflow, as after blocks before it were pruned too far for their dtype."""


@dataclass
class LayerStatistics:
    """Sums over the inputs of a matrix [out, in] on calibration data, or gradients of it.

    Attributes:
        count: number of input rows added, for instance tokens.
        square_sum: fp64 [in], sum of x_j^2, 8 bytes per input; None if not needed.
        gram: fp32 [in, in], sum of x x^T; None if not needed.
        gradients: [m, out * in], floating: a gradient per sample or mini-batch, each [out, in] flattened.
    """

    count: int = 0
    square_sum: Tensor | None = None
    gram: Tensor | None = None
    gradients: Tensor | None = None

    @classmethod
    def empty(cls, fields: Sequence[str], in_features: int, device: torch.device | str = "cpu") -> LayerStatistics:
        """Zero sums for those of ``square_sum`` and ``gram`` that are in ``fields``."""
        statistics = cls()
        if "square_sum" in fields:
            statistics.square_sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        if "gram" in fields:
            statistics.gram = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        return statistics

    @torch.no_grad()
    def add(self, inputs: Tensor) -> None:
        """Add inputs [..., in]: squares in fp32, summed in the dtypes described above."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).to(torch.float32)
        self.count += len(rows)
        if self.square_sum is not None:
            self.square_sum += rows.square().sum(dim=0, dtype=self.square_sum.dtype).to(self.square_sum.device)
        if self.gram is not None:
            self.gram.addmm_(rows.T.to(self.gram.device), rows.to(self.gram.device))

    def check_finite(self, name: str) -> None:
        """Raise NonFiniteInputsError if an input of the matrix called ``name`` was not finite."""
        squares = self.square_sum if self.gram is None else self.gram.diagonal()
        if squares is not None and not bool(squares.isfinite().all()):
            raise NonFiniteInputsError(
                f"{name}: its inputs on the calibration data, or their squares, are not finite, with the weights "
                "before it as pruned so far; ask for less (--sparsity), or store the model in bf16 or fp32"
            )

    def permuted(self, columns: Tensor) -> LayerStatistics:
        """The statistics of the matrix with its columns in the order ``columns``, int64 [in]."""
        gradients = self.gradients
        if gradients is not None:
            gradients = gradients.unflatten(1, (-1, len(columns)))[:, :, columns].flatten(1)
        return LayerStatistics(
            self.count,
            None if self.square_sum is None else self.square_sum[columns],
            None if self.gram is None else self.gram[columns][:, columns],
            gradients,
        )


SCOPES = ("matrix", "row")


class Ranking:
    """The order in which the weights of a matrix are pruned.

    Args:
        scores_of: gives the scores [out, in], floating, finite, the same at every call; the smallest are pruned first.
            Ties go to the lower index.
        scope: "matrix" compares all weights. "row" compares within rows. These keep equally many weights, as far as
            they have so many that are not zero: zeros have scores below 0, see :func:`zeros_first`. A rest that does
            not suffice for all rows goes to those whose next weight has the highest score.

    Raises:
        ValueError: for another scope, or scores that are not a finite matrix.

    Notes:
        Keeps 4 bytes per weight ("matrix"), or 2 ("row"); twice that for 2^31 weights, or 2^15 inputs. Each mask then
        costs one pass, and for "row" the scores again.
    """

    def __init__(self, scores_of: Callable[[], Tensor], scope: str = "matrix"):
        scores = scores_of()
        if scores.dim() != 2 or not bool(scores.isfinite().all()):
            raise ValueError(f"Ranking: expected finite scores [out, in], got shape {tuple(scores.shape)}")
        self.shape, self.scope = scores.shape, scope
        if scope == "matrix":
            narrow = torch.int32 if scores.numel() < 2**31 else torch.int64
            self._order = scores.flatten().argsort(stable=True).to(narrow)
        else:
            self._scores_of = scores_of
            narrow = torch.int16 if scores.shape[1] < 2**15 else torch.int32
            order = scores.argsort(dim=1, stable=True)
            ranks = torch.arange(scores.shape[1], dtype=narrow, device=scores.device)
            self._rank = torch.empty_like(order, dtype=narrow).scatter_(1, order, ranks.expand_as(order))
            self._nonzero = (scores >= 0).sum(dim=1)
            self._least_nonzero = int(self._nonzero.min()) if len(scores) else 0

    def mask(self, keep: int) -> Tensor:
        """Bool [out, in], True for the ``keep`` weights that are pruned last."""
        rows, columns = self.shape
        pruned = rows * columns - check_keep(keep, rows * columns)
        if self.scope == "matrix":
            mask = torch.ones(rows * columns, dtype=torch.bool, device=self._order.device)
            mask[self._order[:pruned]] = False
            return mask.view(rows, columns)
        return self._rank >= (columns - self._kept_per_row(keep)).to(self._rank.dtype)[:, None]

    def _kept_per_row(self, keep: int) -> Tensor:
        """Weights that each row keeps, int64 [out]: no zero before the last nonzero weight of all rows."""
        columns, nonzero = self.shape[1], self._nonzero
        if keep <= int(nonzero.sum()):
            least, most = torch.zeros_like(nonzero), nonzero
        else:
            least, most = nonzero, torch.full_like(nonzero, columns)

        def bounded(each: int) -> Tensor:
            return torch.minimum(torch.maximum(least, torch.full_like(least, each)), most)

        each = keep // max(len(nonzero), 1)
        if each >= self._least_nonzero:  # some row has no more to keep
            each = bisect_right(range(columns), keep, key=lambda count: int(bounded(count).sum())) - 1
        counts = bounded(each)
        if missing := keep - int(counts.sum()):
            following = ((least <= each) & (each < most)).nonzero().flatten()
            next_scores = self._scores_of()[self._rank == columns - each - 1]  # one in every row
            order = next_scores[following].argsort(stable=True)
            counts[following[order[len(following) - missing :]]] += 1
        return counts


def smallest(scores: Tensor, count: int) -> Tensor:
    """Bool of the shape of ``scores``, True for the ``count`` smallest; of equal ones, for the first in order.

    The scores are finite or infinite, not NaN. One selection, O(n): NumPy's on a CPU, which is the faster.
    """
    flat = scores.flatten()
    if not 0 < count < len(flat):
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    if flat.device.type == "cpu" and flat.dtype in (torch.float32, torch.float64):
        limit = torch.from_numpy(np.partition(flat.numpy(), count - 1)[count - 1 : count])
    else:
        # topk uses the whole of a GPU for one long row, which kthvalue does not
        limit = flat.topk(count, largest=False, sorted=False).values.amax()
    mask = flat < limit
    if missing := count - int(mask.sum()):
        mask[(flat == limit).nonzero()[:missing, 0]] = True
    return mask.view_as(scores)


def check_keep(keep: int, numel: int) -> int:
    """Check that ``keep`` is a count from 0 to ``numel``, and return it."""
    if isinstance(keep, bool) or not isinstance(keep, int):
        raise TypeError(f"expected the number of weights to keep, or an N:M pattern, got {keep!r}")
    if not 0 <= keep <= numel:
        raise ValueError(f"cannot keep {keep} of {numel} weights")
    return keep


def split_capped(
    count: int, sizes: Sequence[int], nonzero: Sequence[int], split: Callable[[int, Sequence[int]], Sequence[int]]
) -> list[int]:
    """Split ``count`` weights among parts by ``split(count, sizes)``; nonzero ones come before all zeros.

    What a part cannot take is split among the others.
    """
    if (zeros_kept := count - sum(nonzero)) > 0:
        zeros = [size - most for size, most in zip(sizes, nonzero, strict=True)]
        return [most + more for most, more in zip(nonzero, split_capped(zeros_kept, zeros, zeros, split), strict=True)]
    counts, waiting = list(nonzero), list(range(len(sizes)))
    while waiting:
        shares = dict(zip(waiting, split(count, [sizes[part] for part in waiting]), strict=True))
        full = {part for part, share in shares.items() if share > nonzero[part]}
        if not full:
            for part, share in shares.items():
                counts[part] = share
            break
        count -= sum(nonzero[part] for part in full)
        waiting = [part for part in waiting if part not in full]
    return counts


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

    Zeros are pruned first, so that a sparser level keeps earlier zeros.
    """

    #: of the level of a menu that was made last: its name, and the bytes of the matrix or the scales of its codes
    encoded: tuple[str, Tensor] | None = None

    def __init__(self, weight: Tensor):
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(f"expected a floating weight [out, in], got {tuple(weight.shape)} of {weight.dtype}")
        self.given = weight.detach()

    @cached_property
    def weight(self) -> Tensor:
        """The given weight in fp32 for computing, or in fp64 if it is; a copy of half precision, made when needed."""
        return self.given.to(torch.float64 if self.given.dtype == torch.float64 else torch.float32)

    @torch.no_grad()
    def prune(self, keep: int | NM | str) -> Pruned:
        """The matrix with ``keep`` weights, or with at most N in every M along its inputs.

        Raises:
            ValueError: for a count out of range, a text that is no pattern, or groups that do not fill a row.
            TypeError: for anything else.
        """
        pattern = NM.parse(keep) if isinstance(keep, str) else keep
        if isinstance(pattern, NM):
            if self.given.shape[1] % pattern.m:
                raise ValueError(
                    f"groups of {pattern.m} do not fill the {self.given.shape[1]} inputs of a matrix of shape "
                    f"{tuple(self.given.shape)}: use another pattern, or leave this matrix out"
                )
            weight, mask = self._prune_nm(pattern)
        else:
            weight, mask = self._prune_count(check_keep(pattern, self.given.numel()))
        # masked_fill also removes negative zeros and updates of pruned weights
        return Pruned(weight.to(self.given.dtype).masked_fill(~mask, 0), mask)

    @property
    @abstractmethod
    def scores(self) -> Tensor:
        """[out, in], >= 0: importance of each weight, comparable within the matrix."""

    @abstractmethod
    def _prune_count(self, keep: int) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _prune_nm(self, nm: NM) -> tuple[Tensor, Tensor]: ...


def zeros_first(scores: Tensor, weight: Tensor) -> Tensor:
    """Scores with -1 at zero weights, which are then pruned first: other scores are >= 0."""
    return torch.where(weight == 0, -1.0, scores)


def statistics_bytes(shape: tuple[int, int], scores: Iterable[str], samples: int) -> int:
    """Bytes of the :class:`LayerStatistics` of a matrix [out, in] for some scores, from ``samples`` of calibration."""
    (rows, columns), needs = shape, {need for score in scores for need in NEEDS[score]}
    return (
        8 * columns * ("square_sum" in needs)
        + 4 * columns**2 * ("gram" in needs)
        + 8 * min(GRADIENTS, samples) * rows * columns * ("gradients" in needs)
    )
