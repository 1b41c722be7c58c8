"""The monomials of a polynomial feature map: their order, and the parent of each.

The features are the monomials x^a of degree 0 to g in d variables, each divided by sqrt(a!). Thus the features of two
vectors have the inner product ``sum over t <= g of (x . y)^t / t!``. They are ordered by degree, then by their last
variable. A monomial of degree t with last variable i is x_i times its parent, a monomial of degree t - 1 in the
variables up to i.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# with more features, the tables and states of one head take gigabytes
MAX_FEATURES = 1 << 20


def feature_count(dim: int, degree: int) -> int:
    """Monomials of degree 0 to ``degree`` in ``dim`` variables: ``C(dim + degree, degree)``."""
    return math.comb(dim + degree, degree)


@dataclass(frozen=True, eq=False)
class PolyTables:
    """The feature map of one (d, degree), on one device; see :func:`poly_tables`.

    Attributes:
        parent, last, weight: [k]; feature f > 0 is ``weight * feature[parent] * x[last]``; feature 0 is 1.
        degrees: [k], the degree of each feature.
        up, lift: [features of degree < g, d]; the derivative of feature ``up[b, i]`` in x_i is ``lift[b, i] *
            feature[b]``. With these tables, gradients are gathered instead of scattered.
        weight32, lift32: ``weight`` and ``lift`` in fp32.
        starts: index of each degree's first feature, then k.
    """

    parent: Tensor
    last: Tensor
    weight: Tensor
    degrees: Tensor
    up: Tensor
    lift: Tensor
    starts: tuple[int, ...]
    weight32: Tensor
    lift32: Tensor


@functools.lru_cache(maxsize=16)
def poly_tables(dim: int, degree: int, device: torch.device) -> PolyTables:
    """The tables of all monomials up to ``degree`` in ``dim`` variables. Integers are int32, weights fp64."""
    parent, last, counts_last = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)], [np.zeros(1, np.int64)]
    starts = [0, 1]
    for t in range(1, degree + 1):
        # the number of monomials of degree t - 1 in variables up to i
        prefix = [math.comb(i + t - 1, t - 1) for i in range(dim)]
        local = np.concatenate([np.arange(size) for size in prefix])
        ends = np.repeat(np.arange(dim), prefix)
        parent.append(local + starts[t - 1])
        last.append(ends)
        counts_last.append(1 + np.where((last[t - 1][local] == ends) & (t > 1), counts_last[t - 1][local], 0))
        starts.append(starts[t] + len(local))
    up, lift = _ups(dim, degree, parent, last, starts)
    weight = 1 / np.sqrt(np.maximum(np.concatenate(counts_last), 1))
    degrees = np.repeat(np.arange(degree + 1), np.diff(starts))

    def integers(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(device)

    weights, lifts = torch.from_numpy(weight).to(device), torch.from_numpy(lift).to(device)
    return PolyTables(
        parent=integers(np.concatenate(parent)),
        last=integers(np.concatenate(last)),
        weight=weights,
        degrees=integers(degrees),
        up=integers(up),
        lift=lifts,
        starts=tuple(starts),
        weight32=weights.float(),
        lift32=lifts.float(),
    )


def _ups(
    dim: int, degree: int, parent: list[np.ndarray], last: list[np.ndarray], starts: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """``up`` and ``lift``: index of each feature of degree < g times each variable, and root of the new exponent."""
    variables = np.arange(dim)[None, :]
    ups, counts = [], []
    for t in range(degree):
        local = np.arange(starts[t + 1] - starts[t])[:, None]
        # index of the first monomial of degree t + 1 that ends in variable i
        begins = starts[t + 1] + np.array([math.comb(i + t, t + 1) for i in range(dim)])
        direct = begins[None, :] + local
        if t == 0:
            ups.append(direct)
            counts.append(np.zeros((1, dim), np.int64))
            continue
        above, end = parent[t] - starts[t - 1], last[t][:, None]
        # times an earlier variable, the product keeps its last variable; its parent is the parent times that variable
        inner = ups[t - 1][above] - starts[t]
        ups.append(np.where(variables >= end, direct, begins[end] + inner))
        counts.append(counts[t - 1][above] + (variables == end))
    if not ups:
        return np.zeros((0, dim), np.int64), np.zeros((0, dim))
    return np.concatenate(ups), np.sqrt(np.concatenate(counts) + 1.0)
