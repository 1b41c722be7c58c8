"""One step of LANTON over all layers: noise, factors, momenta, updates, in this order.

This module applies the formulas of :mod:`leanstep.optimizers.lanton.rule` to layers, to the matrices of a stack, and
to this process's shards of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanstep.kernels.steps.common import compute_dtype, constant, largest_entries, nonfinite_flags
from leanstep.optimizers.common.base import by_device_and_dtype, count_nonfinite
from leanstep.optimizers.common.matrices import as_written, write_back
from leanstep.optimizers.common.rounding import rounding_states, seeds_for
from leanstep.optimizers.common.sharding import Reducer, Shard, local, locals_of, positions_of, sum_over_shards
from leanstep.optimizers.lanton import matrices, rule
from leanstep.optimizers.lanton.exchange import MatrixTask
from leanstep.optimizers.lanton.layers import GradientInfo, Layer, LayerStep, estimate_dtype
from leanstep.optimizers.lanton.quantized import update_int8, values_int8
from leanstep.optimizers.lanton.variance import normalize_rows

# Columns of a table with one row per matrix, summed over processes:
_DUAL = 0  # "rms": the difference's dual norm; "sign", "vector": rule.partial_dual_norm of the difference
_NONFINITE = 1  # above 0 if the gradient is not finite
_ACTIVE = 2  # above 0 if the gradient has a nonzero entry
_SQUARE = 3  # the sum of squares of a vector's new momentum


class Update(NamedTuple):
    """An update ``weight = weight * decay - lr * scale * direction`` to write."""

    info: GradientInfo
    weight: Tensor  # this process's shard of the parameter, or of one matrix of its stack
    rounding_states: list[Tensor]  # the weight's rounding state, if it has one
    direction: Tensor  # shaped as as_written shapes the weight
    scale: Tensor  # [1], or [e] for a stack
    matrix: int | None  # index of the matrix in this process's part of a stack; None: the update is of a whole shard


# ---- the step


def step(layers: list[LayerStep], estimated: list[Layer | LayerStep]) -> Reducer[None]:
    """Update the parameters that have a gradient, and their state, in place.

    One all-reduce of four numbers per matrix gives every process all estimates, and so the same maxima.

    Args:
        layers: the parameters that have a gradient, and entries.
        estimated: all parameters that have an estimate, with or without a gradient.
    """
    if not layers:
        return
    device = layers[0].weight.device
    shards = [layer.shard for layer in layers for _ in range(layer.form.estimates)]
    table = torch.zeros(len(shards), 4, dtype=estimate_dtype(device), device=device)
    _measure(layers, table)
    yield from sum_over_shards(table, shards)
    nonfinite = table[constant([layer.rows.start for layer in layers], device, torch.int64), _NONFINITE] > 0
    _count_nonfinite(layers, nonfinite)
    # H and f
    _update_noise(layers, table, nonfinite)
    factors = _factors(layers, estimated, device)
    counters = [layer.state["step"] for layer in layers if layer.rounding == "stochastic" or layer.codes]
    if counters:
        torch._foreach_add_(counters, 1)
    # layers on the host, which waits for no device to read their flags, are left out here
    flags = nonfinite.tolist() if any([layer.on_host for layer in layers]) else [False] * len(layers)
    squares = table[:, _SQUARE].unbind()
    infos = [
        GradientInfo(layer, factor, bad.to(layer.weight.device), squares[layer.rows.start])
        for layer, factor, bad, flag in zip(layers, factors, nonfinite.unbind(), flags, strict=True)
        if not (layer.on_host and flag)
    ]
    # G' of the next step, B, and p along O
    yield from _store_gradients([info for info in infos if info.layer.stores], table[:, _ACTIVE] > 0)
    yield from _update_momenta(infos)
    _write([_elementwise_update(info) for info in infos if info.layer.form.norm != "rms"])
    hidden = [info for info in infos if info.layer.form.norm == "rms"]
    for batch in matrices.directions([info.layer for info in hidden], _direction_momenta):
        ready = [(hidden[task.layer_index], task, direction) for task, direction in batch]
        with_variance = [each for each in ready if each[0].layer.group["variance"]]
        if with_variance:
            yield from normalize_rows(with_variance)
        _write([_matrix_update(*each) for each in ready])


def _measure(layers: list[LayerStep], table: Tensor) -> None:
    device = table.device
    checked = [layer for layer in layers if layer.group["nonfinite"] == "skip"]
    for positions in by_device_and_dtype([layer.weight for layer in checked]):
        flags = nonfinite_flags([checked[k].grad for k in positions])
        table[constant([checked[k].rows.start for k in positions], device, torch.int64), _NONFINITE] = flags.to(table)
    if active := [layer for layer in layers if layer.measures or layer.stores]:
        _mark_active(active, table)
    if vectors := [layer for layer in layers if layer.form.norm == "vector"]:
        norms = torch._foreach_norm([_previewed(layer) for layer in vectors], 2, dtype=table.dtype)
        rows = [layer.rows.start for layer in vectors]
        table[constant(rows, device, torch.int64), _SQUARE] = torch.stack([n.to(device) for n in norms]).square()
    measured = [layer for layer in layers if layer.measures]
    if others := [layer for layer in measured if layer.form.norm != "rms"]:
        sums = [rule.partial_dual_norm(_differences([each])[0], each.form.norm, table.dtype) for each in others]
        rows = [layer.rows.start for layer in others]
        table[constant(rows, device, torch.int64), _DUAL] = torch.stack([each.to(device) for each in sums])
    hidden = [layer for layer in measured if layer.form.norm == "rms"]
    matrices.nuclear_norms(hidden, _differences, table[:, _DUAL])


def _count_nonfinite(layers: list[LayerStep], nonfinite: Tensor) -> None:
    groups = {id(layer.group): layer.group for layer in layers if layer.group["nonfinite"] == "skip"}
    for group in groups.values():
        indices = [i for i, layer in enumerate(layers) if layer.group is group]
        count_nonfinite(group, nonfinite[constant(indices, nonfinite.device, torch.int64)])


def _update_noise(layers: list[LayerStep], table: Tensor, nonfinite: Tensor) -> None:
    measuring = [i for i, layer in enumerate(layers) if layer.measures or layer.stores]
    if not measuring:
        return
    device, dtype, states = table.device, table.dtype, [layers[i].state for i in measuring]
    owners = [i for i in measuring for _ in range(layers[i].form.estimates)]  # of each row
    each = [layers[i] for i in owners]
    rows = [row for i in measuring for row in range(layers[i].rows.start, layers[i].rows.stop)]
    values = table[constant(rows, device, torch.int64)]
    usable = (values[:, _ACTIVE] > 0) & ~nonfinite[constant(owners, device, torch.int64)]
    is_vector = constant([layer.form.norm == "vector" for layer in each], device, torch.bool)
    # "rms" has its scale in the table
    scales = [1.0 if layer.form.norm == "rms" else layer.noise_scale * layer.form.scales[0] for layer in each]
    duals = torch.where(is_vector, values[:, _DUAL].sqrt(), values[:, _DUAL]) * constant(scales, device, dtype)
    noise, counts = (_joined(states, name, device) for name in ("noise", "noise_steps"))
    estimates = rule.noise_estimate(noise, duals, constant([layer.group["betas"][1] for layer in each], device, dtype))
    # numbers: in a trace, bools that depend on noise_clock are symbolic
    measured, stored = (
        constant([1.0 if flag else 0.0 for flag in flags], device, dtype) > 0
        for flags in ([layer.measures for layer in each], [layer.stores for layer in each])
    )
    taken = usable & (counts >= 0) & measured & torch.isfinite(estimates)
    new_counts = torch.where(taken, counts + 1, counts)
    _distribute(states, "noise", torch.where(taken, estimates, noise))
    _distribute(states, "noise_steps", torch.where(usable & stored, new_counts.clamp_min(0), new_counts))


def _joined(states: Sequence[dict[str, Any]], name: str, device: torch.device) -> Tensor:
    return torch.cat([s[name].to(device) for s in states]).to(estimate_dtype(device))


def _distribute(states: Sequence[dict[str, Any]], name: str, values: Tensor) -> None:
    stored = [state[name] for state in states]
    torch._foreach_copy_(stored, values.split([t.numel() for t in stored]))


def _factors(layers: list[LayerStep], estimated: list[Layer | LayerStep], device: torch.device) -> list[Tensor]:
    one = torch.ones(1, dtype=estimate_dtype(device), device=device)
    by_param: dict[int, Tensor] = {}
    if estimated:
        factors = factors_and_noise(estimated, device)[0].split([layer.form.estimates for layer in estimated])
        by_param = {id(layer.param): factor for layer, factor in zip(estimated, factors, strict=True)}
    return [by_param.get(id(layer.param), one.expand(layer.form.estimates)) for layer in layers]


def factors_and_noise(layers: Sequence[Layer | LayerStep], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return f, H and the number of estimates, each concatenated over the matrices of all layers."""
    noise, counts = (_joined([layer.state for layer in layers], name, device) for name in ("noise", "noise_steps"))
    measured, factors = counts >= 1, torch.ones_like(noise)
    alphas = [layer.group["alpha"] for layer in layers for _ in range(layer.form.estimates)]
    norms = [layer.form.norm for layer in layers for _ in range(layer.form.estimates)]
    # the heads of Q and K outnumber all other matrices, and their noise is far smaller
    weights = [1.0 / len(layer.form.block_rows) for layer in layers for _ in range(layer.form.estimates)]
    for norm in dict.fromkeys(norms):
        indices = [i for i, other in enumerate(norms) if other == norm]
        index = constant(indices, device, torch.int64)
        automatic = [alphas[i] == "auto" for i in indices]
        alpha = constant([1.0 if alphas[i] == "auto" else float(alphas[i]) for i in indices], device, noise.dtype)
        if any(automatic):
            counted = [weights[i] for i in indices]
            median = rule.automatic_alpha(
                torch.where(measured[index], noise[index], float("nan")),
                None if set(counted) == {1.0} else constant(counted, device, noise.dtype),
            )
            alpha = torch.where(constant(automatic, device, torch.bool), median, alpha)
        rates = rule.inverse_rates(noise[index], alpha)
        factors = factors.index_put((index,), rule.factors(rates, measured[index]))
    return factors, noise, counts


