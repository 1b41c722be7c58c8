"""Train the MLPs of a model to 1:8, export values and packed indices, and load them into a fresh model."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from leanstep.optimizers import create
from leanstep.sparsity import export_compressed, load_compressed, sparsify, squash, verify

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
config = LlamaConfig(vocab_size=64, tie_word_embeddings=False, **sizes)
model = LlamaForCausalLM(config)
tokens = (torch.arange(64)[:, None] + torch.arange(16)) % 64

steps = 40
controller = sparsify(model, {"*.mlp.*": "1:8"}, schedule=steps, method="mdgf-exponential")
optimizer = create(model, "sinkgd", lr=2e-2)
controller.attach(optimizer)
losses = []
for _ in range(steps):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
squash(model)  # plain layers, exact zeros

Path("runs").mkdir(exist_ok=True)
export_compressed(model, "runs/sparse.safetensors")
loaded = LlamaForCausalLM(config)
load_compressed("runs/sparse.safetensors", loaded)
print(verify("runs/sparse.safetensors", {"*.mlp.*": "1:8"}))
