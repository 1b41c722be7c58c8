"""Matrices with zeros as their nonzero values and a mask of one bit per entry."""

from collections.abc import Sequence

import torch
from torch import Tensor

from leanstep.kernels.reference.sparse import bitmask as reference

# dtypes of codes: of 8 bits, and of 4 bits, two in a byte
CODES = (torch.int8, torch.uint8)


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


def bitmask_quantize(
    values: Tensor, offsets: Tensor, mask: Tensor | None = None, *, bits: int = 8, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round the values of a packed matrix to 8 bits with one scale per row, or to 4 bits with one per block of a row.

    ``scale = max |values| / 127`` over a row, or ``max |values| / 7``, rounded to bf16, over 64 columns of
    a row. ``code = round(value / scale)``: symmetric, to nearest, ties to even.

    Args:
        values: [nonzeros], floating and finite. offsets: int64 [rows + 1]. mask: int32 [rows, words], for 4 bits.
            All from :func:`bitmask_pack`.
        bits: 8 or 4. scales: in place of those above, as they are returned; a value beyond the largest code has that.

    Returns:
        8 bits: codes int8 [nonzeros] and scales fp32 [rows]. 4 bits: codes uint8 [ceil(nonzeros / 2)], two in a byte,
        the first one in the lower half, in two's complement; scales bf16 [rows, ceil(columns / 64)]. Where there is no
        value, the scale is 0. A value below half a scale has the code 0 and stays in the mask.

    Raises:
        ValueError: for other bits, integer values, values that are not finite, or offsets and masks that do not fit.
    """
    name = "bitmask_quantize"
    if bits not in (4, 8):
        raise ValueError(f"{name}: expected 4 or 8 bits, got {bits}")
    if values.dim() != 1 or not values.is_floating_point():
        raise ValueError(f"{name}: expected floating values [n], got {values.dtype} {list(values.shape)}")
    _check_offsets(values, offsets, name)
    if not values.isfinite().all():
        raise ValueError(
            f"{name}: {int((~values.isfinite()).sum())} of {len(values)} values are not finite; "
            f"they have no code of {bits} bits, so keep this matrix in its dtype"
        )
    if bits == 8:
        return reference.quantize(values, offsets, scales)
    if mask is None or mask.dtype is not torch.int32 or mask.dim() != 2 or len(mask) + 1 != len(offsets):
        got = "none" if mask is None else f"{mask.dtype} {list(mask.shape)}"
        raise ValueError(f"{name}: 4 bits need the int32 mask [{len(offsets) - 1}, words] of the matrix, got {got}")
    _check_counts(offsets, mask, name)
    return reference.quantize_int4(values, mask, scales)


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
        scales: of the codes, from :func:`bitmask_quantize`.
        dtype: dtype of the result; default: that of floating values, fp32 for codes.

    Returns:
        The matrix: the same bits that were packed, or ``code * scale`` rounded once to ``dtype``.

    Raises:
        ValueError: as :func:`bitmask_validate`, before the matrix is allocated.
    """
    bitmask_validate(values, mask, offsets, shape, scales)
    rows, columns = shape
    dtype = dtype or (values.dtype if scales is None else torch.float32)
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
            number of values; a row whose mask has more or fewer bits than values; bits beyond the last column; the
            8-bit code -128; codes without scales, values with scales, and scales that are negative or not finite.

    Notes:
        Reads mask, offsets and 8-bit codes, not other values. Needs 12 bytes of scratch memory per word of the mask.
    """
    name = "bitmask_validate"
    if len(shape) != 2 or min(shape) < 0 or not shape[1]:
        raise ValueError(f"{name}: expected a shape (rows, columns) with columns, got {tuple(shape)}")
    check_parts(values, mask, offsets, shape[1], scales, name)
    if len(mask) != shape[0]:
        raise ValueError(f"{name}: expected a mask of {shape[0]} rows, got {list(mask.shape)}: a damaged file")
    _check_offsets(values, offsets, name)
    _check_counts(offsets, mask, name)
    used = shape[1] % reference.WORD
    if used and (mask[:, -1] >> used != 0).any():
        row = int((mask[:, -1] >> used != 0).nonzero()[0])
        raise ValueError(f"{name}: row {row} has bits beyond its {shape[1]} columns: a damaged file")
    if values.dtype is torch.uint8 and int(offsets[-1]) % 2 and int(values[-1]) > 15:
        raise ValueError(f"{name}: a code follows the last of {int(offsets[-1])}: a damaged file")
    if values.dtype is torch.int8 and len(values) and int(values.min()) == -128:
        index = int((values == -128).nonzero()[0])
        raise ValueError(f"{name}: value {index} has the code -128, expected -127 to 127: a damaged file")
    if scales is not None and not (scales.isfinite() & (scales >= 0)).all():
        at = (~(scales.isfinite() & (scales >= 0))).nonzero()[0].tolist()
        scale = scales[tuple(at)].item()
        raise ValueError(f"{name}: row {at[0]} has the scale {scale}, which is no finite number from 0 on")


def check_parts(values: Tensor, mask: Tensor, offsets: Tensor, columns: int, scales: Tensor | None, name: str) -> None:
    """Raise for dtypes, shapes and devices of a packed matrix that do not match; reads no element."""
    if values.dim() != 1 or not (values.is_floating_point() if scales is None else values.dtype in CODES):
        expected = "floating values [n] without scales, or int8 or uint8 values [n] with scales"
        raise ValueError(
            f"{name}: expected {expected}, got {values.dtype} {list(values.shape)} "
            f"{'without' if scales is None else 'with'} scales"
        )
    if mask.dtype is not torch.int32 or mask.dim() != 2 or mask.shape[1] != reference.words(columns):
        raise ValueError(
            f"{name}: expected an int32 mask [rows, {reference.words(columns)}] for {columns} columns, got "
            f"{mask.dtype} {list(mask.shape)}"
        )
    if offsets.dtype is not torch.int64 or offsets.shape != (mask.shape[0] + 1,):
        raise ValueError(
            f"{name}: expected int64 offsets [{mask.shape[0] + 1}], got {offsets.dtype} {list(offsets.shape)}"
        )
    if scales is not None:
        dtype, shape = torch.float32, [mask.shape[0]]
        if values.dtype is torch.uint8:
            dtype, shape = torch.bfloat16, [mask.shape[0], reference.blocks(columns)]
        if scales.dtype is not dtype or list(scales.shape) != shape:
            raise ValueError(
                f"{name}: expected {dtype} scales {shape} of {values.dtype} values, got {scales.dtype} "
                f"{list(scales.shape)}"
            )
    devices = {part.device for part in (values, mask, offsets, scales) if part is not None}
    if len(devices) > 1:
        raise ValueError(f"{name}: expected all parts on one device, got {sorted(map(str, devices))}")


def _check_offsets(values: Tensor, offsets: Tensor, name: str) -> None:
    if offsets.dtype is not torch.int64 or offsets.dim() != 1 or not len(offsets):
        raise ValueError(f"{name}: expected int64 offsets [rows + 1], got {offsets.dtype} {list(offsets.shape)}")
    first, last = int(offsets[0]), int(offsets[-1])
    # two codes of 4 bits are in a byte
    stored, least = len(values), len(values)
    if values.dtype is torch.uint8:
        stored, least = 2 * stored, max(0, 2 * stored - 1)
    if first != 0 or not least <= last <= stored:
        raise ValueError(f"{name}: expected offsets from 0 to {stored}, got {first} to {last}: a damaged file")
    # offsets are compared, not subtracted: differences of damaged ones may overflow
    falls = offsets[1:] < offsets[:-1]
    if falls.any():
        row = int(falls.nonzero()[0])
        raise ValueError(
            f"{name}: offsets of row {row} fall from {int(offsets[row])} to {int(offsets[row + 1])}: a damaged file"
        )


def _check_counts(offsets: Tensor, mask: Tensor, name: str) -> None:
    counts, bits = offsets.diff(), reference.row_counts(mask)
    if not torch.equal(counts, bits):
        row = int((counts != bits).nonzero()[0])
        raise ValueError(f"{name}: row {row} has {int(counts[row])} values and {int(bits[row])} bits: a damaged file")
