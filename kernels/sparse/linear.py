"""Products with matrices of values and bit masks."""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels._backend import Support, on_remembered_backend, remember_backend, requested_backend, why_not
from leanstep.kernels.cpp_impl._build import SPARSE_TYPES
from leanstep.kernels.cpp_impl.sparse import linear as cpp
from leanstep.kernels.op import implementation, is_traced, op, without_autocast
from leanstep.kernels.reference.sparse import linear as reference
from leanstep.kernels.sparse.bitmask import check_parts

# entries of a matrix with 60 % zeros from which one token's product is faster than the dense one (docs/measured/
# sparsity.md): where the call no longer decides; without AVX-512 by the bits of a value, with 4 in no matrix measured
_LEAST_ENTRIES = 2**18
_LEAST_ENTRIES_AVX2 = {16: _LEAST_ENTRIES, 8: _LEAST_ENTRIES, 32: 2**25, 4: math.inf}


def why_slower(matrices: Collection[tuple[int, ...]]) -> str | None:
    """Why one token takes longer with these matrices packed than dense, on this CPU; None where it does not.

    A matrix is its rows, its columns and the bits of a stored value. Judged by those that have most of the entries,
    from times measured with 60 % zeros.
    """
    if matrices and (reason := why_not("bitmask_linear", "cpp", torch.device("cpu"))) is not None:
        return f"the products run in plain torch ({reason})"
    where, by_bits = ("", {}) if cpp.has_avx512() else ("without AVX-512 ", _LEAST_ENTRIES_AVX2)
    rows = [(r * c, by_bits.get(bits, _LEAST_ENTRIES), f"{r} x {c}", bits) for r, c, bits in matrices]
    small = [row for row in rows if row[0] < row[1]]
    share = sum(row[0] for row in small) / max(1, sum(row[0] for row in rows))
    if share <= 0.5:
        return None
    _size, least, largest, bits = max(small)
    if least == math.inf:
        return f"{where}values of {bits} bits save memory and no time"
    return (
        f"{where}leaving out zeros saves time in matrices of {least / 1e6:.1f} million entries of {bits} bits and "
        f"more, and {share:.0%} of the entries here are in smaller ones, of at most {largest}"
    )


