"""One step of LANTON over all layers: noise, factors, momenta, updates, in this order.

This module applies the formulas of :mod:`leanstep.optimizers.lanton.rule` to layers, to the matrices of a stack, and
to this process's shards of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanstep.kernels.steps.common import compute_dtype, constant, nonfinite_flags
from leanstep.optimizers.common.base import by_device_and_dtype, count_nonfinite
from leanstep.optimizers.common.matrices import as_written, write_back
from leanstep.optimizers.common.quantized import scale_key
from leanstep.optimizers.common.rounding import rounding_states, seeds_for
from leanstep.optimizers.common.sharding import Reducer, Shard, local, positions_of, sum_over_shards
from leanstep.optimizers.lanton import matrices, rule
from leanstep.optimizers.lanton.matrices import block_count, is_stack
from leanstep.optimizers.lanton.quantized import update_int8, values_int8
from leanstep.optimizers.lanton.variance import normalize_rows

# Columns of a table with one row per matrix, summed over processes:
_DUAL = 0  # "rms": the difference's dual norm; "sign", "vector": rule.partial_dual_norm of the difference
_NONFINITE = 1  # above 0 if the gradient is not finite
_ACTIVE = 2  # above 0 if the gradient has a nonzero entry
_SQUARE = 3  # the sum of squares of a vector's new momentum


class Layer(NamedTuple):
    """A parameter with noise estimates: one, or one per matrix of a stack."""

    group: dict[str, Any]
    param: Tensor
    state: dict[str, Any]
    norm: str  # "rms", "sign" or "vector"


class LayerStep(NamedTuple):
    """A parameter with a gradient at this step."""

    group: dict[str, Any]
    param: Tensor
    state: dict[str, Any]
    norm: str
    grad: Tensor
    rounding: str
    shard: Shard
    param_index: int  # counted over all groups
    measures: bool  # this step's difference enters H
    stores: bool  # this step's gradient is stored as G' of the next step


class GradientInfo(NamedTuple):
    """A parameter with a gradient, and its row of the reduced table."""

    layer: LayerStep
    factor: Tensor  # [1], or [e] for a stack
    nonfinite: Tensor  # 0-d bool: the gradient is not finite, and the parameter is not updated
    active: Tensor  # bool [1] or [e]: the gradient has a nonzero entry
    square: Tensor  # 0-d: sum of squares of a vector's momentum


class Update(NamedTuple):
    """An update ``weight = weight * decay - lr * scale * direction`` to write."""

    info: GradientInfo
    weight: Tensor  # this process's shard of the parameter, or of one matrix of its stack
    rounding_states: list[Tensor]  # the weight's rounding state, if it has one
    direction: Tensor  # shaped as as_written shapes the weight
    scale: Tensor  # [1], or [e] for a stack
    matrix: int | None  # index of the matrix in this process's part of a stack; None: the update is of a whole shard


# ---- norms and shapes of parameters


def norm_of(group: dict[str, Any], param: Tensor) -> str:
    """Return a parameter's norm, "rms", "sign" or "vector", with "auto" resolved."""
    if group["norm"] != "auto":
        return group["norm"]
    return "rms" if param.dim() >= 2 else "vector"


def matrix_count(layer: Layer | LayerStep) -> int:
    """Return the number of a parameter's noise estimates: those of a matrix's blocks are adjacent."""
    count = layer.param.shape[0] if is_stack(layer.group, layer.norm, layer.param.dim()) else 1
    return count * block_count(layer.group, layer.norm, layer.param.shape)


def _has_codes(state: dict[str, Any]) -> bool:
    return scale_key("momentum_buffer") in state or scale_key("previous_grad") in state


def estimate_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of H, a squared sum over a matrix: fp64, or fp32 on devices without fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


# ---- the step


