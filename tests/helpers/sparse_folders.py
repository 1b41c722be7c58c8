"""Checkpoint folders whose weights have zeros, for the tests of sparse files."""

import json

import torch
from safetensors.torch import load_file

from leanstep.sparsity import nm_mask


def drop(weight, sparsity, generator):
    """A copy with zeros at random places, about ``sparsity`` of them."""
    keep = torch.rand(weight.shape, generator=generator) >= sparsity
    return torch.where(keep, weight, torch.zeros_like(weight))


def save_sparse(folder, model, sparsity=0.7, dtype=torch.bfloat16, shard="10GB", pattern=None):
    """Save a model with random zeros, or those of a pattern, in every matrix; returns the folder."""
    generator = torch.Generator().manual_seed(0)
    model = model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and pattern is not None:
                parameter.copy_(parameter * nm_mask(parameter, pattern) + 0.0)
            elif parameter.dim() > 1:
                parameter.copy_(drop(parameter, sparsity, generator))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def tensors(folder):
    """Every tensor of a folder's files by name, as dtype, shape and bytes."""
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def config(folder):
    return json.loads((folder / "config.json").read_text())
