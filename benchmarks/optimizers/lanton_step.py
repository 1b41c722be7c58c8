"""Step time of LANTON beside torch.optim.Muon on the hidden matrices of LLaMA-60M, one process, interleaved.

    python benchmarks optimizers/lanton_step [--device cuda] [--dtype float32 bfloat16] [--threads 2] [--rounds 10]

"every fifth" is the mean over five steps, of which one estimates the noise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import command_line, interleaved_medians, print_table, start
from models import llama_60m_parameters

from leanstep.optimizers import LANTON

PARSER = command_line(__doc__, device="cpu", dtype=["float32", "bfloat16"], threads=0, rounds=10)


def candidates(params: list[torch.Tensor]) -> dict[str, Callable[[], object]]:
    """name -> one step, or five where the name says so."""
    options = {"lr": 1e-6, "norm": "rms", "scaling": "muon"}
    fifth = LANTON(params, noise_every=5, **options)
    return {
        "torch Muon": torch.optim.Muon(params, lr=1e-6).step,
        "LANTON": LANTON(params, **options).step,
        "LANTON, noise every fifth step": lambda: [fifth.step() for _ in range(5)],
        "LANTON, noise_adaptive=False": LANTON(params, noise_adaptive=False, **options).step,
        'LANTON, nuclear="frobenius"': LANTON(params, nuclear="frobenius", **options).step,
    }


def measure(dtype: str, rounds: int, device: str) -> None:
    """Print one table."""
    params, _ = llama_60m_parameters(getattr(torch, dtype), device)
    medians = interleaved_medians(candidates(params), rounds, warmup=2)
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
