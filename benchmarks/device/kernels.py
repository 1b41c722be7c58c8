"""Every Triton kernel beside its definition: in float64, and bit for bit where the kernel promises it.

    python benchmarks device/kernels [--dry-run] [--out FOLDER]

Each operation runs on the Triton backend, as its definition in the same dtype, and as its definition in float64 on the
same numbers. An error is the largest difference from float64, relative to the largest entry. A result passes if its
error is at most four times that of the definition, or a few roundings, and if the bits are those of the definition
where they must be. Of 16-bit results, nearly as many entries as of the definition's must be float64's, rounded to
nearest. "kernels" names the Triton kernels that ran: together they are those of ``leanstep audit``. The dry run
interprets the kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from operations import BITS, OPERATIONS, Inputs
from stages import Cases, Row, Stage, run_stage, stage_parser
from torch import Tensor

from leanstep.kernels import StepOptions, lion_step, nm_apply, swiglu, use_backend

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
LIMIT = 4.0
MISROUNDED = 0.1


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
            cases[f"{name}, {dtype_name(dtype)}"] = partial(compare, stage, name, dtype)
    for name in HUGE:
        cases[f"{name}, {stage.sizes.huge:,} elements"] = partial(compare_tail, stage, name)
    return cases


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Comparison:
    """Errors of a result, and of a few roundings, relative to the largest entry.

    ``misrounded``: by how much the share of entries that are not float64's rounded is above that of the definition.
    """

    error: float
    definition_error: float
    roundings: float
    misrounded: float

    @property
    def sound(self) -> bool:
        """Whether the error is that of a correct kernel."""
        return self.error <= max(LIMIT * self.definition_error, self.roundings) and self.misrounded <= MISROUNDED


def compare(stage: Stage, name: str, dtype: torch.dtype) -> list[Row]:
    """Run an operation three times."""
    operation = OPERATIONS[name]

    def results(backend: str, wide: bool) -> list[Tensor]:
        inputs = Inputs(stage.device, dtype, wide, stage.sizes)
        with use_backend(backend), torch.no_grad():
            return operation.run(inputs)

    with recorded_launches() as launched:
        actual = results("triton", False)
    definition, exact = results("reference", False), results("reference", True)
    inner = dtype if operation.rounded_inside else None
    # steps return their state too, which float64 does not have
    compared = [measure(*results, inner) for results in zip(actual, definition, exact, strict=False)]
    worst = max(compared, key=lambda c: c.error / max(c.definition_error, c.roundings))
    same_bits = all(bits_equal(*pair) for pair in zip(actual, definition, strict=True))
    sound = worst.sound or operation.promise == BITS
    return [{
        "operation": name,
        "dtype": dtype_name(dtype),
        "elements": max(tensor.numel() for tensor in actual),
        "error": worst.error,
        "definition's error": worst.definition_error,
        "bits of the definition": same_bits if operation.promise == BITS else "not promised",
        "ok": sound and (same_bits or operation.promise != BITS) and bool(launched),
        "kernels": ", ".join(launched),
    }]  # fmt: skip


def measure(actual: Tensor, definition: Tensor, exact: Tensor, inner: torch.dtype | None = None) -> Comparison:
    """Errors of one result; ``inner``: the dtype of intermediate results, where it is not the result's."""
    wide = exact.double()
    size = max(float(wide.abs().max()) if wide.numel() else 0.0, 1e-30)

    def error(tensor: Tensor) -> float:
        difference = (tensor.double() - wide).abs()
        # max() of a NaN is NaN, which no bound admits
        return float(difference.max()) / size if difference.numel() else 0.0

    def correct(tensor: Tensor) -> float:
        return float((tensor == exact.to(tensor.dtype)).double().mean())

    epsilon = torch.finfo(inner or actual.dtype).eps if actual.is_floating_point() else 0.0
    # sums in another order change the last bits of fp32; of 16 bits, only truncation changes half of all entries
    short = actual.dtype in (torch.bfloat16, torch.float16) and actual.numel() >= 64
    misrounded = correct(definition) - correct(actual) if short else 0.0
    return Comparison(error(actual), error(definition), max(4 * epsilon, 1e-12), misrounded)


def bits_equal(actual: Tensor, definition: Tensor) -> bool:
    """Whether all entries are equal, with NaN equal to NaN."""
    same = (actual == definition) | ((actual != actual) & (definition != definition))
    return actual.dtype == definition.dtype and bool(same.all())


@contextmanager
def recorded_launches() -> Iterator[list[str]]:
    """Names of the kernels that are launched in the block, in order, each once."""
    names: list[str] = []
    kernel_type = type(next(iter(kernels().values())))
    run = kernel_type.run

    def record(kernel, *arguments, **named):
        if kernel.fn.__name__ not in names:
            names.append(kernel.fn.__name__)
        return run(kernel, *arguments, **named)

    with mock.patch.object(kernel_type, "run", record):
        yield names


def kernels() -> dict[str, object]:
    """All kernels that the audit compiles, by name."""
    from leanstep.kernels.triton_impl import _compile

    values = {name: value for module in _compile.modules() for name, value in vars(module).items()}
    return {name: value for name, value in values.items() if name.endswith("_kernel")}


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
