"""Prune a model to 60 %, then recover with LoRA: the merged model has the zeros of the pruned one."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from leanstep.lora import LoraConfig, apply_lora, keep_zeros, merge, remove_lora
from leanstep.optimizers import create
from leanstep.pruning import prune

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
tokens = (torch.arange(64)[:, None] * 7 + torch.arange(16) ** 2) % 64


def train(optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def loss() -> float:
    return model(input_ids=tokens, labels=tokens).loss.item()


train(create(model, "sinkgd", lr=2e-2), 200)
dense = loss()
result = prune(model, tokens, sparsity=0.6, curves="fisher")
print(*(f"{layer['sparsity']:.2f}  {layer['name']}" for layer in result.layers()), sep="\n")
zeros = {name: weight == 0 for name, weight in model.named_parameters() if weight.ndim == 2}  # to compare with later
pruned = loss()
apply_lora(model, LoraConfig(r=8, target_modules="all-linear"))
keep_zeros(model)
train(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), 20)
merge(model)
remove_lora(model)
recovered = loss()
print(f"loss: dense {dense:.3f}, pruned {pruned:.3f}, recovered {recovered:.3f}")
