"""Peak memory of pruning a checkpoint, in bytes per byte of its weights.

    python benchmarks/prune_memory.py

A LLaMA of random weights, wide and with few blocks, is saved in one file (``--shards N``: in several) and pruned by
:func:`leanstep.pruning.prune_checkpoint`, in a process of its own for each row. Counted is the largest resident size of
that process, less what it was before the model was opened and after a small model was pruned, by which everything is
imported. The data is random tokens: how well the model is pruned is not looked at.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROWS = "uniform:wanda,lamp:magnitude,owl:wanda,global:wanda,uniform:sparsegpt,dp:wanda"


def main():
    """Print the table, or in a process of its own, one number."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rows", metavar="ALLOCATION:SCORE,...", default=ROWS)
    parser.add_argument("--make", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=3, metavar=("FOLDER", "ALLOCATION", "SCORE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        print(json.dumps(make(args, args.make)))
    elif args.one:
        print(json.dumps(peak(*args.one)))
    else:
        table(args)


def table(args):
    """Make the models and prune them. This process imports nothing: its size would be counted as its children's."""
    with tempfile.TemporaryDirectory() as folder:
        made = ["--hidden", args.hidden, "--layers", args.layers, "--shards", args.shards, "--dtype", args.dtype]
        size, pruned, block = child(*made, "--make", folder)
        print(
            f"{args.dtype}, {size / 1e6:.0f} MB of weights, {pruned / 1e6:.0f} MB of them pruned, {block / 1e6:.0f} MB "
            f"a block, {args.shards} file(s)\n"
        )
        print("| allocation | score | peak, MB | per byte of weights |\n| --- | --- | ---: | ---: |")
        for row in args.rows.split(","):
            allocation, score = row.split(":")
            found = child("--one", folder, allocation, score)
            print(f"| {allocation} | {score} | {found / 1e6:.0f} | {found / size:.2f} |", flush=True)


def child(*arguments):
    """What this program prints in a new process."""
    command = [sys.executable, "-P", __file__, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def make(args, folder):
    """Save the models; bytes of the large one's weights, of those that are pruned, and of one block."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from leanstep.pruning import find_targets

    def save(name, hidden, layers, shards):
        config = LlamaConfig(
            vocab_size=1000, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
            num_attention_heads=8, max_position_embeddings=64,
        )  # fmt: skip
        model = LlamaForCausalLM(config).to(getattr(torch, args.dtype))
        size = sum(parameter.nbytes for parameter in model.parameters())
        model.save_pretrained(folder / name, max_shard_size=size // shards + 10**6)
        return size, sum(target.weight.nbytes for target in find_targets(model))

    save("small", 64, 1, 1)
    size, pruned = save("model", args.hidden, args.layers, args.shards)
    return size, pruned, pruned // args.layers


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

    data = torch.randint(1000, (8, 32), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(dir=folder) as out:
        prune_checkpoint(
            folder / name, Path(out) / "out", data[2:], held_out=data[:2], curve_data=data[2:4], sparsity=0.5,
            allocation=allocation, score=score, levels=(0.5, 0.7) if allocation == "dp" else None,
        )  # fmt: skip


if __name__ == "__main__":
    main()
