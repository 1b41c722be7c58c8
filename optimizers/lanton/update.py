"""What LANTON does to one parameter at a time: difference of gradients, momentum, and the write of an update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanstep.kernels import scaled_step, use_backend
from leanstep.kernels._hyper import compute_dtype, constant, decay_factor, pack
from leanstep.optimizers.common.base import local
from leanstep.optimizers.common.matrices import as_matrices, write_back
from leanstep.optimizers.common.rounding import STATE_KEY, seeds_for
from leanstep.optimizers.common.sharding import Shard
from leanstep.optimizers.lanton.routing import is_stack


class Member(NamedTuple):
    """A parameter that is stepped."""

    group: dict[str, Any]
    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    norm: str  # "rms", "sign" or "vector"
    rounding: str
    shard: Shard
    number: int  # among the parameters of all groups
    layer: int  # place among the layers that have estimates, or -1
    measures: bool  # this step's difference enters H
    keeps: bool  # this step's gradient is kept for the next one


class Found(NamedTuple):
    """A parameter and what is known of it, on all processes alike."""

    member: Member
    factor: Tensor  # [1], or [e] for a stack
    bad: Tensor  # 0-d bool: its gradient is not finite, and it is left alone
    active: Tensor  # bool [1] or [e]: its gradient has a nonzero entry
    square: Tensor  # 0-d: of a vector's momentum


class Update(NamedTuple):
    """An update on its way: ``weight <- weight * decay - lr * factor * size * direction``."""

    found: Found
    weight: Tensor  # this process's part, or one matrix of it
    extra: Tensor | None  # what the rounding keeps for it
    direction: Tensor  # in the shape of ``matrix_view(weight)``
    factor: Tensor  # [1], or [e] for a stack
    size: float
    offset: int = 0  # of the weight's first element in the whole parameter


def backend(group: dict[str, Any]) -> AbstractContextManager[object]:
    """The backend a group asks for."""
    return use_backend("reference") if group["foreach"] is False else nullcontext()


def difference(member: Member) -> Tensor:
    """This process's part of the difference that :func:`difference_size` makes an estimate of the noise.

    G minus the previous gradient; or of the two parts of the batch, h - w * G with the first part's share h = w * g_a
    of the whole gradient G = w * g_a + (1 - w) * g_b. Rounded to the dtype of the gradients, which does not matter to
    a norm and halves what is sent.
    """
    group, state, grad = member.group, member.state, local(member.grad)
    if group["noise"] == "previous":
        return grad - local(state["previous_grad"])
    half = local(state["half_grad"])
    return half.sub(grad, alpha=group["half_fraction"]) if group["half_is"] == "gradient" else half


def difference_size(member: Member) -> float:
    """The number by which the difference has the variance of G - G', G' an independent gradient of the same batch size.

    The halves' h - w * G = w (1 - w) (g_a - g_b) has variance w (1 - w) Var(G), against 2 Var(G).
    """
    if member.group["noise"] == "previous":
        return 1.0
    weight = member.group["half_fraction"]
    return math.sqrt(2.0 / (weight * (1.0 - weight)))


def keep_gradient(found: Found) -> None:
    """Put the gradient where the next step finds it; not one that is not finite, nor a matrix of zeros."""
    member = found.member
    if not member.keeps:
        return
    grad, kept = local(member.grad), local(member.state["previous_grad"])
    take = here(member, found.active & ~found.bad)
    if on_host(grad) and bool(take.all()):
        kept.copy_(grad)
    else:
        kept.copy_(torch.where(take.view(-1, *[1] * (grad.dim() - 1)) if take.numel() > 1 else take[0], grad, kept))


def here(member: Member, values: Tensor) -> Tensor:
    """Of one value for each matrix of a stack, those of the matrices of which this process holds a part."""
    shard = member.shard
    if values.numel() == 1 or not shard.groups or shard.dim != 0 or shard.offset is None:
        return values
    first = shard.offset // math.prod(shard.shape[1:])
    return values[first : first + local(member.param).shape[0]]


def on_host(tensor: Tensor) -> bool:
    """Whether a value can be read without waiting for a device or breaking a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def averaged(member: Member) -> Tensor:
    """beta1 * B + (1 - beta1) * G in the dtype of the buffer, computed wider and rounded once."""
    buffer, grad, weight = local(member.state["momentum_buffer"]), _signed(member), 1.0 - member.group["betas"][0]
    if buffer.dtype == grad.dtype:
        return buffer.lerp(grad, weight)  # wide inside
    wide = torch.promote_types(buffer.dtype, grad.dtype)
    return buffer.to(wide).lerp(grad.to(wide), weight).to(buffer.dtype)


def average(found: Found) -> None:
    """Update the momentum, unless the gradient is not finite."""
    member = found.member
    buffer = local(member.state["momentum_buffer"])
    if not on_host(buffer) and member.group["nonfinite"] == "skip":  # on the host no bad one comes here
        buffer.copy_(torch.where(found.bad, buffer, averaged(member)))
    elif buffer.dtype == member.grad.dtype:
        buffer.lerp_(_signed(member), 1.0 - member.group["betas"][0])
    else:
        buffer.copy_(averaged(member))


