"""Step times of optimizers on the parameter list of LLaMA-60M, side by side in one process.

    python benchmarks optimizers/step [--device cuda] [--dtype float32 bfloat16] [--threads 2] [--rounds 15] [--slow]
    python benchmarks optimizers/step --small 300 --dtype float32 --threads 1 --rounds 101

All optimizers step the same parameters with the same gradients, one step each per round, in shuffled order; medians
over the rounds. "bytes" is what the rule must read and write, divided by the bandwidth of a copy measured in the same
rounds: 1.0 is the floor that the copy sets. ``--small N`` takes N matrices of 16 x 16, whose steps are the time of the
host. Peers are measured when they are installed (extra ``bench``; bitsandbytes
and dion besides), and named when they are not. ``--slow`` adds those that take over half a second a step. The first
step of each optimizer, which may compile, is reported apart.
"""

from __future__ import annotations

import warnings
from functools import partial

import torch
from common import command_line, interleaved_medians, print_table, start, timed
from models import llama_60m_parameters
from optimizer_steps import Step, candidates, missing_peers

PARSER = command_line(
    __doc__, device="cpu", dtype=["float32", "bfloat16"], threads=0, rounds=15,
    small=(0, "N matrices of 16 x 16 in place of LLaMA-60M"),
    slow=(False, "also optimizers that take over half a second a step"),
)  # fmt: skip


def measure(dtype: str, rounds: int, slow: bool, device: str, small: int) -> None:
    """Print one table."""
    if small:
        random = partial(torch.randn, 16, 16, dtype=getattr(torch, dtype), device=device)
        hidden, others = [torch.nn.Parameter(random()) for _ in range(small)], []
        for param in hidden:
            param.grad = random()
    else:
        hidden, others = llama_60m_parameters(getattr(torch, dtype), device)
    source = [param.detach().clone() for param in hidden + others]
    target = [torch.zeros_like(tensor) for tensor in source]
    made = candidates(hidden, others, slow, small)
    runs: dict[str, Step] = {name: make() for name, (make, _) in made.items()}
    first = {name: timed(step)[0] for name, step in runs.items()}
    runs["copy"] = lambda: [a.copy_(b) for a, b in zip(target, source, strict=True)]
    medians = interleaved_medians(runs, rounds, warmup=3 * bool(small))
    copy, base = medians.pop("copy"), medians["torch AdamW fused"]
    moved = 2 * sum(tensor.nbytes for tensor in source)
    print(f"\ncopy of the parameters: {copy * 1e3:.1f} ms, {moved / copy / 1e9:.1f} GB/s\n")
    rows = []
    for name, seconds in sorted(medians.items(), key=lambda item: item[1]):
        streams = made[name][1]
        floor = f"{seconds / (copy * streams / 2):.2f}" if streams else "—"
        rows.append([name, f"{seconds * 1e3:.2f}", f"{seconds / base:.2f}", floor, f"{first[name]:.1f}"])
    print_table([dtype, "median ms", "÷ AdamW fused", "x copy of its bytes", "first step s"], rows)


def main() -> None:
    """Measure, and print the table."""
    options = start(PARSER)
    warnings.simplefilter("ignore")
    for name in options.dtype:
        measure(name, options.rounds, options.slow, options.device, options.small)
    if missing_peers():
        print(f"\nnot installed, so not measured: {', '.join(missing_peers())}")
