"""Rules that say how dense each layer should be, from its shape, its depth or its outliers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from leanstep.pruning.allocate.apportion import Floats
from leanstep.pruning.score.layers import Layer

# of sparsity, in OWL: blocks lie within twice this of one another (arXiv 2310.05175, LLaMA-7B at 70 %)
OWL_SPREAD = 0.08
# a score is an outlier from this many times the mean on (ibid.)
OWL_MULTIPLE = 5.0


def erk(layers: Sequence[Layer]) -> Floats:
    """Densities of the Erdos-Renyi kernel rule, up to a factor: ``sum(shape) / prod(shape)``.

    References:
        Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery", arXiv 1911.11134, section 3.
    """
    return np.array([sum(layer.shape) / math.prod(layer.shape) for layer in layers])


def owl(layers: Sequence[Layer], outliers: Mapping[int, float] | Mapping[str, float], spread: float) -> Floats:
    """Densities of outlier weighed layerwise sparsity, up to a constant: ``2 spread (o - min) / (max - min)``.

    Args:
        layers: of which each has a block, or an entry by name.
        outliers: o, the percentage of outliers (:func:`outlier_ratio`), by block number or by layer name.
        spread: half the range of densities, lambda.

    Raises:
        ValueError: where a layer has no entry, or the spread is negative.

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
        scores: of a layer, or of all layers of a block, which are taken together; Wanda's in the paper.
        multiple: M.
    """
    parts = [scores] if isinstance(scores, Tensor) else list(scores)
    count = sum(part.numel() for part in parts)
    mean = sum(float(part.detach().sum(dtype=torch.float64)) for part in parts) / count
    return 100 * sum(int((part > multiple * mean).sum()) for part in parts) / count


def atp(layers: Sequence[Layer], sparsity: float, beta: float) -> Floats:
    """Densities that fall with depth by ``beta`` per block, up to a constant.

    Args:
        layers: of which each has a block.
        sparsity: S of the whole model.
        beta: 0 < beta <= min(2 S, 2 (1 - S)) / (L - 1) for L blocks; see :func:`atp_betas`.

    Raises:
        ValueError: for a layer outside of the blocks, or a beta that is out of range.

    References:
        Huang et al., "Determining Layer-wise Sparsity for Large Language Models Through a Theoretical Perspective",
        arXiv 2502.14770: s_i = S - beta (L - 1) / 2 + beta (i - 1).
    """
    if any(layer.block is None for layer in layers):
        raise ValueError("atp: sparsity rises with depth, so every layer needs the number of its block")
    depth = {block: i for i, block in enumerate(sorted({layer.block for layer in layers if layer.block is not None}))}
    largest = _largest_beta(sparsity, len(depth))
    if not 0 < beta <= largest * (1 + 1e-9):
        raise ValueError(f"atp: expected 0 < beta <= {largest:g} for {len(depth)} blocks at {sparsity:g}, got {beta}")
    return np.array([-beta * depth[layer.block] for layer in layers if layer.block is not None])


def atp_betas(sparsity: float, blocks: int, step: float = 0.002) -> list[float]:
    """The values of ``beta`` to choose from: multiples of ``step`` up to the largest one possible.

    Notes:
        The paper takes the one with the lowest perplexity on the test set. Choose on other text than the one that is
        reported.
    """
    largest = _largest_beta(sparsity, blocks)
    return [step * i for i in range(1, int(largest / step + 1e-9) + 1)] or [largest]


def _largest_beta(sparsity: float, blocks: int) -> float:
    if not 0 < sparsity < 1 or blocks < 2:
        raise ValueError(f"atp: expected a sparsity in (0, 1) and two blocks or more, got {sparsity} and {blocks}")
    return min(2 * sparsity, 2 * (1 - sparsity)) / (blocks - 1)
