"""The Lion step on lists of tensors."""

from typing import Any

import torch
from torch import Tensor

from leanstep.kernels._backend import choose, group_by_dtypes, same_layout
from leanstep.kernels.reference.steps import lion_step as reference


def lion_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    extras: list[Tensor],
    *,
    hyper: Tensor,
    rounding: str = "nearest",
    cautious_scale: Tensor | None = None,
    decay_where_aligned: bool = False,
    maximize: bool = False,
    skip_nonfinite: bool = True,
    seeds: Tensor | None = None,
    offsets: Tensor | None = None,
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
        extras: empty, or one tensor per parameter for ``rounding`` "kahan" (parameter's dtype) and "master" (fp32).
        hyper: 1-D tensor of 6 on the device: [lr, 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2].
        rounding: how the new value meets the parameter's dtype: "nearest", "stochastic", "kahan" or "master"; see
            ``leanstep.kernels.reference.rounding``.
        cautious_scale: fp32 [len(params)]; factor of agreeing entries (Liang et al., arXiv 2411.16085). None: off.
        decay_where_aligned: decay only entries with u * p >= 0 (Chen et al., arXiv 2510.12402).
        maximize: ascend instead.
        skip_nonfinite: entries with a non-finite gradient keep parameter, momentum and extra as they are.
        seeds: int64 [len(params)] of unsigned 32-bit values, for "stochastic".
        offsets: int64 [len(params)]: index of each tensor's first element in its whole tensor, where it is a shard.

    Returns:
        int32 [len(params)]: 1 where the gradient had a non-finite entry.

    Raises:
        BackendError: when a backend was asked for that cannot run here.

    Notes:
        Reads p, g, m and writes p, m once each: 20 bytes per fp32 element. No temporary of a tensor's size on the fast
        paths. All backends agree bit for bit (products and sums are not contracted).
    """
    if torch.compiler.is_compiling():
        return torch.ops.leanstep.lion_step(
            params, grads, exp_avgs, extras, hyper, rounding, cautious_scale, decay_where_aligned, maximize,
            skip_nonfinite, seeds, offsets,
        )  # fmt: skip
    return _run(
        params, grads, exp_avgs, extras, hyper, rounding, cautious_scale, decay_where_aligned, maximize,
        skip_nonfinite, seeds, offsets,
    )  # fmt: skip


@torch.no_grad()
def _run(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    extras: list[Tensor],
    hyper: Tensor,
    rounding: str,
    cautious_scale: Tensor | None,
    decay_where_aligned: bool,
    maximize: bool,
    skip_nonfinite: bool,
    seeds: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    if not params:
        return torch.zeros(0, dtype=torch.int32)
    dtypes = dict.fromkeys(t.dtype for ts in (params, grads, exp_avgs) for t in ts)
    backend = choose("lion_step", params[0].device, *dtypes).backend
    if backend == "triton":
        from leanstep.kernels.triton_impl.steps import lion_step as triton_lion

        return triton_lion.lion_step(
            params, grads, exp_avgs, extras, hyper=hyper, rounding=rounding, cautious_scale=cautious_scale,
            decay_where_aligned=decay_where_aligned, maximize=maximize, skip_nonfinite=skip_nonfinite,
            seeds=seeds, offsets=offsets,
        )  # fmt: skip
    options: dict[str, Any] = {
        "hyper": hyper,
        "rounding": rounding,
        "decay_where_aligned": decay_where_aligned,
        "maximize": maximize,
        "skip_nonfinite": skip_nonfinite,
    }
    if backend == "cpp":
        return _cpp_step(params, grads, exp_avgs, extras, cautious_scale, seeds, offsets, options)
    flags: list[Tensor | None] = [None] * len(params)
    for i in range(len(params)):
        flags[i] = reference.lion_step(
            params[i],
            grads[i],
            exp_avgs[i],
            extras[i] if extras else None,
            cautious_scale=None if cautious_scale is None else cautious_scale[i],
            seed=None if seeds is None else seeds[i],
            offset=0 if offsets is None else offsets[i],
            **options,
        )
    quiet = torch.zeros((), dtype=torch.bool, device=params[0].device)
    return torch.stack([quiet if flag is None else flag for flag in flags]).to(torch.int32)


def _cpp_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    extras: list[Tensor],
    cautious_scale: Tensor | None,
    seeds: Tensor | None,
    offsets: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """One call for all tensors of the same dtypes; those whose rows differ in layout go through the reference."""
    from leanstep.kernels.cpp_impl.steps import lion_step as cpp_lion

    flags = torch.zeros(len(params), dtype=torch.int32)
    columns = [ts for ts in (params, grads, exp_avgs, extras) if ts]
    row_major = options["rounding"] == "stochastic"
    walkable = [same_layout(row, row_major=row_major) for row in zip(*columns, strict=True)]
    for members in group_by_dtypes(columns, walkable):
        chosen = [[ts[i] for i in members] if ts else [] for ts in (params, grads, exp_avgs, extras)]
        found = cpp_lion.lion_step(
            *chosen,
            cautious_scale=None if cautious_scale is None else cautious_scale[members],
            seeds=None if seeds is None else seeds[members],
            offsets=None if offsets is None else offsets[members],
            **options,
        )
        flags[members] = found
    written = [t for ts in (params, exp_avgs, extras) for t in ts]
    torch.autograd.graph.increment_version(written)
    for i in (i for i, fits in enumerate(walkable) if not fits):
        flag = reference.lion_step(
            params[i],
            grads[i],
            exp_avgs[i],
            extras[i] if extras else None,
            cautious_scale=None if cautious_scale is None else cautious_scale[i],
            seed=None if seeds is None else seeds[i],
            offset=0 if offsets is None else offsets[i],
            **options,
        )
        flags[i] = 0 if flag is None else flag
    return flags


def lion_agreement(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    *,
    hyper: Tensor,
    maximize: bool = False,
    skip_nonfinite: bool = True,
) -> Tensor:
    """Count, per tensor, the entries whose Lion update agrees in sign with the gradient.

    Cautious Lion scales the agreeing entries by numel / count. Under sharding the counts are summed over the shards
    before the scale is formed.

    Args:
        grads, exp_avgs, hyper, maximize, skip_nonfinite: as for :func:`lion_step`.

    Returns:
        fp32 [len(grads)] (exact up to 2**24 on backends that count in fp32; integer counts are converted once).

    Notes:
        Reads g and m once each.
    """
    if torch.compiler.is_compiling():
        return torch.ops.leanstep.lion_agreement(grads, exp_avgs, hyper, maximize, skip_nonfinite)
    return _run_agreement(grads, exp_avgs, hyper, maximize, skip_nonfinite)


@torch.no_grad()
def _run_agreement(
    grads: list[Tensor], exp_avgs: list[Tensor], hyper: Tensor, maximize: bool, skip_nonfinite: bool
) -> Tensor:
    if not grads:
        return torch.zeros(0)
    dtypes = dict.fromkeys([hyper.dtype, *(t.dtype for ts in (grads, exp_avgs) for t in ts)])
    backend = choose("lion_agreement", grads[0].device, *dtypes).backend
    options: dict[str, Any] = {"hyper": hyper, "maximize": maximize, "skip_nonfinite": skip_nonfinite}
    if backend == "triton":
        from leanstep.kernels.triton_impl.steps import lion_step as triton_lion

        return triton_lion.lion_agreement(grads, exp_avgs, **options)
    if backend == "cpp":
        return _cpp_agreement(grads, exp_avgs, options)
    return torch.stack([reference.lion_agreement(g, m, **options) for g, m in zip(grads, exp_avgs, strict=True)])


def _cpp_agreement(grads: list[Tensor], exp_avgs: list[Tensor], options: dict[str, Any]) -> Tensor:
    from leanstep.kernels.cpp_impl.steps import lion_step as cpp_lion

    counts = torch.zeros(len(grads))
    walkable = [same_layout(row) for row in zip(grads, exp_avgs, strict=True)]
    for members in group_by_dtypes([grads, exp_avgs], walkable):
        found = cpp_lion.lion_agreement([grads[i] for i in members], [exp_avgs[i] for i in members], **options)
        counts[members] = found.to(counts.dtype)
    for i in (i for i, fits in enumerate(walkable) if not fits):
        counts[i] = reference.lion_agreement(grads[i], exp_avgs[i], **options)
    return counts


_step_op = torch.library.custom_op("leanstep::lion_step", _run, mutates_args=("params", "exp_avgs", "extras"))
_agreement_op = torch.library.custom_op("leanstep::lion_agreement", _run_agreement, mutates_args=())


@_step_op.register_fake
def _(params, grads, exp_avgs, extras, hyper, *_):
    return hyper.new_empty(len(params), dtype=torch.int32)


@_agreement_op.register_fake
def _(grads, exp_avgs, hyper, *_):
    return hyper.new_empty(len(grads), dtype=torch.float32)
