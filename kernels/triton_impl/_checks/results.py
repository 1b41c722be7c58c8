"""An operation's results on the Triton backend beside its definition's in the same dtype and in float64.

An error is the largest difference from float64, relative to the largest entry. A result passes if its error is at most
four times that of the definition, or a few roundings, and if the bits are those of the definition where they must be.
Of 16-bit results, nearly as many entries as of the definition's must be float64's, rounded to nearest.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from leanstep.kernels import use_backend
from leanstep.kernels.triton_impl._checks.operations import BITS, OPERATIONS, SIZES, Inputs

LIMIT = 4.0
MISROUNDED = 0.1


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


def compare_small(name: str) -> dict[str, Any]:
    """Compare an operation on the host, in bf16 where it has a kernel for that, on inputs of several programs."""
    dtypes = OPERATIONS[name].dtypes
    return compare(name, torch.bfloat16 if torch.bfloat16 in dtypes else dtypes[0], torch.device("cpu"), SIZES)


def compare(name: str, dtype: torch.dtype, device: torch.device, sizes: SimpleNamespace) -> dict[str, Any]:
    """Run an operation three times. "kernels" names the kernels that were launched."""
    operation = OPERATIONS[name]

    def results(backend: str, wide: bool) -> list[Tensor]:
        inputs = Inputs(device, dtype, wide, sizes)
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
    sound = operation.promise == BITS or all(comparison.sound for comparison in compared)
    return {
        "operation": name,
        "dtype": str(dtype).removeprefix("torch."),
        "elements": max(tensor.numel() for tensor in actual),
        "error": worst.error,
        "definition's error": worst.definition_error,
        "bits of the definition": same_bits if operation.promise == BITS else "not promised",
        "ok": sound and (same_bits or operation.promise != BITS) and bool(launched),
        "kernels": ", ".join(launched),
    }


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