# ---- the tensors of some layers


def _mark_active(layers: list[LayerStep], table: Tensor) -> None:
    """Write above 0 where a gradient has a nonzero entry, for every estimate of this process's matrices."""
    alone: list[LayerStep] = []
    together: list[LayerStep] = []
    for layer in layers:
        several = layer.form.stacked or len(layer.form.block_rows) > 1
        (alone if layer.on_host or several else together).append(layer)
    marks = [([layer], _active(layer)) for layer in alone]
    for positions in by_device_and_dtype([layer.weight for layer in together]):
        alike = [together[k] for k in positions]
        marks.append((alike, largest_entries([layer.grad for layer in alike]) != 0))
    rows = [row for alike, _ in marks for layer in alike for row in range(layer.held.start, layer.held.stop)]
    values = torch.cat([values.to(table) for _, values in marks])
    table[constant(rows, table.device, torch.int64), _ACTIVE] = values


def _active(layer: LayerStep) -> Tensor:
    grad = layer.grad
    if len(layer.form.block_rows) > 1:
        return matrices.active_blocks(layer)
    if layer.form.stacked:
        return grad.flatten(1).any(dim=1)
    # first look at 64 entries, which usually suffices
    start = grad.flatten()[:64] if grad.is_contiguous() else grad
    return (start.any() if start is grad or bool(start.any()) else grad.any()).view(1)


