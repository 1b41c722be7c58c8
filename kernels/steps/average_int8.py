"""Averages in 8 bits, on lists of tensors: the momenta of SinkGD and LANTON, and LANTON's previous gradient."""

import torch
from torch import Tensor

from leanstep.kernels._backend import choose
from leanstep.kernels.cpp_impl._build import TYPES, call
from leanstep.kernels.reference.steps import average_int8 as reference
from leanstep.kernels.steps.common import (
    StepOptions,
    check_scales,
    check_shapes,
    fp8_macro,
    rows_and_columns,
    step_on_host,
)


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
    arguments = (grads, codes, scales, outputs, options.scalars, options.maximize, options.seeds, options.offsets)
    if torch.compiler.is_compiling():
        torch.ops.leanstep.average_step_int8(*arguments, skip, nesterov, update)
        return
    _step(*arguments, skip, nesterov, update)


@torch.no_grad()
def _step(
    grads: list[Tensor],
    codes: list[Tensor],
    scales: list[Tensor],
    outputs: list[Tensor],
    scalars: Tensor,
    maximize: bool,
    seeds: Tensor,
    offsets: Tensor | None,
    skip: Tensor | None,
    nesterov: bool,
    update: bool,
) -> None:
    options = StepOptions(scalars, maximize=maximize, seeds=seeds, offsets=offsets)
    if not grads:
        return
    check_shapes("average_step_int8", *(ts for ts in (grads, codes, outputs) if ts))
    check_scales("average_step_int8", codes, scales)
    backend = choose("average_step_int8", grads[0].device, *dict.fromkeys([scalars.dtype, *(g.dtype for g in grads)]))
    lists = [ts for ts in (grads, codes, scales, outputs) if ts]
    written = lists[1:] if update else lists[3:]
    if backend.backend == "triton":
        from leanstep.kernels.triton_impl.steps import average_int8 as triton_average

        torch.autograd.graph.increment_version([t for ts in written for t in ts])  # kernels do not
        triton_average.average_step_int8(lists, skip, options, nesterov=nesterov, update=update)
        return

    def cpp(indices: list[int], lists: list[list[Tensor]]) -> None:
        flags = None if skip is None else skip[indices]
        _cpp_step(lists, flags, options.of(indices), nesterov, update)

    def definition(i: int, tensors: list[Tensor]) -> None:
        grad, code, scale, *output = tensors
        flag = None if skip is None else skip[i]
        reference.average_step_int8(
            grad, code, scale, output[0] if output else None, flag,
            options=options.of(i), nesterov=nesterov, update=update,
        )  # fmt: skip

    step_on_host(backend.backend, lists, cpp, definition, written)


def _cpp_step(
    lists: list[list[Tensor]], skip: Tensor | None, options: StepOptions, nesterov: bool, update: bool
) -> None:
    """Step contiguous tensors of one dtype per list."""
    grads, codes, scales, *outputs = lists
    numbers = (options.scalars, options.seeds, options.offsets)
    macros: dict[str, str | int] = {"GRAD": TYPES[grads[0].dtype], "NESTEROV": int(nesterov), "UPDATE": int(update)}
    macros |= fp8_macro(codes[0])
    call(
        "steps/average_int8", "average_step_int8", macros, len(grads), grads, codes, scales,
        outputs[0] if outputs else None, *rows_and_columns(grads), *numbers, skip, int(options.maximize),
    )  # fmt: skip


_step_op = torch.library.custom_op(
    "leanstep::average_step_int8",
    _step,
    mutates_args=("codes", "scales", "outputs"),
    schema="(Tensor[] grads, Tensor(a!)[] codes, Tensor(b!)[] scales, Tensor(c!)[] outputs, Tensor scalars, "
    "bool maximize, Tensor seeds, Tensor? offsets, Tensor? skip, bool nesterov, bool update) -> ()",
)
_step_op.register_fake(lambda *_: None)
