"""Lion: sign of an interpolated momentum, with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels import lion_agreement, lion_agreement_int8, lion_step, lion_step_int8
from leanstep.kernels.steps.common import compute_dtype, constant, decay_factor, pack
from leanstep.optimizers.common.base import Batch, GradientAverage, LeanOptimizer, count_nonfinite, step_decoded
from leanstep.optimizers.common.checks import check_betas, check_dtype, check_flags, settings_of
from leanstep.optimizers.common.column_shards import cuts_rows
from leanstep.optimizers.common.quantized import is_quantized, scale_key
from leanstep.optimizers.common.sharding import Reducer, locals_of, readables, shard_of, store, sum_over_shards
from leanstep.optimizers.common.state import Entry

# lower bound of the cautious mask's mean, by which the update is divided (arXiv 2411.16085)
_MIN_AGREEMENT = 1e-5


class Lion(LeanOptimizer):
    r"""Lion (evolved sign momentum).

    Start with a fifth of a tuned AdamW's ``lr`` and five times its ``weight_decay``, which ``like_adamw`` of
    :func:`leanstep.optimizers.create` sets. Searches on the three language models of docs/measured/losses.md chose
    2.5e-4 to 5e-4 for hidden matrices, and 4e-3 to 8e-3 for the rest: far from the default ``lr``, so ``create`` takes
    another one where none is given. In their 200 to 480 steps Lion ends behind AdamW, tuned too.

    For every parameter, in fp32, with the momentum m starting at 0::

        c = beta1 * m + (1 - beta1) * g
        p = p * (1 - lr * weight_decay) - lr * sign(c)        # decay first, sign(0) = 0
        m = beta2 * m + (1 - beta2) * g

    Every entry moves by lr or not at all. bf16 parameters lose small updates with rounding="nearest".
    ``leanstep/kernels/reference/steps/lion_step.py`` has the formula in code, one tensor at a time.

    Args:
        params: parameters, named parameters, or groups (see :func:`leanstep.optimizers.param_groups`).
        lr: step size, a number or a one-element tensor.
        betas: (beta1, beta2): the weights of m in the interpolation c and in the new m.
        weight_decay: decoupled: ``p *= 1 - lr * weight_decay``.
        cautious: move only entries whose update and gradient agree in sign, and multiply their step by
            numel / agreeing entries (arXiv 2411.16085). Reads gradient and momentum once more.
        cautious_decay: no decay for entries whose update and parameter differ in sign (arXiv 2510.12402); those with a
            zero update decay.
        rounding: how to round the fp32 result to a bf16 or fp16 parameter. "nearest". "stochastic": unbiased, bf16
            only, reproducible from ``seed``. "kahan": carry the rounding error in a compensation of the parameter's
            dtype. "master": update fp32 weights in the state. Every step compares each entry of the parameter with its
            rounded master, and continues from the parameter where they differ: after ``model.load_state_dict``, or any
            other write, also through ``.data`` and into shards. "kahan" drops compensations that exceed half the
            distance to the next number; smaller ones of older weights move a weight by less than its own rounding.
            "split": bf16 only; the parameter and one byte of state are the upper 24 bits of the fp32 weight, rounded to
            nearest: exact to 2**-16 of its value. The byte of an older weight moves a written one by at most half the
            distance to the next bf16 number, and a zero not at all. Setting ``group["rounding"]`` converts the state in
            the next step.
        momentum_dtype: dtype of m; None: the parameter's. torch.int8: 8-bit codes with one fp32 scale for every 128
            neighbours of a row, for parameters of two or more dimensions; others have the parameter's dtype. Rounding
            to codes is stochastic and unbiased, because rounding to nearest would lose slow changes of m:
            ``leanstep/kernels/reference/quantization.py`` has the numbers. Shards that cut rows are stepped in plain
            torch, with m in fp32 for the time of the step. Setting ``group["momentum_dtype"]`` converts m in the next
            step. torch.float8_e4m3fn or "fp8": numbers of this format in place of the codes; they take the same memory,
            and are rounded about twice as coarsely.
        seed: seed of stochastic rounding, an int in [0, 2**32).
        nonfinite: how to treat infinite or NaN gradients. "skip": leave these entries of parameter and momentum
            unchanged (an 8-bit momentum up to rounding), and count the tensor (:meth:`nonfinite_count`). "raise": check
            all gradients before any update (waits for the device). "pass": use the gradient as it is; it makes its
            block of 128 entries of an 8-bit momentum NaN.
        maximize: ascend instead of descend.
        foreach: None or True: one call for all tensors of a device and dtype. False: one call per tensor. The results
            are bit-identical.

    Raises:
        ValueError, TypeError: a setting is out of range.
        RuntimeError: a gradient is sparse.
        NonFiniteGradientError: a gradient is not finite, with nonfinite="raise".

    Notes:
        State: ``exp_avg``, 1 value per parameter (4 bytes in fp32, 2 in bf16, 1 in int8 and fp8). These two add
        ``exp_avg_scale`` (4 bytes per 128 entries of a row; a short block at the end of a row counts too) and ``step``.
        "kahan" adds ``kahan_compensation`` (2 bytes), "master" adds ``master_param`` (4 bytes), "split" adds
        ``split_difference`` (1 byte), "stochastic" adds ``step`` (a scalar). A step allocates no
        temporary of a parameter's size.
        FSDP2: no communication; with ``cautious`` one all-reduce of one number per tensor. int8 with shards that cut
        rows: one all-reduce of the largest entries per mesh dimension that cuts columns, unless all of them get a
        multiple of 128 columns of a matrix. ``nonfinite_count`` counts the shards of this process.

    References:
        Chen, Liang, Huang, Real, Wang, Liu, Pham, Dong, Luong, Hsieh, Lu, Le, "Symbolic Discovery of Optimization
        Algorithms", arXiv 2302.06675, Algorithm 2.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = Lion(model.parameters(), lr=1e-4, weight_decay=0.1)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    _state_entries = (Entry("exp_avg", setting="momentum_dtype"),)
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
        momentum_dtype: torch.dtype | str | None = None,
        seed: int = 0,
        nonfinite: str = "skip",
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(params, settings_of(locals()))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_betas("Lion", group["betas"])
        check_flags("Lion", group, ("cautious", "cautious_decay"))
        check_dtype("Lion", "momentum_dtype", group["momentum_dtype"], codes=True)

    def _group_steps(
        self, group: dict[str, Any], first_index: int, only: Sequence[int] | None = None
    ) -> list[Reducer[Any]]:
        batches = self._batches(group, first_index, only, lambda param: _rule_of(group, param))
        return [
            step_decoded(batch, "exp_avg", _step) if name == "int8 columns" else _step(batch, int8=name == "int8")
            for name, batch in batches
        ]

    def _gradient_average(self, group: dict[str, Any], param: Tensor) -> GradientAverage | str:
        beta1, beta2 = group["betas"]
        if beta1 != beta2 or not beta1:
            return f"needs one weight of the momentum, above 0, and has betas=({beta1}, {beta2})"
        if group["cautious"]:
            return "compares update and gradient (cautious=True)"
        if _is_int8(group, param):
            return "would round its momentum of 8 bits in every pass"
        return GradientAverage("exp_avg", beta1)


