"""The Lion step with an 8-bit momentum, on lists of tensors."""

import torch
from torch import Tensor

from leanstep.kernels._backend import choose
from leanstep.kernels.cpp_impl._build import TYPES, call
from leanstep.kernels.reference.steps import lion_int8 as reference
from leanstep.kernels.steps.common import (
    StepOptions,
    check_scales,
    check_shapes,
    fp8_macro,
    rows_and_columns,
    step_on_host,
)


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
    if torch.compiler.is_compiling():
        return torch.ops.leanstep.lion_step_int8(params, grads, codes, scales, rounding_state, *options)
    return _step(params, grads, codes, scales, rounding_state, *options)


@torch.no_grad()
def _step(
    params: list[Tensor],
    grads: list[Tensor],
    codes: list[Tensor],
    scales: list[Tensor],
    rounding_state: list[Tensor],
    *fields,
) -> Tensor:
    options = StepOptions(*fields)
    if not params:
        return torch.zeros(0, dtype=torch.int32, device="cpu")
    check_shapes("lion_step_int8", *(ts for ts in (params, grads, codes, rounding_state) if ts))
    check_scales("lion_step_int8", codes, scales)
    dtypes = dict.fromkeys(t.dtype for ts in (params, grads) for t in ts)
    backend = choose("lion_step_int8", params[0].device, *dtypes).backend
    if backend == "triton":
        from leanstep.kernels.triton_impl.steps import lion_int8 as triton_lion

        torch.autograd.graph.increment_version([*params, *codes, *scales, *rounding_state])  # kernels do not
        return triton_lion.lion_step_int8(params, grads, codes, scales, rounding_state, options)
    lists = [ts for ts in (params, grads, codes, scales, rounding_state) if ts]
    flags = torch.zeros(len(params), dtype=torch.int32, device=params[0].device)

    def cpp(indices: list[int], lists: list[list[Tensor]]) -> None:
        flags[indices] = _cpp_step(lists, options.of(indices))

    def definition(i: int, tensors: list[Tensor]) -> None:
        flag = reference.lion_step_int8(*tensors, options=options.of(i))
        if flag is not None:
            flags[i] = flag

    lists = [ts for ts in (params, grads, codes, scales, rounding_state) if ts]
    step_on_host(backend, lists, cpp, definition, written=(params, codes, scales, rounding_state))
    return flags


def _cpp_step(lists: list[list[Tensor]], options: StepOptions) -> Tensor:
    """Step contiguous tensors of one dtype per list."""
    params, grads, codes, scales, *rounding_state = lists
    macros = {
        **_macros(grads[0], codes[0], options.maximize, options.skip_nonfinite),
        "PARAM": TYPES[params[0].dtype],
        "ROUNDING": options.rounding.upper(),
        "CAUTIOUS": int(options.cautious_scale is not None),
        "ALIGNED": int(options.decay_where_aligned),
    }
    flags = torch.zeros(len(params), dtype=torch.int32, device="cpu")
    tensors = (params, grads, codes, scales, rounding_state[0] if rounding_state else None)
    numbers = (options.scalars, options.cautious_scale, options.seeds, options.offsets)
    call("steps/lion_int8", "lion_step_int8", macros, len(params), *tensors, *rows_and_columns(params), *numbers, flags)
    return flags


def _macros(grad: Tensor, codes: Tensor, maximize: bool, skip_nonfinite: bool) -> dict[str, str | int]:
    return {"GRAD": TYPES[grad.dtype], "MAXIMIZE": int(maximize), "SKIP": int(skip_nonfinite), **fp8_macro(codes)}


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
    fields = (options.scalars, options.maximize, options.skip_nonfinite)
    if torch.compiler.is_compiling():
        return torch.ops.leanstep.lion_agreement_int8(grads, codes, scales, *fields)
    return _agreement(grads, codes, scales, *fields)


@torch.no_grad()
def _agreement(
    grads: list[Tensor],
    codes: list[Tensor],
    scales: list[Tensor],
    scalars: Tensor,
    maximize: bool,
    skip_nonfinite: bool,
) -> Tensor:
    options = StepOptions(scalars, maximize=maximize, skip_nonfinite=skip_nonfinite)
    if not grads:
        return torch.zeros(0, dtype=torch.float32, device="cpu")
    check_shapes("lion_agreement_int8", grads, codes)
    check_scales("lion_agreement_int8", codes, scales)
    dtypes = dict.fromkeys([scalars.dtype, *(g.dtype for g in grads)])
    backend = choose("lion_agreement_int8", grads[0].device, *dtypes).backend
    if backend == "triton":
        from leanstep.kernels.triton_impl.steps import lion_int8 as triton_lion

        return triton_lion.lion_agreement_int8(grads, codes, scales, options)
    counts = torch.zeros(len(grads), dtype=torch.float32, device=grads[0].device)

    def cpp(indices: list[int], lists: list[list[Tensor]]) -> None:
        counts[indices] = _cpp_agreement(lists, options).to(counts.dtype)

    def definition(i: int, tensors: list[Tensor]) -> None:
        grad, codes_of_grad, scales_of_grad = tensors
        counts[i] = reference.lion_agreement_int8(grad, codes_of_grad, scales_of_grad, options)

    step_on_host(backend, [grads, codes, scales], cpp, definition)
    return counts


def _cpp_agreement(lists: list[list[Tensor]], options: StepOptions) -> Tensor:
    """int64 counts of agreeing entries, for contiguous tensors of one dtype per list."""
    grads = lists[0]
    macros = _macros(grads[0], lists[1][0], options.maximize, options.skip_nonfinite)
    variant = {**macros, "PARAM": "float", "ROUNDING": "NEAREST", "CAUTIOUS": 1, "ALIGNED": 0}
    counts = torch.zeros(len(grads), dtype=torch.int64, device="cpu")
    sizes = rows_and_columns(grads)
    call("steps/lion_int8", "lion_agreement_int8", variant, len(grads), *lists, *sizes, options.scalars, counts)
    return counts


_step_op = torch.library.custom_op(
    "leanstep::lion_step_int8",
    _step,
    mutates_args=("params", "codes", "scales", "rounding_state"),
    schema="(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] codes, Tensor(c!)[] scales, "
    "Tensor(d!)[] rounding_state, Tensor scalars, str rounding, Tensor? cautious_scale, bool decay_where_aligned, "
    "bool maximize, bool skip_nonfinite, Tensor? seeds, Tensor? offsets, Tensor? runs=None) -> Tensor",
)
_agreement_op = torch.library.custom_op("leanstep::lion_agreement_int8", _agreement, mutates_args=())

_step_op.register_fake(lambda params, g, codes, *rest: rest[2].new_empty(len(params), dtype=torch.int32))
_agreement_op.register_fake(lambda grads, codes, s, scalars, *_: scalars.new_empty(len(grads), dtype=torch.float32))
