"""Matrices with zeros as their nonzero values and a mask of one bit per entry."""

from collections.abc import Sequence

import torch
from torch import Tensor

from leanstep.kernels.reference.sparse import bitmask as reference


def bitmask_pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Store the nonzeros of a matrix in row order, and which entries they are, as bits.

    Args:
        weight: [rows, columns], floating, with at least one column; not written.

    Returns:
        values [nonzeros] of the weight's dtype; mask int32 [rows, ceil(columns / 32)], where bit j of word k stands for
        column 32 k + j and bits beyond the last column are 0; offsets int64 [rows + 1], where row r has the values
        ``offsets[r]`` to ``offsets[r + 1]``.

    Raises:
        ValueError: for anything but a floating matrix with columns.

    Notes:
        -0 and NaN are values, so :func:`bitmask_unpack` returns the same bits. A matrix of b bits per entry takes
        ``density * b + 1`` bits per entry and 8 bytes per row. Needs scratch memory for a million entries.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.shape[1]:
        raise ValueError(
            f"bitmask_pack: expected a floating matrix [rows, columns], got {weight.dtype} {list(weight.shape)}; "
            "flatten the leading dimensions of a stack of matrices"
        )
    return reference.pack(weight.detach())


def bitmask_quantize(values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Round the values of a packed matrix to 8 bits, with one scale per row.

    ``scales[r] = max |values of row r| / 127`` and ``codes = round(value / scales[r])``: symmetric, to nearest, ties to
    even.

    Args:
        values: [nonzeros], floating and finite. offsets: int64 [rows + 1], both from :func:`bitmask_pack`.

    Returns:
        codes int8 [nonzeros] and scales fp32 [rows]. A row without values has the scale 0. A value below half a scale
        has the code 0 and stays in the mask.

    Raises:
        ValueError: for integer values, values that are not finite, or offsets that do not fit.
    """
    if values.dim() != 1 or not values.is_floating_point():
        raise ValueError(f"bitmask_quantize: expected floating values [n], got {values.dtype} {list(values.shape)}")
    _check_offsets(values, offsets, "bitmask_quantize")
    if not values.isfinite().all():
        raise ValueError(
            f"bitmask_quantize: {int((~values.isfinite()).sum())} of {len(values)} values are not finite; "
            "they have no code of 8 bits, so keep this matrix in its dtype"
        )
    return reference.quantize(values, offsets)


def bitmask_unpack(
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    shape: Sequence[int],
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Undo :func:`bitmask_pack`: return the matrix of ``shape`` (rows, columns).

    Args:
        values, mask, offsets: as from :func:`bitmask_pack`, or codes of :func:`bitmask_quantize` as ``values``.
        shape: rows and columns.
        scales: fp32 [rows], for codes only.
        dtype: dtype of the result; default: that of floating values, fp32 for codes.

    Returns:
        The matrix: the same bits that were packed, or ``code * scale`` rounded once to ``dtype``.

    Raises:
        ValueError: as :func:`bitmask_validate`, before the matrix is allocated.
    """
    bitmask_validate(values, mask, offsets, shape, scales)
    rows, columns = shape
    dtype = dtype or (values if scales is None else scales).dtype
    weight = torch.empty(rows, columns, dtype=dtype, device=values.device)
    for begin, end in reference.row_tiles(rows, columns):
        reference.unpack_rows(values, mask, offsets, scales, weight[begin:end], begin, end)
    return weight


def bitmask_validate(
    values: Tensor, mask: Tensor, offsets: Tensor, shape: Sequence[int], scales: Tensor | None = None
) -> None:
    """Check that the parts of a packed matrix fit together; every reader of a file calls this once.

    Args:
        values, mask, offsets, scales: as in :func:`bitmask_unpack`. shape: rows and columns.

    Raises:
        ValueError: for wrong dtypes, shapes or devices; offsets that do not start at 0, fall, or do not end at the
            number of values; a row whose mask has more or fewer bits than values; bits beyond the last column; codes
            without scales, values with scales, and scales that are negative or not finite.

    Notes:
        Reads mask and offsets, not the values. Needs 12 bytes of scratch memory per word of the mask.
    """
    name = "bitmask_validate"
    if len(shape) != 2 or min(shape) < 0 or not shape[1]:
        raise ValueError(f"{name}: expected a shape (rows, columns) with columns, got {tuple(shape)}")
    check_parts(values, mask, offsets, shape[1], scales, name)
    if len(mask) != shape[0]:
        raise ValueError(f"{name}: expected a mask of {shape[0]} rows, got {list(mask.shape)}: a damaged file")
    _check_offsets(values, offsets, name)
    counts, bits = offsets.diff(), reference.row_counts(mask)
    if not torch.equal(counts, bits):
        row = int((counts != bits).nonzero()[0])
        raise ValueError(f"{name}: row {row} has {int(counts[row])} values and {int(bits[row])} bits: a damaged file")
    used = shape[1] % reference.WORD
    if used and (mask[:, -1] >> used != 0).any():
        row = int((mask[:, -1] >> used != 0).nonzero()[0])
        raise ValueError(f"{name}: row {row} has bits beyond its {shape[1]} columns: a damaged file")
    if scales is not None and not (scales.isfinite() & (scales >= 0)).all():
        row = int((~(scales.isfinite() & (scales >= 0))).nonzero()[0])
        raise ValueError(f"{name}: row {row} has the scale {scales[row].item()}, which is no finite number from 0 on")


def check_parts(values: Tensor, mask: Tensor, offsets: Tensor, columns: int, scales: Tensor | None, name: str) -> None:
    """Raise for dtypes, shapes and devices of a packed matrix that do not match; reads no element."""
    if values.dim() != 1 or not (values.is_floating_point() if scales is None else values.dtype is torch.int8):
        expected = "floating values [n] without scales, or int8 values [n] with scales"
        raise ValueError(
            f"{name}: expected {expected}, got {values.dtype} {list(values.shape)} "
            f"{'without' if scales is None else 'with'} scales"
        )
    if mask.dtype is not torch.int32 or mask.dim() != 2 or mask.shape[1] != reference.words(columns):
        raise ValueError(
            f"{name}: expected an int32 mask [rows, {reference.words(columns)}] for {columns} columns, got "
            f"{mask.dtype} {list(mask.shape)}"
        )
    if offsets.dtype is not torch.int64 or offsets.shape != (len(mask) + 1,):
        raise ValueError(f"{name}: expected int64 offsets [{len(mask) + 1}], got {offsets.dtype} {list(offsets.shape)}")
    if scales is not None and (scales.dtype is not torch.float32 or scales.shape != (len(mask),)):
        raise ValueError(f"{name}: expected fp32 scales [{len(mask)}], got {scales.dtype} {list(scales.shape)}")
    devices = {part.device for part in (values, mask, offsets, scales) if part is not None}
    if len(devices) > 1:
        raise ValueError(f"{name}: expected all parts on one device, got {sorted(map(str, devices))}")


def _check_offsets(values: Tensor, offsets: Tensor, name: str) -> None:
    if offsets.dtype is not torch.int64 or offsets.dim() != 1 or not len(offsets):
        raise ValueError(f"{name}: expected int64 offsets [rows + 1], got {offsets.dtype} {list(offsets.shape)}")
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != len(values):
        raise ValueError(f"{name}: expected offsets from 0 to {len(values)}, got {first} to {last}: a damaged file")
    # offsets are compared, not subtracted: differences of damaged ones may overflow
    falls = offsets[1:] < offsets[:-1]
    if falls.any():
        row = int(falls.nonzero()[0])
        raise ValueError(
            f"{name}: offsets of row {row} fall from {int(offsets[row])} to {int(offsets[row + 1])}: a damaged file"
        )
