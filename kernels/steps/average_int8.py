"""Averages in 8 bits, on lists of tensors: the momenta of SinkGD and LANTON, and LANTON's previous gradient."""

from torch import Tensor

from leanstep.kernels.cpp_impl._build import TYPES, call
from leanstep.kernels.reference.steps import average_int8 as reference
from leanstep.kernels.steps.common import StepOptions
from leanstep.kernels.steps.engine import Lists, check_scales, declare_step, fp8_macro, rows_and_columns


def average_step_int8(
    grads: list[Tensor],
    codes: list[Tensor],
    scales: list[Tensor],
    outputs: list[Tensor],
    options: StepOptions,
    *,
    skip: Tensor | None = None,
    nesterov: bool = False,
    update: bool = True,
) -> None:
    """Update averages in 8 bits by gradients, and write their values before rounding.

    For every tensor, in fp32 (fp64 for fp64 ``scalars``), elementwise, with m the value of the codes::

        m = beta * m + (1 - beta) * g              # g alone for beta = 0, also where m is infinite or NaN
        output = m                                 # with nesterov: beta * m + (1 - beta) * g

    and then codes and scales of the new m, by ``leanstep/kernels/reference/quantization.py``.

    Args:
        grads: tensors of one device, of two or more dimensions; any floating dtype; not written.
        codes: int8 or float8_e4m3fn, same shapes; updated in place.
        scales: fp32 [rows, blocks], one for every 128 neighbours of a row; updated in place.
        outputs: in the dtype of ``scalars``, same shapes; written. Empty: none.
        options: see :class:`StepOptions`; ``scalars`` are [beta, 1 - beta]. Reads ``maximize``, ``seeds`` (required),
            and for shards ``offsets``, which must begin a row.
        skip: int32 [len(grads)]: above 0 to leave codes and scales as they are; the output is then m. None: none.
        nesterov: average the output with g once more.
        update: False: only write outputs, of the m that is stored.

    Raises:
        BackendError: the requested backend cannot run here.
        ValueError: shapes do not fit.

    Notes:
        Reads g, codes and scales once, and writes codes, scales and outputs once: 8 bytes per bf16 element. The C++ and
        Triton kernels make no temporary of a tensor's size. All backends agree bit for bit.
    """
    assert options.seeds is not None
    _step([grads, codes, scales, outputs], options, skip, nesterov, update)


def _cpp_step(lists: Lists, options: StepOptions, skip: Tensor | None, nesterov: bool, update: bool) -> None:
    grads, codes, scales, *outputs = lists
    macros: dict[str, str | int] = {"GRAD": TYPES[grads[0].dtype], "NESTEROV": int(nesterov), "UPDATE": int(update)}
    tensors = (grads, codes, scales, outputs[0] if outputs else None, *rows_and_columns(grads))
    numbers = (options.scalars, options.seeds, options.offsets, skip, int(options.maximize))
    call("steps/average_int8", "average_step_int8", macros | fp8_macro(codes), len(grads), *tensors, *numbers)


def _definition(tensors: list[Tensor], options: StepOptions, skip: Tensor | None, nesterov: bool, update: bool) -> None:
    grad, codes, scales, *output = tensors
    reference.average_step_int8(
        grad, codes, scales, output[0] if output else None, skip, options=options, nesterov=nesterov, update=update
    )


_step = declare_step(
    __name__,
    "average_step_int8",
    lists="grads codes! .scales! outputs!",
    floats=1,
    options=("scalars", "maximize", "seeds", "offsets"),
    extras={"skip": "Tensor?", "nesterov": "bool", "update": "bool"},
    check=lambda lists: check_scales("average_step_int8", lists[1], lists[2]),
    cpp=_cpp_step,
    definition=_definition,
)
