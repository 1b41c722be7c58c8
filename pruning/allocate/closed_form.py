"""Allocation rules without a search: from the shapes, depths, outliers or scores of the layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from leanstep.pruning.allocate.knapsack import STATES, InfeasibleBudget, common_step, quantize, solve_knapsack
from leanstep.pruning.allocate.relaxed import MOST_GROUPS, RelaxedKnapsack
from leanstep.pruning.result import Allocation
from leanstep.pruning.score.targets import Layer

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# most slopes of ATP to try
_SLOPES = 9


def apportion(shares: Floats, total: int, lower: Ints, upper: Ints) -> Ints:
    """Round ``shares`` to integers within bounds that add up to ``total``.

    Rounds down, then adds one to the counts with the largest remainders (Hamilton's method). Ties go to the first.

    Args:
        shares: [n], between the bounds; its sum is ``total`` up to rounding.
        total: sum of the result.
        lower, upper: bounds [n].

    Raises:
        InfeasibleBudget: if the bounds exclude ``total``.
    """
    check_total(total, lower, upper)
    counts = np.clip(np.floor(shares + 1e-9).astype(np.int64), lower, upper)
    while (missing := total - int(counts.sum())) != 0:
        step = 1 if missing > 0 else -1
        room = counts < upper if step > 0 else counts > lower
        order = np.argsort(-step * (shares - counts), kind="stable")
        changed = order[room[order]][: abs(missing)]
        counts[changed] += step
    return counts


def scaled(base: Floats, numel: Ints, total: int, upper: Ints) -> Ints:
    """Counts in proportion to ``base * numel``: ``clip(c * base * numel)`` with the c that makes their sum ``total``.

    Args:
        base: [n], > 0: densities up to a common factor.
        numel, upper: [n], weights of each layer and bound of its count.
        total: sum of the result.
    """
    return _fitted(lambda c: c * base * numel, 0.0, float(1 / base.min()), total, upper)


def shifted(base: Floats, numel: Ints, total: int, upper: Ints) -> Ints:
    """Counts ``clip((base + c) * numel)`` with the c that makes their sum ``total``; arguments as :func:`scaled`."""
    return _fitted(lambda c: (base + c) * numel, float(-base.max()), float(1 - base.min()), total, upper)


def _fitted(counts_at: Callable[[float], Floats], low: float, high: float, total: int, upper: Ints) -> Ints:
    """Bisect the argument of the non-decreasing ``counts_at`` until its clipped counts sum to ``total``; round them."""
    for _ in range(200):
        middle = (low + high) / 2
        if np.clip(counts_at(middle), 0, upper).sum() < total:
            low = middle
        else:
            high = middle
    return apportion(np.clip(counts_at(high), 0, upper), total, np.zeros_like(upper), upper)


def check_total(total: int, lower: Ints, upper: Ints) -> None:
    """Raise InfeasibleBudget for a total that the bounds exclude."""
    least, most = int(lower.sum()), int(upper.sum())
    if not least <= total <= most:
        raise InfeasibleBudget(f"{total} weights cannot be kept: the bounds allow {least} to {most}", least, most)


# lambda of OWL: sparsities of blocks differ by at most twice this (arXiv 2310.05175, LLaMA-7B at 70 %)
OWL_SPREAD = 0.08
# M of OWL: scores above M times the mean are outliers (ibid.)
OWL_MULTIPLE = 5.0


def counts_by_rule(
    layers: Sequence[Layer],
    method: str,
    keep: int,
    upper: Ints,
    *,
    scores: Mapping[str, Tensor] | None,
    outliers: Mapping[int, float] | Mapping[str, float] | None,
    spread: float,
    beta: float | None,
) -> Ints:
    """Weights that each layer keeps by a method of :func:`leanstep.pruning.allocate`; they add up to ``keep``."""
    fit = np.array([layer.numel for layer in layers], dtype=np.int64), keep, upper
    if method == "uniform":
        return scaled(np.ones(len(layers)), *fit)
    if method == "erk":
        return scaled(erk(layers), *fit)
    if method == "owl":
        assert outliers is not None
        return shifted(owl(layers, outliers, spread), *fit)
    if method == "atp":
        assert beta is not None
        return shifted(atp(layers, beta), *fit)
    assert scores is not None
    names = [layer.name for layer in layers]
    if method == "lamp":
        weights = scores
        scores = ComputedScores(names, lambda name: lamp_scores(weights[name]))
    return counts_above_threshold(names, scores, keep, upper)


def erk(layers: Sequence[Layer]) -> Floats:
    """Densities of the Erdos-Renyi kernel rule, up to a factor: ``sum(shape) / prod(shape)``.

    References:
        Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery", arXiv 1911.11134, section 3.
    """
    return np.array([sum(layer.shape) / math.prod(layer.shape) for layer in layers])


def owl(layers: Sequence[Layer], outliers: Mapping[int, float] | Mapping[str, float], spread: float) -> Floats:
    """Densities of outlier weighed layerwise sparsity, up to a constant: ``2 spread (o - min) / (max - min)``.

    Args:
        layers: each has a block, or an entry by name.
        outliers: o, the percentage of outliers (:func:`outlier_ratio`), by block number or by layer name.
        spread: half the range of densities, lambda.

    Raises:
        ValueError: for a layer without an entry, or a negative spread.

    References:
        Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", arXiv 2310.05175.
    """
    if spread < 0:
        raise ValueError(f"owl: expected a spread >= 0, got {spread}")
    table: dict[int | str | None, float] = {}
    table.update(outliers.items())
    ratios = [table.get(layer.name, table.get(layer.block)) for layer in layers]
    without = [layer.name for layer, ratio in zip(layers, ratios, strict=True) if ratio is None]
    if without:
        raise ValueError(f"owl: no outlier ratio for {without[:5]}: give one by block number or by name")
    o = np.array(ratios, dtype=np.float64)
    width = o.max() - o.min()
    return np.zeros(len(o)) if width == 0 else (o - o.min()) / width * 2 * spread


def outlier_ratio(scores: Tensor | Sequence[Tensor], multiple: float = OWL_MULTIPLE) -> float:
    """Percentage of scores that are more than ``multiple`` times their mean.

    Args:
        scores: of a layer, or of all layers of a block together; the paper uses Wanda's.
        multiple: M.
    """
    tensors = [scores] if isinstance(scores, Tensor) else list(scores)
    count = sum(tensor.numel() for tensor in tensors)
    mean = sum(float(tensor.detach().sum(dtype=torch.float64)) for tensor in tensors) / count
    return 100 * sum(int((tensor > multiple * mean).sum()) for tensor in tensors) / count


def atp(layers: Sequence[Layer], beta: float) -> Floats:
    """Densities that fall with depth by ``beta`` per block, up to a constant; :func:`check_beta` has the conditions.

    References:
        Huang et al., "Determining Layer-wise Sparsity for Large Language Models Through a Theoretical Perspective",
        arXiv 2502.14770: s_i = S - beta (L - 1) / 2 + beta (i - 1).
    """
    depth = {block: i for i, block in enumerate(sorted({layer.block for layer in layers if layer.block is not None}))}
    return np.array([-beta * depth[layer.block] for layer in layers if layer.block is not None])


def check_beta(layers: Sequence[Layer], sparsity: float, beta: float) -> None:
    """Refuse a layer outside of the blocks, and all but ``0 < beta <= min(2 S, 2 (1 - S)) / (L - 1)`` for L blocks."""
    blocks = {layer.block for layer in layers}
    if None in blocks:
        raise ValueError("atp: sparsity rises with depth, so every layer needs the number of its block")
    largest = _largest_beta(sparsity, len(blocks))
    if not 0 < beta <= largest * (1 + 1e-9):
        raise ValueError(f"atp: expected 0 < beta <= {largest:g} for {len(blocks)} blocks at {sparsity:g}, got {beta}")


def atp_betas(sparsity: float, blocks: int, step: float = 0.002) -> list[float]:
    """Candidates for ``beta``: multiples of ``step`` up to the largest slope, or that slope alone.

    The largest slope keeps every block's sparsity in 0 .. 1: ``min(2 S, 2 (1 - S)) / (blocks - 1)``.

    Raises:
        ValueError: for a sparsity S outside (0, 1), or fewer than two blocks.

    Notes:
        The paper takes the one with the lowest perplexity on the test set. Do not choose on the text you report.
    """
    largest = _largest_beta(sparsity, blocks)
    return [step * i for i in range(1, int(largest / step + 1e-9) + 1)] or [largest]


def atp_betas_tried(sparsity: float, blocks: int) -> list[float]:
    """Those of :func:`atp_betas` that pruning tries: at most 9, evenly spaced."""
    betas = atp_betas(sparsity, blocks)
    return betas[:: -(-len(betas) // _SLOPES)]


def in_blocks(layers: Sequence[Layer]) -> list[Layer]:
    """Give layers outside all blocks the number of the preceding block, or of the first block."""
    block, numbered = min((layer.block for layer in layers if layer.block is not None), default=0), []
    for layer in layers:
        block = block if layer.block is None else layer.block
        numbered.append(replace(layer, block=block))
    return numbered


def _largest_beta(sparsity: float, blocks: int) -> float:
    if not 0 < sparsity < 1 or blocks < 2:
        raise ValueError(f"atp: expected a sparsity in (0, 1) and two blocks or more, got {sparsity} and {blocks}")
    return min(2 * sparsity, 2 * (1 - sparsity)) / (blocks - 1)


# nonnegative fp32 numbers sort like their 31 bits. Each pass reads some of these: (bits below, bits read)
_DIGITS = ((20, 11), (10, 10), (0, 10))
_CHUNK = 1 << 22


def counts_above_threshold(names: Sequence[str], scores: Mapping[str, Tensor], keep: int, upper: Ints) -> Ints:
    """Number of each layer's weights among the ``keep`` largest scores of all layers.

    The threshold is the score at which the counts, clipped to ``upper``, add up to ``keep``. Ties at the threshold are
    shared in proportion to each layer's ties.

    Args:
        scores: by name, any shape, >= 0; compared in fp32. Each layer's are read three times, one layer at a
            time; a mapping may compute them on access.
        keep: sum of the result.
        upper: [layers], most weights of each.

    Raises:
        InfeasibleBudget: if the bounds exclude ``keep``.
        ValueError: for scores that are negative or not finite.

    Notes:
        Exact, without sorting or joining the scores: each of three passes finds some bits of the threshold. Memory:
        16 KiB per layer.
    """
    check_total(keep, np.zeros_like(upper), upper)
    above = np.zeros((len(names), 1), dtype=np.int64)  # weights whose bits exceed the prefix
    prefix = 0
    for below, bits in _DIGITS:
        counts = np.stack([_histogram(name, scores[name], prefix, below, bits) for name in names])
        # weights per layer with these bits >= b, for every b, within the bounds
        reached = np.concatenate([above + counts[:, ::-1].cumsum(axis=1)[:, ::-1], above], axis=1)
        bounded = np.minimum(reached, upper[:, None])
        # the largest b that keeps enough weights
        digit = int(np.flatnonzero(bounded.sum(axis=0) >= keep)[-1])
        if digit == counts.shape[1]:
            return apportion(bounded[:, -1].astype(np.float64), keep, np.zeros_like(upper), upper)
        above = reached[:, digit + 1 : digit + 2]
        prefix = prefix << bits | digit
    sure, tied = bounded[:, digit + 1], bounded[:, digit] - bounded[:, digit + 1]
    share = (keep - int(sure.sum())) / max(int(tied.sum()), 1)
    return apportion(sure + tied * share, keep, sure, sure + tied)


def _histogram(name: str, scores: Tensor, prefix: int, below: int, bits: int) -> Ints:
    """Histogram of the next ``bits`` bits of the scores that begin with the bits ``prefix``."""
    counts = np.zeros(1 << bits, dtype=np.int64)
    for chunk in _chunks(name, scores):
        high_bits = chunk.view(torch.int32) >> below
        digits = high_bits[high_bits >> bits == prefix] & ((1 << bits) - 1)
        counts += torch.bincount(digits, minlength=1 << bits).cpu().numpy()
    return counts


def _chunks(name: str, scores: Tensor) -> Iterator[Tensor]:
    flat = scores.detach().flatten()
    for start in range(0, len(flat), _CHUNK):
        chunk = flat[start : start + _CHUNK].to(torch.float32)
        if not bool(((chunk >= 0) & (chunk < torch.inf)).all()):
            raise ValueError(f"scores of {name!r} must be finite and >= 0 to be compared with those of other layers")
        yield chunk + 0.0  # -0 and 0 have one score


class ComputedScores(Mapping[str, Tensor]):
    """Scores of layers, computed on every access and never stored.

    Args:
        compute: name -> scores.
    """

    def __init__(self, names: Iterable[str], compute: Callable[[str], Tensor]):
        self._names, self._compute = list(names), compute

    def __getitem__(self, name: str) -> Tensor:
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def lamp_scores(weights: Tensor) -> Tensor:
    """LAMP scores of a layer: ``w^2 / sum of v^2 over all v with |v| >= |w|``, fp64, flattened.

    Of weights of equal magnitude, the later one is the larger. The largest weight of a layer has score 1, so that no
    layer is pruned completely.

    Args:
        weights: any shape; weights, or other scores to square.

    References:
        Lee, Park, Mo, Ahn, Shin, "Layer-adaptive Sparsity for the Magnitude-based Pruning", arXiv 2010.07611,
        equation 1.
    """
    squares = weights.detach().flatten().to(torch.float64).square()
    ordered, order = squares.sort(stable=True)
    larger = ordered.flip(0).cumsum(0).flip(0)
    # a layer of zeros: 0 / 0 is 0
    scores = torch.where(ordered > 0, ordered / larger, 0.0)
    return torch.empty_like(scores).scatter_(0, order, scores)


def snap(allocation: Allocation, levels: Mapping[str, tuple[Sequence[int], Sequence[str]]]) -> Allocation:
    """Move an allocation of arbitrary counts to the nearest N:M patterns.

    Minimizes the sum of ``numel * (difference of densities)^2`` without increasing the total number of weights.

    Args:
        allocation: of any method.
        levels: counts and patterns of each layer, for instance :func:`leanstep.pruning.nm_levels`.

    Raises:
        InfeasibleBudget: if the sparsest patterns keep more weights than the allocation.
    """
    names = sorted(levels)
    costs = [np.array(levels[name][0], dtype=np.float64) for name in names]
    losses = [(c - allocation.counts[name]) ** 2 / allocation.numel[name] for name, c in zip(names, costs, strict=True)]
    total = float(sum(allocation.counts[name] for name in names))
    least, most = (sum(float(pick(cost)) for cost in costs) for pick in (np.min, np.max))
    if total < least:
        raise InfeasibleBudget(
            f"snap: {total:g} weights cannot be kept: the patterns keep {least:g} or more", least, most
        )
    if len(names) > MOST_GROUPS:
        level_indices = RelaxedKnapsack(costs, losses).choose(total)
    else:
        unit = max(common_step(costs), math.ceil((min(total, most) - least) / (2 * STATES)), 1)
        whole, units = quantize(costs, min(total, most), unit)
        level_indices = solve_knapsack(whole, losses, units).choose()
    level_by_name = dict(zip(names, level_indices, strict=True))
    counts = {n: int(levels[n][0][level_by_name[n]]) if n in levels else c for n, c in allocation.counts.items()}
    patterns = {name: levels[name][1][level_by_name[name]] for name in counts if name in levels}
    cost = float(sum(counts.values()))
    return replace(allocation, counts=counts, patterns=patterns, budget_kind="params", cost=cost, predicted=None)
