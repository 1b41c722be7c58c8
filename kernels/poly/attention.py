"""Attention with a polynomial in place of exp, and its exact gradient, in time linear in the sequence length."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels._backend import on_remembered_backend, remember_backend
from leanstep.kernels.op import op
from leanstep.kernels.poly import chunks
from leanstep.kernels.poly.tables import MAX_FEATURES, feature_count

_NAME = "poly_attention"


def poly_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coefficients: Sequence[float],
    *,
    scale: float,
    causal: bool = False,
    center: Tensor | None = None,
    key_mask: Tensor | None = None,
    chunk: int = 128,
) -> tuple[Tensor, Tensor]:
    """Attention with the weights ``p(s_ij) / D_i``, ``D_i = sum_j p(s_ij)``, ``s_ij = scale * q_i . (k_j - center)``.

    The gradient is exact, with ``center`` as a constant: ``dS_ij = p'(s_ij) / D_i * (dO_i . v_j - dO_i . O_i)``. No
    L x M matrix is formed.

    Args:
        q: [B, Hq, L, d], floating.
        k: [B, H, M, d] of q's dtype. H divides Hq; query head h reads key head ``h // (Hq / H)``.
        v: [B, H, M, e] of q's dtype.
        coefficients: the g + 1 coefficients of p, the constant first.
        scale: factor of the products q . k.
        causal: query i reads only keys j <= i; requires M = L.
        center: [H, d] or [B, H, d], subtracted from the keys; gets no gradient.
        key_mask: [B, M] bool, False for keys that all queries ignore.
        chunk: queries and keys processed at a time. Only causal attention forms weights, inside each chunk.

    Returns:
        (out [B, Hq, L, e] of q's dtype, normalisers D [B, Hq, L] in fp32 or fp64). Both are 0 for queries without keys.
        Where D is negative or not finite, p does not approximate exp;
        :func:`leanstep.lora.low_rank_attention` checks D.

    Raises:
        ValueError: for shapes, dtypes or devices that do not match, or more than 2^20 features.

    Notes:
        With ``k = C(d + g, g)`` features, the forward pass takes about ``2 k e (Hq L + H M)`` floating-point operations
        and the backward pass ``2 k e (2 Hq L + 3 H M)``; :func:`poly_attention_flops` and
        :func:`poly_attention_backward_flops` count them exactly. Sums run in fp32 (fp64 for fp64). Autograd saves
        q, k, v, out and D. Scratch memory: one or two states [k, e + 1] per head, and the features of one chunk
        for as many heads as fit into 16 MB (1 GB on a GPU). fp32 sums of features cancel, so D has an error of about
        1e-7 * (scale |q| |k|)^g / g!, even where p(s) is small.
    """
    _check(q, k, v, coefficients, causal, center, key_mask, chunk)
    if center is not None:
        center = center.detach().to(torch.promote_types(q.dtype, torch.float32))
        center = center.expand(k.shape[0], -1, -1) if center.dim() == 2 else center
    return _run(q, k, v, center, key_mask, [float(c) for c in coefficients], float(scale), causal, chunk)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coefficients: Sequence[float],
    causal: bool,
    center: Tensor | None,
    key_mask: Tensor | None,
    chunk: int,
) -> None:
    if any(x.dim() != 4 for x in (q, k, v)) or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"{_NAME}: expected q [B, Hq, L, d], k [B, H, M, d] and v [B, H, M, e], got {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.shape[0] != k.shape[0] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{_NAME}: expected one batch and query heads that are a multiple of key heads, got q {tuple(q.shape)} and "
            f"k {tuple(k.shape)}"
        )
    if not q.is_floating_point() or len({(x.dtype, x.device) for x in (q, k, v)}) > 1:
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"{_NAME}: expected q, k and v of one floating dtype on one device, got {kinds}")
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"{_NAME}: causal attention needs as many keys as queries, got {k.shape[2]} and {q.shape[2]}; "
            "use exact attention to decode with a cache of keys"
        )
    if len(coefficients) < 1 or chunk < 1:
        raise ValueError(f"{_NAME}: expected coefficients and a chunk >= 1, got {list(coefficients)} and {chunk}")
    features = feature_count(q.shape[3], len(coefficients) - 1)
    if features > MAX_FEATURES:
        raise ValueError(
            f"{_NAME}: degree {len(coefficients) - 1} of heads of {q.shape[3]} has {features:,} features, more than "
            f"{MAX_FEATURES:,}; take a lower degree"
        )
    if center is not None and tuple(center.shape) not in (
        tuple(k.shape[1:2] + k.shape[3:]),
        (*k.shape[:2], k.shape[3]),
    ):
        raise ValueError(
            f"{_NAME}: expected center [H, d] or [B, H, d] for keys {tuple(k.shape)}, got {tuple(center.shape)}"
        )
    if key_mask is not None and (key_mask.dtype != torch.bool or tuple(key_mask.shape) != (k.shape[0], k.shape[2])):
        raise ValueError(
            f"{_NAME}: expected a bool key_mask [B, M] = {(k.shape[0], k.shape[2])}, True where a key counts, got "
            f"{tuple(key_mask.shape)} of {key_mask.dtype}"
        )


def _heads(
    q: Tensor, k: Tensor, v: Tensor, center: Tensor | None, key_mask: Tensor | None, *settings: Any
) -> chunks.Heads:
    """Flatten batch and key heads to one dimension; the query heads of a key head are the next one."""
    heads = k.shape[1]
    center = None if center is None else center.flatten(0, 1)
    mask = None if key_mask is None else key_mask.repeat_interleave(heads, dim=0)
    queries = q.unflatten(1, (heads, -1)).flatten(0, 1)
    return chunks.Heads(queries, k.flatten(0, 1), v.flatten(0, 1), center, mask, *settings)


def _fake(q, k, v, *_):
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide)


def _fake_backward(grad, q, k, v, out, normaliser, center, key_mask, coefficients, scale, causal, chunk, wanted):
    return [x.new_empty(x.shape if want else 0) for x, want in zip((q, k, v), wanted, strict=True)]


@op("poly_attention_backward", fake=_fake_backward)
def _run_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    normaliser: Tensor,
    center: Tensor | None,
    key_mask: Tensor | None,
    coefficients: list[float],
    scale: float,
    causal: bool,
    chunk: int,
    wanted: list[bool],
) -> list[Tensor]:
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        heads = _heads(q, k, v, center, key_mask, coefficients, scale, causal, chunk)
        grad, out, normaliser = (
            x.unflatten(1, (k.shape[1], -1)).flatten(0, 1) for x in (grad, out, normaliser)
        )  # fmt: skip
        gradients = chunks.backward(heads, grad, out, normaliser, wanted)
    return [
        x.new_empty(0) if result is None else result.view(x.shape)
        for x, result in zip((q, k, v), gradients, strict=True)
    ]


def _setup(ctx, inputs, output):
    q, k, v, center, key_mask, *ctx.settings = inputs
    out, normaliser = output
    ctx.save_for_backward(q, k, v, out, normaliser, center, key_mask)
    ctx.mark_non_differentiable(normaliser)
    ctx.set_materialize_grads(False)
    remember_backend(ctx)


@on_remembered_backend
def _gradients(ctx, grad, _):
    q, k, v, out, normaliser, center, key_mask = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    if grad is None:
        return (None,) * 9
    gradients = torch.ops.leanstep.poly_attention_backward(
        grad, q, k, v, out, normaliser, center, key_mask, *ctx.settings, wanted
    )
    return (*(x if want else None for x, want in zip(gradients, wanted, strict=True)), *(None,) * 6)


# autograd records every call
@op("poly_attention", fake=_fake, traced=lambda *_: True, autograd=(_gradients, _setup))
def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    center: Tensor | None,
    key_mask: Tensor | None,
    coefficients: list[float],
    scale: float,
    causal: bool,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        heads = _heads(q, k, v, center, key_mask, coefficients, scale, causal, chunk)
        out, normaliser = chunks.forward(heads)
    return out.view(*q.shape[:3], v.shape[3]), normaliser.view(q.shape[:3])


def poly_attention_flops(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    degree: int,
    *,
    causal: bool = False,
    chunk: int = 128,
) -> int:
    """Floating-point operations of the matrix products of :func:`poly_attention`'s forward pass."""
    queries, keys, pairs = _rows(q_shape, k_shape, causal, chunk)
    wide = v_shape[3] + 1
    return 2 * feature_count(q_shape[3], degree) * wide * (queries + keys) + 2 * pairs * (q_shape[3] + wide)


def poly_attention_backward_flops(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    degree: int,
    *,
    causal: bool = False,
    chunk: int = 128,
    wanted: Sequence[bool] = (True, True, True),
) -> int:
    """Floating-point operations of the backward pass's matrix products; ``wanted``: which of q, k, v get a gradient."""
    queries, keys, pairs = _rows(q_shape, k_shape, causal, chunk)
    dim, wide = q_shape[3], v_shape[3] + 1
    of_q, of_k, of_v = wanted
    full_width = (queries + keys) * of_q + queries * (of_k or of_v) + keys * of_k
    states = 2 * feature_count(dim, degree) * (wide * full_width + (wide - 1) * keys * of_v)
    of_products = (wide + dim * (of_q + of_k)) * (of_q or of_k)
    return states + 2 * pairs * (dim + (wide - 1) * of_v + of_products)


def _rows(q_shape: Sequence[int], k_shape: Sequence[int], causal: bool, chunk: int) -> tuple[int, int, int]:
    """Count, over all heads, the queries that read a state, the keys added to one, and the pairs inside chunks."""
    batch, query_heads, length, _ = q_shape
    if not causal:
        return batch * query_heads * length, batch * k_shape[1] * k_shape[2], 0
    sizes = [min(chunk, length - start) for start in range(0, length, chunk)] or [0]
    # queries of the first chunk read no state; keys of the last chunk are added to none
    queries, keys = batch * query_heads * (length - sizes[0]), batch * k_shape[1] * (length - sizes[-1])
    return queries, keys, batch * query_heads * sum(size * size for size in sizes)
