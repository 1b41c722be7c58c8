"""Every Triton kernel beside its definition: in float64, and bit for bit where the kernel promises it.

    python benchmarks device/kernels [--dry-run] [--out FOLDER]

Each operation runs on the Triton backend, as its definition in the same dtype, and as its definition in float64 on the
same numbers (``leanstep.kernels.triton_impl._checks.results`` says what passes). "kernels" names the Triton kernels
that ran: together they are those of ``leanstep audit``. The dry run interprets the kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

import torch
from stages import Cases, Row, Stage, run_stage, stage_parser
from torch import Tensor

from leanstep.kernels import StepOptions, lion_step, nm_apply, swiglu, use_backend
from leanstep.kernels.triton_impl._checks.operations import OPERATIONS
from leanstep.kernels.triton_impl._checks.results import compare, recorded_launches

PARSER = stage_parser(__doc__)
MATRICES = ((4096, 4096), (11008, 4096), (32000, 512), (515, 16384), (257, 8195), (4099, 1003))
FULL = {
    "dtypes": (torch.float32, torch.bfloat16, torch.float16), "matrices": MATRICES, "products": MATRICES,
    "balanced": MATRICES, "iterations": 5, "tokens": 4096, "width": 4096, "window": 64, "columns": 2**22,
    "variables": 32, "huge": 2**31 + 2**12, "tail": 2**20,
}  # fmt: skip
# every kernel runs, in one dtype where it has several
DRY = {
    "dtypes": (torch.bfloat16,), "matrices": ((9, 40), (5, 7)), "products": ((20, 40), (5, 3)),
    "balanced": ((9, 40), (1, 8200), (1, 8195)), "iterations": 2, "tokens": 9, "width": 64, "window": 5,
    "columns": 300, "variables": 3, "huge": 2**12 + 40, "tail": 2**8,
}  # fmt: skip


def main() -> int:
    """Compare, and print the table."""
    options = PARSER.parse_args()
    if options.dry_run:
        # read when Triton is imported
        os.environ["TRITON_INTERPRET"] = "1"
    return run_stage("kernels", PARSER, cases_of, FULL, DRY)


def cases_of(stage: Stage) -> Cases:
    """One case per operation and dtype, and the large tensors."""
    cases = {}
    for name, operation in OPERATIONS.items():
        for dtype in [d for d in operation.dtypes if d in stage.sizes.dtypes] or operation.dtypes[:1]:
            label = str(dtype).removeprefix("torch.")
            cases[f"{name}, {label}"] = partial(_compared, stage, name, dtype)
    for name in HUGE:
        cases[f"{name}, {stage.sizes.huge:,} elements"] = partial(compare_tail, stage, name)
    return cases


def _compared(stage: Stage, name: str, dtype: torch.dtype) -> list[Row]:
    return [compare(name, dtype, stage.device, stage.sizes)]


# -- tensors whose indices need more than 32 bits ---------------------------------------------------------------------


def _lion(tensors: Sequence[Tensor]) -> Tensor:
    param, grad, momentum = tensors
    numbers = torch.tensor([1e-2, 0.999, 0.9, 0.1, 0.99, 0.01], device=param.device)
    lion_step([param], [grad], [momentum], [], StepOptions(numbers))
    return param


def _apply(tensors: Sequence[Tensor]) -> Tensor:
    weight, scores, _ = tensors
    return nm_apply(weight, scores > 0, torch.tensor(0.5, device=weight.device))


HUGE: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "lion_step": _lion,
    "swiglu": lambda tensors: swiglu(tensors[0], tensors[1]),
    "nm_apply": _apply,
}


def compare_tail(stage: Stage, name: str) -> list[Row]:
    """Run an elementwise operation on a tensor of more than 2**31 elements; compare the last of them."""
    sizes, generator = stage.sizes, torch.Generator(stage.device).manual_seed(0)
    settings = {"dtype": torch.bfloat16, "device": stage.device}
    tensors = [torch.zeros(sizes.huge, **settings) for _ in range(3)]
    for tensor in tensors:
        tensor[-sizes.tail :] = torch.randn(sizes.tail, generator=generator, **settings)
    tails = [tensor[-sizes.tail :].clone() for tensor in tensors]
    with torch.no_grad(), recorded_launches() as launched:
        with use_backend("triton"):
            actual = HUGE[name](tensors)[-sizes.tail :]
        with use_backend("reference"):
            definition = HUGE[name](tails)
    error = float((actual.double() - definition.double()).abs().max()) / float(definition.abs().max())
    row = {"operation": name, "dtype": "bfloat16", "elements": sizes.huge, "error": error}
    return [row | {"ok": error <= torch.finfo(torch.bfloat16).eps and bool(launched), "kernels": ", ".join(launched)}]
