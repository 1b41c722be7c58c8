"""Square-root Sinkhorn row and column scales of lists of matrices."""

from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from leanstep.kernels._backend import choose
from leanstep.kernels.cpp_impl._build import TYPES, call
from leanstep.kernels.op import EVERYWHERE, op, triton_module
from leanstep.kernels.reference.matrices import sinkhorn as reference
from leanstep.kernels.reference.matrices.sinkhorn import finish_columns


class Scales(NamedTuple):
    """Row scales [B, m] and column scales [B, n] of every matrix, as views of two flat buffers."""

    rows: list[Tensor]
    cols: list[Tensor]
    flat_rows: Tensor
    flat_cols: Tensor


def as_batch(mat: Tensor) -> Tensor:
    """[m, n] or [..., m, n] as a batch [B, m, n]."""
    return mat.flatten(0, -3) if mat.dim() > 2 else mat.unsqueeze(0)


def sinkhorn(mats: Sequence[Tensor], num_iters: int, *, end_with_rows: bool = False) -> Scales:
    """Compute scales r, c such that diag(r) G diag(c) is the L-th square-root Sinkhorn iterate of G.

    One iteration scales every row to norm sqrt(n), then every column to norm sqrt(m) (Scetbon, Ma, Gong, Meeds,
    "Gradient Multi-Normalization for Stateless and Scalable LLM Training", arXiv 2502.06742, SR-Sinkhorn). Rows are
    dimension -2. After L iterations the norms of the columns are exact. Zero rows and columns get scale 0.

    Args:
        mats: matrices [..., m, n] of one device, any strides, bf16, fp16, fp32 or fp64; not written. Leading
            dimensions are independent matrices (fused experts).
        num_iters: L >= 0. Without any iteration, r = 1 / max|row| and c = 1.
        end_with_rows: scale the rows once more after the last iteration.

    Returns:
        :class:`Scales` in fp32 (fp64 if a matrix is in fp64). A matrix with a non-finite entry has NaN in all its
        columns.

    Raises:
        BackendError: the requested backend cannot run here.

    Notes:
        Sums are fp32. Rows are scaled before they are squared (in C++, if squares would leave the range), so finite
        gradients of any size work. In fp32, an entry of 1e-13 times the largest in its row counts as zero. Needs memory
        for a few rows, for copies of matrices whose columns are not adjacent and, on a GPU, for partial column sums.
        Every iteration reads every matrix once. On a CPU, only the first one reads a matrix below 4 MB from memory.
    """
    if not mats:
        empty = torch.zeros(0, dtype=torch.float32, device="cpu")
        return Scales([], [], empty, empty)
    if torch.compiler.is_compiling():
        return _scales(mats, *_op(list(mats), num_iters, end_with_rows))
    return _run(mats, num_iters, end_with_rows)


def _scales(mats: Sequence[Tensor], flat_rows: Tensor, flat_cols: Tensor) -> Scales:
    """Split the flat buffers into views: [..., m] and [..., n] per matrix."""
    rows = flat_rows.split([m.shape[:-1].numel() for m in mats])
    cols = flat_cols.split([m.shape[:-2].numel() * m.shape[-1] for m in mats])
    return Scales(
        [r.view(m.shape[:-1]) for r, m in zip(rows, mats, strict=True)],
        [c.view(*m.shape[:-2], m.shape[-1]) for c, m in zip(cols, mats, strict=True)],
        flat_rows,
        flat_cols,
    )


def new_scales(mats: Sequence[Tensor]) -> Scales:
    """Allocate scales: 0 for rows, 1 for columns."""
    first = mats[0]
    wide = torch.float64 if any(m.dtype == torch.float64 for m in mats) else torch.float32
    rows = torch.zeros(sum(m.shape[:-1].numel() for m in mats), dtype=wide, device=first.device)
    cols = torch.ones(sum(m.shape[:-2].numel() * m.shape[-1] for m in mats), dtype=wide, device=first.device)
    return _scales(mats, rows, cols)


def sinkhorn_of_rows(
    mats: Sequence[Tensor], num_iters: int, rows_total: Sequence[int], *, end_with_rows: bool = False
) -> Generator[tuple[Tensor, str, str], None, Scales]:
    """:func:`sinkhorn` of shards of rows, as a generator, so that the caller can reduce several lists at once.

    Triton on a GPU, plain torch on a CPU, whatever :func:`use_backend` says.

    ``rows_total``: the rows of each matrix before sharding. Yields (flat buffer, "sum", "rows") once per iteration,
    with this shard's share of the column means. The caller sums the buffer over the shards of rows, in place.
    """
    backend = choose("sinkhorn", mats[0].device, *dict.fromkeys(m.dtype for m in mats)).backend
    scales = new_scales(mats)
    for sums in _iterate_together(mats, scales, num_iters, end_with_rows, rows_total, backend):
        yield sums, "sum", "rows"
    return scales


