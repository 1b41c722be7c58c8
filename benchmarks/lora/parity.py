"""Losses of adapters in training beside PEFT's, step by step, in one process and under DDP.

    python benchmarks lora/parity

A small LLaMA in fp32 reads the bytes of Python's language reference. PEFT makes the adapter; PEFT, leanstep with the
same adapter, PEFT accelerated by leanstep, and PEFT with the rows of every batch reversed train it with the same
batches and the same AdamW. The last differs from the first by rounding alone: what training makes of that is the
scale for the others. Under DDP every process has a part of each batch, and losses are means over processes. AdamW's
eps is 1e-6: the usual 1e-8 makes steps of the rate's size out of the rounding of gradients that are nearly zero, in
either library. Needs peft, of the extra ``bench``.
"""

import copy
import os
import pydoc_data.topics
import socket
import tempfile
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing
from common import command_line, print_table, required
from models import LINEARS, random_llama
from torch.nn.parallel import DistributedDataParallel

from leanstep.lora import accelerate_peft, load_adapter

RANK = 8
VARIANTS = {"plain": {}, "rslora": {"use_rslora": True}, "DoRA": {"use_dora": True}}
# rslora's scale is sqrt(r) times the usual one, which a rate as much smaller makes up for
RATES = {"rslora": RANK**-0.5}
PARSER = command_line(
    __doc__, steps=200, processes=[1, 2], batch=8, length=64,
    lr=(3e-3, "over sqrt(r) for rslora, unless --one-rate"),
    one_rate=(False, "rslora at the rate of the others, which is too high"),
)  # fmt: skip
PARSER.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)


def main():
    """Print the table."""
    options = PARSER.parse_args()
    print(f"peft {required('peft').__version__}, torch {torch.__version__}, {vars(options)}\n")

    def rows():
        for variant in options.variants:
            for size in options.processes:
                expected, *others = together(options, variant, size)
                gaps = [(losses - expected).abs().max().item() for losses in others]
                yield variant, size, f"{expected[0]:.4f}, {expected[-1]:.4f}", *(f"{gap:.1e}" for gap in gaps)

    models = ["leanstep", "PEFT, accelerated", "PEFT, rows reversed"]
    print_table(["adapter", "processes", "PEFT's loss, first and last", *models], rows(), left=(0, 2))


def together(options, variant, size):
    """Losses [4, steps] of the runs, from so many processes."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
        probe.close()
        torch.multiprocessing.spawn(work, (size, folder, options, variant), nprocs=size)
        return torch.load(f"{folder}/losses.pt")


def work(rank, size, folder, options, variant):
    """One process: train one model after another; the first process writes the losses."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    options.lr *= 1.0 if options.one_rate else RATES.get(variant, 1.0)
    text = torch.tensor(list("".join(pydoc_data.topics.topics.values()).encode()[: 2**18]))
    peft = required("peft")
    theirs = peft.get_peft_model(llama(options), peft.LoraConfig(r=RANK, target_modules=LINEARS, **VARIANTS[variant]))
    theirs.save_pretrained(f"{folder}/{rank}")
    ours, fast = load_adapter(llama(options), f"{folder}/{rank}"), copy.deepcopy(theirs)
    accelerate_peft(fast)
    again = copy.deepcopy(theirs)
    losses = [train(options, model, text, rank, size) for model in (theirs, ours, fast)]
    losses.append(train(options, again, text, rank, size, backwards=True))
    if rank == 0:
        torch.save(torch.stack(losses), f"{folder}/losses.pt")
    dist.destroy_process_group()


def llama(options):
    """The base, and the generator that PEFT's factors come from, the same in every process."""
    return random_llama(64, 176, 2, options.length, vocab_size=256, num_key_value_heads=2)


def train(options, model, text, rank, size, backwards=False):
    """The losses of a run, means over processes."""
    model.train()
    parallel = DistributedDataParallel(model) if size > 1 else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr, eps=1e-6)
    generator = torch.Generator().manual_seed(1)
    losses = torch.empty(options.steps, dtype=torch.float64)
    for step in range(options.steps):
        starts = torch.randint(len(text) - options.length, (options.batch,), generator=generator)
        ids = torch.stack([text[start : start + options.length] for start in starts])[rank::size]
        ids = ids.flip(0) if backwards else ids
        loss = parallel(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[step] = loss.detach()
    dist.all_reduce(losses)
    return losses / size
