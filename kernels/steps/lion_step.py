"""The Lion step on lists of tensors."""

import torch
from torch import Tensor

from leanstep.kernels.cpp_impl._build import TYPES, call
from leanstep.kernels.reference.steps import lion_step as reference
from leanstep.kernels.steps.common import StepOptions
from leanstep.kernels.steps.engine import Lists, declare_step


def lion_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    rounding_state: list[Tensor],
    options: StepOptions,
) -> Tensor:
    """One Lion step (Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, Algorithm 2).

    For every tensor, in fp32 (fp64 for fp64 parameters), elementwise::

        c = beta1 * m + (1 - beta1) * g
        u = sign(c)                                   # sign(0) = 0
        u = u * scale if u * g > 0 else 0             # only with cautious_scale
        p = p * (1 - lr * weight_decay) - lr * u
        m = beta2 * m + (1 - beta2) * g

    Args:
        params: tensors of one device and dtype, any shape; updated in place.
        grads: same shapes; any floating dtype; not written.
        exp_avgs: momenta m, same shapes, any floating dtype; updated in place.
        rounding_state: one tensor per parameter for the roundings "kahan" (in the parameter's dtype), "master"
            (fp32) and "split" (int8), updated in place; empty for the others.
        options: see :class:`StepOptions`; ``scalars`` are
            [lr, 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2].

    Returns:
        int32 [len(params)]: 1 where the gradient has a non-finite entry. With ``skip_nonfinite``, the parameter,
        momentum and rounding state of such an entry do not change. Without it, all flags are 0.

    Raises:
        BackendError: the requested backend cannot run here.
        ValueError: tensors at one index have different shapes.

    Notes:
        Reads p, g, m and writes p, m once each: 20 bytes per fp32 element. The C++ and Triton kernels make no temporary
        of a tensor's size. All backends agree bit for bit, because no kernel contracts products and sums.
    """
    return _step([params, grads, exp_avgs, rounding_state], options)


def lion_agreement(grads: list[Tensor], exp_avgs: list[Tensor], options: StepOptions) -> Tensor:
    """Count, per tensor, the entries whose Lion update agrees in sign with the gradient.

    Cautious Lion scales the agreeing entries by numel / count. For shards, sum the counts over the shards first.

    Args:
        grads, exp_avgs: as for :func:`lion_step`.
        options: as for :func:`lion_step`; reads ``scalars``, ``maximize`` and ``skip_nonfinite``.

    Returns:
        fp32 [len(grads)]. Counts are integers, converted once.

    Notes:
        Reads g and m once each.
    """
    return _agreement([grads, exp_avgs], options)


def macros(options: StepOptions, **types: str | int) -> dict[str, str | int]:
    """The macros of Lion's C++ kernels."""
    return types | {
        "MAXIMIZE": int(options.maximize),
        "SKIP": int(options.skip_nonfinite),
        "ROUNDING": options.rounding.upper(),
        "CAUTIOUS": int(options.cautious_scale is not None),
        "ALIGNED": int(options.decay_where_aligned),
    }


def _types(grads: list[Tensor], exp_avgs: list[Tensor]) -> dict[str, str]:
    return {"GRAD": TYPES[grads[0].dtype], "AVG": TYPES[exp_avgs[0].dtype]}


def _cpp_step(lists: Lists, options: StepOptions) -> Tensor:
    params, grads, exp_avgs, *state = lists
    variant = macros(options, PARAM=TYPES[params[0].dtype], **_types(grads, exp_avgs))
    flags = torch.zeros(len(params), dtype=torch.int32, device="cpu")
    tensors = (params, grads, exp_avgs, state[0] if state else None, [p.numel() for p in params])
    numbers = (options.scalars, options.cautious_scale, options.seeds, options.offsets, options.runs)
    call("steps/lion_step", "lion_step", variant, len(params), *tensors, *numbers, flags)
    return flags


def _cpp_agreement(lists: Lists, options: StepOptions) -> Tensor:
    grads, exp_avgs = lists
    # a variant that a step has, too
    variant = macros(options, PARAM="float", **_types(grads, exp_avgs)) | {"CAUTIOUS": 1}
    counts = torch.zeros(len(grads), dtype=torch.int64, device="cpu")
    sizes = [g.numel() for g in grads]
    call("steps/lion_step", "lion_agreement", variant, len(grads), *lists, sizes, options.scalars, counts)
    return counts


_step = declare_step(
    __name__,
    "lion_step",
    lists="params! grads exp_avgs! rounding_state!",
    floats=3,
    result=torch.int32,
    cpp=_cpp_step,
    definition=lambda tensors, options: reference.lion_step(*tensors, options=options),
)
_agreement = declare_step(
    __name__,
    "lion_agreement",
    lists="grads exp_avgs",
    floats=2,
    options=("scalars", "maximize", "skip_nonfinite"),
    result=torch.float32,
    cpp=_cpp_agreement,
    definition=lambda tensors, options: reference.lion_agreement(tensors[0], tensors[1], options),
)
