"""N:M masks from scores."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels._backend import choose
from leanstep.kernels.cpp_impl._build import call, group_by_dtypes
from leanstep.kernels.op import EVERYWHERE, is_traced, op, triton_module
from leanstep.kernels.reference.nm import mask as reference

MAX_FAST_M = 128  # longest group of the kernels
# bit pattern of infinity; every NaN has a larger one
INFINITE = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


def nm_mask(
    scores: Sequence[Tensor],
    n: int,
    m: int,
    *,
    dim: int = -1,
    check: bool = False,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Select the n largest magnitudes in every group of m consecutive entries along a dimension.

    Of entries with equal ``|score|``, the last is kept, so masks are reproducible. A group of zeros keeps its last n
    entries, so a layer that starts at zero can grow.

    Args:
        scores: tensors of one device, any shape and floating dtype; not written. Weights are their own scores.
        n: entries kept per group, 0 <= n <= m.
        m: entries per group; must divide every tensor's size along ``dim``. The C++ and Triton kernels take m <= 128.
        dim: dimension of the groups.
        check: raise for entries that are not finite, which waits for the device.
        out: bool tensors of the same shapes, overwritten. None: new tensors.

    Returns:
        ``out``: one bool tensor per score, True where a weight is kept.

    Raises:
        ValueError: for n or m out of range, an m that does not divide a tensor's size, ``out`` of other shapes, and,
            with ``check``, entries that are not finite.
        TypeError: for scores that are not of floating dtype.
        BackendError: the requested backend cannot run here.

    Notes:
        Reads the scores and writes the masks once: 5 bytes per fp32 element. Without ``check``, NaN counts as larger
        than any number. All backends give the same masks.
    """
    _check(scores, n, m, dim, out)
    for i, score in enumerate(scores if check else ()):
        finite = score.detach().isfinite()
        if not finite.all():
            raise ValueError(
                f"nm_mask: {int((~finite).sum())} of the {score.numel()} entries of scores[{i}], of shape "
                f"{tuple(score.shape)}, are not finite: the weights or their scores have diverged"
            )
    if out is None:
        out = [torch.empty(s.shape, dtype=torch.bool, device=s.device) for s in scores]
    _run(list(scores), n, m, dim, list(out))
    return list(out)


def _any_traced(scores: list[Tensor], *_: Any) -> bool:
    return torch.compiler.is_compiling() or any(map(is_traced, scores))


@op("nm_mask", EVERYWHERE, mutates=["out"], traced=_any_traced)
@torch.no_grad()
def _run(scores: list[Tensor], n: int, m: int, dim: int, out: list[Tensor]) -> None:
    if not scores:
        return
    # all backends take fp32, bf16 and fp16: only fp64 matters for the choice
    wide = [torch.float64] if any(s.dtype == torch.float64 for s in scores) else []
    backend = choose("nm_mask", scores[0].device, *wide).backend
    if backend == "reference" or (m > MAX_FAST_M and m != n):
        for score, mask in zip(scores, out, strict=True):
            mask.copy_(reference.nm_mask(score, n, m, dim))
        return
    outputs = [
        mask if mask.is_contiguous() else torch.empty_like(mask, memory_format=torch.contiguous_format) for mask in out
    ]
    inputs = [score.detach().contiguous() for score in scores]
    for indices in group_by_dtypes([inputs], [score.numel() > 0 for score in inputs]):
        group = ([inputs[i] for i in indices], n, m, dim, [outputs[i] for i in indices])
        if backend == "triton":
            triton_module(__name__).nm_mask(*group)
        else:
            _cpp_mask(*group)
    for mask, written in zip(out, outputs, strict=True):
        if written is not mask:
            mask.copy_(written)


def _cpp_mask(scores: list[Tensor], n: int, m: int, dim: int, out: list[Tensor]) -> None:
    """Masks of contiguous scores of one dtype, into contiguous bool tensors."""
    groups, inner = [s.numel() // m for s in scores], [math.prod(s.shape[dim % s.dim() + 1 :]) for s in scores]
    infinite, macros = INFINITE[scores[0].dtype], {"WORD": f"uint{8 * scores[0].itemsize}_t"}
    call("nm/mask", "nm_mask", macros, len(scores), scores, out, groups, inner, n, m, infinite)


def _check(scores: Sequence[Tensor], n: int, m: int, dim: int, out: Sequence[Tensor] | None) -> None:
    if m < 1 or not 0 <= n <= m:
        raise ValueError(f"nm_mask: expected 0 <= n <= m and m >= 1, got n = {n}, m = {m}")
    for i, score in enumerate(scores):
        if not score.is_floating_point():
            raise TypeError(f"nm_mask: scores[{i}] is {score.dtype}, expected a floating dtype")
        if not -score.dim() <= dim < score.dim():
            raise ValueError(f"nm_mask: scores[{i}] of shape {tuple(score.shape)} has no dimension {dim}")
        if score.shape[dim] % m:
            raise ValueError(
                f"nm_mask: scores[{i}] of shape {tuple(score.shape)} has {score.shape[dim]} entries along dimension "
                f"{dim}, which groups of {m} do not fill: {score.shape[dim] % m} are left over"
            )
    if out is None:
        return
    if len(out) != len(scores):
        raise ValueError(f"nm_mask: expected one mask in out per score, got {len(out)} for {len(scores)}")
    for i, (score, mask) in enumerate(zip(scores, out, strict=True)):
        if mask.shape != score.shape or mask.dtype != torch.bool or mask.device != score.device:
            raise ValueError(
                f"nm_mask: expected out[{i}] of shape {tuple(score.shape)}, torch.bool, on {score.device}; got "
                f"{tuple(mask.shape)} of {mask.dtype} on {mask.device}"
            )
