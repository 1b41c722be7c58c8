"""Peak memory of gradients: summed before the step, freed inside the backward pass, and accumulated in the momentum.

    python benchmarks optimizers/release_memory [--hidden 512] [--layers 8] [--passes 2]

Training steps of a LLaMA in fp32 on few tokens, by SinkGD with momentum on every matrix, each way in a process of its
own. Counted is the largest resident size during the third step, beyond what the process has after the second one:
weights and state. Needs Linux, which can set the largest resident size back.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from common import command_line, print_table

PARSER = command_line(__doc__, hidden=512, layers=8, passes=(2, "backward passes of an accumulated step"), tokens=16)
PARSER.add_argument("--one", nargs=2, metavar=("WAY", "PASSES"), help=argparse.SUPPRESS)
WAYS = ("step", "release_gradients")


def main():
    """Print the table, or in a process of its own, one row."""
    options = PARSER.parse_args()
    if options.one:
        way, passes = options.one
        print(json.dumps(measure(options, way, int(passes))))
        return
    rows = ((way, passes, *child(way, passes)) for passes in (1, options.passes) for way in WAYS)
    print_table(
        ["gradients", "passes", "weights, MB", "state, MB", "peak beyond both, MB", "per byte of weights"], rows
    )


def child(way, passes):
    """Cells of a row, measured in a new process."""
    command = [sys.executable, str(Path(__file__).parents[1]), "optimizers/release_memory", *sys.argv[1:]]
    # freed tensors leave the resident size at once
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(
        [*command, "--one", way, str(passes)], check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout
    weights, state, peak = json.loads(output)
    return f"{weights / 1e6:.1f}", f"{state / 1e6:.1f}", f"{peak / 1e6:.1f}", f"{peak / weights:.2f}"


def measure(options, way, passes):
    """Bytes of weights and of state, and those that the third step takes beyond them at its peak."""
    import torch
    from models import random_llama

    from leanstep.optimizers import SinkGD, release_gradients

    torch.manual_seed(0)
    mlp = options.hidden * 11 // 4
    model = random_llama(options.hidden, mlp, options.layers, 64, vocab_size=2000, num_attention_heads=8)
    for param in model.parameters():
        param.requires_grad_(param.dim() == 2)
    matrices = [param for param in model.parameters() if param.dim() == 2]
    optimizer = SinkGD(matrices, lr=1e-3, momentum=0.9, algorithm="sinkgd")
    release = release_gradients(model, optimizer) if way == "release_gradients" else None
    tokens = torch.randint(2000, (1, options.tokens))

    def step():
        for number in range(passes):
            last = number == passes - 1
            with contextlib.nullcontext() if last or release is None else release.accumulate():
                (model(tokens, labels=tokens).loss / passes).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step()
    return sum(param.nbytes for param in model.parameters()), optimizer.state_bytes(), resident("VmHWM") - before


def resident(name):
    """The resident size of this process, or the largest one."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024
