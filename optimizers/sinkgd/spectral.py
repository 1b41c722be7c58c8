"""SinkGD's ``spectral`` option: scale updates to an operator norm, estimated by warm-started power iteration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanstep.kernels import Scales
from leanstep.optimizers.common.matrices import Sides, matrix_shape, oriented
from leanstep.optimizers.common.sharding import Reducer, Reduction, Shard, local, new_vectors, shard_of, together
from leanstep.optimizers.sinkgd import rule

# power iterations at a matrix's first finite nonzero gradient
_FIRST_POWER_STEPS = 20


def power_vector_shape(param: Tensor, group: dict[str, Any]) -> tuple[int, ...]:
    """Return the shape of ``power_vector`` before sharding: [n], or [e, n] for a stack."""
    shard = oriented(shard_of(param), group["transposed"], group["flatten"])
    return (*shard.shape[:-2], matrix_shape(shard)[1]) if len(shard.shape) == 3 else (matrix_shape(shard)[1],)


def init_power_vector(state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
    """Create the vector of the power iteration, zero until the first finite nonzero gradient."""
    if "power_vector" not in state:
        state["power_vector"] = new_vectors(param, power_vector_shape(param, group))


def find_warm(state: dict[str, Any]) -> None:
    """Set ``power_warm`` of a loaded state, which may be that of a process with other matrices of the stack."""
    if "power_warm" in state:
        state["power_warm"] = local(state["power_vector"]).any(dim=-1).all().cpu()


def pin_operator_norms(
    matrices: list[Tensor],
    scales: Scales,
    states: list[dict[str, Any]],
    shards: list[Shard],
    sides: list[Sides],
    kind: str,
) -> Reducer[None]:
    """Multiply the row scales so that every diag(r) G diag(c) has operator norm :func:`rule.spectral_target`.

    ``sides``: the groups that shard each matrix; no columns may be sharded.
    """
    assert not any(side.columns for side in sides)
    reducers: list[Reducer[None]] = []
    for i, (matrix, rows, cols, state) in enumerate(zip(matrices, scales.rows, scales.cols, states, strict=True)):
        if shards[i].shape.numel() > 0:
            target = rule.spectral_target(kind, *matrix_shape(shards[i]))
            reducers.append(_pin_one(matrix, rows, cols, state, sides[i].rows, target))
    yield from together(reducers)


def _pin_one(
    matrix: Tensor, rows: Tensor, cols: Tensor, state: dict[str, Any], groups: tuple[Any, ...], target: float
) -> Reducer[None]:
    """Multiply ``rows`` so that diag(rows) matrix diag(cols) has operator norm ``target``; update the state's vector.

    A matrix is cold while its vector is zero. ``power_warm`` (on the CPU) is true if no matrix of the stack is cold;
    then the step reads nothing from the device. A trace cannot read it, and treats the first step as the warm-up.

    ``groups``: those that shard the rows; empty for unsharded rows.
    """
    cold = "power_warm" not in state or (not torch.compiler.is_compiling() and not state["power_warm"])
    vector = local(state["power_vector"])
    update = rule.scaled(matrix, rows, cols)
    norm, new = yield from (_first_norm if cold else _next_norm)(update, vector, groups)
    usable = torch.isfinite(new).all(dim=-1, keepdim=True) & (norm > 0)
    if cold:
        state["power_warm"] = (vector.any(dim=-1, keepdim=True) | usable).all().cpu()
    vector.copy_(torch.where(usable, new, vector))
    rows.mul_(torch.where(norm > 0, target / norm, torch.ones_like(norm)))


def _first_norm(update: Tensor, vector: Tensor, groups: tuple[Any, ...]) -> Reducer[tuple[Tensor, Tensor]]:
    """Return the norm and the next vector after several power steps, from hashed values where ``vector`` is zero."""
    known = vector.any(dim=-1, keepdim=True)
    new = torch.where(known, vector, rule.first_power_vector(vector))
    norm = vector.new_zeros(())
    for iteration in range(_FIRST_POWER_STEPS):
        ((norm, new),) = yield from _power_steps(update, [new], groups)
        usable = torch.isfinite(new).all(dim=-1, keepdim=True) & (norm > 0)
        # no cold matrix has a usable gradient
        if iteration == 0 and not torch.compiler.is_compiling() and not (usable & ~known).any():
            break
    return norm, new


def _next_norm(update: Tensor, vector: Tensor, groups: tuple[Any, ...]) -> Reducer[tuple[Tensor, Tensor]]:
    """Return the larger of two norms and its next vector: one step from ``vector``, two from hashed values.

    The first is nearly exact where gradients change slowly. It may be far too small where this gradient has little in
    common with the last ones; the second one depends on this gradient alone.
    """
    first = rule.first_power_vector(vector)
    (warm_norm, warm), (_, fresh) = yield from _power_steps(update, [vector, first], groups)
    ((fresh_norm, fresh),) = yield from _power_steps(update, [fresh], groups)
    return torch.maximum(warm_norm, fresh_norm), torch.where(fresh_norm > warm_norm, fresh, warm)


def _power_steps(
    update: Tensor, vectors: list[Tensor], groups: tuple[Any, ...]
) -> Reducer[list[tuple[Tensor, Tensor]]]:
    """Return (norm, next vector) of a power step from each vector, summed over the shards of the rows."""
    steps = [rule.power_step(update, vector) for vector in vectors]
    for process_group in groups:
        yield [Reduction(part, process_group) for step in steps for part in step]
    return [(square.sqrt(), new) for square, new in steps]
