"""The AdamW step with 8-bit moments, on lists of tensors."""

import torch
from torch import Tensor

from leanstep.kernels._backend import choose
from leanstep.kernels.cpp_impl._build import TYPES, call
from leanstep.kernels.reference.steps import adamw_int8 as reference
from leanstep.kernels.steps.common import (
    StepOptions,
    check_scales,
    check_shapes,
    fp8_macro,
    rows_and_columns,
    step_on_host,
)


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
    lists = (params, grads, codes, scales, square_codes, square_scales)
    fields = (
        options.scalars,
        options.rounding,
        options.decay_where_aligned,
        options.maximize,
        options.seeds,
        options.offsets,
    )
    if torch.compiler.is_compiling():
        torch.ops.leanstep.adamw_step_int8(*lists, corrections, rounding_state, *fields)
        return
    _step(*lists, corrections, rounding_state, *fields)


@torch.no_grad()
def _step(
    params: list[Tensor],
    grads: list[Tensor],
    codes: list[Tensor],
    scales: list[Tensor],
    square_codes: list[Tensor],
    square_scales: list[Tensor],
    corrections: Tensor,
    rounding_state: list[Tensor],
    scalars: Tensor,
    rounding: str,
    decay_where_aligned: bool,
    maximize: bool,
    seeds: Tensor,
    offsets: Tensor | None,
) -> None:
    options = StepOptions(scalars, rounding, None, decay_where_aligned, maximize, seeds=seeds, offsets=offsets)
    if not params:
        return
    check_shapes("adamw_step_int8", *(ts for ts in (params, grads, codes, square_codes, rounding_state) if ts))
    check_scales("adamw_step_int8", codes, scales)
    check_scales("adamw_step_int8", square_codes, square_scales)
    dtypes = dict.fromkeys(t.dtype for ts in (params, grads) for t in ts)
    backend = choose("adamw_step_int8", params[0].device, *dtypes).backend
    state = [rounding_state] if rounding_state else []
    lists = [params, grads, codes, scales, square_codes, square_scales, *state]
    written = [params, *lists[2:]]
    if backend == "triton":
        from leanstep.kernels.triton_impl.steps import adamw_int8 as triton_adamw

        torch.autograd.graph.increment_version([t for ts in written for t in ts])  # kernels do not
        triton_adamw.adamw_step_int8(lists, corrections, options)
        return

    def cpp(indices: list[int], lists: list[list[Tensor]]) -> None:
        _cpp_step(lists, corrections[indices], options.of(indices))

    def definition(i: int, tensors: list[Tensor]) -> None:
        param, grad, moment, scale, square, square_scale, *state = tensors
        rounding = state[0] if state else None
        reference.adamw_step_int8(
            param, grad, moment, scale, square, square_scale, corrections[i], rounding, options=options.of(i)
        )

    step_on_host(backend, lists, cpp, definition, written)


def _cpp_step(lists: list[list[Tensor]], corrections: Tensor, options: StepOptions) -> None:
    """Step contiguous tensors of one dtype per list."""
    params, grads, *moments = lists
    dtypes = {"PARAM": TYPES[params[0].dtype], "GRAD": TYPES[grads[0].dtype]}
    macros = {**dtypes, "ROUNDING": options.rounding.upper(), **fp8_macro(moments[0][0])}
    rounding_state = moments[4] if len(moments) > 4 else None
    numbers = (options.scalars, corrections, options.seeds, options.offsets)
    call(
        "steps/adamw_int8", "adamw_step_int8", macros, len(params), params, grads, *moments[:4], rounding_state,
        *rows_and_columns(params), *numbers,
        int(options.decay_where_aligned), int(options.maximize),
    )  # fmt: skip


_step_op = torch.library.custom_op(
    "leanstep::adamw_step_int8",
    _step,
    mutates_args=("params", "codes", "scales", "square_codes", "square_scales", "rounding_state"),
    schema="(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] codes, Tensor(c!)[] scales, Tensor(d!)[] square_codes, "
    "Tensor(e!)[] square_scales, Tensor corrections, Tensor(f!)[] rounding_state, Tensor scalars, str rounding, "
    "bool decay_where_aligned, bool maximize, Tensor seeds, Tensor? offsets) -> ()",
)
_step_op.register_fake(lambda *_: None)
