"""Lion: sign of an interpolated momentum, with decoupled weight decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanstep.kernels import StepOptions, lion_agreement, lion_step, use_backend
from leanstep.kernels.steps.common import compute_dtype, constant, decay_factor, pack
from leanstep.optimizers.common.base import (
    LeanOptimizer,
    by_device_and_dtype,
    check_betas,
    check_dtype,
    check_flags,
    count_nonfinite,
    new_state,
)
from leanstep.optimizers.common.rounding import (
    check_rounding,
    effective,
    init_rounding,
    rounding_states,
    seeds_and_offsets,
)
from leanstep.optimizers.common.sharding import Steps, readable, shard_of, store, sum_over_shards

# the smallest mean of the cautious mask that is divided by (arXiv 2411.16085)
_MIN_AGREEMENT = 1e-5


class Lion(LeanOptimizer):
    r"""Lion (evolved sign momentum).

    For every parameter, in fp32, with the momentum m starting at 0::

        c = beta1 * m + (1 - beta1) * g
        p = p * (1 - lr * weight_decay) - lr * sign(c)        # decay first, sign(0) = 0
        m = beta2 * m + (1 - beta2) * g

    Every entry moves by lr (or not at all), so a good lr is 3 to 10 times smaller than AdamW's and a good
    ``weight_decay`` 3 to 10 times larger. In plain bf16 small updates are lost to rounding: choose ``rounding``.

    Args:
        params: parameters, named parameters, or groups (see :func:`leanstep.optimizers.param_groups`).
        lr: step size, a number or a one-element tensor.
        betas: (beta1, beta2), of the interpolation and of the momentum.
        weight_decay: decoupled: ``p *= 1 - lr * weight_decay``.
        cautious: move only where the update agrees in sign with the gradient, scaled by numel / agreeing
            (arXiv 2411.16085). Needs one more read of gradient and momentum.
        cautious_decay: decay only where the update and the parameter agree in sign (arXiv 2510.12402).
        rounding: how the fp32 result meets bf16 or fp16 parameters: "nearest", "stochastic" (bf16; reproducible from
            ``seed``), "kahan" (a compensation in the parameter's dtype) or "master" (fp32 weights in the state, taken
            from the parameter at its first step: load a model before, or its values are overwritten).
        momentum_dtype: dtype of m; None is the parameter's.
        seed: of stochastic rounding.
        nonfinite: "skip": entries with a non-finite gradient keep parameter and momentum, and the tensor is counted
            (:meth:`nonfinite_count`); "raise": check before anything is changed (waits for the device);
            "pass": the gradient is used as it is.
        maximize: ascend.
        foreach: None or True: one call for all tensors of a device and dtype; False: the definition, a tensor at a
            time. Bit for bit the same.

    Raises:
        ValueError, TypeError: settings out of range.
        RuntimeError: a sparse gradient.
        NonFiniteGradientError: see ``nonfinite``.

    Notes:
        State: ``exp_avg``, 1 value per parameter (4 bytes in fp32, 2 in bf16), plus ``kahan_compensation`` (2 bytes)
        or ``master_param`` (4 bytes) and ``step`` where ``rounding`` needs them. A step allocates nothing of a
        parameter's size. Sharded parameters (FSDP2) need no communication, except cautious: one all-reduce of one
        number per tensor. ``nonfinite_count`` counts the parts a process holds.

    References:
        Chen, Liang, Huang, Real, Wang, Liu, Pham, Dong, Luong, Hsieh, Lu, Le, "Symbolic Discovery of Optimization
        Algorithms", arXiv 2302.06675, Algorithm 2.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = Lion(model.parameters(), lr=1e-4, weight_decay=0.1)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        cautious: bool = False,
        cautious_decay: bool = False,
        rounding: str = "nearest",
        momentum_dtype: torch.dtype | None = None,
        seed: int = 0,
        nonfinite: str = "skip",
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "cautious": cautious,
            "cautious_decay": cautious_decay,
            "rounding": rounding,
            "momentum_dtype": momentum_dtype,
            "seed": seed,
            "nonfinite": nonfinite,
            "maximize": maximize,
            "foreach": foreach,
        }
        self._check_group(defaults)
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_betas("Lion", group["betas"])
        check_flags("Lion", group, ("cautious", "cautious_decay"))
        check_rounding("Lion", group)
        check_dtype("Lion", "momentum_dtype", group["momentum_dtype"])

    def _init_state(self, group: dict[str, Any], position: int, param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        if "exp_avg" not in state:
            state["exp_avg"] = new_state(param, group["momentum_dtype"])
        init_rounding(state, param, effective("Lion", group, position, param))
        return state

    def _group_steps(self, group: dict[str, Any], first_index: int, only: int | None = None) -> list[Steps[None]]:
        batch = self._batch(group, first_index, only)
        parts = []
        for (device, dtype), members in by_device_and_dtype(batch.params).items():
            params, grads, states, indices, positions = batch.pick(members)
            rounding = effective("Lion", group, positions[0], params[0])
            exp_avgs = [state["exp_avg"] for state in states]
            scalars = lion_scalars(group, device, dtype)
            parts.append(
                lion(params, grads, exp_avgs, states, indices=indices, group=group, rounding=rounding, scalars=scalars)
            )
        return parts


def lion_scalars(group: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The scalars of a group as the kernels take them: [lr, decay, beta1, 1 - beta1, beta2, 1 - beta2]."""
    beta1, beta2 = group["betas"]
    decay = decay_factor(group["lr"], group["weight_decay"])
    return pack([group["lr"], decay, beta1, 1.0 - beta1, beta2, 1.0 - beta2], device, compute_dtype(dtype))


def lion(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    states: list[dict[str, Any]],
    *,
    indices: list[int],
    group: dict[str, Any],
    rounding: str,
    scalars: Tensor,
) -> Steps[None]:
    """Lion over tensors of one device and dtype: parameters, momenta, rounding state and the group's count in place."""
    shards = [shard_of(p) for p in params]
    local_params, local_grads, local_avgs = ([readable(t) for t in ts] for ts in (params, grads, exp_avgs))
    seeds, offsets = seeds_and_offsets(rounding, states, indices, shards, group["seed"], scalars.device)
    options = StepOptions(
        scalars,
        rounding,
        decay_where_aligned=group["cautious_decay"],
        maximize=group["maximize"],
        skip_nonfinite=group["nonfinite"] != "pass",
        seeds=seeds,
        offsets=offsets,
    )
    if group["cautious"]:
        counts = lion_agreement(local_grads, local_avgs, options)
        if any(s.groups for s in shards):
            yield from sum_over_shards(counts, shards)
        options = options._replace(cautious_scale=_cautious_scale(counts, params, scalars.dtype))
    tensors = (local_params, local_grads, local_avgs, rounding_states(states, rounding))
    if group["foreach"] is False:
        with use_backend("reference"):
            flags = lion_step(*tensors, options)
    else:
        flags = lion_step(*tensors, options)
    store(local_params, params)
    count_nonfinite(group, flags)


def _cautious_scale(counts: Tensor, params: list[Tensor], dtype: torch.dtype) -> Tensor:
    """1 / mean(mask) of every whole tensor, in fp32: the mean is at least 1e-5."""
    sizes = constant([max(p.numel(), 1) for p in params], counts.device, counts.dtype)
    return (1.0 / (counts / sizes).clamp(min=_MIN_AGREEMENT)).to(dtype)
