"""Peak memory of pruning a checkpoint, in bytes per byte of its weights.

    python benchmarks pruning/memory

A LLaMA of random weights, wide and with few blocks, is saved in one file (``--shards N``: in several) and pruned by
:func:`leanstep.pruning.prune_checkpoint`, in a process of its own for each row. Counted is the largest resident size of
that process, less what it was before the model was opened and after a small model was pruned, by which everything is
imported. ``dp-block`` is ``dp`` with one level for a block. The data is random tokens: how well the model is pruned is
not looked at.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from common import command_line, print_table

ROWS = "uniform:wanda,lamp:magnitude,owl:wanda,global:wanda,uniform:sparsegpt,dp:wanda,dp-block:wanda"
PARSER = command_line(__doc__, hidden=1024, layers=4, shards=1, rows=(ROWS, "ALLOCATION:SCORE,..."))
PARSER.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
PARSER.add_argument("--make", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
PARSER.add_argument("--one", nargs=3, metavar=("FOLDER", "ALLOCATION", "SCORE"), help=argparse.SUPPRESS)


def main():
    """Print the table, or in a process of its own, one number."""
    options = PARSER.parse_args()
    if options.make:
        print(json.dumps(make(options, options.make)))
    elif options.one:
        print(json.dumps(peak(*options.one)))
    else:
        table(options)


def table(options):
    """Make the models and prune them. This process imports nothing: its size would be counted as its children's."""
    with tempfile.TemporaryDirectory() as folder:
        size, pruned, block = child(*sys.argv[1:], "--make", folder)
        weights = f"{options.dtype}, {size / 1e6:.0f} MB of weights, {pruned / 1e6:.0f} MB of them pruned"
        print(f"{weights}, {block / 1e6:.0f} MB a block, {options.shards} file(s)\n")

        def rows():
            for allocation, score in (row.split(":") for row in options.rows.split(",")):
                grown = child("--one", folder, allocation, score)
                yield allocation, score, f"{grown / 1e6:.0f}", f"{grown / size:.2f}"

        print_table(["allocation", "score", "peak, MB", "per byte of weights"], rows(), left=(0, 1))


def child(*arguments):
    """What this program prints in a new process."""
    command = [sys.executable, str(Path(__file__).parents[1]), "pruning/memory", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def make(options, folder):
    """Save the models; bytes of the large one's weights, of those that are pruned, and of one block."""
    import torch
    from models import random_llama

    from leanstep.pruning import find_targets

    def save(name, hidden, layers, shards):
        model = random_llama(hidden, hidden * 11 // 4, layers, 64, vocab_size=1000, num_attention_heads=8).to(
            getattr(torch, options.dtype)
        )
        size = sum(parameter.nbytes for parameter in model.parameters())
        model.save_pretrained(folder / name, max_shard_size=size // shards + 10**6)
        return size, sum(target.weight.nbytes for target in find_targets(model))

    save("small", 64, 1, 1)
    size, pruned = save("model", options.hidden, options.layers, options.shards)
    return size, pruned, pruned // options.layers


def peak(folder, allocation, score):
    """Bytes that the process grew by."""
    run(Path(folder), "small", allocation, score)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(Path(folder), "model", allocation, score)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)


def run(folder, name, allocation, score):
    """Prune one of the models, and throw the result away."""
    import torch

    from leanstep.pruning import prune_checkpoint

    allocation, _, granularity = allocation.partition("-")
    data = torch.randint(1000, (8, 32), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(dir=folder) as out:
        prune_checkpoint(
            folder / name, Path(out) / "out", data[2:], held_out=data[:2], curve_data=data[2:4], sparsity=0.5,
            allocation=allocation, score=score, levels=(0.5, 0.7) if allocation == "dp" else None,
            granularity=granularity or "matrix",
        )  # fmt: skip
