"""The Lion step on lists of tensors."""

import torch
from torch import Tensor

from leanstep.kernels._backend import choose
from leanstep.kernels.cpp_impl._build import TYPES, call, same_layout
from leanstep.kernels.reference.steps import lion_step as reference
from leanstep.kernels.steps.common import StepOptions, call_groups, check_shapes


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
    if torch.compiler.is_compiling():
        return torch.ops.leanstep.lion_step(params, grads, exp_avgs, rounding_state, *options)
    return _step(params, grads, exp_avgs, rounding_state, *options)


@torch.no_grad()
def _step(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], rounding_state: list[Tensor], *fields
) -> Tensor:
    options = StepOptions(*fields)
    if not params:
        return torch.zeros(0, dtype=torch.int32, device="cpu")
    lists = [ts for ts in (params, grads, exp_avgs, rounding_state) if ts]
    check_shapes("lion_step", *lists)
    dtypes = dict.fromkeys(t.dtype for ts in (params, grads, exp_avgs) for t in ts)
    backend = choose("lion_step", params[0].device, *dtypes).backend
    if backend == "triton":
        from leanstep.kernels.triton_impl.steps import lion_step as triton_lion

        torch.autograd.graph.increment_version([*params, *exp_avgs, *rounding_state])  # kernels do not
        return triton_lion.lion_step(params, grads, exp_avgs, rounding_state, options)
    flags = torch.zeros(len(params), dtype=torch.int32, device=params[0].device)
    row_major = options.rounding == "stochastic"
    walkable = [backend == "cpp" and same_layout(row, row_major=row_major) for row in zip(*lists, strict=True)]

    def cpp(indices: list[int], lists: list[list[Tensor]]) -> None:
        flags[indices] = _cpp_step(lists, options.of(indices))

    call_groups(lists, walkable, cpp)
    if backend == "cpp":
        torch.autograd.graph.increment_version([t for ts in (params, exp_avgs, rounding_state) for t in ts])
    for i in (i for i, is_covered in enumerate(walkable) if not is_covered):
        flag = reference.lion_step(*(ts[i] for ts in lists), options=options.of(i))
        if flag is not None:
            flags[i] = flag
    return flags


def _cpp_step(lists: list[list[Tensor]], options: StepOptions) -> Tensor:
    """Step tensors of one dtype per list. The tensors at an index have one dense layout."""
    params, grads, exp_avgs, *rounding_state = lists
    macros = {
        **_macros(grads[0], exp_avgs[0], options.maximize, options.skip_nonfinite),
        "PARAM": TYPES[params[0].dtype],
        "ROUNDING": options.rounding.upper(),
        "CAUTIOUS": int(options.cautious_scale is not None),
        "ALIGNED": int(options.decay_where_aligned),
    }
    flags = torch.zeros(len(params), dtype=torch.int32, device="cpu")
    tensors = (params, grads, exp_avgs, rounding_state[0] if rounding_state else None)
    numbers = (options.scalars, options.cautious_scale, options.seeds, options.offsets, options.runs)
    call("steps/lion_step", "lion_step", macros, len(params), *tensors, [p.numel() for p in params], *numbers, flags)
    return flags


def _macros(grad: Tensor, exp_avg: Tensor, maximize: bool, skip_nonfinite: bool) -> dict[str, str | int]:
    return {
        "GRAD": TYPES[grad.dtype],
        "AVG": TYPES[exp_avg.dtype],
        "MAXIMIZE": int(maximize),
        "SKIP": int(skip_nonfinite),
    }


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
    fields = (options.scalars, options.maximize, options.skip_nonfinite)
    if torch.compiler.is_compiling():
        return torch.ops.leanstep.lion_agreement(grads, exp_avgs, *fields)
    return _agreement(grads, exp_avgs, *fields)


@torch.no_grad()
def _agreement(
    grads: list[Tensor], exp_avgs: list[Tensor], scalars: Tensor, maximize: bool, skip_nonfinite: bool
) -> Tensor:
    options = StepOptions(scalars, maximize=maximize, skip_nonfinite=skip_nonfinite)
    if not grads:
        return torch.zeros(0, dtype=torch.float32, device="cpu")
    check_shapes("lion_agreement", grads, exp_avgs)
    dtypes = dict.fromkeys([scalars.dtype, *(t.dtype for ts in (grads, exp_avgs) for t in ts)])
    backend = choose("lion_agreement", grads[0].device, *dtypes).backend
    if backend == "triton":
        from leanstep.kernels.triton_impl.steps import lion_step as triton_lion

        return triton_lion.lion_agreement(grads, exp_avgs, options)
    counts = torch.zeros(len(grads), dtype=torch.float32, device=grads[0].device)
    walkable = [backend == "cpp" and same_layout(row) for row in zip(grads, exp_avgs, strict=True)]

    def cpp(indices: list[int], lists: list[list[Tensor]]) -> None:
        counts[indices] = _cpp_agreement(lists[0], lists[1], options).to(counts.dtype)

    call_groups([grads, exp_avgs], walkable, cpp)
    for i in (i for i, is_covered in enumerate(walkable) if not is_covered):
        counts[i] = reference.lion_agreement(grads[i], exp_avgs[i], options)
    return counts


def _cpp_agreement(grads: list[Tensor], exp_avgs: list[Tensor], options: StepOptions) -> Tensor:
    """int64 counts of agreeing entries, for tensors of one dtype per list."""
    macros = _macros(grads[0], exp_avgs[0], options.maximize, options.skip_nonfinite)
    counts = torch.zeros(len(grads), dtype=torch.int64, device="cpu")
    variant = {**macros, "PARAM": "float", "ROUNDING": "NEAREST", "CAUTIOUS": 1, "ALIGNED": 0}
    sizes = [g.numel() for g in grads]
    call("steps/lion_step", "lion_agreement", variant, len(grads), grads, exp_avgs, sizes, options.scalars, counts)
    return counts


_step_op = torch.library.custom_op(
    "leanstep::lion_step",
    _step,
    mutates_args=("params", "exp_avgs", "rounding_state"),
    schema="(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] rounding_state, Tensor scalars, "
    "str rounding, Tensor? cautious_scale, bool decay_where_aligned, bool maximize, bool skip_nonfinite, "
    "Tensor? seeds, Tensor? offsets, Tensor? runs=None) -> Tensor",
)
_agreement_op = torch.library.custom_op("leanstep::lion_agreement", _agreement, mutates_args=())

_step_op.register_fake(lambda params, g, m, state, scalars, *_: scalars.new_empty(len(params), dtype=torch.int32))
_agreement_op.register_fake(lambda grads, m, scalars, *_: scalars.new_empty(len(grads), dtype=torch.float32))
