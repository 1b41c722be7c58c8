"""AdamW for parameters that SinkGD does not normalize: torch's function, plus skipped steps and rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from leanstep.kernels.cpp_impl._build import same_layout
from leanstep.kernels.reference.rounding import narrow, widen
from leanstep.kernels.reference.steps.adamw_int8 import adamw_step as adamw_step_of_one
from leanstep.kernels.steps.adamw_int8 import adamw_step_int8
from leanstep.kernels.steps.adamw_step import adamw_step as adamw_step_on_host
from leanstep.kernels.steps.common import StepOptions, compute_dtype, decay_factor, nonfinite_flags, pack
from leanstep.optimizers.common.base import Batch, count_nonfinite
from leanstep.optimizers.common.column_shards import cuts_rows
from leanstep.optimizers.common.quantized import average_values, store_averages
from leanstep.optimizers.common.rounding import seeds_for
from leanstep.optimizers.common.sharding import (
    Reducer,
    all_reduce_flags,
    local,
    positions_of,
    readable,
    store,
    together,
)


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


def step_adamw(batch: Batch, *, int8: bool) -> Reducer[None]:
    """Step AdamW: bit-identical to ``torch.optim.AdamW`` with the same ``fused`` and ``foreach``.

    With nonfinite="skip", one non-finite gradient skips the whole batch, without a wait for the device. Otherwise
    ``foreach=False`` steps its parameters one at a time. ``int8``: the moments are in 8 bits, and the step is that of
    :func:`leanstep.kernels.steps.adamw_int8.adamw_step_int8`.
    """
    group = batch.group
    params, grads = [readable(p) for p in batch.params], [local(g) for g in batch.grads]
    if batch.rounding == "nearest" and not int8:  # torch's step takes one dtype, and gradients may have another one
        grads = [g.to(p.dtype) for g, p in zip(grads, params, strict=True)]
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
    spans = [slice(i, i + 1) for i in range(len(params))] if group["foreach"] is False else [slice(len(params))]
    yield from together([_update_part(params[s], grads[s], batch.part(s), skip, int8=int8) for s in spans])
    store(params, batch.params)


def _update_part(
    params: list[Tensor], grads: list[Tensor], batch: Batch, skip: Tensor | None, *, int8: bool
) -> Reducer[None]:
    """Step the parameters of a batch; a true flag ``skip`` on the device leaves everything unchanged."""
    if int8:
        yield from _update_int8(params, grads, batch, skip)
    elif batch.rounding == "nearest":
        _decay_and_update(params, grads, batch.states, batch.group, skip)
    else:
        _update_rounded(params, grads, batch, skip)


def _decay_and_update(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    group: dict[str, Any],
    skip: Tensor | None,
) -> None:
    decays: Any = group["weight_decay"]
    has_decay = isinstance(decays, Tensor) or decays != 0  # no wait for a tensor
    if has_decay and group["cautious_decay"]:
        _decay_cautiously(params, grads, states, group, skip)
        group = {**group, "weight_decay": 0.0}
    _update(params, grads, states, group, skip)


def _decay_cautiously(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    group: dict[str, Any],
    skip: Tensor | None,
) -> None:
    """Decay parameters; with cautious_decay, only entries with update * value >= 0."""
    decay, weight = decay_factor(group["lr"], group["weight_decay"]), 1.0 - group["betas"][0]
    if isinstance(decay, Tensor):
        decay = decay.reshape(())  # a tensor of shape (1, 1) would broadcast
    for param, grad, state in zip(params, grads, states, strict=True):
        average = local(state["exp_avg"])
        # AdamW divides the new average by positive numbers, so it has the update's sign
        gradient = (-grad if group["maximize"] else grad).to(average.dtype)
        # signs, because a product of fp16 numbers underflows
        decaying = average.lerp(gradient, weight).sign_().mul_(param.sign()) >= 0
        if skip is not None:
            decaying &= ~skip.to(decaying.device)
        param.copy_(torch.where(decaying, param * decay, param))


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


def _update_int8(params: list[Tensor], grads: list[Tensor], batch: Batch, skip: Tensor | None) -> Reducer[None]:
    """Step AdamW with moments in 8 bits; a true flag ``skip`` on the device leaves everything unchanged."""
    group, states, (beta1, beta2) = batch.group, batch.states, batch.group["betas"]
    device, dtype = params[0].device, compute_dtype(params[0].dtype)
    lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]  # [1, 1] is a number, too
    steps = [state["step"] for state in states]
    moments = [
        [local(s[key]) for s in states] for key in ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
    ]
    rounding_state = batch.rounding_state()
    backups = []
    if skip is not None:
        backups = [(t, t.clone()) for ts in (params, *moments, rounding_state, steps) for t in ts]
    torch._foreach_add_(steps, 1)
    counts = torch.stack([step.to(device) for step in steps]).to(
        torch.float32 if device.type == "mps" else torch.float64
    )
    sizes = lr / (1.0 - beta1**counts)
    corrections = torch.stack([sizes, (1.0 - beta2**counts).rsqrt()], 1).to(dtype)
    decay = decay_factor(lr, group["weight_decay"])
    options = StepOptions(
        pack([decay, beta1, 1.0 - beta1, beta2, 1.0 - beta2, group["eps"]], device, dtype),
        batch.rounding,
        decay_where_aligned=group["cautious_decay"],
        maximize=group["maximize"],
        seeds=seeds_for(steps, batch.indices, group["seed"], device),
        **positions_of(batch.shards, device),
    )
    codes, scales, square_codes, square_scales = moments
    if cuts_rows(batch.shards[0]):
        yield from _update_columns(params, grads, batch, corrections, rounding_state, options)
    else:
        adamw_step_int8(params, grads, codes, scales, square_codes, square_scales, corrections, rounding_state, options)
    for tensor, before in backups:
        assert skip is not None
        tensor.copy_(torch.where(skip.to(tensor.device), before, tensor))


def _update_columns(
    params: list[Tensor],
    grads: list[Tensor],
    batch: Batch,
    corrections: Tensor,
    rounding_state: list[Tensor],
    options: StepOptions,
) -> Reducer[None]:
    """Do the same for shards that cut rows: decode the moments, step by the definition, and encode them."""
    assert options.seeds is not None
    dtype, averages, squares = options.scalars.dtype, [], []
    for i, (param, grad, state, shard) in enumerate(zip(params, grads, batch.states, batch.shards, strict=True)):
        average, square = (average_values(state, key, shard, dtype) for key in ("exp_avg", "exp_avg_sq"))
        remainder = rounding_state[i] if rounding_state else None
        average, square = adamw_step_of_one(
            param, grad, average, square, corrections[i], remainder, options=options.of(i)
        )  # fmt: skip
        averages.append(average)
        squares.append(square)
    seeds = options.seeds.unbind()
    yield from store_averages(averages, batch.states, "exp_avg", batch.shards, seeds)
    yield from store_averages(squares, batch.states, "exp_avg_sq", batch.shards, seeds)


def _update_rounded(params: list[Tensor], grads: list[Tensor], batch: Batch, skip: Tensor | None) -> None:
    """Step AdamW on fp32 copies (or master weights) of the batch, then round into the parameters."""
    states, rounding, device = batch.states, batch.rounding, params[0].device
    rounding_state: Any = batch.rounding_state() or [None] * len(params)
    pairs = zip(params, rounding_state, strict=True)
    masters = rounding == "master"
    wide = [r.copy_(widen(p, r, rounding)) if masters and r is not None else widen(p, r, rounding) for p, r in pairs]
    _decay_and_update(wide, [g.float() for g in grads], states, batch.group, skip)
    randomness: list[Any] = [()] * len(params)  # seed, offset and runs
    if rounding == "stochastic":
        seeds = seeds_for([s["step"] for s in states], batch.indices, batch.group["seed"], device)
        positions = positions_of(batch.shards, device)
        runs: Any = [None] * len(params) if positions["runs"] is None else positions["runs"]
        randomness = list(zip(seeds, positions["offsets"], runs, strict=True))
    for param, state, value, bits in zip(params, rounding_state, wide, randomness, strict=True):
        new_param, new_rounding_state = narrow(value, param, rounding, *bits)
        if skip is not None:
            new_param = torch.where(skip, param.to(new_param.dtype), new_param)
            if state is not None and new_rounding_state is not None:
                new_rounding_state = torch.where(skip, state, new_rounding_state)
        param.copy_(new_param)
        if state is not None and new_rounding_state is not None and state is not value:
            state.copy_(new_rounding_state)