def sinkhorn_of_blocks(
    mats: Sequence[Tensor],
    num_iters: int,
    rows_total: Sequence[int],
    cols_total: Sequence[int],
    *,
    end_with_rows: bool = False,
) -> Generator[tuple[Tensor, str, str], None, Scales]:
    """:func:`sinkhorn` of shards of columns, or of rows and columns, as a generator; plain torch on every device.

    ``rows_total``, ``cols_total``: the rows and columns of each matrix before sharding. Yields flat buffers for the
    caller to reduce in place. First (buffer, "max", "columns") with the largest entry of every row. Then, for every
    half-iteration, (buffer, "sum", "columns") with the row means, or (buffer, "sum", "rows") with the column means. The
    last word says over which shards to reduce: those of the columns, or those of the rows.
    """
    scales = new_scales(mats)
    batches = [as_batch(m) for m in mats]
    cols = _scales(batches, scales.flat_rows, scales.flat_cols).cols
    row_means, col_means = torch.zeros_like(scales.flat_rows), torch.zeros_like(scales.flat_cols)
    row_means_of, col_means_of = _scales(batches, row_means, col_means)[:2]
    for batch, largest in zip(batches, row_means_of, strict=True):
        if batch.numel():
            largest.copy_(batch.abs().amax(dim=-1))
    yield row_means, "max", "columns"
    prescale = reference.inverse_of_largest(row_means)
    prescales = _scales(batches, prescale, scales.flat_cols).rows
    for iteration in range(num_iters + end_with_rows):
        for batch, means, r0, c, n in zip(batches, row_means_of, prescales, cols, cols_total, strict=True):
            means.copy_(reference.row_half(reference.scaled_squares(batch, r0), c, n))
        yield row_means, "sum", "columns"
        row_means.copy_(reference.reciprocal_or_zero(row_means))
        scales.flat_rows.copy_(reference.finish_rows(prescale, row_means))
        if iteration == num_iters:
            break
        for batch, inverse, means, r0, m in zip(
            batches, row_means_of, col_means_of, prescales, rows_total, strict=True
        ):
            means.copy_(reference.column_half(reference.scaled_squares(batch, r0), inverse, m))
        yield col_means, "sum", "rows"
        scales.flat_cols.copy_(finish_columns(col_means))
    return scales


@torch.no_grad()
def _run(mats: Sequence[Tensor], num_iters: int, end_with_rows: bool) -> Scales:
    backend = choose("sinkhorn", mats[0].device, *dict.fromkeys(m.dtype for m in mats)).backend
    scales = new_scales(mats)
    if backend == "cpp":
        _cpp_sinkhorn(mats, scales, num_iters, end_with_rows)
    elif backend == "triton":
        rows_total = [m.shape[-2] for m in mats]
        for _ in _iterate_together(mats, scales, num_iters, end_with_rows, rows_total, backend):
            pass  # the matrices are whole: there is nothing to reduce
    else:
        for mat, rows, cols in zip(mats, scales.rows, scales.cols, strict=True):
            if mat.numel():
                r, c = reference.sinkhorn(as_batch(mat), num_iters, end_with_rows=end_with_rows)
                rows.copy_(r.view(rows.shape))
                cols.copy_(c.view(cols.shape))
    return scales


def _cpp_sinkhorn(mats: Sequence[Tensor], scales: Scales, num_iters: int, end_with_rows: bool) -> None:
    """Call the C++ kernel once per dtype. Matrices whose columns are not adjacent are copied first."""
    lists_of: dict[torch.dtype, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
    for mat, rows, cols in zip(mats, scales.rows, scales.cols, strict=True):
        if mat.numel():
            batch = as_batch(mat if mat.stride(-1) == 1 or mat.shape[-1] == 1 else mat.contiguous())
            stacks = (batch, rows.view(batch.shape[:-1]), cols.view(batch.shape[0], -1))
            for tensors, stack in zip(lists_of.setdefault(mat.dtype, ([], [], [])), stacks, strict=True):
                tensors.extend(stack)
    for dtype, (matrices, rows_out, cols_out) in lists_of.items():
        sizes = ([m.shape[0] for m in matrices], [m.shape[1] for m in matrices], [m.stride(0) for m in matrices])
        arguments = (len(matrices), matrices, *sizes, rows_out, cols_out, num_iters, end_with_rows)
        call("matrices/sinkhorn", "sinkhorn", {"MAT": TYPES[dtype]}, *arguments)


def _iterate_together(
    mats: Sequence[Tensor],
    scales: Scales,
    num_iters: int,
    end_with_rows: bool,
    rows_total: Sequence[int],
    backend: str,
) -> Generator[Tensor, None, None]:
    """Iterate all matrices together, with one launch per iteration on a GPU. Yield the column means of each iteration.

    The caller sums the means of row shards over the shards, in place.
    """
    batches = [as_batch(m) for m in mats]
    if num_iters + end_with_rows == 0:
        for batch, rows in zip(batches, _scales(batches, scales.flat_rows, scales.flat_cols).rows, strict=True):
            if batch.numel():
                rows.copy_(reference.row_prescale(batch))
    for iteration in range(num_iters + end_with_rows):
        first = iteration == 0
        if backend == "triton":
            colmeans = triton_module(__name__).sinkhorn_pass(
                batches, scales.flat_rows, scales.flat_cols, rows_total, first
            )
        else:
            colmeans = _reference_pass(batches, scales, rows_total, first)
        if iteration == num_iters:  # the closing row half-iteration needs no columns
            break
        yield colmeans
        scales.flat_cols.copy_(finish_columns(colmeans))


def _reference_pass(batches: Sequence[Tensor], scales: Scales, rows_total: Sequence[int], first: bool) -> Tensor:
    colmeans = torch.zeros_like(scales.flat_cols)
    means = _scales(batches, scales.flat_rows, colmeans).cols
    rows, cols = _scales(batches, scales.flat_rows, scales.flat_cols)[:2]
    for batch, r, c, out, total in zip(batches, rows, cols, means, rows_total, strict=True):
        if batch.numel():
            new_rows, new_means = reference.sinkhorn_pass(batch, r, c, rows_total=total, first=first)
            r.copy_(new_rows)
            out.copy_(new_means)
    return colmeans


@op("sinkhorn", EVERYWHERE, fake=lambda mats, *_: new_scales(mats)[2:])
def _op(mats: list[Tensor], num_iters: int, end_with_rows: bool) -> tuple[Tensor, Tensor]:
    scales = _run(mats, num_iters, end_with_rows)
    return scales.flat_rows, scales.flat_cols