def step(layers: list[LayerStep], estimated: list[Layer]) -> Reducer[None]:
    """Update the parameters that have a gradient, and their state, in place.

    One all-reduce of four numbers per matrix gives every process all estimates, and so the same maxima.

    Args:
        layers: the parameters that have a gradient.
        estimated: all parameters that have an estimate, with or without a gradient.
    """
    layers = [layer for layer in layers if layer.param.numel() > 0]
    if not layers:
        return
    device = local(layers[0].param).device
    rows: list[slice] = []  # rows of the table, per layer
    shards: list[Shard] = []  # per row
    for layer in layers:
        count = matrix_count(layer)
        rows.append(slice(len(shards), len(shards) + count))
        shards += [layer.shard] * count
    table = torch.zeros(len(shards), 4, dtype=estimate_dtype(device), device=device)
    _measure(layers, rows, table)
    yield from sum_over_shards(table, shards)
    nonfinite = table[constant([span.start for span in rows], device, torch.int64), _NONFINITE] > 0
    _count_nonfinite(layers, nonfinite)
    # H and f
    _update_noise(layers, rows, table, nonfinite)
    factors = _factors(layers, estimated, device)
    infos = []
    for layer, span, factor, flag in zip(layers, rows, factors, nonfinite.unbind(), strict=True):
        active = (table[span, _ACTIVE] > 0).to(local(layer.param).device)
        infos.append(GradientInfo(layer, factor, flag.to(active.device), active, table[span.start, _SQUARE]))
    counters = [layer.state["step"] for layer in layers if layer.rounding == "stochastic" or _has_codes(layer.state)]
    if counters:
        torch._foreach_add_(counters, 1)
    # of layers on the host: reading their flags needs no wait, unless other layers are elsewhere
    infos = [info for info in infos if not (_on_host(info.nonfinite) and bool(info.nonfinite))]
    # G' of the next step, B, and p along O
    for info in infos:
        yield from _store_gradient(info)
        yield from _update_momentum(info)
    _write([_elementwise_update(info) for info in infos if info.layer.norm != "rms"])
    hidden = [info for info in infos if info.layer.norm == "rms"]
    for batch in matrices.directions([info.layer for info in hidden], lambda i: _direction_momentum(hidden[i].layer)):
        ready = [(hidden[task.layer_index], task, direction) for task, direction in batch]
        with_variance = [each for each in ready if each[0].layer.group["variance"]]
        if with_variance:
            yield from normalize_rows(with_variance)
        _write([_matrix_update(*each) for each in ready])


def _measure(layers: list[LayerStep], rows: list[slice], table: Tensor) -> None:
    checked = [i for i, layer in enumerate(layers) if layer.group["nonfinite"] == "skip"]
    for positions in by_device_and_dtype([layers[i].param for i in checked]):
        flags = nonfinite_flags([local(layers[checked[k]].grad) for k in positions])
        starts = constant([rows[checked[k]].start for k in positions], table.device, torch.int64)
        table[starts, _NONFINITE] = flags.to(table)
    for layer, span in zip(layers, rows, strict=True):
        if layer.measures or layer.stores:
            grad = local(layer.grad)
            if _has_blocks(layer):
                active = matrices.active_blocks(layer, grad)
            else:
                active = grad.flatten(1).any(dim=1) if span.stop - span.start > 1 else _any(grad).view(1)
            _local_values(layer, table[span, _ACTIVE]).copy_(active)
        if layer.norm == "vector":
            momentum = _direction_momentum(layer, _preview_momentum(layer))
            table[span.start, _SQUARE] = torch.linalg.vector_norm(momentum, dtype=table.dtype).square()
        if layer.measures and layer.norm != "rms":
            table[span.start, _DUAL] = rule.partial_dual_norm(_difference(layer), layer.norm, table.dtype)
    hidden = [i for i, layer in enumerate(layers) if layer.measures and layer.norm == "rms"]
    for task, norms in matrices.nuclear_norms([layers[i] for i in hidden], lambda i: _difference(layers[hidden[i]])):
        layer = layers[hidden[task.layer_index]]
        start = rows[hidden[task.layer_index]].start
        start += task.first * block_count(layer.group, layer.norm, layer.shard.shape)
        table[start : start + norms.numel(), _DUAL] = norms.to(table)


