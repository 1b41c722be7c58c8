"""The start of PiSSA: the factors are the principal part of the base weight, which keeps the rest.

With the singular value decomposition ``W = U S V^T``, rank r and scale s:

    A0 = sqrt(S_r / s) V_r^T,    B0 = U_r sqrt(S_r / s),    W' = W - s B0 A0

The trained layer is ``W' + s B A = W + s [B, -B0] [A; A0]``: to the plain base, an adapter of rank 2 r.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanstep._torch import place_like
from leanstep.lora.layers.frozen import quantized_kind

START_A, START_B = "lora_start_A", "lora_start_B"


@torch.no_grad()
def take_principal_part(module: Any, init: str, scale: float, transposed: bool) -> None:
    """Move the principal part of a layer's weight into its factors ``lora_A`` and ``lora_B``, and keep copies of these.

    The decomposition is in fp32, or fp64 for fp64 weights. ``"pissa_niter_N"`` takes torch's randomised one with N
    iterations of subspace.
    """
    stored = module.weight
    exact = stored.detach().to(torch.promote_types(stored.dtype, torch.float32))
    exact = exact.t() if transposed else exact
    rank = module.lora_A.out_features
    if init == "pissa":
        u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(exact, rank, niter=int(init.rpartition("_")[2]))
        vh = v.t()
    root = (s[:rank] / scale).sqrt()
    module.lora_A.weight.copy_(root.unsqueeze(1) * vh[:rank])
    module.lora_B.weight.copy_(u[:, :rank] * root)
    # of the factors as they are stored, in a narrower dtype perhaps: the sum is the weight again
    rest = exact - scale * (module.lora_B.weight.to(exact) @ module.lora_A.weight.to(exact))
    stored.copy_(rest.t() if transposed else rest)
    module.register_buffer(START_A, module.lora_A.weight.detach().clone())
    module.register_buffer(START_B, module.lora_B.weight.detach().clone())


def start_factors(module: Any) -> tuple[Tensor, Tensor] | None:
    """A0 (r, in) and B0 (out, r) of a layer that began with PiSSA, else None."""
    a = getattr(module, START_A, None)
    return None if a is None else (a, getattr(module, START_B))


def start_product(module: Any, x: Tensor) -> Tensor:
    """``s x A0^T B0^T``: what the base computes beyond the weight that it keeps."""
    a, b = getattr(module, START_A), getattr(module, START_B)
    return torch.nn.functional.linear(torch.nn.functional.linear(x.to(a.dtype), a), b) * module.lora.scale


@torch.no_grad()
def move_start(module: Any, a: Tensor | None = None, b: Tensor | None = None) -> None:
    """Give the principal part back to the weight, and take ``s b a`` out of it as the new start, if given."""
    old_a, old_b = getattr(module, START_A), getattr(module, START_B)
    if a is not None and b is not None and torch.equal(a, old_a) and torch.equal(b, old_b):
        return
    weight = module.weight
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    change = module.lora.scale * (old_b.to(exact.device, exact.dtype) @ old_a.to(exact.device, exact.dtype))
    if a is not None and b is not None:
        change -= module.lora.scale * (b.to(change) @ a.to(change))
    weight.copy_(exact + place_like(change.t() if module.lora.transposed else change, weight))
    if a is not None and b is not None:
        # last: an error above leaves the layer as it was
        old_a.copy_(a)
        old_b.copy_(b)


def why_no_pissa(module: Any, rank: int) -> str | None:
    """The reason why a layer cannot begin with PiSSA, or None."""
    kind, weight = quantized_kind(module), module.weight
    if isinstance(module, torch.nn.Embedding):
        return "it is an embedding, and PiSSA starts linear layers"
    if kind is not None:
        return f"it is a {kind}, and PiSSA changes the base weight; take init_lora_weights=True"
    if not isinstance(weight, torch.nn.Parameter):
        return "its weight is made by a parametrization, and PiSSA changes the base weight; remove that first"
    if weight.device.type == "meta":
        return "its weight has no values yet (meta), and PiSSA decomposes them; load the weights first"
    if not torch.isfinite(weight).all():
        return "its weight holds NaN or infinity, which has no decomposition"
    if 2 * rank > min(weight.shape):
        return (
            f"PiSSA's adapter is saved with rank 2 * {rank}, and its weight is {tuple(weight.shape)}; set r to at most "
            f"{min(weight.shape) // 2}"
        )
    return None
