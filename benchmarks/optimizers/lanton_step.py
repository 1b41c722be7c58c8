"""Step time of LANTON beside torch.optim.Muon on the hidden matrices of LLaMA-60M, one process, interleaved.

    python benchmarks optimizers/lanton_step [--device cuda] [--dtype float32 bfloat16] [--threads 2] [--rounds 10]

"every fifth" is the mean over five steps, of which one estimates the noise.
"""

from __future__ import annotations

import torch
from common import command_line, interleaved_medians, print_table, start
from models import llama_60m_parameters
from optimizer_steps import LANTON_OPTIONS, lanton

PARSER = command_line(__doc__, device="cpu", dtype=["float32", "bfloat16"], threads=0, rounds=10)


def measure(dtype: str, rounds: int, device: str) -> None:
    """Print one table."""
    params, _ = llama_60m_parameters(getattr(torch, dtype), device)
    runs = {"torch Muon": torch.optim.Muon(params, lr=1e-6).step} | {
        name: lanton(params, name) for name in LANTON_OPTIONS
    }
    medians = interleaved_medians(runs, rounds, warmup=2)
    medians = {name: value / (5 if "fifth" in name else 1) for name, value in medians.items()}
    rows = [
        (name, f"{value * 1e3:.0f}", f"{value / medians['torch Muon']:.2f}")
        for name, value in sorted(medians.items(), key=lambda item: item[1])
    ]
    print()
    print_table([dtype, "median ms", "÷ torch Muon"], rows)


def main() -> None:
    """Measure, and print the table."""
    options = start(PARSER)
    for name in options.dtype:
        measure(name, options.rounds, options.device)
