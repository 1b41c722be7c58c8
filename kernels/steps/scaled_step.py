"""The step p <- p * decay - step * r_i c_j G_ij on lists of matrices, with given scales or with Sinkhorn's."""

import contextlib
import itertools

import torch
from torch import Tensor

from leanstep.kernels._backend import choose
from leanstep.kernels.cpp_impl._build import TYPES, MissingKernelError, call
from leanstep.kernels.matrices.sinkhorn import sinkhorn
from leanstep.kernels.reference.rounding import index_in_whole
from leanstep.kernels.reference.steps import scaled_step as reference
from leanstep.kernels.steps.common import StepOptions
from leanstep.kernels.steps.engine import Lists, check_shapes, declare_step


def scaled_step(
    params: list[Tensor],
    mats: list[Tensor],
    rows: list[Tensor],
    cols: list[Tensor],
    rounding_state: list[Tensor],
    options: StepOptions,
) -> Tensor:
    """Apply scaled matrices to parameters, elementwise in fp32 (fp64 for fp64 parameters)::

        p = p * decay - step * ((r_i * G_ij) * c_j)

    With ``decay_where_aligned``, entries whose update (r_i * G_ij) * c_j and value differ in sign do not decay.

    Args:
        params: parameters [..., m, n] of one device and dtype; updated in place.
        mats: matrices G, same shapes, any floating dtype; not written.
        rows, cols: scales [..., m] and [..., n] of every matrix, fp32, as :func:`leanstep.kernels.sinkhorn` returns.
        rounding_state: as for :func:`leanstep.kernels.lion_step`.
        options: see :class:`StepOptions`; ``scalars`` are [step, decay]. ``skip_nonfinite`` does not update matrices
            with a NaN among their column scales, whose gradient was not finite.

    Returns:
        int32 [len(params)]: 1 where a matrix was not finite. Without ``skip_nonfinite``, all flags are 0.

    Raises:
        BackendError: the requested backend cannot run here.
        ValueError: shapes do not fit.

    Notes:
        Reads G and p and writes p once each: 12 bytes per fp32 element.
    """
    return _step([params, mats, rows, cols, rounding_state], options)


@torch.no_grad()
def sinkhorn_step(
    params: list[Tensor],
    mats: list[Tensor],
    rounding_state: list[Tensor],
    options: StepOptions,
    *,
    num_iters: int,
    end_with_rows: bool = False,
) -> Tensor:
    """:func:`leanstep.kernels.sinkhorn` of the matrices, then :func:`scaled_step` with its scales.

    Args:
        params, mats, rounding_state, options: as for :func:`scaled_step`.
        num_iters, end_with_rows: as for :func:`leanstep.kernels.sinkhorn`.

    Returns:
        int32 [len(params)]: 1 where a matrix was not finite.

    Raises:
        BackendError: the requested backend cannot run here.
        ValueError: shapes do not fit.

    Notes:
        Gives the bits of the two operations. The C++ backend scales and updates one matrix after another, so it reads a
        matrix of less than 4 MB from memory once instead of twice.
    """
    if _fits_one_call(params, mats, rounding_state):
        state = [rounding_state] if rounding_state else []
        check_shapes("sinkhorn_step", [params, mats, *state])
        # a kernel of a wheel may be missing where there is no compiler: then each operation says what it runs on
        with contextlib.suppress(MissingKernelError):
            flags = _cpp_step(params, mats, None, None, *state, options=options, iterations=(num_iters, end_with_rows))
            torch.autograd.graph.increment_version([*params, *rounding_state])
            return flags
    scales = sinkhorn(mats, num_iters, end_with_rows=end_with_rows)
    return scaled_step(params, mats, scales.rows, scales.cols, rounding_state, options)


def _fits_one_call(params: list[Tensor], mats: list[Tensor], rounding_state: list[Tensor]) -> bool:
    """Whether one C++ call can scale and step: contiguous matrices with entries, one dtype per list."""
    if torch.compiler.is_compiling() or not params:
        return False
    lists = (params, mats, rounding_state)
    dtypes = dict.fromkeys(t.dtype for ts in (params, mats) for t in ts)
    device = params[0].device
    return (
        all(choose(op, device, *dtypes).backend == "cpp" for op in ("sinkhorn", "scaled_step"))
        and all(len({t.dtype for t in ts}) <= 1 for ts in lists)
        and all(t.is_contiguous() and t.numel() for ts in lists for t in ts)
    )


