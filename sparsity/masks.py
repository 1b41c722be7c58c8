"""N:M masks of weights: along which axis groups lie, what happens to a short last group, and whether a mask is one."""

from __future__ import annotations

import torch
from torch import Tensor

from leanstep.kernels.nm.mask import nm_mask as nm_mask_kernel
from leanstep.sparsity.detect import violations
from leanstep.sparsity.patterns import NM, as_pattern

AXES = ("in", "out", "conv")


def axis_dim(shape: torch.Size, axis: str) -> int:
    """The dimension along which the groups of a weight of this shape lie.

    * ``"in"``: the last, the input dimension of a matrix (out, in), which products run over. The default.
    * ``"out"``: the one before it: the output dimension of a matrix, or the input dimension of one stored (in, out).
    * ``"conv"``: dimension 1, the in-channels of a convolution's weight (out, in, ...), as hardware wants them.

    Raises:
        ValueError: for another axis, or a weight that has no such dimension.
    """
    if axis not in AXES:
        raise ValueError(f"axis must be one of {', '.join(AXES)}, got {axis!r}")
    needed = {"in": 1, "out": 2, "conv": 3}[axis]
    if len(shape) < needed:
        raise ValueError(f"axis {axis!r} needs a weight of at least {needed} dimensions, got shape {tuple(shape)}")
    return {"in": len(shape) - 1, "out": len(shape) - 2, "conv": 1}[axis]


def nm_mask(
    scores: Tensor,
    pattern: NM | str,
    *,
    axis: str = "in",
    pad: str = "refuse",
    check: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Keep, of every M consecutive weights along an axis, the N of largest score.

    Groups begin at the start of every row and never straddle two. Scores count by magnitude, so a weight is its own
    score; of equal ones the higher index is kept, so that masks are reproducible, and a layer of zeros keeps the last N
    of every group and can grow.

    Args:
        scores: any shape with that axis, floating; not written.
        pattern: N:M, as NM or text.
        axis: "in", "out" or "conv"; see :func:`axis_dim`.
        pad: for a last group of r < M weights. "refuse": an error. "zero": the row counts as filled up with zeros,
            which are pruned first: the group keeps its min(N, r) largest.
        check: whether scores that are not finite are an error. Otherwise NaN counts as the largest.
        out: bool tensor of the same shape, to be overwritten. None: a new one.

    Returns:
        ``out``: bool, True where a weight is kept; exactly N per whole group.

    Raises:
        ValueError: where M is larger than the row, or does not divide it (unless padded); for another axis or pad; and
            with ``check``, for scores that are not finite.
        TypeError: for scores that are not of floating dtype.
    """
    pattern = as_pattern(pattern)
    dim = axis_dim(scores.shape, axis)
    size = scores.shape[dim]
    rest = _check_fit(scores.shape, pattern, axis, pad)
    if out is None:
        out = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for start, length, n, m in (
        (0, size - rest, pattern.n, pattern.m),
        (size - rest, rest, min(pattern.n, rest), rest),
    ):
        if length:
            part, kept = (t.narrow(dim, start, length) for t in (scores, out))
            nm_mask_kernel([part], n, m, dim=dim, check=check, out=[kept])
    return out


def _check_fit(shape: torch.Size, pattern: NM, axis: str, pad: str) -> int:
    """Weights in a short last group."""
    if pad not in ("refuse", "zero"):
        raise ValueError(f"nm_mask: pad must be 'refuse' or 'zero', got {pad!r}")
    size = shape[axis_dim(shape, axis)]
    if pattern.m > size > 0:
        raise ValueError(
            f"nm_mask: the pattern {pattern} has groups longer than a row: a weight of shape {tuple(shape)} has {size} "
            f"entries along axis {axis!r}"
        )
    rest = size % pattern.m
    if rest and pad == "refuse":
        raise ValueError(
            f"nm_mask: groups of {pattern.m} do not fill the {size} entries along axis {axis!r} of a weight of shape "
            f"{tuple(shape)}: {rest} are left over. Use pad='zero', another pattern, or another width."
        )
    return rest


def is_nm(weight: Tensor, pattern: NM | str, *, axis: str = "in") -> bool:
    """Whether no group of a weight or mask has more than N nonzeros; a short last group counts as padded with zeros."""
    return nm_violations(weight, pattern, axis=axis) == 0


def nm_violations(weight: Tensor, pattern: NM | str, *, axis: str = "in") -> int:
    """Number of groups with more than N nonzeros (NaN is one); a short last group counts as padded with zeros."""
    return violations(weight, as_pattern(pattern), axis_dim(weight.shape, axis))


def flip_rate(mask: Tensor, previous: Tensor) -> Tensor:
    """Fraction of entries in which two masks differ, fp32, 0-d.

    Hu et al., "Accelerating Transformer Pre-training with 2:4 Sparsity", arXiv 2404.01847, where it tells whether the
    decay of pruned weights is strong enough.
    """
    if mask.shape != previous.shape:
        raise ValueError(f"flip_rate: masks of shapes {tuple(mask.shape)} and {tuple(previous.shape)}")
    return (mask != previous).to(torch.float32).mean()
