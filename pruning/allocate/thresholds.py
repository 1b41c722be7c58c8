"""One threshold over the scores of all layers: how many weights each layer keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from leanstep.pruning.allocate.apportion import apportion, check_total

Ints = npt.NDArray[np.int64]

# nonnegative fp32 numbers are ordered as their 31 bits are, which are looked at in turn: (bits below, bits)
_DIGITS = ((20, 11), (10, 10), (0, 10))
_CHUNK = 1 << 22


def counts_above_threshold(
    names: Sequence[str], scores: Mapping[str, Tensor], keep: int, lower: Ints, upper: Ints
) -> Ints:
    """Weights that each layer keeps when the ``keep`` largest scores of all layers are kept.

    A layer that the threshold would leave fewer than ``lower`` or more than ``upper`` weights has that many, and the
    threshold makes up for it. Weights that tie at the threshold are shared out in proportion.

    Args:
        names: of the layers.
        scores: by name, any shape, >= 0; compared in fp32. Each layer's are asked for three times and used one
            layer at a time, so that a mapping may compute them when asked.
        keep: weights that are kept, of all layers.
        lower, upper: [layers].

    Raises:
        InfeasibleBudget: where the bounds exclude ``keep``.
        ValueError: for scores that are negative or not finite.

    Notes:
        Exact, without sorting or joining the scores: three passes find the threshold's bits, the first, the middle and
        the last ones. 16 KiB per layer.
    """
    check_total(keep, lower, upper)
    above = np.zeros((len(names), 1), dtype=np.int64)  # weights with larger bits than those looked at
    prefix = 0
    for below, bits in _DIGITS:
        counts = np.stack([_histogram(name, scores[name], prefix, below, bits) for name in names])
        # weights per layer with these bits >= b, for every b, within the bounds
        reached = np.concatenate([above + counts[:, ::-1].cumsum(axis=1)[:, ::-1], above], axis=1)
        found = np.clip(reached, lower[:, None], upper[:, None])
        # the largest b for which they are enough
        digit = int(np.flatnonzero(found.sum(axis=0) >= keep)[-1])
        if digit == counts.shape[1]:
            return apportion(found[:, -1].astype(np.float64), keep, lower, upper)
        above = reached[:, digit + 1 : digit + 2]
        prefix = prefix << bits | digit
    sure, tied = found[:, digit + 1], found[:, digit] - found[:, digit + 1]
    share = (keep - int(sure.sum())) / max(int(tied.sum()), 1)
    return apportion(sure + tied * share, keep, sure, sure + tied)


def _histogram(name: str, scores: Tensor, prefix: int, below: int, bits: int) -> Ints:
    """How often each value of some bits occurs, among the scores whose bits before them are ``prefix``."""
    counts = np.zeros(1 << bits, dtype=np.int64)
    for chunk in _chunks(name, scores):
        found = chunk.view(torch.int32) >> below
        digits = found[found >> bits == prefix] & ((1 << bits) - 1)
        counts += torch.bincount(digits, minlength=1 << bits).cpu().numpy()
    return counts


def _chunks(name: str, scores: Tensor) -> Iterator[Tensor]:
    flat = scores.detach().flatten()
    for start in range(0, len(flat), _CHUNK):
        chunk = flat[start : start + _CHUNK].to(torch.float32)
        if not bool(((chunk >= 0) & (chunk < torch.inf)).all()):
            raise ValueError(f"scores of {name!r} must be finite and >= 0 to be compared with those of other layers")
        yield chunk + 0.0  # -0 and 0 have one score


class LampScores(Mapping[str, Tensor]):
    """LAMP scores of layers, computed when asked for: ``w^2 / sum of v^2 over all v with |v| >= |w|`` of the layer.

    Of weights of one magnitude, those that come later count as larger. The largest weight of a layer has score 1, so
    that no layer is ever pruned whole.

    Args:
        weights: by name: weights, or other scores whose squares take their place.

    References:
        Lee, Park, Mo, Ahn, Shin, "Layer-adaptive Sparsity for the Magnitude-based Pruning", arXiv 2010.07611,
        equation 1.
    """

    def __init__(self, weights: Mapping[str, Tensor]):
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        squares = self._weights[name].detach().flatten().to(torch.float64).square()
        ordered, order = squares.sort(stable=True)
        behind = ordered.flip(0).cumsum(0).flip(0)
        # a layer of zeros: 0 / 0 is 0
        found = torch.where(ordered > 0, ordered / behind, 0.0)
        return torch.empty_like(found).scatter_(0, order, found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