def _signed(layer: LayerStep) -> Tensor:
    return -layer.grad if layer.group["maximize"] else layer.grad


def _previewed(layer: LayerStep) -> Tensor:
    """Return what determines O of a vector, from the momentum that this step will store; leave the stored one."""
    grad, beta = _signed(layer), layer.group["betas"][0]
    momentum = rule.momentum(local(layer.state["momentum_buffer"]), grad, beta)
    return rule.nesterov(momentum, grad, beta) if layer.group["nesterov"] else momentum


def _direction_momenta(layers: list[LayerStep]) -> list[Tensor]:
    """Return the tensors that determine O: the stored momenta, or Nesterov's averages of them with G."""
    key = "momentum_buffer"
    values = iter(values_int8([layer for layer in layers if key in layer.codes], key))
    result = []
    for layer, momentum in zip(layers, locals_of([layer.state[key] for layer in layers]), strict=True):
        if key in layer.codes:
            result.append(next(values))
        elif layer.group["nesterov"]:
            result.append(rule.nesterov(momentum, _signed(layer), layer.group["betas"][0]))
        else:
            result.append(momentum)
    return result


def _differences(layers: list[LayerStep]) -> list[Tensor]:
    """Return this process's shards of G - G', or of h - w * G for halves (see :func:`rule.noise_scale`).

    The results have the gradients' dtype: a norm tolerates its rounding, and bf16 halves the communication.
    """
    values = iter(values_int8([layer for layer in layers if "previous_grad" in layer.codes], "previous_grad"))
    keys = ["previous_grad" if layer.group["noise"] == "previous" else "half_grad" for layer in layers]
    stored = locals_of([layer.state[key] for layer, key in zip(layers, keys, strict=True)])
    result = []
    for layer, key, other in zip(layers, keys, stored, strict=True):
        if key in layer.codes:
            result.append(next(values).neg_().add_(layer.grad))
        elif key == "previous_grad":
            result.append(layer.grad - other)
        elif layer.group["half_content"] == "gradient":
            result.append(other.sub(layer.grad, alpha=layer.group["half_fraction"]))
        else:
            result.append(other)
    return result


