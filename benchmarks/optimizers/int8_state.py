"""Steps with averages in 8 bits beside averages in the parameters' dtype, one process, interleaved.

    python benchmarks optimizers/int8_state [--device cuda] [--dtype bfloat16] [--threads 1] [--rounds 10] [--cpu-time]

SinkGD with momentum and LANTON with noise from successive gradients, on square matrices; medians.
"""

from __future__ import annotations

import torch
from common import Clock, clock_of, command_line, interleaved_medians, print_table, start

from leanstep.optimizers import LANTON, SinkGD

PARSER = command_line(
    __doc__, device="cpu", dtype=["float32", "bfloat16"], threads=0, rounds=10, size=1024, matrices=4,
    cpu_time=(False, "measure processor time"),
)  # fmt: skip
# name -> (class, settings, settings of the dtypes)
METHODS = {
    "SinkGD, momentum": (SinkGD, {"algorithm": "sinkgd", "momentum": 0.9, "nesterov": True}, ("momentum_dtype",)),
    "LANTON": (LANTON, {"norm": "rms"}, ("momentum_dtype", "noise_dtype")),
}


def measure(dtype: str, rounds: int, device: str, size: int, matrices: int, clock: Clock) -> None:
    """Print one table."""
    runs = {}
    for name, (cls, settings, dtypes) in METHODS.items():
        for state in (None, torch.int8):
            params = [torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(matrices)]
            for param in params:
                param.grad = torch.randn_like(param)
            runs[name, state] = cls(params, lr=1e-6, **settings, **dict.fromkeys(dtypes, state)).step
    medians = interleaved_medians(runs, rounds, clock=clock, warmup=2)
    rows = [
        (name, *(f"{medians[name, state] * 1e3:.1f}" for state in (None, torch.int8)),
         f"{medians[name, torch.int8] / medians[name, None]:.2f}")
        for name in METHODS
    ]  # fmt: skip
    print()
    print_table([dtype, "median ms", "int8, median ms", "int8 ÷ dtype"], rows)


def main() -> None:
    """Measure, and print the table."""
    options = start(PARSER)
    for name in options.dtype:
        measure(name, options.rounds, options.device, options.size, options.matrices, clock_of(options))