def look_ahead(member: Member, buffer: Tensor) -> Tensor:
    """What the direction is taken of: the buffer as stored; with Nesterov, averaged once more with the gradient."""
    if not member.group["nesterov"]:
        return buffer
    grad = _signed(member)
    wide = torch.promote_types(buffer.dtype, grad.dtype)
    return buffer.to(wide).lerp(grad.to(wide), 1.0 - member.group["betas"][0]).to(buffer.dtype)


def _signed(member: Member) -> Tensor:
    grad = local(member.grad)
    return -grad if member.group["maximize"] else grad


def extra_of(member: Member) -> Tensor | None:
    """This process's part of what the rounding keeps beside the parameter."""
    return local(member.state[STATE_KEY[member.rounding]]) if member.rounding in STATE_KEY else None


def matrix_view(tensor: Tensor, member: Member) -> Tensor:
    """A parameter, or a part of it, as it is written: scalars and vectors as a row, all but stacks as a matrix."""
    if tensor.dim() < 2:
        return tensor.reshape(1, -1)
    return as_matrices(tensor, flatten=not is_stack(member.group, member.norm, tensor.dim()))


def apply(updates: Sequence[Update]) -> None:
    """Write updates of any groups: those of one group, device and dtype in one call."""
    sets: dict[Any, list[Update]] = {}
    for update in updates:
        if update.weight.numel() > 0:
            member = update.found.member
            key = (id(member.group), update.weight.device, update.weight.dtype)
            sets.setdefault(key, []).append(update)
    for alike in sets.values():
        group = alike[0].found.member.group
        if group["decay_rate"] == "layer" and group["weight_decay"]:
            for update in alike:
                for one in _one_by_one(update):
                    _write([one], group, one.factor)
        else:
            _write(alike, group, None)


def _one_by_one(update: Update) -> list[Update]:
    """The matrices of a stack by themselves."""
    if update.factor.numel() == 1:
        return [update]
    return [
        update._replace(
            weight=weight,
            extra=None if update.extra is None else update.extra[i],
            direction=update.direction[i],
            factor=update.factor[i : i + 1],
            offset=update.offset + i * weight.numel(),
        )
        for i, weight in enumerate(update.weight)
    ]


def _write(updates: list[Update], group: dict[str, Any], decay: Tensor | None) -> None:
    """One call for updates of one group, device and dtype. ``decay``: the factor that weight decay takes part in."""
    device, dtype = updates[0].weight.device, updates[0].weight.dtype
    lr, rounding = group["lr"], updates[0].found.member.rounding
    decayed = lr if decay is None else decay.reshape(()) * (lr.reshape(()) if isinstance(lr, Tensor) else lr)
    hyper = pack([lr, decay_factor(decayed, group["weight_decay"])], device, compute_dtype(dtype))
    rows, cols = _scales(updates, hyper)
    seeds = offsets = None
    if rounding == "stochastic":
        members = [u.found.member for u in updates]
        seeds = seeds_for([m.state["step"] for m in members], [m.number for m in members], group["seed"], device)
        offsets = constant([u.offset for u in updates], device, torch.int64)

    def step(matrices: list[Tensor], kept: list[Tensor]) -> Tensor:
        directions = [_beside(u.direction, w) for u, w in zip(updates, matrices, strict=True)]
        with backend(group):
            return scaled_step(
                matrices, directions, rows, cols, kept, hyper=hyper, rounding=rounding,
                skip_nonfinite=group["nonfinite"] != "pass", seeds=seeds, offsets=offsets,
            )  # fmt: skip

    stacked = [is_stack(group, u.found.member.norm, u.weight.dim()) for u in updates]
    write_back(step, [u.weight for u in updates], [u.extra for u in updates if u.extra is not None], stacked)


def _beside(direction: Tensor, weight: Tensor) -> Tensor:
    """The direction, wide where one of the two is fp16 and the other bf16: the compiler has no loop over both."""
    both = {direction.dtype, weight.dtype}
    return direction.float() if both == {torch.float16, torch.bfloat16} else direction


def _scales(updates: list[Update], like: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Every row's factor * size, and for every column 1, or NaN where nothing is to be written."""
    device, weights = like.device, [u.direction for u in updates]
    counts = [u.factor.numel() for u in updates]
    lengths = [[w.shape[d] for w, k in zip(weights, counts, strict=True) for _ in range(k)] for d in (-2, -1)]
    scales = torch.cat([(u.factor * u.size).to(device) for u in updates]).to(like.dtype)
    ones = torch.ones_like(scales)
    if not on_host(scales):
        bad = torch.cat([u.found.bad.to(device).expand(k) for u, k in zip(updates, counts, strict=True)])
        ones = torch.where(bad, float("nan"), ones)
    found = []
    for values, sizes, dim in ((scales, lengths[0], -2), (ones, lengths[1], -1)):
        flat = values.repeat_interleave(constant(sizes, device, torch.int64), output_size=sum(sizes))
        parts = flat.split([k * w.shape[dim] for w, k in zip(weights, counts, strict=True)])
        found.append([part.view(*w.shape[:-2], w.shape[dim]) for part, w in zip(parts, weights, strict=True)])
    return found[0], found[1]
