"""The AdamW step on a list of CPU tensors: torch's fused kernel or, in bf16, a faster kernel with the same bits."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from leanstep.kernels._backend import choose
from leanstep.kernels.cpp_impl._build import call, group_by_dtypes
from leanstep.kernels.steps.engine import check_shapes

# elements that torch's fused kernel processes at a time; it rounds the remaining ones differently
LANES = 64


@torch.no_grad()
def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool = False,
) -> None:
    """One step of ``torch.optim.AdamW(fused=True)`` on CPU tensors, bit for bit.

    ``p <- p (1 - lr weight_decay) - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)``, where ``m`` and ``v``
    are the averages of ``g`` and ``g^2``, and ``t`` counts the steps including this one (Loshchilov and Hutter, 2019).

    Args:
        params, grads, exp_avgs, exp_avg_sqs: fp32 or bf16 tensors on the CPU, both in one list, too. The four tensors
            at an index have one dtype and one dense layout. All but the gradients are updated in place.
        steps: 0-d fp32 tensors, the number of earlier steps; increased in place.
        lr, betas, eps, weight_decay, maximize: as ``torch.optim.AdamW`` takes them.

    Raises:
        BackendError: the requested backend cannot run here.
        ValueError: tensors at one index have different shapes or dtypes.

    Notes:
        Reads p, g, m, v once and writes p, m, v once. Does not detect non-finite gradients, and does not increase
        version counters. In bf16, conversions limit torch's kernel, not memory. A C++ kernel therefore updates the
        elements that fill whole vectors, and torch updates the rest. The first call compares the bits of both kernels.
        If they differ, torch's kernel runs alone, as it does in fp32.
    """
    if not params:
        return
    columns = (params, grads, exp_avgs, exp_avg_sqs)
    check_shapes("adamw_step", columns)
    _check_dtypes(*columns)
    options = _Options(lr, betas, eps, weight_decay, maximize)
    choice = choose("adamw_step", params[0].device, *dict.fromkeys(p.dtype for p in params))
    for indices in group_by_dtypes([params], [True] * len(params)):
        first, second, third, fourth = ([column[i] for i in indices] for column in columns)
        is_faster = choice.backend == "cpp" and first[0].dtype == torch.bfloat16 and _same_bits()
        (_cpp if is_faster else _torch)((first, second, third, fourth), [steps[i] for i in indices], options)


def _check_dtypes(*lists: Sequence[Tensor]) -> None:
    """Raise ValueError unless the tensors at every index have one dtype, for kernels that read all as the first."""
    for index, (first, *others) in enumerate(zip(*lists, strict=True)):
        dtype = first.dtype
        if any(tensor.dtype != dtype for tensor in others):
            dtypes = ", ".join(str(tensor.dtype) for tensor in (first, *others))
            raise ValueError(
                f"adamw_step: expected tensors of one dtype at index {index}, got {dtypes}; convert them first"
            )


# parameters, gradients, averages, averages of squares
_Columns = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


class _Options(NamedTuple):
    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    maximize: bool

    def numbers(self, step: int) -> tuple[float, ...]:
        """Return the kernel's scalars for step number ``step``, in double precision as torch computes them."""
        lr, (beta1, beta2) = float(self.lr), self.betas
        size = -lr / (1 - beta1**step)
        return 1 - lr * self.weight_decay, 1 - beta1, beta2, 1 - beta2, math.sqrt(1 - beta2**step), self.eps, size


def _torch(columns: _Columns, steps: list[Tensor], options: _Options) -> None:
    beta1, beta2 = options.betas
    adamw(
        *columns, [], steps, fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=options.lr,
        weight_decay=options.weight_decay, eps=options.eps, maximize=options.maximize,
    )  # fmt: skip


def _cpp(columns: _Columns, steps: list[Tensor], options: _Options) -> None:
    # torch updates the elements that fill no vector: its loop over single elements rounds differently
    sizes = [p.numel() for p in columns[0]]
    vector_sizes = [size // LANES * LANES for size in sizes]
    ends = [i for i, size in enumerate(sizes) if size > vector_sizes[i]]
    if ends:
        first, second, third, fourth = (
            [c[i].as_strided((sizes[i],), (1,))[vector_sizes[i] :] for i in ends] for c in columns
        )
        _torch((first, second, third, fourth), [steps[i].clone() for i in ends], options)
    torch._foreach_add_(steps, 1)
    counts = [int(step) for step in steps]
    numbers = {count: options.numbers(count) for count in set(counts)}
    rows = [number for count in counts for number in numbers[count]]
    scalars = (ctypes.c_float * len(rows))(*rows)
    macros = {"MAXIMIZE": int(options.maximize)}
    call("steps/adamw_step", "adamw_step", macros, len(sizes), *columns, vector_sizes, scalars)


@functools.cache
def _same_bits() -> bool:
    """Whether the C++ kernel gives the bits of this build of torch. Compilers may fuse products differently."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(4, 64 * LANES, generator=generator, dtype=torch.float32, device="cpu")
    *tensors, squares = (row * scale for row, scale in zip(normal, (2e-2, 1e-3, 1e-4, 1e-6), strict=True))
    for betas in ((0.9, 0.999), (0.0, 0.5)):
        results = []
        for run in (_torch, _cpp):
            step = torch.zeros((), dtype=torch.float32, device="cpu")
            param, grad, avg, avg_sq = (t.bfloat16() for t in (*tensors, squares.abs()))
            run(([param], [grad], [avg], [avg_sq]), [step], _Options(1e-3, betas, 1e-8, 0.1, False))
            results.append(torch.stack([param, avg, avg_sq]))
        if not torch.equal(*results):
            return False
    return True
