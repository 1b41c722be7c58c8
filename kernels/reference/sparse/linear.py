"""Products with matrices of values and bit masks, in plain torch: the definition."""

import torch
from torch import Tensor

from leanstep.kernels.reference.sparse.bitmask import row_tiles, unpack_rows


def bitmask_linear(
    x: Tensor, values: Tensor, mask: Tensor, offsets: Tensor, bias: Tensor | None, scales: Tensor | None
) -> Tensor:
    """``x W^T + bias`` for x [t, columns], in fp32 (fp64 for fp64), with a tile of W in memory at a time."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, dtype, (tokens, columns), rows = x.to(wide), x.dtype, x.shape, len(mask)
    out = x.new_empty(tokens, rows, dtype=dtype)
    for begin, end in row_tiles(rows, columns):
        tile = x.new_empty(end - begin, columns)
        unpack_rows(values, mask, offsets, scales, tile, begin, end)
        sums = x @ tile.T
        out[:, begin:end] = sums if bias is None else sums + bias[begin:end]
    return out


def bitmask_linear_backward(
    grad: Tensor, values: Tensor, mask: Tensor, offsets: Tensor, columns: int, scales: Tensor | None
) -> Tensor:
    """``grad W`` for grad [t, rows], in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    sums = grad.new_zeros(len(grad), columns, dtype=wide)
    for begin, end in row_tiles(len(mask), columns):
        tile = sums.new_empty(end - begin, columns)
        unpack_rows(values, mask, offsets, scales, tile, begin, end)
        sums.addmm_(grad[:, begin:end].to(wide), tile)
    return sums.to(grad.dtype)
