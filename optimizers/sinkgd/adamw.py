"""AdamW for parameters that SinkGD does not normalize: torch's function, plus skipped steps and rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from leanstep.kernels.cpp_impl._build import same_layout
from leanstep.kernels.reference.rounding import narrow, widen
from leanstep.kernels.steps.adamw_step import adamw_step as adamw_step_on_host
from leanstep.kernels.steps.common import decay_factor, nonfinite_flags
from leanstep.optimizers.common.base import Batch, count_nonfinite
from leanstep.optimizers.common.rounding import seeds_for
from leanstep.optimizers.common.sharding import Reducer, all_reduce_flags, local, new_state, offsets_of, readable, store


def init_adamw(state: dict[str, Any], param: Tensor, group: dict[str, Any], rounding: str) -> None:
    """Create step, exp_avg and exp_avg_sq as torch does; the moments are fp32 unless rounding is "nearest"."""
    if "exp_avg_sq" in state:
        return
    device = local(param).device if uses_fused(param, group) else torch.device("cpu")
    state.setdefault("step", torch.zeros((), dtype=torch.float32, device=device))
    dtype = None if rounding == "nearest" else torch.float32
    state["exp_avg"] = new_state(param, dtype)
    state["exp_avg_sq"] = new_state(param, dtype)


def uses_fused(param: Tensor, group: dict[str, Any]) -> bool:
    """Whether to run torch's fused kernel: ``group["fused"]``, or if that is None, whether the device has one.

    Raises:
        RuntimeError: ``fused=True`` on a device or dtype without a fused kernel.
    """
    supported = _get_fused_kernels_supported_devices()
    possible = param.is_floating_point() and param.device.type in supported
    if group["fused"] and not possible:
        raise RuntimeError(
            f"`fused=True` requires all the params to be floating point Tensors of supported devices: {supported}, got "
            f"one of {param.dtype} on {param.device}; fused=None uses the fused kernel only if the device has one"
        )
    if group["fused"] is not None:
        return group["fused"]
    return possible and not torch.compiler.is_compiling() and group["foreach"] is None


def step_adamw(batch: Batch) -> Reducer[None]:
    """Step AdamW: bit-identical to ``torch.optim.AdamW`` with the same ``fused`` and ``foreach``.

    With nonfinite="skip", one non-finite gradient skips the whole batch, without a wait for the device.
    """
    group = batch.group
    params, grads = [readable(p) for p in batch.params], [local(g) for g in batch.grads]
    skip = None
    if group["nonfinite"] == "skip":
        flags = nonfinite_flags(grads)
        yield from all_reduce_flags(flags, batch.shards)
        count_nonfinite(group, flags)
        skip = flags.any()
        if skip.device.type == "cpu" and not torch.compiler.is_compiling():
            if skip:
                return
            skip = None
    if batch.rounding == "nearest":
        _decay_and_update(params, grads, batch.states, group, skip)
    else:
        _update_rounded(params, grads, batch, skip)
    store(params, batch.params)


def _decay_and_update(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    group: dict[str, Any],
    skip: Tensor | None,
) -> None:
    """Update parameters and moments; with cautious_decay, decay only entries whose update and value agree in sign."""
    if group["cautious_decay"]:
        decay, weight = decay_factor(group["lr"], group["weight_decay"]), 1.0 - group["betas"][0]
        for param, grad, state in zip(params, grads, states, strict=True):
            average = local(state["exp_avg"])
            # AdamW divides the new average by positive numbers, so it has the update's sign
            gradient = (-grad if group["maximize"] else grad).to(average.dtype)
            aligned = average.lerp(gradient, weight) * param >= 0
            if skip is not None:
                aligned &= ~skip.to(aligned.device)
            param.copy_(torch.where(aligned, param * decay, param))
        group = {**group, "weight_decay": 0.0}
    _update(params, grads, states, group, skip)


def _update(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    group: dict[str, Any],
    skip: Tensor | None,
) -> None:
    """Call torch's functional AdamW; a true flag ``skip`` on the device leaves everything unchanged."""
    beta1, beta2 = group["betas"]
    fused = uses_fused(params[0], group)
    exp_avgs, exp_avg_sqs = ([local(s[key]) for s in states] for key in ("exp_avg", "exp_avg_sq"))
    steps = [s["step"] for s in states]
    backups = []
    if skip is not None and not fused:  # only the fused kernel takes a flag
        backups = [(t, t.clone()) for t in (*params, *exp_avgs, *exp_avg_sqs, *steps)]
    stored = list(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True))
    rows: list[tuple[Tensor, ...]] = list(stored)
    if fused:  # torch's fused CPU kernel ignores strides
        contiguous = torch.contiguous_format
        rows = [row if same_layout(row) else tuple(t.clone(memory_format=contiguous) for t in row) for row in stored]
    params, grads, exp_avgs, exp_avg_sqs = (list(column) for column in zip(*rows, strict=True))
    rule: dict[str, Any] = {key: group[key] for key in ("lr", "weight_decay", "eps", "maximize")}
    if fused:  # torch's fused kernels take a tensor for lr alone
        rule["weight_decay"] = float(rule["weight_decay"])
    if fused and skip is None and params[0].device.type == "cpu" and not torch.compiler.is_compiling():
        adamw_step_on_host(params, grads, exp_avgs, exp_avg_sqs, steps, betas=(beta1, beta2), **rule)
    else:
        adamw(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            # torch's foreach functions accept no tensor lr
            foreach=False if isinstance(group["lr"], Tensor) else group["foreach"],
            fused=fused,
            capturable=fused and params[0].device.type != "cpu",
            found_inf=skip.to(torch.float32) if skip is not None and fused else None,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            **rule,
        )
    if fused:
        for (param, _, *moments), (new_param, _, *new_moments) in zip(stored, rows, strict=True):
            if new_param is not param:
                torch._foreach_copy_([param, *moments], [new_param, *new_moments])
            else:
                torch.autograd.graph.increment_version([param, *moments])  # the fused kernels omit this
    for tensor, before in backups:
        assert skip is not None
        tensor.copy_(torch.where(skip.to(tensor.device), before, tensor))


def _update_rounded(params: list[Tensor], grads: list[Tensor], batch: Batch, skip: Tensor | None) -> None:
    """Step AdamW on fp32 copies (or master weights) of the batch, then round into the parameters."""
    states, rounding, device = batch.states, batch.rounding, params[0].device
    rounding_state: Any = batch.rounding_state() or [None] * len(params)
    pairs = zip(params, rounding_state, strict=True)
    masters = rounding == "master"
    wide = [r.copy_(widen(p, r, rounding)) if masters and r is not None else widen(p, r, rounding) for p, r in pairs]
    _decay_and_update(wide, [g.float() for g in grads], states, batch.group, skip)
    seeds: Any = [None] * len(params)
    offsets: Any = [0] * len(params)
    if rounding == "stochastic":
        offsets = offsets_of(batch.shards, device)
        seeds = seeds_for([s["step"] for s in states], batch.indices, batch.group["seed"], device)
    for param, state, value, seed, offset in zip(params, rounding_state, wide, seeds, offsets, strict=True):
        new_param, new_rounding_state = narrow(value, param, rounding, seed, offset)
        if skip is not None:
            new_param = torch.where(skip, param.to(new_param.dtype), new_param)
            if state is not None and new_rounding_state is not None:
                new_rounding_state = torch.where(skip, state, new_rounding_state)
        param.copy_(new_param)
        if state is not None and new_rounding_state is not None and state is not value:
            state.copy_(new_rounding_state)
