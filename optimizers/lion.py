"""Lion: sign of an interpolated momentum, with decoupled weight decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanstep.kernels import lion_agreement, lion_step
from leanstep.kernels.steps.common import compute_dtype, constant, decay_factor, pack
from leanstep.optimizers.common.base import Batch, LeanOptimizer, count_nonfinite
from leanstep.optimizers.common.checks import check_betas, check_dtype, check_flags
from leanstep.optimizers.common.rounding import effective, init_rounding
from leanstep.optimizers.common.sharding import Steps, new_state, readable, store, sum_over_shards

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
    The formula in code, one tensor at a time, is ``leanstep/kernels/reference/steps/lion_step.py``.

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
        nonfinite: "skip": leave entries with a non-finite gradient unchanged, and count the tensor
            (:meth:`nonfinite_count`); "raise": raise before anything is changed (waits for the device); "pass": use
            the gradient as it is.
        maximize: ascend.
        foreach: None or True: one call for all tensors of a device and dtype; False: one tensor at a time. Bit for bit
            the same.

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

    _shaped_state = ("exp_avg",)
    _separable = True

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
        defaults = dict(
            lr=lr, betas=betas, weight_decay=weight_decay, cautious=cautious, cautious_decay=cautious_decay,
            rounding=rounding, momentum_dtype=momentum_dtype, seed=seed, nonfinite=nonfinite, maximize=maximize,
            foreach=foreach,
        )  # fmt: skip
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_betas("Lion", group["betas"])
        check_flags("Lion", group, ("cautious", "cautious_decay"))
        check_dtype("Lion", "momentum_dtype", group["momentum_dtype"])

    def _init_state(self, group: dict[str, Any], position: int, param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        if "exp_avg" not in state:
            state["exp_avg"] = new_state(param, group["momentum_dtype"])
        init_rounding(state, param, effective("Lion", group, position, param))
        return state

    def _group_steps(self, group: dict[str, Any], first_index: int, only: int | None = None) -> list[Steps[None]]:
        return [_step(batch) for _, batch in self._batches(group, first_index, only)]


def _step(batch: Batch) -> Steps[None]:
    """Update parameters, momenta and rounding states in place; count non-finite gradients."""
    group = batch.group
    params, grads = ([readable(t) for t in ts] for ts in (batch.params, batch.grads))
    exp_avgs = [readable(state["exp_avg"]) for state in batch.states]
    scalars = lion_scalars(group["lr"], group["betas"], group["weight_decay"], params[0])
    options = batch.options(scalars, decay_where_aligned=group["cautious_decay"], maximize=group["maximize"])
    if group["cautious"]:
        agreeing = lion_agreement(grads, exp_avgs, options)
        if any(s.groups for s in batch.shards):
            yield from sum_over_shards(agreeing, batch.shards)
        options = options._replace(cautious_scale=cautious_scale(agreeing, [p.numel() for p in batch.params], scalars))
    flags = lion_step(params, grads, exp_avgs, batch.rounding_state(), options)
    store(params, batch.params)
    count_nonfinite(group, flags)


# ---- the rule: lion_step of leanstep.kernels is the formula above, with these numbers


def lion_scalars(lr: float | Tensor, betas: tuple[float, float], weight_decay: float, like: Tensor) -> Tensor:
    """The numbers of the formula: [lr, 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2].

    On the device of ``like``, in the dtype that an update of it is computed in.
    """
    beta1, beta2 = betas
    numbers = [lr, decay_factor(lr, weight_decay), beta1, 1.0 - beta1, beta2, 1.0 - beta2]
    return pack(numbers, like.device, compute_dtype(like.dtype))


def cautious_scale(agreeing: Tensor, sizes: list[int], like: Tensor) -> Tensor:
    """Factor of the entries that agree in sign with their gradient: 1 / max(agreeing / size, 1e-5), [n].

    Args:
        agreeing: how many entries of every whole tensor agree, as :func:`leanstep.kernels.lion_agreement` counts them.
        sizes: how many entries every whole tensor has.
        like: gives the dtype.
    """
    entries = constant([max(size, 1) for size in sizes], agreeing.device, agreeing.dtype)
    return (1.0 / (agreeing / entries).clamp(min=_MIN_AGREEMENT)).to(like.dtype)