def _any(grad: Tensor) -> Tensor:
    """Whether a gradient has a nonzero entry. On a CPU, first look at 64 entries, which usually suffices."""
    start = grad.flatten()[:64] if _on_host(grad) and grad.is_contiguous() else grad
    return start.any() if start is grad or bool(start.any()) else grad.any()


def _count_nonfinite(layers: list[LayerStep], nonfinite: Tensor) -> None:
    by_group: dict[int, list[int]] = {}
    for i, layer in enumerate(layers):
        if layer.group["nonfinite"] == "skip":
            by_group.setdefault(id(layer.group), []).append(i)
    for indices in by_group.values():
        count_nonfinite(layers[indices[0]].group, nonfinite[constant(indices, nonfinite.device, torch.int64)])


def _update_noise(layers: list[LayerStep], rows: list[slice], table: Tensor, nonfinite: Tensor) -> None:
    measuring = [i for i, layer in enumerate(layers) if layer.measures or layer.stores]
    if not measuring:
        return
    pairs = [(i, row) for i in measuring for row in range(rows[i].start, rows[i].stop)]
    states = [layers[i].state for i in measuring]

    def per_matrix(value: Callable[[LayerStep], float]) -> Tensor:
        # in a trace, bools that depend on noise_clock are symbolic and have no float()
        numbers = [value(layers[i]) for i, _ in pairs]
        return constant([(1.0 if v else 0.0) if isinstance(v, bool) else v for v in numbers], table.device, table.dtype)

    values = table[constant([row for _, row in pairs], table.device, torch.int64)]
    usable = (values[:, _ACTIVE] > 0) & ~nonfinite[constant([i for i, _ in pairs], table.device, torch.int64)]
    is_vector = per_matrix(lambda layer: layer.norm == "vector") > 0
    duals = torch.where(is_vector, values[:, _DUAL].sqrt(), values[:, _DUAL]) * per_matrix(_remaining_scale)
    noise, counts = (_joined(states, name, table.device) for name in ("noise", "noise_steps"))
    estimates = rule.noise_estimate(noise, duals, per_matrix(lambda layer: layer.group["betas"][1]))
    taken = usable & (counts >= 0) & (per_matrix(lambda layer: layer.measures) > 0) & torch.isfinite(estimates)
    stores = usable & (per_matrix(lambda layer: layer.stores) > 0)
    new_counts = torch.where(taken, counts + 1, counts)
    _distribute(states, "noise", torch.where(taken, estimates, noise))
    _distribute(states, "noise_steps", torch.where(stores, new_counts.clamp_min(0), new_counts))


def _remaining_scale(layer: LayerStep) -> float:
    """Return the factor from the table's entry to the dual norm; 1 for "rms", whose entry has it already."""
    if not layer.measures or layer.norm == "rms":
        return 1.0
    scale = rule.dual_norm_scale(layer.norm, tuple(layer.param.shape))
    return rule.noise_scale(layer.group["noise"], layer.group["half_fraction"]) * scale


def _joined(states: Sequence[dict[str, Any]], name: str, device: torch.device) -> Tensor:
    return torch.cat([s[name].to(device) for s in states]).to(estimate_dtype(device))


def _distribute(states: Sequence[dict[str, Any]], name: str, values: Tensor) -> None:
    for state, part in zip(states, values.split([s[name].numel() for s in states]), strict=True):
        state[name].copy_(part)


def _factors(layers: list[LayerStep], estimated: list[Layer], device: torch.device) -> list[Tensor]:
    one = torch.ones(1, dtype=estimate_dtype(device), device=device)
    by_param: dict[Tensor, Tensor] = {}
    if estimated:
        counts = [matrix_count(layer) for layer in estimated]
        factors = factors_and_noise(estimated, device)[0].split(counts)
        by_param = {layer.param: factor for layer, factor in zip(estimated, factors, strict=True)}
    return [by_param.get(layer.param, one.expand(matrix_count(layer))) for layer in layers]


