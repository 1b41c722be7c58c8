"""Compressed N:M matrices, and products with them."""

import torch
from torch import Tensor

from leanstep.kernels._backend import choose
from leanstep.kernels.cpp_impl._build import TYPES, call
from leanstep.kernels.cpp_impl.sparse import linear as cpp
from leanstep.kernels.op import EVERYWHERE, is_traced, op, triton_module, without_autocast
from leanstep.kernels.reference.nm import matmul as reference

# up to this number of rows of x, the C++ kernel expands a 2:4 matrix in registers
MOST_EXPANDED = 8


def nm_compress(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Compress an N:M matrix: store n entries of every group of m along the last dimension, with their indices.

    Args:
        weight: [..., in], any floating dtype, at most n nonzeros in every m; not written.
        n: entries stored per group, 0 <= n <= m.
        m: entries per group, 1 <= m <= 256; must divide ``in``.

    Returns:
        (values [..., in / m, n] of the weight's dtype, indices [..., in / m, n] uint8 inside the group, ascending). A
        group with fewer nonzeros also stores its -0 entries, then its first zeros. Equal weights thus have equal
        compressed forms. The round trip is exact to the bit unless nonzeros and -0 together are more than n in a group.

    Raises:
        ValueError: for n or m out of range, an m that does not divide ``in``, or a group with more than n nonzeros.
    """
    if not 1 <= m <= 256 or not 0 <= n <= m:
        raise ValueError(f"nm_compress: expected 0 <= n <= m <= 256 and m >= 1, got n = {n}, m = {m}")
    if weight.dim() == 0 or weight.shape[-1] % m:
        raise ValueError(f"nm_compress: groups of {m} do not fill the last dimension of {tuple(weight.shape)}")
    counts = (weight.detach().unflatten(-1, (-1, m)) != 0).sum(dim=-1)
    if counts.numel() and int(counts.max()) > n:
        where = tuple((counts > n).nonzero()[0].tolist())
        raise ValueError(
            f"nm_compress: the weight of shape {tuple(weight.shape)} is not {n}:{m}: {int((counts > n).sum())} groups "
            f"have more nonzeros; the first is {where}, with {int(counts[where])}"
        )
    return reference.compress(weight, n, m)


def nm_decompress(values: Tensor, indices: Tensor, m: int) -> Tensor:
    """Undo :func:`nm_compress`: expand ``values`` and ``indices`` to the dense matrix [..., groups * m].

    Raises:
        ValueError: for shapes that differ, indices that are not uint8 or not below m, or repeated indices in a group.
    """
    _check_compressed(values, indices, m, "nm_decompress")
    if indices.numel():
        wide = indices.to(torch.int16)
        if int(wide.max()) >= m or (indices.shape[-1] > 1 and int(wide.diff(dim=-1).min()) <= 0):
            raise ValueError(
                f"nm_decompress: indices of shape {tuple(indices.shape)} are not ascending numbers below {m} in every "
                "group: the compressed form is damaged, or of another pattern"
            )
    return reference.decompress(values, indices, m)


def nm_matmul(x: Tensor, values: Tensor, indices: Tensor, m: int) -> Tensor:
    """``x W^T`` for a compressed N:M matrix W.

    ``out[t, o] = sum over g, k of values[o, g, k] * x[t, g * m + indices[o, g, k]]``

    Args:
        x: [..., in], floating; not written.
        values: [out, in / m, n] of x's dtype, from :func:`nm_compress`.
        indices: uint8 [out, in / m, n], each below m; not checked. A larger one may read memory outside of x.
        m: entries per group.

    Returns:
        [..., out] of x's dtype.

    Raises:
        ValueError: for shapes or dtypes that do not match, or if autograd would record the product.
        BackendError: the requested backend cannot run here.

    Notes:
        Computes in fp32 (fp64 for fp64) and rounds once. A CPU with AVX-512 expands a 2:4 matrix in registers, and
        reads it once, for up to 8 rows of x. More rows run as :func:`bitmask_linear`, with a mask of one bit per entry
        that is made for the call, unless the indices of a group do not ascend. A CPU with AVX-512 reads other matrices
        with an M of at most 32 once per 4 rows, for up to 4 rows (8 in bf16). All others are read once per 64 rows. A
        GPU reads the matrix once per 4 rows. All but 2:4 do n / m of the dense product's multiplications. bf16 dot
        products of a CPU take subnormal numbers for zero. torch.func.vmap works: a batch of x becomes rows of one call.
        From 32 rows on, a GPU forms the dense matrix first, as the
        reference does, in scratch memory of its size. :func:`bitmask_linear` of the same matrix is faster where a third
        or more of its entries are nonzero, as with 4:8. ``benchmarks/sparsity/matmul.py`` measures where either is
        faster than the dense product.
    """
    _check_compressed(values, indices, m, "nm_matmul")
    if values.dim() != 3 or x.dim() == 0 or x.shape[-1] != values.shape[1] * m:
        raise ValueError(
            f"nm_matmul: expected x [..., in] and values [out, in / {m}, n], got {tuple(x.shape)} and "
            f"{tuple(values.shape)}"
        )
    if x.dtype != values.dtype or not x.is_floating_point() or x.device != values.device:
        raise ValueError(
            f"nm_matmul: expected x and values of one floating dtype on one device, got {x.dtype} on {x.device} and "
            f"{values.dtype} on {values.device}"
        )
    if torch.is_grad_enabled() and (x.requires_grad or values.requires_grad):
        raise ValueError(
            "nm_matmul: the product is for inference and has no gradient; call it under torch.no_grad(), or multiply "
            "with nm_decompress(values, indices, m)"
        )
    return _run(x.reshape(-1, x.shape[-1]), values, indices, m).view(*x.shape[:-1], values.shape[0])


@op(
    "nm_matmul",
    EVERYWHERE,
    fake=lambda x, values, indices, m: x.new_empty(x.shape[0], values.shape[0]),
    traced=lambda x, values, indices, m: is_traced(x) or is_traced(values),
    vmap_rows=True,
)
@without_autocast
@torch.no_grad()
def _run(x: Tensor, values: Tensor, indices: Tensor, m: int) -> Tensor:
    if not x.numel() or not values.numel():
        return x.new_zeros(x.shape[0], values.shape[0])
    backend = choose("nm_matmul", x.device, x.dtype).backend
    if backend == "cpp":
        x, values, indices = x.contiguous(), values.contiguous(), indices.contiguous()
        if len(x) > MOST_EXPANDED and (values.shape[-1], m) == (2, 4) and (mask := _bits(indices)) is not None:
            offsets = torch.arange(len(mask) + 1, device=values.device) * values[0].numel()
            return cpp.bitmask_linear(x, values.flatten(), mask, offsets, None, None)
        out = x.new_empty(x.shape[0], values.shape[0])
        macros = {"VALUE": TYPES[x.dtype]}
        call("nm/matmul", "nm_matmul", macros, x, values, indices, out, len(x), *values.shape, m)
        return out
    if backend == "triton":
        return triton_module(__name__).nm_matmul(x, values, indices, m)
    return reference.nm_matmul(x, values, indices, m)


def _bits(indices: Tensor) -> Tensor | None:
    """The bit mask [out, words] of a 2:4 matrix, whose values then are those of a bitmask matrix.

    None if a pair of indices does not ascend below 4.
    """
    mask = indices.new_empty(len(indices), -(-indices.shape[1] // 8), dtype=torch.int32)
    valid = indices.new_zeros(1, dtype=torch.int32)
    call("nm/matmul", "nm_bits", {"VALUE": "float"}, indices, mask, valid, *indices.shape[:2])
    return mask if valid else None


def _check_compressed(values: Tensor, indices: Tensor, m: int, name: str) -> None:
    if values.dim() < 2 or values.shape != indices.shape or indices.dtype != torch.uint8:
        raise ValueError(
            f"{name}: expected values [..., groups, n] and uint8 indices of that shape, got {tuple(values.shape)} and "
            f"{tuple(indices.shape)} of {indices.dtype}"
        )
    if not values.shape[-1] <= m <= 256 or m < 1:
        raise ValueError(f"{name}: expected groups of {values.shape[-1]} to 256 entries, got m = {m}")
