"""Sinkhorn scales and the update with them, in one operation."""

import torch
from torch import Tensor

from leanstep.kernels._backend import choose
from leanstep.kernels.matrices.sinkhorn import sinkhorn
from leanstep.kernels.steps.scaled_step import scaled_step


@torch.no_grad()
def sinkhorn_step(
    params: list[Tensor],
    mats: list[Tensor],
    num_iters: int,
    extras: list[Tensor],
    *,
    hyper: Tensor,
    end_with_rows: bool = False,
    rounding: str = "nearest",
    skip_nonfinite: bool = True,
    seeds: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """:func:`leanstep.kernels.sinkhorn` of the matrices, then :func:`leanstep.kernels.scaled_step` with its scales.

    Args:
        params, mats, extras, hyper, rounding, skip_nonfinite, seeds, offsets: as for ``scaled_step``.
        num_iters, end_with_rows: as for ``sinkhorn``.

    Returns:
        int32 [len(params)]: 1 where a matrix was not finite.

    Raises:
        BackendError: when a backend was asked for that cannot run here.

    Notes:
        The C++ backend updates every matrix before it goes on to the next, so that one of less than 4 MB is read from
        memory once, not twice; bits are those of the two operations.
    """
    if not _fits(params, mats, extras):
        scales = sinkhorn(mats, num_iters, end_with_rows=end_with_rows)
        return scaled_step(
            params, mats, scales.rows, scales.cols, extras,
            hyper=hyper, rounding=rounding, skip_nonfinite=skip_nonfinite, seeds=seeds, offsets=offsets,
        )  # fmt: skip
    from leanstep.kernels.cpp_impl.steps.scaled_step import scaled_step as cpp_step

    flags = cpp_step(
        params, mats, [], [], extras, iterations=(num_iters, end_with_rows),
        hyper=hyper, rounding=rounding, skip_nonfinite=skip_nonfinite, seeds=seeds, offsets=offsets,
    )  # fmt: skip
    torch.autograd.graph.increment_version([*params, *extras])
    return flags


def _fits(params: list[Tensor], mats: list[Tensor], extras: list[Tensor]) -> bool:
    """True where one C++ call does it: contiguous matrices with entries, of one dtype each list."""
    if torch.compiler.is_compiling() or not params:
        return False
    dtypes = dict.fromkeys(t.dtype for ts in (params, mats) for t in ts)
    device = params[0].device
    return (
        all(choose(op, device, *dtypes).backend == "cpp" for op in ("sinkhorn", "scaled_step"))
        and all(len({t.dtype for t in ts}) <= 1 for ts in (params, mats, extras))
        and all(t.is_contiguous() and t.numel() for ts in (params, mats, extras) for t in ts)
    )
