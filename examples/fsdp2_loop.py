"""A plain loop with FSDP2: torchrun --standalone --nproc-per-node 2 examples/fsdp2_loop.py, on GPUs or on CPUs."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from leanstep.optimizers import create

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if device == "cuda" else "gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh(device, (world_size,))
torch.manual_seed(0)  # the same weights everywhere
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).to(device)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = create(model, "sinkgd", lr=2e-2, say=print if rank == 0 else None)  # after fully_shard

losses = []
for step in range(20):
    starts = torch.arange(8) + 8 * (step * world_size + rank)  # other sequences in each process
    tokens = ((starts[:, None] + torch.arange(16)) % 64).to(device)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

model_state, optimizer_state = get_state_dict(model, optimizer)
dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id="runs/fsdp2")
if rank == 0:
    print(f"{world_size} processes, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
dist.destroy_process_group()
