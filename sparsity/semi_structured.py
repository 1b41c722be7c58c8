"""Converts 2:4 sparse linear layers to torch's semi-structured tensors, and gives the reason for every other layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from leanstep._torch import is_conv1d
from leanstep.sparsity.masks import violations
from leanstep.sparsity.patterns import NM

_SUBCLASSES = {
    "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
    "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
}


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
        backend: "cusparselt", "cutlass", or "auto" for the first one available.

    Returns:
        One :class:`Conversion` for each linear layer and convolution, in the model's order.

    Raises:
        ValueError: for another backend, or one that this installation of torch lacks.

    Notes:
        Products of one or a few tokens can be slower than dense ones (pytorch/pytorch issue 111339): measure first.
        Skips fp32 weights, for which hardware supports 1:2, not 2:4.
    """
    backend = _choose_backend(backend)
    results = []
    for name, module in model.named_modules():
        if not (isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or is_conv1d(module)):
            continue
        reason = obstacle(module, backend)
        if not reason:
            with torch.no_grad():
                sparse = _SUBCLASSES[backend].from_dense(module.weight.detach().contiguous())
            module.weight = nn.Parameter(sparse, requires_grad=False)
        results.append(Conversion(name, reason))
    return results


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
    limits = _SUBCLASSES[backend]._DTYPE_SHAPE_CONSTRAINTS
    if weight.dtype == torch.float32:
        return "fp32 is 1:2 sparse in hardware, not 2:4; convert the model to bf16 or fp16 first"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"{backend} multiplies fp16 and bf16 here, its weight is {str(weight.dtype).removeprefix('torch.')}"
    rows, columns = limits[weight.dtype].sparse_min_rows, limits[weight.dtype].sparse_min_cols
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"{backend} takes multiples of {rows} x {columns}, its weight is {weight.shape[0]} x {weight.shape[1]}"
    count = violations(weight, NM(2, 4), dim=1)
    if count:
        return f"it is not 2:4: {count:,} of {weight.numel() // 4:,} groups have more than two nonzeros"
    kind = device or weight.device.type
    if kind != "cuda":
        return f"its weight is on {kind}, and sparse units are on NVIDIA GPUs"
    major, minor = capability or torch.cuda.get_device_capability(weight.device)
    if (major, minor) < (8, 0):
        return f"the GPU has compute capability {major}.{minor}, sparse units come with 8.0"
    return ""


def _choose_backend(backend: str) -> str:
    if backend not in ("auto", *_SUBCLASSES):
        raise ValueError(f"to_semi_structured: backend must be one of auto, {', '.join(_SUBCLASSES)}, got {backend!r}")
    available = torch.backends.cusparselt.is_available()
    if backend == "cusparselt" and not available:
        raise ValueError("to_semi_structured: this torch was built without cuSPARSELt; take backend='cutlass'")
    return ("cusparselt" if available else "cutlass") if backend == "auto" else backend
