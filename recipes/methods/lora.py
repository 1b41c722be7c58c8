"""Low-rank adapters in a run: adapt the model, store the merged model and the adapter.

A saved model is the merged model, an ordinary Hugging Face folder, with ``adapter/`` in PEFT's format inside. A resumed
run loads the base from ``model.init_from`` and the adapter from the checkpoint.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leanstep._torch import output_head, weight_count
from leanstep.lora import LoraConfig, apply_lora, load_adapter
from leanstep.lora.apply import all_adapters
from leanstep.recipes.config.schema import RunConfig
from leanstep.recipes.methods.pruned import mask_adapters
from leanstep.recipes.training.checkpoint import CheckpointError

ADAPTER = "adapter"


def adapt(config: RunConfig, model: nn.Module) -> None:
    """Add the adapters of ``config.lora`` to the model. Raises ValueError for layers that cannot have one."""
    settings = asdict(config.lora)
    for name in ("attention", "attention_tolerance", "lr_ratio", "quantize_base"):
        del settings[name]
    if settings["target_modules"] == ["all-linear"]:
        settings["target_modules"] = "all-linear"
    if next(model.parameters()).is_meta:
        # `leanstep check` counts sizes; PiSSA would decompose the weights
        settings["init_lora_weights"] = True
    settings["modules_to_save"] = settings["modules_to_save"] or None
    settings["target_parameters"] = settings["target_parameters"] or None
    try:
        lora = LoraConfig(**settings, task_type="CAUSAL_LM", base_model_name_or_path=config.model.init_from)
        apply_lora(model, lora)
    except ValueError as error:
        raise ValueError(f"lora: {error}") from None
    mask_adapters(config, model)


def describe_adapters(model: nn.Module) -> str:
    """``14 layers, 98,304 of 1,164,800 parameters are trained``."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(map(weight_count, model.parameters()))
    return f"{len(all_adapters(model))} layers, {trained:,} of {total:,} parameters are trained"


def load_adapters(model: nn.Module, path: Path) -> None:
    """Load the adapter beside a merged model. Raises CheckpointError if it is missing or does not fit."""
    try:
        load_adapter(model, path / ADAPTER)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: the adapter cannot be loaded: {error}") from error


# --- a base of fewer bits ---------------------------------------------------------------------------------------------

# the package that stores a layer in each kind of `lora.quantize_base`
_PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao"}


def why_not_quantized(kind: str) -> str | None:
    """The reason why this machine cannot store a base in ``kind``; None if it can."""
    package = _PACKAGES[kind]
    return None if find_spec(package) else f"{kind} needs {package}, which is not installed: pip install {package}"


def quantize_base(model: nn.Module, kind: str, dtype: torch.dtype) -> None:
    """Store the linear layers of a model but its head in fewer bits, one after the other; the rest in ``dtype``.

    Products are in ``dtype``, which each layer's weight is dequantised to. Raises ValueError for a model without such
    layers.
    """
    quantize: Callable[[nn.Linear], nn.Module] = _to_nf4 if kind == "nf4" else _to_int8
    # by name: a reference to every layer would hold the dense weights of all
    for name in list(quantized_layers(model)):
        layer: Any = model.get_submodule(name)
        model.set_submodule(name, quantize(layer.to(dtype)))
    for parameter in model.parameters():
        if parameter.dtype.is_floating_point and type(parameter) is nn.Parameter:
            # a copy: the weights of a mapped file cannot be trained
            parameter.data = parameter.data.to(dtype, copy=True)


def quantized_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers by name that :func:`quantize_base` changes. Raises ValueError if there are none."""
    head = output_head(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if not layers:
        raise ValueError("lora.quantize_base: the model has no torch.nn.Linear besides its head; take null")
    return layers


def quantized_bytes(layer: nn.Linear, kind: str) -> int:
    """Bytes of a dense layer's weight in ``kind``, its scales and tables included."""
    weights = layer.weight.numel()
    if kind == "int8":
        return weights + layer.out_features * (layer.weight.itemsize + 1)  # a scale and a zero point for every output
    blocks = -(-weights // 64)
    # a byte for the scale of every block, a scale in fp32 for 256 of them, their mean and two tables of values
    return -(-weights // 2) + blocks + 4 * (-(-blocks // 256) + 1 + 16 + 256)


def _to_nf4(layer: nn.Linear) -> nn.Module:
    # it asks for a package of faster products in evaluation, which are not used
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    nn4: Any = import_module("bitsandbytes.nn")
    weight, bias = layer.weight, layer.bias
    form = {"compute_dtype": weight.dtype, "quant_type": "nf4", "device": "meta"}
    new = nn4.Linear4bit(layer.in_features, layer.out_features, bias is not None, **form)
    # bitsandbytes quantises where a weight moves to a device
    new.weight = nn4.Params4bit(weight.data, requires_grad=False, quant_type="nf4", module=new)
    new.bias = bias
    # else evaluation on a processor with AVX-512 BF16 rounds the scales to 16 bits, for all steps after it
    new.support_avx512bf16_for_cpu = False
    quantized: nn.Module = new.to(weight.device)
    return quantized


def _to_int8(layer: nn.Linear) -> nn.Module:
    torchao: Any = import_module("torchao.quantization")
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    return layer
