"""The fast path of sparse windows on a CPU: compiled loops that go block by block over all rows.

What they gather from, or add to, is then one block of a dense vector, which stays in the cache; row by row, it is the
whole vector, and takes three times as long. Blocks are shared out among the threads, so no two threads add to the same
element, and results repeat bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leanstep.kernels._compile import variant
from leanstep.kernels.reference import sparse_window as reference
from leanstep.kernels.reference.sparse_window import SparseLayout

_MIN_BLOCKS = 32


def row_dots(values: Tensor, indices: Tensor, vector: Tensor, layout: SparseLayout) -> Tensor:
    """:func:`leanstep.kernels.reference.sparse_window.row_dots`: [m, k] and [numel] to fp64 [m]."""
    vector = vector.to(torch.float32).contiguous()
    blocks = _whole_blocks(values, layout)
    split = blocks * layout.block
    total = reference.row_dots(*_rest(values, indices, layout, blocks), vector[split:], _rest_layout(layout, blocks))
    if blocks:
        dots = variant(_dots_of_blocks, (values.dtype, layout.per_block), [])
        parts = dots(*_blocks(values, indices, layout, blocks), _starts(layout, blocks), vector)
        total += parts.sum(dim=0, dtype=torch.float64)
    return total


def linear_combination(
    values: Tensor, indices: Tensor, coefficients: Tensor, layout: SparseLayout, out: Tensor
) -> None:
    """:func:`leanstep.kernels.reference.sparse_window.linear_combination`: [m, k] and [m] to ``out`` [numel]."""
    blocks = _whole_blocks(values, layout)
    split = blocks * layout.block
    rest = _rest_layout(layout, blocks)
    reference.linear_combination(*_rest(values, indices, layout, blocks), coefficients, rest, out[split:])
    if blocks:
        out[:split] = 0.0
        add = variant(_add_blocks, (values.dtype, layout.per_block), [])
        wide = coefficients.to(torch.float32).clone()
        add(*_blocks(values, indices, layout, blocks), wide, _starts(layout, blocks), out)
        torch.autograd.graph.increment_version([out])


def _dots_of_blocks(values: Tensor, indices: Tensor, starts: Tensor, vector: Tensor) -> Tensor:
    """Sums over every block of every row, [blocks, m]."""
    gathered = vector[starts[:, None, None] + indices]
    return (values.to(vector.dtype) * gathered).sum(dim=2)


def _add_blocks(values: Tensor, indices: Tensor, coefficients: Tensor, starts: Tensor, out: Tensor) -> None:
    places = starts[:, None, None] + indices
    out.index_put_((places,), values.to(out.dtype) * coefficients[None, :, None], accumulate=True)


def _whole_blocks(values: Tensor, layout: SparseLayout) -> int:
    """Number of blocks that the compiled loops take; 0 where they do not pay, or might be shared out otherwise."""
    enough = layout.full_blocks >= max(_MIN_BLOCKS, torch.get_num_threads())
    return layout.full_blocks if enough and values.shape[0] > 1 and layout.per_block > 1 else 0


def _blocks(values: Tensor, indices: Tensor, layout: SparseLayout, blocks: int) -> list[Tensor]:
    """Values and indices as [blocks, m, per_block]."""
    shape = (blocks, values.shape[0], layout.per_block)
    found = []
    for tensor in (values.contiguous(), indices.contiguous()):
        strides = (layout.per_block, layout.k, 1)
        # not a torch view, see `alias`
        cut = torch.empty(0, dtype=tensor.dtype)
        cut.set_(tensor.untyped_storage(), tensor.storage_offset(), shape, strides)
        for dim in range(2):
            torch._dynamo.mark_dynamic(cut, dim)
        found.append(cut)
    return found


def _starts(layout: SparseLayout, blocks: int) -> Tensor:
    starts = torch.arange(0, blocks * layout.block, layout.block)
    torch._dynamo.mark_dynamic(starts, 0)
    return starts


def _rest(values: Tensor, indices: Tensor, layout: SparseLayout, blocks: int) -> tuple[Tensor, Tensor]:
    done = blocks * layout.per_block
    return values[:, done:], indices[:, done:]


def _rest_layout(layout: SparseLayout, blocks: int) -> SparseLayout:
    return layout._replace(numel=layout.numel - blocks * layout.block)