# ---- state


def _store_gradients(infos: list[GradientInfo], active: Tensor) -> Reducer[None]:
    """Store gradients as G' of the next step, except matrices with a zero or non-finite gradient.

    ``active``: of every row of the table, whether the gradient has a nonzero entry.
    """
    key = "previous_grad"
    coded: list[tuple[LayerStep, Tensor | None]] = []
    for info, take in zip(infos, _taken(infos, active), strict=True):
        layer = info.layer
        if take is not None and len(layer.form.block_rows) > 1:
            old = values_int8([layer], key)[0] if key in layer.codes else local(layer.state[key])
            mask = matrices.spread(layer, take, layer.grad.dim())
            layer, take = layer._replace(grad=torch.where(mask, layer.grad.to(old.dtype), old)), None
        previous, grad = local(layer.state[key]), layer.grad
        if key in layer.codes:
            coded.append((layer, None if take is None else (~take).to(torch.int32)))
        elif take is None:
            previous.copy_(grad)
        else:
            mask = take[0] if take.numel() == 1 else take.view(-1, *[1] * (grad.dim() - 1))
            torch.where(mask, grad.to(previous.dtype), previous, out=previous)
    yield from update_int8(coded, key)


def _taken(infos: list[GradientInfo], active: Tensor) -> list[Tensor | None]:
    """Return which gradients of a layer's matrices to store; None where the host knows that it is all."""
    on_host = active.tolist() if any([info.layer.on_host for info in infos]) else []
    takes: list[Tensor | None] = [None] * len(infos)
    # on the host they are finite
    asked = [i for i, info in enumerate(infos) if not (info.layer.on_host and all(on_host[info.layer.held]))]
    if not asked:
        return takes
    held, device = [infos[i].layer.held for i in asked], active.device
    rows = [row for each in held for row in range(each.start, each.stop)]
    owners = [k for k, each in enumerate(held) for _ in range(each.start, each.stop)]
    nonfinite = torch.stack([infos[i].nonfinite.to(device) for i in asked])[constant(owners, device, torch.int64)]
    flags = active[constant(rows, device, torch.int64)] & ~nonfinite
    for i, part in zip(asked, flags.split([each.stop - each.start for each in held]), strict=True):
        takes[i] = part.to(infos[i].layer.grad.device)
    return takes


