"""SinkGD's ``spectral`` option: scale updates to an operator norm, estimated by warm-started power iteration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanstep.kernels import Scales
from leanstep.optimizers.common.matrices import Sides, matrix_shape
from leanstep.optimizers.common.sharding import Reducer, Reduction, Shard, local, together
from leanstep.optimizers.sinkgd import rule

# power iterations at a matrix's first finite nonzero gradient
_FIRST_POWER_STEPS = 20


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
    tracing = torch.compiler.is_compiling()
    cold = "power_warm" not in state or (not tracing and not state["power_warm"])
    vector = local(state["power_vector"])
    first, known = rule.first_power_vector(vector), vector.any(dim=-1, keepdim=True)
    update = rule.scaled(matrix, rows, cols)
    if cold:
        new = torch.where(known, vector, first)
        for iteration in range(_FIRST_POWER_STEPS):
            square, new = rule.power_step(update, new)
            yield from _summed([square, new], groups)
            # no cold matrix has a usable gradient
            if iteration == 0 and not tracing and not (_is_usable(square, new) & ~known).any():
                break
    else:
        # one step from the last vector is nearly exact where gradients change slowly, and may be far too small where
        # this one has little in common with the last ones; two from hashed values depend on this gradient alone
        square, new = rule.power_step(update, vector)
        fresh_square, fresh = rule.power_step(update, first)
        yield from _summed([square, new, fresh_square, fresh], groups)
        fresh_square, fresh = rule.power_step(update, fresh)
        yield from _summed([fresh_square, fresh], groups)
        new = torch.where(fresh_square > square, fresh, new)
        square = torch.maximum(square, fresh_square)
    usable, norm = _is_usable(square, new), square.sqrt()
    vector.copy_(torch.where(usable, new, vector))
    if cold:
        state["power_warm"] = (known | usable).all().cpu()
    rows.mul_(torch.where(norm > 0, target / norm, torch.ones_like(norm)))


def _is_usable(square: Tensor, new: Tensor) -> Tensor:
    """Whether the next vector of a power step is finite, and its squared norm not 0."""
    return torch.isfinite(new).all(dim=-1, keepdim=True) & (square > 0)


def _summed(parts: list[Tensor], groups: tuple[Any, ...]) -> Reducer[None]:
    for process_group in groups:
        yield [Reduction(part, process_group) for part in parts]
