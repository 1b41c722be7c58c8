"""The AdamW step with 8-bit moments, on lists of tensors."""

from torch import Tensor

from leanstep.kernels.cpp_impl._build import TYPES, call
from leanstep.kernels.reference.steps import adamw_int8 as reference
from leanstep.kernels.steps.common import StepOptions
from leanstep.kernels.steps.engine import Lists, check_scales, declare_step, fp8_macro, rows_and_columns


def adamw_step_int8(
    params: list[Tensor],
    grads: list[Tensor],
    codes: list[Tensor],
    scales: list[Tensor],
    square_codes: list[Tensor],
    square_scales: list[Tensor],
    corrections: Tensor,
    rounding_state: list[Tensor],
    options: StepOptions,
) -> None:
    """One AdamW step (Loshchilov and Hutter, arXiv 1711.05101) with both moments in 8 bits.

    For every tensor, in fp32 (fp64 for fp64 parameters), elementwise, with m and v the values of the codes::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2                    # at most the largest fp32 number
        p = p * (1 - lr * weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    and then codes and scales of the new m and v, by ``leanstep/kernels/reference/quantization.py``.

    Args:
        params: tensors of one device and dtype, of two or more dimensions; updated in place.
        grads: same shapes; any floating dtype; not written.
        codes: int8 or float8_e4m3fn, same shapes, of m; updated in place.
        scales: fp32 [rows, blocks], one for every 128 neighbours of a row; updated in place.
        square_codes, square_scales: the same of v, with uint8 codes; updated in place.
        corrections: [len(params), 2] in the dtype of ``scalars``: lr / (1 - beta1^t) and 1 / sqrt(1 - beta2^t), with
            t the number of this step.
        rounding_state: as for :func:`leanstep.kernels.lion_step`.
        options: see :class:`StepOptions`; ``scalars`` are
            [1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, eps]. ``seeds`` are required, and for shards
            ``offsets``, which must begin a row. The caller handles ``skip_nonfinite``.

    Raises:
        BackendError: the requested backend cannot run here.
        ValueError: shapes do not fit.

    Notes:
        Reads p, g and the state once, and writes p and the state once: 10 bytes per bf16 element. The C++ and
        Triton kernels make no temporary of a tensor's size. All backends agree bit for bit.
    """
    assert options.seeds is not None
    _step([params, grads, codes, scales, square_codes, square_scales, rounding_state], options, corrections)


def _check(lists: Lists) -> None:
    check_scales("adamw_step_int8", lists[2], lists[3])
    check_scales("adamw_step_int8", lists[4], lists[5])


def _cpp_step(lists: Lists, options: StepOptions, corrections: Tensor) -> None:
    params, grads, codes, scales, square_codes, square_scales, *state = lists
    dtypes = {"PARAM": TYPES[params[0].dtype], "GRAD": TYPES[grads[0].dtype]}
    macros = {**dtypes, "ROUNDING": options.rounding.upper(), **fp8_macro(codes)}
    tensors = (params, grads, codes, scales, square_codes, square_scales, state[0] if state else None)
    numbers = (options.scalars, corrections, options.seeds, options.offsets)
    switches = int(options.decay_where_aligned), int(options.maximize)
    sizes = rows_and_columns(params)
    call("steps/adamw_int8", "adamw_step_int8", macros, len(params), *tensors, *sizes, *numbers, *switches)


def _definition(tensors: list[Tensor], options: StepOptions, corrections: Tensor) -> None:
    param, grad, codes, scales, square_codes, square_scales, *state = tensors
    moments = codes, scales, square_codes, square_scales
    reference.adamw_step_int8(param, grad, *moments, corrections, state[0] if state else None, options=options)


_step = declare_step(
    __name__,
    "adamw_step_int8",
    lists="params! grads codes! .scales! square_codes! .square_scales! rounding_state!",
    floats=2,
    options=("scalars", "rounding", "decay_where_aligned", "maximize", "seeds", "offsets"),
    extras={"corrections": "Tensor"},
    check=_check,
    cpp=_cpp_step,
    definition=_definition,
)
