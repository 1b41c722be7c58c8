"""Converts 2:4 sparse linear layers to semi-structured tensors of torch or torchao; a reason for every other layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from leanstep._files import one_line
from leanstep._torch import is_conv1d
from leanstep.sparsity.patterns import NM
from leanstep.sparsity.training.masks import violations

_SUBCLASSES = {
    "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
    "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
}
_TORCHAO = "torchao-float8"
# of the weight, for torchao's float8 products
_TORCHAO_MULTIPLE = 16


@dataclass(frozen=True)
class Conversion:
    """The result for one layer. ``reason`` says why the layer was not converted; "" if it was."""

    layer: str
    reason: str = ""

    @property
    def converted(self) -> bool:
        """Whether the layer's weight is now a semi-structured tensor."""
        return not self.reason


def to_semi_structured(model: nn.Module, *, backend: str = "auto") -> list[Conversion]:
    """Convert the weight of every linear layer that is 2:4 sparse along its inputs, for the GPU's sparse units.

    torch's own conversion accepts any weight of the right shape and silently drops entries that are not 2:4. This one
    checks each weight first. Converted layers are for inference: they cannot be trained, saved as plain tensors, or
    moved.

    Args:
        model: a plain or squashed model; changed in place.
        backend: "cusparselt", "cutlass", "auto" for the first of these that is available, or "torchao-float8":
            torchao's tensors, with weights rounded to float8 with a scale per row, and inputs rounded at every product.

    Returns:
        One :class:`Conversion` for each linear layer and convolution, in the model's order.

    Raises:
        ValueError: for another backend, or one that is not installed.

    Notes:
        Products of one or a few tokens can be slower than dense ones (pytorch/pytorch issue 111339): measure first.
        Skips fp32 weights, for which hardware supports 1:2, not 2:4. "torchao-float8" has not been run on a GPU by this
        repository.
    """
    backend, convert = _choose_backend(backend)
    results = []
    for name, module in model.named_modules():
        if not (isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or is_conv1d(module)):
            continue
        reason = obstacle(module, backend)
        if not reason:
            with torch.no_grad():
                reason = convert(module)
        results.append(Conversion(name, reason))
    return results


def _convert_by_torch(module: Any, backend: str) -> str:
    sparse = _SUBCLASSES[backend].from_dense(module.weight.detach().contiguous())
    module.weight = nn.Parameter(sparse, requires_grad=False)
    return ""


def _convert_by_torchao(module: Any, quantize: Callable[..., Any], config: Any) -> str:
    """Replace the weight; the reason if torchao refuses, or leaves the layer as it is."""
    weight = module.weight
    # its compression may take a negative zero for a value
    module.weight = nn.Parameter(weight.detach() + 0.0, requires_grad=False)
    try:
        quantize(module, config)
        reason = "torchao left it as it is" if type(module.weight.data) is Tensor else ""
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = f"torchao refused: {one_line(error)}"
    if reason:
        module.weight = weight
    return reason


def obstacle(
    module: nn.Module, backend: str, *, device: str | None = None, capability: tuple[int, int] | None = None
) -> str:
    """The reason why a layer's weight cannot be a semi-structured tensor of a backend; "" if it can.

    ``device`` and ``capability`` override those of the weight's device, to ask about another machine.
    """
    if parametrize.is_parametrized(module, "weight"):
        return "its weight is parametrized; squash the model first"
    if not isinstance(module, nn.Linear):
        return f"{type(module).__name__} does not multiply by its weight as nn.Linear does"
    weight = module.weight
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    if weight.dtype == torch.float32:
        return "fp32 is 1:2 sparse in hardware, not 2:4; convert the model to bf16 or fp16 first"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"{backend} multiplies fp16 and bf16 here, its weight is {str(weight.dtype).removeprefix('torch.')}"
    rows, columns = _multiples(backend, weight.dtype)
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"{backend} takes multiples of {rows} x {columns}, its weight is {weight.shape[0]} x {weight.shape[1]}"
    count = violations(weight, NM(2, 4), dim=1)
    if count:
        return f"it is not 2:4: {count:,} of {weight.numel() // 4:,} groups have more than two nonzeros"
    kind = device or weight.device.type
    if kind != "cuda":
        return f"its weight is on {kind}, and sparse units are on NVIDIA GPUs"
    major, minor = capability or torch.cuda.get_device_capability(weight.device)
    needed = (9, 0) if backend == _TORCHAO else (8, 0)
    if (major, minor) < needed:
        units = "sparse units for float8" if backend == _TORCHAO else "sparse units"
        return f"the GPU has compute capability {major}.{minor}, {units} come with {needed[0]}.{needed[1]}"
    return ""


def _multiples(backend: str, dtype: torch.dtype) -> tuple[int, int]:
    """What the rows and columns of a weight are multiples of."""
    if backend == _TORCHAO:
        return _TORCHAO_MULTIPLE, _TORCHAO_MULTIPLE
    limits = _SUBCLASSES[backend]._DTYPE_SHAPE_CONSTRAINTS[dtype]
    return limits.sparse_min_rows, limits.sparse_min_cols


def _choose_backend(backend: str) -> tuple[str, Callable[[nn.Module], str]]:
    """The backend and its conversion of one layer, which returns the reason if it fails."""
    if backend not in ("auto", *_SUBCLASSES, _TORCHAO):
        choices = ", ".join(("auto", *_SUBCLASSES, _TORCHAO))
        raise ValueError(f"to_semi_structured: backend must be one of {choices}, got {backend!r}")
    if backend == _TORCHAO:
        quantize, config = _torchao()
        return backend, lambda module: _convert_by_torchao(module, quantize, config)
    available = torch.backends.cusparselt.is_available()
    if backend == "cusparselt" and not available:
        raise ValueError("to_semi_structured: this torch was built without cuSPARSELt; take backend='cutlass'")
    name = ("cusparselt" if available else "cutlass") if backend == "auto" else backend
    return name, lambda module: _convert_by_torch(module, name)


def _torchao() -> tuple[Callable[..., Any], Any]:
    """torchao's function that quantises a model, and its settings for float8 weights in the 2:4 format."""
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
        from torchao.quantization.quantize_.workflows import Float8PackingFormat

        packing = Float8PackingFormat.SPARSE_2D_DATA_2D_METADATA
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"to_semi_structured: backend='{_TORCHAO}' takes torchao with 2:4 float8 tensors, as in 0.18 "
            f"(pip install 'torchao>=0.18'): {one_line(error)}"
        ) from None
    return quantize_, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), packing_format=packing)
