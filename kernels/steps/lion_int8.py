"""The Lion step with an 8-bit momentum, on lists of tensors."""

import torch
from torch import Tensor

from leanstep.kernels.cpp_impl._build import TYPES, call
from leanstep.kernels.reference.steps import lion_int8 as reference
from leanstep.kernels.steps.common import StepOptions
from leanstep.kernels.steps.engine import Lists, check_scales, declare_step, fp8_macro, rows_and_columns
from leanstep.kernels.steps.lion_step import macros


def lion_step_int8(
    params: list[Tensor],
    grads: list[Tensor],
    codes: list[Tensor],
    scales: list[Tensor],
    rounding_state: list[Tensor],
    options: StepOptions,
) -> Tensor:
    """One Lion step, as :func:`leanstep.kernels.lion_step`, with the momentum in 8 bits.

    For every tensor: m = value of the codes; the Lion step; codes and scales of the new m, by
    ``leanstep/kernels/reference/quantization.py``. Rounding of m is stochastic and unbiased.

    Args:
        params: tensors of one device and dtype, of two or more dimensions; updated in place.
        grads: same shapes; any floating dtype; not written.
        codes: int8 or float8_e4m3fn, same shapes; updated in place.
        scales: fp32 [rows, blocks], one for every 128 neighbours of a row; a row is all that one index of the first
            dimension selects. Updated in place.
        rounding_state: as for ``lion_step``.
        options: as for ``lion_step``. ``seeds`` are required, and for shards ``offsets``, which must begin a row.

    Returns:
        int32 [len(params)]: 1 where the gradient has a non-finite entry. With ``skip_nonfinite``, the parameter and the
        rounding state of such an entry do not change, and its momentum is rounded anew. Without it, all flags are 0,
        and a block of 128 momenta with a non-finite entry becomes NaN.

    Raises:
        BackendError: the requested backend cannot run here.
        ValueError: shapes do not fit.

    Notes:
        Reads p, g, codes and scales, and writes p, codes and scales once each: 8 bytes per bf16 element. The C++ and
        Triton kernels make no temporary of a tensor's size. All backends agree bit for bit.
    """
    return _step([params, grads, codes, scales, rounding_state], options)


def lion_agreement_int8(grads: list[Tensor], codes: list[Tensor], scales: list[Tensor], options: StepOptions) -> Tensor:
    """Count, per tensor, the entries whose update agrees in sign, as :func:`leanstep.kernels.lion_agreement`.

    Args:
        grads, codes, scales: as for :func:`lion_step_int8`.
        options: as for ``lion_agreement``.

    Returns:
        fp32 [len(grads)].

    Notes:
        Reads g, codes and scales once each.
    """
    return _agreement([grads, codes, scales], options)


def _cpp_step(lists: Lists, options: StepOptions) -> Tensor:
    params, grads, codes, scales, *state = lists
    types = {"PARAM": TYPES[params[0].dtype], "GRAD": TYPES[grads[0].dtype], **fp8_macro(codes)}
    flags = torch.zeros(len(params), dtype=torch.int32, device="cpu")
    tensors = (params, grads, codes, scales, state[0] if state else None, *rows_and_columns(params))
    numbers = (options.scalars, options.cautious_scale, options.seeds, options.offsets)
    call("steps/lion_int8", "lion_step_int8", macros(options, **types), len(params), *tensors, *numbers, flags)
    return flags


def _cpp_agreement(lists: Lists, options: StepOptions) -> Tensor:
    grads, codes, _ = lists
    # a variant that a step has, too
    variant = macros(options, PARAM="float", GRAD=TYPES[grads[0].dtype], **fp8_macro(codes)) | {"CAUTIOUS": 1}
    counts = torch.zeros(len(grads), dtype=torch.int64, device="cpu")
    sizes = rows_and_columns(grads)
    call("steps/lion_int8", "lion_agreement_int8", variant, len(grads), *lists, *sizes, options.scalars, counts)
    return counts


_step = declare_step(
    __name__,
    "lion_step_int8",
    lists="params! grads codes! .scales! rounding_state!",
    floats=2,
    result=torch.int32,
    check=lambda lists: check_scales("lion_step_int8", lists[2], lists[3]),
    cpp=_cpp_step,
    definition=lambda tensors, options: reference.lion_step_int8(*tensors, options=options),
)
_agreement = declare_step(
    __name__,
    "lion_agreement_int8",
    lists="grads codes .scales",
    floats=1,
    options=("scalars", "maximize", "skip_nonfinite"),
    result=torch.float32,
    check=lambda lists: check_scales("lion_agreement_int8", lists[1], lists[2]),
    cpp=_cpp_agreement,
    definition=lambda tensors, options: reference.lion_agreement_int8(tensors[0], tensors[1], tensors[2], options),
)
