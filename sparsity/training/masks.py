"""N:M masks from scores, and detection of N:M patterns in tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from leanstep.kernels.nm.mask import nm_mask as nm_mask_kernel
from leanstep.sparsity.patterns import NM, as_pattern

PADS = ("refuse", "zero")
# axis -> the fewest dimensions of a weight that has it
_AXES = {"in": 1, "out": 2, "conv": 3}
# longest group to detect
_LONGEST = 128
# a pattern counts if its groups are this full, or if chance produces it in fewer than one of a million tensors
_FULL, _SURE = 0.99, math.log(1e6)
# a row longer than this does not count as one group
_ROW = 32


def axis_dim(shape: torch.Size, axis: str) -> int:
    """The dimension along which the groups of a weight of this shape lie.

    * ``"in"`` (default): the last dimension, over which a matrix (out, in) multiplies its inputs.
    * ``"out"``: the second last dimension: the outputs of a matrix (out, in), or the inputs of one stored (in, out).
    * ``"conv"``: dimension 1, the in-channels of a convolution's weight (out, in, ...), as hardware needs them.

    Raises:
        ValueError: for another axis, or a weight without that dimension.
    """
    if axis not in _AXES:
        raise ValueError(f"axis must be one of {', '.join(_AXES)}, got {axis!r}")
    if len(shape) < _AXES[axis]:
        raise ValueError(f"axis {axis!r} needs a weight of at least {_AXES[axis]} dimensions, got {tuple(shape)}")
    return {"in": len(shape) - 1, "out": len(shape) - 2, "conv": 1}[axis]


def nm_mask(scores: Tensor, pattern: NM | str, *, axis: str = "in", pad: str = "refuse") -> Tensor:
    """Keep the N largest scores of every M consecutive weights along an axis.

    Groups begin at the start of every row and never span two rows. Scores compare by magnitude, so a weight can be its
    own score. Ties go to the higher index. So masks are reproducible, and a layer of zeros keeps the last N weights of
    every group and can grow.

    Args:
        scores: any shape with that axis, floating; not written.
        pattern: N:M, as NM or text.
        axis: "in", "out" or "conv"; see :func:`axis_dim`.
        pad: treatment of a last group of r < M weights. "refuse": raise. "zero": pad the row with zeros, which are
            pruned first, so the group keeps its min(N, r) largest scores.

    Returns:
        bool, the shape of ``scores``, False for pruned weights; exactly N True entries per whole group. NaN counts as
        the largest score.

    Raises:
        ValueError: if M is larger than the row, or does not divide it (unless padded); for another axis or pad.
        TypeError: for scores without a floating dtype.
    """
    pattern, dim = as_pattern(pattern), axis_dim(scores.shape, axis)
    if pad not in PADS:
        raise ValueError(f"nm_mask: pad must be one of {PADS}, got {pad!r}")
    check_fit(scores.shape, pattern, dim, pad, "nm_mask: a weight")
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    fill_masks([scores], pattern, dim, [mask])
    return mask


def fill_masks(scores: Sequence[Tensor], pattern: NM, dim: int, out: Sequence[Tensor]) -> None:
    """Write the masks of tensors on one device, batching tensors of one size; a last group may be shorter than M."""
    for size in {score.shape[dim] for score in scores}:
        indices = [i for i, score in enumerate(scores) if score.shape[dim] == size]
        rest = size % pattern.m
        whole_groups = (0, size - rest, pattern.n, pattern.m)
        last_group = (size - rest, rest, min(pattern.n, rest), rest)
        for start, length, n, m in (whole_groups, last_group):
            if length:
                inputs, outputs = ([t[i].narrow(dim, start, length) for i in indices] for t in (scores, out))
                nm_mask_kernel(inputs, n, m, dim=dim, out=outputs)


def check_fit(shape: torch.Size, pattern: NM, dim: int, pad: str, where: str) -> None:
    """Raise ValueError for groups that are longer than a row, or do not fill it unless ``pad`` is "zero".

    Accepts empty rows.
    """
    size = shape[dim]
    where = f"{where} of shape {tuple(shape)} has {size} entries along dimension {dim}"
    if pattern.m > size > 0:
        raise ValueError(f"{where}, fewer than a group of {pattern} holds; take a pattern with a smaller m")
    if size % pattern.m and pad == "refuse":
        raise ValueError(
            f"{where}, which groups of {pattern.m} ({pattern}) do not fill; take a divisor of {size}, leave the weight "
            "out, or let the last group of each row be shorter with pad='zero'"
        )


def is_nm(weight: Tensor, pattern: NM | str, *, axis: str = "in") -> bool:
    """Whether no group of a weight or mask has more than N nonzeros; a short last group counts as padded with zeros."""
    return violations(weight, as_pattern(pattern), axis_dim(weight.shape, axis)) == 0


def group_dims(weight: Tensor) -> tuple[int, ...]:
    """The dimensions along which groups can lie: 1 or 0 of matrices and convolutions, 2 of a tensor of experts."""
    return (1, 0, 2) if weight.dim() == 3 else (1, 0)


def tightest(weight: Tensor, dim: int) -> NM | None:
    """The N:M of lowest density (then smallest M) that a tensor obeys along a dimension; None for a dense tensor."""
    candidates = _obeyed_patterns(weight, dim, min(weight.shape[dim], _LONGEST))
    return min(candidates, key=lambda pattern: Fraction(pattern.n, pattern.m), default=None)


def pattern_of(weight: Tensor, dim: int) -> NM | None:
    """The N:M that a tensor was pruned to; None for a dense tensor, or if its zeros look random.

    Random zeros also obey some pattern with long groups, such as 26:128. A pattern counts if nearly every group has N
    nonzeros, or if equally many random zeros would almost certainly violate it. Of several patterns, returns the one
    that random zeros are least likely to obey. Rows of a wide matrix with equally many zeros, as Wanda leaves them, do
    not count as groups.
    """
    size, numel = weight.shape[dim], weight.numel()
    density = int(weight.detach().count_nonzero()) / numel if numel else 1.0
    best, strongest = None, -1.0
    for pattern in _obeyed_patterns(weight, dim, min(size if size <= _ROW else size // 2, _LONGEST)):
        evidence = numel // pattern.m * _evidence(pattern, density, size)
        if evidence > strongest and (density >= _FULL * pattern.density or evidence > _SURE):
            best, strongest = pattern, evidence
    return best


def _obeyed_patterns(weight: Tensor, dim: int, longest: int) -> Iterator[NM]:
    """For each group length M that divides the dimension, the smallest N that the tensor obeys, if N < M."""
    nonzero = weight.detach().movedim(dim, -1) != 0
    if not weight.numel() or bool(nonzero.all()):
        return
    # group length -> nonzeros of every group, from those of its largest divisor; at most _LONGEST, so they fit a byte
    counts = {1: nonzero.contiguous().view(torch.uint8)}
    for m in range(2, longest + 1):
        if weight.shape[dim] % m == 0:
            divisor = max(length for length in counts if m % length == 0)
            parts = counts[divisor].unflatten(-1, (-1, m // divisor)).unbind(-1)
            counts[m] = parts[0] + parts[1]
            for part in parts[2:]:
                counts[m] += part
            pattern = NM(int(counts[m].max()), m)
            if not pattern.is_dense:
                yield pattern


def _evidence(pattern: NM, density: float, size: int) -> float:
    """-log(probability that a group obeys a pattern) if the row's nonzeros lie at random."""
    n, m, nonzeros = pattern.n, pattern.m, round(density * size)
    # hypergeometric: assumes the same number of nonzeros in every row, as Wanda leaves them
    ways = sum(math.comb(nonzeros, k) * math.comb(size - nonzeros, m - k) for k in range(n + 1))
    return max(0.0, math.log(math.comb(size, m)) - math.log(max(ways, 1)))


def violations(weight: Tensor, pattern: NM, dim: int) -> int:
    """Number of groups with more than N nonzeros (including NaN); a short last group counts as padded with zeros."""
    return int((group_counts(weight, pattern.m, dim) > pattern.n).sum())


def group_counts(weight: Tensor, m: int, dim: int) -> Tensor:
    """Nonzeros of every group of m along a dimension, int64 [other dimensions, groups]."""
    nonzero = weight.detach().movedim(dim, -1) != 0
    padded = torch.nn.functional.pad(nonzero, (0, -nonzero.shape[-1] % m))
    return padded.unflatten(-1, (-1, m)).sum(dim=-1)
