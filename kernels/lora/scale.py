"""DoRA's factor on the columns of an output, and its gradient."""

import torch
from torch import Tensor

from leanstep.kernels._backend import choose
from leanstep.kernels.cpp_impl._build import TYPES, call
from leanstep.kernels.op import EVERYWHERE, declare, is_traced, triton_module
from leanstep.kernels.reference.lora import scale as reference

# rows that the C++ kernel sums together; scale.cpp has the same constant
ROWS = 64

declare("lora_scale", EVERYWHERE)


def lora_scale_(y: Tensor, c: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = y * c + bias``, in place; returns y.

    Args:
        y: [M, m], floating; written.
        c: [m], fp32, or fp64 for an fp64 y.
        bias: [m] of y's dtype.

    Raises:
        ValueError: for shapes and dtypes that do not match.
        BackendError: the requested backend cannot run here.

    Notes:
        Computed in c's dtype, rounded once. Reads and writes y once.
    """
    _check("lora_scale_", y, c, bias)
    backend = _backend(y) if y.is_contiguous() else "reference"
    if backend == "reference":
        reference.lora_scale_(y, c, bias)
        return y
    c, bias = c.contiguous(), None if bias is None else bias.contiguous()
    if backend == "cpp":
        call("lora/scale", "lora_scale", {"VALUE": TYPES[y.dtype]}, *y.shape, y, c, bias)
    else:
        triton_module(__name__).lora_scale_(y, c, bias)
    torch.autograd.graph.increment_version(y)  # kernels do not
    return y


def lora_scale_backward(g: Tensor, y: Tensor | None, c: Tensor, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """``g * c``, and the sum of ``g * y`` over the rows.

    Args:
        g: [M, m], the gradient of an output.
        y: like g. None if the caller does not read the sums, which are then arbitrary.
        c: [m], fp32, or fp64 for fp64 tensors.
        in_place: write the product into g.

    Returns:
        ([M, m] of g's dtype, [m] of c's dtype).

    Raises:
        ValueError, BackendError: as :func:`lora_scale_`.

    Notes:
        Reads g and y once and writes the product once.
    """
    _check("lora_scale_backward", g, c, None)
    if y is not None and (y.shape != g.shape or y.dtype != g.dtype):
        raise ValueError(
            f"lora_scale_backward: expected g and y alike, got {tuple(g.shape)} of {g.dtype} and {tuple(y.shape)} of "
            f"{y.dtype}"
        )
    if is_traced(g) or not g.numel():
        return reference.lora_scale_backward(g, y, c)
    g, c, y = g.contiguous(), c.contiguous(), None if y is None else y.contiguous()
    inner = g if in_place else torch.empty_like(g)
    backend = _backend(g)
    if backend == "reference":
        return reference.lora_scale_backward(g, y, c, inner)
    if in_place:
        torch.autograd.graph.increment_version(g)  # kernels do not
    if backend == "cpp":
        sums = g.new_empty(-(-g.shape[0] // ROWS), g.shape[1], dtype=torch.float32)
        # without y, the kernel sums squares that nobody reads
        tensors = (g, g if y is None else y, c, inner, sums)
        call("lora/scale", "lora_scale_backward", {"VALUE": TYPES[g.dtype]}, *g.shape, *tensors)
        return inner, sums.sum(0)
    return triton_module(__name__).lora_scale_backward(g, y, c, inner)


def _backend(y: Tensor) -> str:
    # torch.compile fuses plain torch
    return "reference" if is_traced(y) or not y.numel() else choose("lora_scale", y.device, y.dtype).backend


def _check(name: str, y: Tensor, c: Tensor, bias: Tensor | None) -> None:
    wide = torch.promote_types(y.dtype, torch.float32)
    if y.dim() != 2 or c.shape != y.shape[1:] or c.dtype != wide or not y.is_floating_point():
        raise ValueError(
            f"{name}: expected a matrix and {wide} factors of its columns, got {tuple(y.shape)} of {y.dtype} and "
            f"{tuple(c.shape)} of {c.dtype}"
        )
    if bias is not None and (bias.shape != c.shape or bias.dtype != y.dtype):
        raise ValueError(
            f"{name}: expected a bias of {y.dtype} for {tuple(c.shape)}, got {bias.dtype}, {tuple(bias.shape)}"
        )