def _is_int8(group: dict[str, Any], param: Tensor) -> bool:
    return is_quantized(group["momentum_dtype"], param)


def _rule_of(group: dict[str, Any], param: Tensor) -> str:
    if not _is_int8(group, param):
        return ""
    return "int8 columns" if cuts_rows(shard_of(param)) else "int8"


def _step(batch: Batch, *, int8: bool = False) -> Reducer[None]:
    """Update parameters, momenta and rounding states in place; count non-finite gradients."""
    group = batch.group
    params, grads = readables(batch.params), readables(batch.grads)
    exp_avgs = readables([state["exp_avg"] for state in batch.states])
    scales = locals_of([state[scale_key("exp_avg")] for state in batch.states]) if int8 else []
    scalars = lion_scalars(group["lr"], group["betas"], group["weight_decay"], params[0])
    options = batch.options(
        scalars, seeded=int8, decay_where_aligned=group["cautious_decay"], maximize=group["maximize"]
    )
    if group["cautious"]:
        if int8:
            agreeing = lion_agreement_int8(grads, exp_avgs, scales, options)
        else:
            agreeing = lion_agreement(grads, exp_avgs, options)
        yield from sum_over_shards(agreeing, batch.shards)
        options = options._replace(cautious_scale=cautious_scale(agreeing, [p.numel() for p in batch.params], scalars))
    if int8:
        flags = lion_step_int8(params, grads, exp_avgs, scales, batch.rounding_state(), options)
    else:
        flags = lion_step(params, grads, exp_avgs, batch.rounding_state(), options)
    store(params, batch.params)
    count_nonfinite(group, flags)


# ---- the scalars of the rule, which leanstep.kernels.lion_step applies


def lion_scalars(lr: float | Tensor, betas: tuple[float, float], weight_decay: float, like: Tensor) -> Tensor:
    """Pack [lr, 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2], on the device of ``like``.

    The dtype is fp64 for an fp64 ``like``, else fp32.
    """
    beta1, beta2 = betas
    numbers = [lr, decay_factor(lr, weight_decay), beta1, 1.0 - beta1, beta2, 1.0 - beta2]
    return pack(numbers, like.device, compute_dtype(like.dtype))


def cautious_scale(agreeing: Tensor, sizes: list[int], like: Tensor) -> Tensor:
    """Compute the factor of cautious updates, 1 / max(agreeing / size, 1e-5), [n], in the dtype of ``like``.

    ``agreeing`` [n] counts the entries whose update and gradient agree in sign, ``sizes`` all entries before sharding.
    """
    entries = constant([max(size, 1) for size in sizes], agreeing.device, like.dtype)
    return 1.0 / (agreeing.to(like.dtype) / entries).clamp(min=_MIN_AGREEMENT)