def _update_momenta(infos: list[GradientInfo]) -> Reducer[None]:
    key = "momentum_buffer"
    buffers = locals_of([info.layer.state[key] for info in infos])
    coded: list[tuple[LayerStep, Tensor | None]] = []
    for info, buffer in zip(infos, buffers, strict=True):
        layer, beta = info.layer, info.layer.group["betas"][0]
        skip = not layer.on_host and layer.group["nonfinite"] == "skip"  # on the host, step() has left these out
        if key in layer.codes:
            coded.append((layer, info.nonfinite.view(1).to(torch.int32) if skip else None))
        elif skip:
            momentum = rule.momentum(buffer, _signed(layer), beta)
            torch.where(info.nonfinite, buffer, momentum, out=buffer)
        else:
            rule.momentum(buffer, _signed(layer), beta, in_place=True)
    yield from update_int8(coded, key)


# ---- updates


def _elementwise_update(info: GradientInfo) -> Update:
    form, momentum = info.layer.form, as_written(_direction_momenta([info.layer])[0], stacked=False)
    if form.norm == "sign":
        direction = rule.sign_direction(momentum)
    else:
        direction = rule.vector_direction(momentum, info.square, form.scales[0])
    return _update(info, direction, info.factor * info.layer.group["radius"])


def _matrix_update(info: GradientInfo, task: MatrixTask, direction: Tensor) -> Update:
    layer, scales, radius = info.layer, info.layer.form.scales, info.layer.group["radius"]
    count, first = len(scales), task.first * len(scales)
    if task.matrix is None:
        factor = info.factor[layer.held.start - layer.rows.start : layer.held.stop - layer.rows.start]
    else:
        factor = info.factor[first : first + count]
    if count == 1:
        return _update(info, direction, factor * (radius * scales[0]), task.matrix)
    # factors of blocks differ by row: they go into the direction, in the dtype in which the kernel multiplies
    sizes = factor.view(-1, count) * constant([radius * scale for scale in scales], factor.device, factor.dtype)
    wide = compute_dtype(layer.weight.dtype)
    direction = direction.to(wide) * matrices.spread(layer, sizes.to(wide), direction.dim())
    return _update(info, direction, factor.new_ones(len(sizes)), task.matrix)


def _update(info: GradientInfo, direction: Tensor, scale: Tensor, matrix: int | None = None) -> Update:
    layer = info.layer
    states = rounding_states([layer.state], layer.rounding) if layer.rounding != "nearest" else []
    weight = layer.weight
    if matrix is not None:
        weight, states = weight[matrix], [state[matrix] for state in states]
    return Update(info, weight, states, direction, scale, matrix)


def _shard_of(update: Update) -> Shard:
    """Return the shard of an update's parameter, or of the matrix of a stack that it updates, in the parameter."""
    shard = update.info.layer.shard
    if update.matrix is None or shard.ranges is None:
        return shard
    number = shard.ranges[0][update.matrix]
    return shard._replace(ranges=(range(number, number + 1), *shard.ranges[1:]))


def _write(updates: list[Update]) -> None:
    sets: dict[Any, list[Update]] = {}
    for update in updates:
        weight = update.weight
        if weight.numel() > 0:
            sets.setdefault((id(update.info.layer.group), weight.device, weight.dtype), []).append(update)
    for alike in sets.values():
        _write_alike(alike)


def _write_alike(updates: list[Update]) -> None:
    layers, device = [u.info.layer for u in updates], updates[0].weight.device
    group, rounding = layers[0].group, layers[0].rounding
    seeds, positions = None, {}
    if rounding == "stochastic":
        seeds = seeds_for(
            [layer.state["step"] for layer in layers], [layer.param_index for layer in layers], group["seed"], device
        )
        positions = positions_of([_shard_of(u) for u in updates], device)

    def write(weights: list[Tensor], states: list[Tensor]) -> Tensor:
        return rule.update(
            weights,
            [u.direction for u in updates],
            [u.scale for u in updates],
            group["lr"],
            group["weight_decay"],
            cautious_decay=group["cautious_decay"],
            skipped=[] if layers[0].on_host else [u.info.nonfinite for u in updates],
            rounding=rounding,
            rounding_states=states,
            seeds=seeds,
            **positions,
            skip_nonfinite=group["nonfinite"] != "pass",
        )

    states = [state for u in updates for state in u.rounding_states]
    write_back(write, [u.weight for u in updates], states, [layer.form.stacked for layer in layers])
