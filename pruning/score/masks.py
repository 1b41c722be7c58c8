"""Masks with an exact number of weights, from scores that are ranked once and asked for many levels."""

from __future__ import annotations

import torch
from torch import Tensor

SCOPES = ("matrix", "row")


class Ranking:
    """The order in which the weights of a matrix are pruned.

    Args:
        scores: [out, in], floating, finite; the smallest are pruned first. Of equal ones the lower index is.
        scope: "matrix" compares all weights. "row" compares within rows and prunes as many in each: of P weights,
            P // out in every row, and one more in P % out rows, those where the next weight has the lowest score.

    Raises:
        ValueError: for another scope, or scores that are not a finite matrix.

    Notes:
        Keeps 8 bytes per weight ("matrix"), or 4 and the scores ("row"). Each mask then costs one pass.
    """

    def __init__(self, scores: Tensor, scope: str = "matrix"):
        if scope not in SCOPES:
            raise ValueError(f"Ranking: scope must be one of {', '.join(SCOPES)}, got {scope!r}")
        if scores.dim() != 2 or not bool(scores.isfinite().all()):
            raise ValueError(f"Ranking: expected finite scores [out, in], got shape {tuple(scores.shape)}")
        self.shape, self.scope = scores.shape, scope
        if scope == "matrix":
            self._order = scores.flatten().argsort(stable=True)
        else:
            order = scores.argsort(dim=1, stable=True)
            self._sorted = scores.gather(1, order)
            places = torch.arange(scores.shape[1], dtype=torch.int32, device=scores.device)
            self._rank = torch.empty_like(order, dtype=torch.int32).scatter_(1, order, places.expand_as(order))

    def mask(self, keep: int) -> Tensor:
        """Bool [out, in], True for the ``keep`` weights that are pruned last."""
        rows, columns = self.shape
        pruned = rows * columns - check_keep(keep, rows * columns)
        if self.scope == "matrix":
            mask = torch.ones(rows * columns, dtype=torch.bool, device=self._order.device)
            mask[self._order[:pruned]] = False
            return mask.view(rows, columns)
        each, more = divmod(pruned, rows)
        first_kept = torch.full((rows, 1), each, dtype=torch.int32, device=self._rank.device)
        if more:
            first_kept[self._sorted[:, each].argsort(stable=True)[:more]] += 1
        return self._rank >= first_kept


def check_keep(keep: int, numel: int) -> int:
    """``keep``, if it is a count from 0 to ``numel``."""
    if isinstance(keep, bool) or not isinstance(keep, int):
        raise TypeError(f"expected the number of weights to keep, or an N:M pattern, got {keep!r}")
    if not 0 <= keep <= numel:
        raise ValueError(f"cannot keep {keep} of {numel} weights")
    return keep
