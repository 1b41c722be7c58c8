"""The parameter update p <- p * decay - step * r_i c_j G_ij on lists of matrices."""

from collections.abc import Sequence

import torch
from torch import Tensor

from leanstep.kernels._backend import choose, group_by_dtypes
from leanstep.kernels.reference.steps import scaled_step as reference


def scaled_step(
    params: list[Tensor],
    mats: list[Tensor],
    rows: list[Tensor],
    cols: list[Tensor],
    extras: list[Tensor],
    *,
    hyper: Tensor,
    rounding: str = "nearest",
    skip_nonfinite: bool = True,
    seeds: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Apply scaled matrices to parameters, elementwise in fp32 (fp64 for fp64 parameters)::

        p = p * decay - step * ((r_i * G_ij) * c_j)

    Args:
        params: parameters [..., m, n] of one device and dtype; updated in place.
        mats: matrices G, same shapes, any floating dtype; not written.
        rows, cols: scales [..., m] and [..., n] of every matrix, fp32, cut from two flat buffers in list order
            (:func:`leanstep.kernels.matrices.sinkhorn` returns such lists).
        extras: as for :func:`leanstep.kernels.steps.lion_step`.
        hyper: 1-D tensor of 2 on the device: [step, decay].
        rounding, seeds, offsets: as for :func:`leanstep.kernels.steps.lion_step`.
        skip_nonfinite: leave a matrix alone whose column scales hold a NaN (its gradient was not finite).

    Returns:
        int32 [len(params)]: 1 where a matrix was not finite.

    Raises:
        BackendError: when a backend was asked for that cannot run here.

    Notes:
        Reads G and p and writes p once each: 12 bytes per fp32 element.
    """
    if torch.compiler.is_compiling():
        return torch.ops.leanstep.scaled_step(
            params, mats, rows, cols, extras, hyper, rounding, skip_nonfinite, seeds, offsets
        )
    return _run(params, mats, rows, cols, extras, hyper, rounding, skip_nonfinite, seeds, offsets)


@torch.no_grad()
def _run(
    params: list[Tensor],
    mats: list[Tensor],
    rows: list[Tensor],
    cols: list[Tensor],
    extras: list[Tensor],
    hyper: Tensor,
    rounding: str,
    skip_nonfinite: bool,
    seeds: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    if not params:
        return torch.zeros(0, dtype=torch.int32)
    dtypes = dict.fromkeys(t.dtype for ts in (params, mats) for t in ts)
    backend = choose("scaled_step", params[0].device, *dtypes).backend
    if backend == "triton":
        from leanstep.kernels.triton_impl.steps import scaled_step as triton_step

        return triton_step.scaled_step(
            params, mats, _joined(rows), _joined(cols), extras, hyper=hyper,
            rounding=rounding, skip_nonfinite=skip_nonfinite, seeds=seeds, offsets=offsets,
        )  # fmt: skip
    flags = torch.zeros(len(params), dtype=torch.int32, device=params[0].device)
    rest: Sequence[int] = range(len(params))
    if backend == "cpp":
        rest = _cpp_step(params, mats, rows, cols, extras, seeds, offsets, flags, hyper, rounding, skip_nonfinite)
    for i in rest:
        param = params[i]
        bad = torch.isnan(cols[i]).any(dim=-1)
        if skip_nonfinite:
            flags[i] = bad.any()
        _reference_step(
            param,
            mats[i],
            rows[i],
            cols[i],
            extras[i] if extras else None,
            bad if skip_nonfinite else None,
            hyper=hyper,
            rounding=rounding,
            seed=None if seeds is None else seeds[i],
            offset=0 if offsets is None else offsets[i],
        )
    return flags


def _cpp_step(
    params: list[Tensor],
    mats: list[Tensor],
    rows: list[Tensor],
    cols: list[Tensor],
    extras: list[Tensor],
    seeds: Tensor | None,
    offsets: Tensor | None,
    flags: Tensor,
    hyper: Tensor,
    rounding: str,
    skip_nonfinite: bool,
) -> list[int]:
    """One call for all contiguous tensors of the same dtypes; the positions of the others are returned."""
    from leanstep.kernels.cpp_impl.steps import scaled_step as cpp_step

    columns = [ts for ts in (params, mats, rows, cols, extras) if ts]
    contiguous = [all(t.is_contiguous() for t in row) for row in zip(*columns, strict=True)]
    for members in group_by_dtypes(columns, contiguous):
        chosen = [[ts[i] for i in members] if ts else [] for ts in (params, mats, rows, cols, extras)]
        flags[members] = cpp_step.scaled_step(
            *chosen,
            hyper=hyper,
            rounding=rounding,
            skip_nonfinite=skip_nonfinite,
            seeds=None if seeds is None else seeds[members],
            offsets=None if offsets is None else offsets[members],
        )
    torch.autograd.graph.increment_version([t for ts in (params, extras) for t in ts])
    return [i for i, fits in enumerate(contiguous) if not fits]


def _joined(scales: list[Tensor]) -> Tensor:
    """Scale vectors of all matrices behind one another, as the Triton kernels read them."""
    return torch.cat([scale.reshape(-1) for scale in scales])


def _reference_step(
    param: Tensor, mat: Tensor, rows: Tensor, cols: Tensor, extra: Tensor | None, bad: Tensor | None, **options
) -> None:
    """The reference, with the old contents put back where a matrix was not finite."""
    written = [param] if extra is None else [param, extra]
    old = [t.clone() for t in written] if bad is not None and bool(bad.any()) else None
    reference.scaled_step(param, mat, rows.unsqueeze(-1), cols.unsqueeze(-2), extra, **options)
    if old is not None and bad is not None:
        for tensor, before in zip(written, old, strict=True):
            tensor.copy_(torch.where(bad[..., None, None], before, tensor))


_step_op = torch.library.custom_op("leanstep::scaled_step", _run, mutates_args=("params", "extras"))


@_step_op.register_fake
def _(params, mats, rows, cols, extras, hyper, *_):
    return hyper.new_empty(len(params), dtype=torch.int32)