def _check(lists: Lists) -> None:
    params, _, rows, cols = lists[:4]
    for param, row, col in zip(params, rows, cols, strict=True):
        if row.shape != param.shape[:-1] or col.shape != param.shape[:-2] + param.shape[-1:]:
            raise ValueError(
                f"scaled_step: expected scales of the rows and columns of {tuple(param.shape)}, got shapes "
                f"{tuple(row.shape)} and {tuple(col.shape)}"
            )


def _definition(tensors: list[Tensor], options: StepOptions) -> Tensor | None:
    """Run the definition, then restore the matrices that were not finite."""
    nonfinite = torch.isnan(tensors[3]).any(dim=-1) if options.skip_nonfinite else None
    written = [tensors[0], *tensors[4:]]
    old = [t.clone() for t in written] if nonfinite is not None and bool(nonfinite.any()) else []
    reference.scaled_step(*tensors, options=options)
    for tensor, before in zip(written, old, strict=bool(old)):
        assert nonfinite is not None
        tensor.copy_(torch.where(nonfinite[..., None, None], before, tensor))
    return None if nonfinite is None else nonfinite.any()


def _cpp_step(
    params: list[Tensor],
    mats: list[Tensor],
    rows: list[Tensor] | None,
    cols: list[Tensor] | None,
    rounding_state: list[Tensor] | None = None,
    *,
    options: StepOptions,
    iterations: tuple[int, bool] = (0, False),
) -> Tensor:
    """Step contiguous tensors [..., m, n] of one dtype per list.

    Without ``rows`` and ``cols``, the call computes the scales first, with ``iterations`` = (num_iters, end_with_rows).
    """
    macros: dict[str, str | int] = {
        "PARAM": TYPES[params[0].dtype],
        "MAT": TYPES[mats[0].dtype],
        "ROUNDING": options.rounding.upper(),
        "SKIP": int(options.skip_nonfinite),
        "ALIGNED": int(options.decay_where_aligned),
    }
    # the kernel takes single matrices; owners gives the parameter of each
    owners = [t for t, p in enumerate(params) for _ in range(p.shape[:-2].numel())]
    stack_indices = [e for p in params for e in range(p.shape[:-2].numel())]
    starts = [0] * len(params) if options.offsets is None else options.offsets.tolist()
    sizes = [p.shape[-2] * p.shape[-1] for p in params]
    heights, widths = [params[t].shape[-2] for t in owners], [params[t].shape[-1] for t in owners]
    firsts = [e * sizes[t] for t, e in zip(owners, stack_indices, strict=True)]
    if options.runs is not None:
        runs = options.runs.tolist()
        firsts = [index_in_whole(first, runs[t]) for t, first in zip(owners, firsts, strict=True)]
    offsets = [starts[t] + first for t, first in zip(owners, firsts, strict=True)]
    seeds = None if options.seeds is None else options.seeds[owners]
    scales: list[list[Tensor]] | list[list[int]]
    if rows is not None and cols is not None:
        name, scales = "scaled_step", [_matrices(rows, 1), _matrices(cols, 1)]
    else:
        # the kernel writes fp32 numbers, whatever the default dtype
        memory = torch.empty(sum(heights) + sum(widths), dtype=torch.float32, device="cpu")
        byte_sizes = (memory.element_size() * size for size in (*heights, *widths))
        addresses = list(itertools.accumulate(byte_sizes, initial=memory.data_ptr()))
        name, scales = "sinkhorn_step", [addresses[: len(owners)], addresses[len(owners) :]]
    state = _matrices(rounding_state, 2) if rounding_state else None
    flags = torch.zeros(len(params), dtype=torch.int32, device="cpu")
    call(
        f"steps/{name}", name, macros, len(owners), _matrices(params, 2), _matrices(mats, 2), *scales, state,
        heights, widths, *(iterations if rows is None else ()), options.scalars, seeds, offsets, options.runs,
        owners, flags,
    )  # fmt: skip
    return flags


def _matrices(tensors: list[Tensor], dims: int) -> list[Tensor]:
    """Split stacks [..., m, n], or their scales [..., m], into single matrices or scales."""
    if all([t.dim() == dims for t in tensors]):
        return tensors
    return [matrix for t in tensors for matrix in (t.flatten(0, -dims - 1) if t.dim() > dims else t[None])]


_step = declare_step(
    __name__,
    "scaled_step",
    lists="params! mats .rows .cols rounding_state!",
    floats=2,
    options=("scalars", "rounding", "decay_where_aligned", "skip_nonfinite", "seeds", "offsets", "runs"),
    result=torch.int32,
    check=_check,
    cpp=lambda lists, options: _cpp_step(*lists, options=options),
    definition=_definition,
)
