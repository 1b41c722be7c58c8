"""Losses of adapters in training beside PEFT's, step by step, in one process and under DDP.

    python benchmarks/lora_parity.py

A small LLaMA in fp32 reads the bytes of Python's language reference. PEFT makes the adapter; PEFT, leanstep with the
same adapter, PEFT accelerated by leanstep, and PEFT with the rows of every batch reversed train it with the same
batches and the same AdamW. The last differs from the first by rounding alone: what training makes of that is the
scale for the others. Under DDP every process has a part of each batch, and losses are means over processes. AdamW's
eps is 1e-6: the usual 1e-8 makes steps of the rate's size out of the rounding of gradients that are nearly zero, in
either library. Needs peft, of the extra ``bench``.
"""

import argparse
import copy
import os
import pydoc_data.topics
import socket
import sys
import tempfile
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing
import transformers
from bench_extra import needed
from torch.nn.parallel import DistributedDataParallel

from leanstep.lora import accelerate_peft, load_adapter

peft = needed("peft")

RANK = 8
VARIANTS = {"plain": {}, "rslora": {"use_rslora": True}, "DoRA": {"use_dora": True}}
# rslora's scale is sqrt(r) times the usual one, which a rate as much smaller makes up for
RATES = {"rslora": RANK**-0.5}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
AIM = 1e-5


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3, help="over sqrt(r) for rslora, unless --one-rate")
    parser.add_argument("--one-rate", action="store_true", help="rslora at the rate of the others, which is too high")
    parser.add_argument("--double", action="store_true", help="in fp64, where rounding has no time to grow")
    parser.add_argument(
        "--check", action="store_true", help=f"exit with 1 where losses differ by more than {AIM:g}, or rounding"
    )
    args = parser.parse_args()
    print(f"peft {peft.__version__}, torch {torch.__version__}, {vars(args)}\n")
    print("| adapter | processes | PEFT's loss, first and last | leanstep | PEFT, accelerated | PEFT, rows reversed |")
    print("| --- | ---: | --- | ---: | ---: | ---: |")
    missed = False
    for variant in args.variants:
        for size in args.processes:
            wanted, *others = together(args, variant, size)
            gaps = [(found - wanted).abs().max().item() for found in others]
            missed |= not max(gaps[:2]) <= max(AIM, 4 * gaps[2])
            cells = " | ".join(f"{gap:.1e}" for gap in gaps)
            print(f"| {variant} | {size} | {wanted[0]:.4f}, {wanted[-1]:.4f} | {cells} |", flush=True)
    sys.exit(args.check and missed)


def together(args, variant, size):
    """Losses [4, steps] of the runs, from so many processes."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
        probe.close()
        torch.multiprocessing.spawn(work, (size, folder, args, variant), nprocs=size)
        return torch.load(f"{folder}/losses.pt")


def work(rank, size, folder, args, variant):
    """One process: train one model after another; the first process writes the losses."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    args.lr *= 1.0 if args.one_rate else RATES.get(variant, 1.0)
    text = torch.tensor(list("".join(pydoc_data.topics.topics.values()).encode()[: 2**18]))
    theirs = peft.get_peft_model(llama(args), peft.LoraConfig(r=RANK, target_modules=TARGETS, **VARIANTS[variant]))
    own = f"{folder}/{rank}"
    theirs.save_pretrained(own)
    ours, fast = load_adapter(llama(args), own), copy.deepcopy(theirs)
    accelerate_peft(fast)
    again = copy.deepcopy(theirs)
    found = [train(args, model, text, rank, size) for model in (theirs, ours, fast)]
    found.append(train(args, again, text, rank, size, backwards=True))
    if rank == 0:
        torch.save(torch.stack(found), f"{folder}/losses.pt")
    dist.destroy_process_group()


def llama(args):
    """The base, and the generator that PEFT's factors come from, the same in every process."""
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, max_position_embeddings=args.length, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(torch.float64 if args.double else torch.float32)


def train(args, model, text, rank, size, backwards=False):
    """The losses of a run, means over processes."""
    model.train()
    parallel = DistributedDataParallel(model) if size > 1 else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, eps=1e-6)
    generator = torch.Generator().manual_seed(1)
    losses = torch.empty(args.steps, dtype=torch.float64)
    for step in range(args.steps):
        starts = torch.randint(len(text) - args.length, (args.batch,), generator=generator)
        ids = torch.stack([text[start : start + args.length] for start in starts])[rank::size]
        ids = ids.flip(0) if backwards else ids
        loss = parallel(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[step] = loss.detach()
    dist.all_reduce(losses)
    return losses / size


if __name__ == "__main__":
    main()
