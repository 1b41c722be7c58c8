"""Models, data, and hashes of tensors that several benchmarks use."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from common import required
from torch import Tensor

HIDDEN, MLP, LAYERS, VOCABULARY = 512, 1376, 8, 32000
# the linear layers of a LLaMA's block
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama_60m_parameters(dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    """LLaMA-60M's 75 parameters of random values, with random gradients: the hidden matrices, and the others."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS}
    return llama_parameters(sizes, dtype, device)


def llama_parameters(
    sizes: Mapping[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu"
) -> tuple[list[Tensor], list[Tensor]]:
    """A LLaMA's parameters of random values, with random gradients: the hidden matrices, and the others.

    ``sizes``: as in the ``model.config`` of a recipe. Numbers are drawn on the device.
    """
    hidden_size, mlp = sizes["hidden_size"], sizes["intermediate_size"]
    matrices = [(hidden_size, hidden_size)] * 4 + [(mlp, hidden_size)] * 2 + [(hidden_size, mlp)]
    layers: list[tuple[int, ...]] = [*matrices, (hidden_size,), (hidden_size,)] * sizes["num_hidden_layers"]
    table = (sizes["vocab_size"], hidden_size)
    generator = torch.Generator(device).manual_seed(0)
    hidden, others = [], []
    for shape in [table, *layers, (hidden_size,), table]:
        values, grad = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
        param = torch.nn.Parameter(values.mul_(0.02).to(dtype))
        param.grad = grad.to(dtype)
        (hidden if shape in matrices else others).append(param)
    return hidden, others


def random_llama(hidden: int, mlp: int, layers: int, length: int, **settings: Any) -> Any:
    """A causal LLaMA of transformers with random weights from seed 0 and a vocabulary of 512."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"vocab_size": 512, "num_attention_heads": 4, "use_cache": False} | settings
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
                    max_position_embeddings=length, **settings)
    )  # fmt: skip


def adapted_llamas(base: torch.nn.Module, rank: int, **settings: Any) -> dict[str, torch.nn.Module]:
    """Copies of a LLaMA: frozen, with adapters on all linear layers by peft and by leanstep, and peft's accelerated."""
    from leanstep.lora import LoraConfig, accelerate_peft, apply_lora

    peft = required("peft")
    settings = {"r": rank, "target_modules": LINEARS, **settings}
    models = {"frozen": copy.deepcopy(base).requires_grad_(False)}
    theirs, fast = (peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings)) for _ in range(2))
    accelerate_peft(fast)
    models["PEFT"] = theirs
    for name, fused in (("leanstep", True), ("leanstep, blocks not fused", False)):
        models[name] = apply_lora(copy.deepcopy(base), LoraConfig(**settings, fused_blocks=fused))
    return models | {"PEFT, accelerated": fast}


def digit_images(seed: int) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 images of digits, (1797, 1, 8, 8) with entries from 0 to 16, and labels, shuffled."""
    data = required("sklearn.datasets").load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    return torch.from_numpy(data.images).float().unsqueeze(1)[order], torch.from_numpy(data.target).long()[order]


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 over dtype, shape and bytes of the tensors, in order."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:24]


def tensors_of(value: object) -> Iterator[torch.Tensor]:
    """All tensors of nested dicts and lists, dict keys in sorted order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value, key=lambda k: (isinstance(k, str), k)):
            yield from tensors_of(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
