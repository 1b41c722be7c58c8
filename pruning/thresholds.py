"""One threshold over the scores of all layers: how many weights each layer keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from leanstep.pruning.apportion import apportion, check_total

Ints = npt.NDArray[np.int64]

# a nonnegative fp32 number is ordered as its bits are: its upper half and its lower half are looked at in turn
_BITS = 16
_CHUNK = 1 << 22


def counts_above_threshold(
    names: Sequence[str], scores: Mapping[str, Tensor], keep: int, lower: Ints, upper: Ints
) -> Ints:
    """Weights that each layer keeps when the ``keep`` largest scores of all layers are kept.

    A layer that the threshold would leave fewer than ``lower`` or more than ``upper`` weights has that many, and the
    threshold makes up for it. Weights that tie at the threshold are shared out in proportion.

    Args:
        names: of the layers.
        scores: by name, any shape, >= 0; compared in fp32. Every layer's are asked for twice, and used one layer at a
            time, so that a mapping may compute them when asked.
        keep: weights that are kept, of all layers.
        lower, upper: [layers].

    Raises:
        InfeasibleBudget: where the bounds exclude ``keep``.
        ValueError: for scores that are negative or not finite.

    Notes:
        Exact, without sorting or joining the scores: two passes count how often each upper and lower half of the bits
        occurs. 512 KiB per layer.
    """
    check_total(keep, lower, upper)
    none = np.zeros((len(names), 1), dtype=np.int64)

    def at_least(histogram: Ints, above: Ints) -> Ints:
        """Weights per layer (rows) with bits >= b, for every b, and within the bounds."""
        counts = above + histogram[:, ::-1].cumsum(axis=1)[:, ::-1]
        return np.clip(np.concatenate([counts, above], axis=1), lower[:, None], upper[:, None])

    # the largest b for which enough weights have at least b
    high = np.stack([_histogram(name, scores[name], None) for name in names])
    found = at_least(high, none)
    first = int(np.flatnonzero(found.sum(axis=0) >= keep)[-1])
    if first == high.shape[1]:
        return apportion(found[:, -1].astype(np.float64), keep, lower, upper)
    above = high[:, first + 1 :].sum(axis=1, keepdims=True)
    low = np.stack([_histogram(name, scores[name], first) for name in names])
    found = at_least(low, above)
    second = int(np.flatnonzero(found.sum(axis=0) >= keep)[-1])
    sure, tied = found[:, second + 1], found[:, second] - found[:, second + 1]
    missing = keep - int(sure.sum())
    share = missing / max(int(tied.sum()), 1)
    return apportion(sure + tied * share, keep, np.maximum(lower, sure), np.minimum(upper, sure + tied))


def _histogram(name: str, scores: Tensor, upper_half: int | None) -> Ints:
    """How often each upper half of the bits occurs; or each lower half, where the upper one is as given."""
    counts = np.zeros(1 << _BITS, dtype=np.int64)
    for chunk in _chunks(name, scores):
        bits = chunk.view(torch.int32)
        high = bits >> _BITS
        halves = high if upper_half is None else bits[high == upper_half] & ((1 << _BITS) - 1)
        counts += torch.bincount(halves, minlength=1 << _BITS).cpu().numpy()
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
