"""Products in 8-bit floating point, by torchao: ``fp8: tensorwise``, ``rowwise`` or ``rowwise_with_gw_hp``.

Weights, gradients and optimizer state stay as ``precision`` says; torchao casts both factors of each product.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from leanstep._torch import output_head
from leanstep.recipes.config.schema import RunConfig

# cuBLAS multiplies fp8 matrices whose sizes are multiples of it
MULTIPLE = 16


def why_no_fp8(cpu: bool) -> str | None:
    """The reason why this machine cannot multiply in fp8; None if it can."""
    if find_spec("torchao") is None:
        return "needs torchao, which is not installed: pip install torchao"
    device = "the CPU"
    if not cpu:
        index = torch.cuda.current_device() if torch.cuda.is_available() else None
        device = "this device" if index is None else torch.cuda.get_device_name(index)
        if index is not None and torch.version.hip is None and torch.cuda.get_device_capability(index) >= (8, 9):
            return None
        if index is not None and "gfx94" in getattr(torch.cuda.get_device_properties(index), "gcnArchName", ""):
            return None
    return f"needs a GPU that multiplies in fp8 (compute capability 8.9 or newer, or gfx94x), this run is on {device}"


def to_fp8(config: RunConfig, model: torch.nn.Module, *, emulate: bool = False) -> int:
    """Convert the linear layers of a model, except its output head; returns their number.

    Leaves out layers whose sizes are no multiples of 16. ``emulate`` rounds to fp8 and multiplies in the model's dtype,
    on any device.

    Raises:
        ValueError: if no layer is left.
    """
    torchao: Any = import_module("torchao.float8")
    linear: Any = import_module("torchao.float8.float8_linear").Float8Linear

    head = output_head(model)

    def fits(module: torch.nn.Module, name: str) -> bool:
        return module is not head and not any(size % MULTIPLE for size in module.weight.shape)  # type: ignore[union-attr]

    recipe = torchao.Float8LinearConfig.from_recipe_name(config.fp8)
    if emulate:
        object.__setattr__(recipe, "emulate", True)
    torchao.convert_to_float8_training(model, config=recipe, module_filter_fn=fits)
    count = sum(isinstance(module, linear) for module in model.modules())
    if not count:
        raise ValueError(
            f"fp8: no linear layer besides the head has sizes that are multiples of {MULTIPLE}; take fp8=null"
        )
    return count