def factors_and_noise(layers: Sequence[Layer], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return f, H and the number of estimates, each concatenated over the matrices of all layers."""
    noise, counts = (_joined([layer.state for layer in layers], name, device) for name in ("noise", "noise_steps"))
    measured, factors = counts >= 1, torch.ones_like(noise)
    alphas = [layer.group["alpha"] for layer in layers for _ in range(matrix_count(layer))]
    norms = [layer.norm for layer in layers for _ in range(matrix_count(layer))]
    # the heads of Q and K outnumber all other matrices, and their noise is far smaller
    blocks = [block_count(layer.group, layer.norm, layer.param.shape) for layer in layers]
    weights = [1.0 / count for layer, count in zip(layers, blocks, strict=True) for _ in range(matrix_count(layer))]
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


# ---- one parameter


def _signed(layer: LayerStep) -> Tensor:
    grad = local(layer.grad)
    return -grad if layer.group["maximize"] else grad


def _preview_momentum(layer: LayerStep) -> Tensor:
    """Return the momentum that this step will store, before rounding, and leave the stored one."""
    beta = layer.group["betas"][0]
    if scale_key("momentum_buffer") not in layer.state:
        return rule.momentum(local(layer.state["momentum_buffer"]), _signed(layer), beta)
    # the average with G of what is stored
    return values_int8(layer, "momentum_buffer", beta, nesterov=True)


def _direction_momentum(layer: LayerStep, momentum: Tensor | None = None) -> Tensor:
    """Return the tensor that determines O: the stored momentum, or Nesterov's average of it with G."""
    beta, nesterov = layer.group["betas"][0], layer.group["nesterov"]
    if momentum is None and scale_key("momentum_buffer") in layer.state:
        return values_int8(layer, "momentum_buffer", beta, nesterov=nesterov)
    momentum = local(layer.state["momentum_buffer"]) if momentum is None else momentum
    return rule.nesterov(momentum, _signed(layer), beta) if nesterov else momentum


def _difference(layer: LayerStep) -> Tensor:
    """Return this process's shard of G - G', or of h - w * G for halves (see :func:`rule.noise_scale`).

    The result has the gradients' dtype: a norm tolerates its rounding, and bf16 halves the communication.
    """
    grad = local(layer.grad)
    if layer.group["noise"] == "previous":
        if scale_key("previous_grad") not in layer.state:
            return grad - local(layer.state["previous_grad"])
        return values_int8(layer, "previous_grad", 0.0).neg_().add_(grad)
    half = local(layer.state["half_grad"])
    return half.sub(grad, alpha=layer.group["half_fraction"]) if layer.group["half_content"] == "gradient" else half


def _store_gradient(info: GradientInfo) -> Reducer[None]:
    """Store the gradient as G' of the next step, except matrices with a zero or non-finite gradient."""
    layer = info.layer
    if not layer.stores:
        return
    grad, previous = local(layer.grad), local(layer.state["previous_grad"])
    take = _local_values(layer, info.active & ~info.nonfinite)
    if scale_key("previous_grad") in layer.state:
        if _has_blocks(layer):
            old = values_int8(layer, "previous_grad", 0.0)
            layer = layer._replace(grad=torch.where(matrices.spread(layer, take, grad.dim()), grad.to(old.dtype), old))
            yield from update_int8(layer, "previous_grad", 0.0, None)
        else:
            yield from update_int8(layer, "previous_grad", 0.0, (~take).to(torch.int32))
    elif _on_host(grad) and bool(take.all()):
        previous.copy_(grad)
    else:
        if _has_blocks(layer):
            mask = matrices.spread(layer, take, grad.dim())
        else:
            mask = take.view(-1, *[1] * (grad.dim() - 1)) if take.numel() > 1 else take[0]
        previous.copy_(torch.where(mask, grad, previous))


def _update_momentum(info: GradientInfo) -> Reducer[None]:
    layer, buffer, beta = info.layer, local(info.layer.state["momentum_buffer"]), info.layer.group["betas"][0]
    if scale_key("momentum_buffer") in layer.state:
        skip = info.nonfinite.view(1).to(torch.int32) if layer.group["nonfinite"] == "skip" else None
        yield from update_int8(layer, "momentum_buffer", beta, skip)
    elif not _on_host(buffer) and layer.group["nonfinite"] == "skip":  # on the host, step() has dropped these layers
        buffer.copy_(torch.where(info.nonfinite, buffer, rule.momentum(buffer, _signed(layer), beta)))
    else:
        rule.momentum(buffer, _signed(layer), beta, in_place=True)


def _local_values(layer: LayerStep, values: Tensor) -> Tensor:
    """Select the values of this process's matrices from one value per block of each matrix of a stack."""
    shard = layer.shard
    if shard.ranges is None or not is_stack(layer.group, layer.norm, layer.param.dim()):
        return values
    blocks = block_count(layer.group, layer.norm, shard.shape)
    return values[shard.ranges[0].start * blocks : shard.ranges[0].stop * blocks]


def _has_blocks(layer: LayerStep) -> bool:
    """Whether every matrix of a parameter has several blocks, each with an estimate of its own."""
    return block_count(layer.group, layer.norm, layer.shard.shape) > 1


def _on_host(tensor: Tensor) -> bool:
    """Whether reading values neither waits for a device nor breaks a graph of torch.compile."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


# ---- updates


def _elementwise_update(info: GradientInfo) -> Update:
    layer = info.layer
    momentum = as_written(_direction_momentum(layer), stacked=False)
    if layer.norm == "sign":
        direction = rule.sign_direction(momentum)
    else:
        scale = rule.dual_norm_scale("vector", tuple(layer.param.shape))
        direction = rule.vector_direction(momentum, info.square, scale)
    return _update(info, direction, info.factor * layer.group["radius"])


def _matrix_update(info: GradientInfo, task: matrices.MatrixTask, direction: Tensor) -> Update:
    layer, first, scales = info.layer, task.first, matrices.scales_of(info.layer)
    count, radius = len(scales), layer.group["radius"]
    in_stack = slice(first * count, (first + 1) * count)
    factor = _local_values(layer, info.factor) if task.matrix is None else info.factor[in_stack]
    if count == 1:
        return _update(info, direction, factor * (radius * scales[0]), task.matrix)
    # factors of blocks differ by row: they go into the direction, in the dtype in which the kernel multiplies
    sizes = factor.view(-1, count) * constant([radius * scale for scale in scales], factor.device, factor.dtype)
    wide = compute_dtype(local(layer.param).dtype)
    direction = direction.to(wide) * matrices.spread(layer, sizes.to(wide), direction.dim())
    return _update(info, direction, factor.new_ones(len(sizes)), task.matrix)


def _update(info: GradientInfo, direction: Tensor, scale: Tensor, matrix: int | None = None) -> Update:
    parts = [local(info.layer.param), *rounding_states([info.layer.state], info.layer.rounding)]
    weight, *states = parts if matrix is None else [part[matrix] for part in parts]
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
            skipped=[] if _on_host(updates[0].direction) else [u.info.nonfinite for u in updates],
            rounding=rounding,
            rounding_states=states,
            seeds=seeds,
            **positions,
            skip_nonfinite=group["nonfinite"] != "pass",
        )

    states = [state for u in updates for state in u.rounding_states]
    stacked = [is_stack(group, layer.norm, u.weight.dim()) for layer, u in zip(layers, updates, strict=True)]
    write_back(write, [u.weight for u in updates], states, stacked)