def bitmask_linear(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    columns: int,
    bias: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """``x W^T + bias`` for a matrix W from :func:`bitmask_pack`.

    Args:
        x: [..., columns], floating; not written.
        values: [nonzeros] of x's dtype; or int8 or uint8 codes, from :func:`bitmask_quantize`.
        mask: int32 [rows, ceil(columns / 32)]. offsets: int64 [rows + 1].
        columns: columns of W.
        bias: [rows] of x's dtype, or None.
        scales: of the codes, from :func:`bitmask_quantize`.

    Returns:
        [..., rows] of x's dtype. Differentiable in x and bias; values are constants.

    Raises:
        ValueError: for dtypes, shapes or devices that do not match, or values that require a gradient.
        BackendError: the requested backend cannot run here.
        RuntimeError: in an export to ONNX.

    Notes:
        Checks no element of mask and offsets; :func:`bitmask_validate` does. Computes in fp32 (fp64 for fp64) and
        rounds once. Up to 16 tokens (24 on a CPU) read the packed matrix. More multiply expanded tiles, never all of
        W: tiles of 48 rows in the cache on a CPU with AVX-512, with a copy of at most 1024 tokens of x; elsewhere tiles
        of about a million entries for the BLAS, with codes rounded to x's dtype. Weights of 4 bits are rounded to bf16
        in tiles for x in bf16. bf16 dot products of a CPU take subnormal numbers for zero.
        ``benchmarks/sparsity/bitmask.py`` measures where this is faster than the dense product.
    """
    _check(x, values, mask, offsets, columns, bias, scales)
    return _run(x.reshape(-1, columns), values, mask, offsets, bias, scales).view(*x.shape[:-1], mask.shape[0])


class RepeatedProduct:
    """:func:`bitmask_linear` with one matrix: after a first call, few tokens skip the checks of its parts.

    Checks and conversions of arguments take longer than the product of one token with a small matrix.
    """

    _prepared: cpp.Prepared | None = None

    def __call__(self, x: Tensor, *arguments: Any) -> Tensor:
        """As :func:`bitmask_linear`, with all arguments by position."""
        parts, prepared = (*arguments[:3], *arguments[4:]), self._prepared
        if _is_recorded(x, *parts) or parts[0].requires_grad:
            return bitmask_linear(x, *arguments)
        if prepared is not None and requested_backend() in ("auto", "cpp") and prepared.fits(x, parts):
            return prepared(x)
        out = bitmask_linear(x, *arguments)
        if _module(x) is cpp and all(part is None or part.is_contiguous() for part in parts):
            self._prepared = cpp.Prepared(x, parts)
        return out


def _check(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    columns: int,
    bias: Tensor | None,
    scales: Tensor | None,
) -> None:
    name = "bitmask_linear"
    check_parts(values, mask, offsets, columns, scales, name)
    if not x.dim() or x.shape[-1] != columns or not columns:
        raise ValueError(f"{name}: expected x [..., {columns}] with columns, got {list(x.shape)}")
    if not x.is_floating_point() or x.device != values.device or (scales is None and x.dtype != values.dtype):
        raise ValueError(
            f"{name}: expected x and values of one floating dtype (or codes) on one device, got {x.dtype} on "
            f"{x.device} and {values.dtype} on {values.device}"
        )
    if bias is not None and (bias.shape != (mask.shape[0],) or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(
            f"{name}: expected a bias [{mask.shape[0]}] of {x.dtype} on {x.device}, got {bias.dtype} "
            f"{list(bias.shape)} on {bias.device}"
        )
    if values.requires_grad:
        raise ValueError(
            f"{name}: values have no gradient; detach them, or train the matrix of bitmask_unpack with a mask"
        )


def _empty(x: Tensor, values: Tensor, mask: Tensor, *rest: Any) -> Tensor:
    """The result without values. Raises RuntimeError in an export to ONNX, also where that only traces."""
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "bitmask_linear: ONNX has no product with a packed matrix; export a model with dense weights, whose folder "
            "`leanstep export --format dense` writes"
        )
    return x.new_empty(x.shape[0], mask.shape[0])


def _module(x: Tensor) -> Any:
    return implementation("bitmask_linear", x, reference, __name__, cpp)


@op(
    "bitmask_linear_backward",
    fake=lambda grad, values, mask, offsets, columns, scales: grad.new_empty(grad.shape[0], columns),
    vmap_rows=True,
)
@without_autocast
@torch.no_grad()
def _run_backward(
    grad: Tensor, values: Tensor, mask: Tensor, offsets: Tensor, columns: int, scales: Tensor | None
) -> Tensor:
    if not grad.numel():
        return grad.new_zeros(grad.shape[0], columns)
    values, mask, offsets = values.contiguous(), mask.contiguous(), offsets.contiguous()
    return _module(grad).bitmask_linear_backward(grad, values, mask, offsets, columns, scales)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *matrix, _bias, scales = inputs
    ctx.save_for_backward(*matrix, scales)
    ctx.columns = x.shape[1]
    remember_backend(ctx)


@on_remembered_backend
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *matrix, scales = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.leanstep.bitmask_linear_backward(grad, *matrix, ctx.columns, scales)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.sum(dim=0)
    return grad_x, None, None, None, grad_bias, None


def _is_recorded(x: Tensor, values: Tensor, mask: Tensor, offsets: Tensor, bias: Tensor | None, *_: Any) -> bool:
    """Whether autograd or a tracer has to see the op."""
    return is_traced(x) or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))


@op(
    "bitmask_linear",
    Support(types=SPARSE_TYPES, kernel="sparse/linear", instructions=cpp.instructions),
    fake=_empty,
    traced=_is_recorded,
    autograd=(_backward, _save),
    vmap_rows=True,
)
@without_autocast
@torch.no_grad()
def _run(
    x: Tensor, values: Tensor, mask: Tensor, offsets: Tensor, bias: Tensor | None, scales: Tensor | None
) -> Tensor:
    if torch.onnx.is_in_onnx_export() or not x.numel() or not mask.shape[0]:
        return _empty(x, values, mask)
    x, values, mask, offsets = x.contiguous(), values.contiguous(), mask.contiguous(), offsets.contiguous()
    return _module(x).bitmask_linear(x, values, mask, offsets, bias, scales)
