"""Time of fp32 products by torch.mm over those that adapters take on this processor.

    python benchmarks lora/dense_product [--threads 2] [--rounds 15]

Interleaved, medians; 1 where both are torch.mm (``leanstep info`` says which library runs, and why).
"""

from collections.abc import Iterator

import torch
from common import command_line, interleaved_medians, print_table, start

from leanstep.kernels import product

PARSER = command_line(__doc__, threads=0, rounds=15)
SHAPES = ((1, 512, 512), (8, 512, 512), (64, 512, 512), (1024, 512, 512), (1024, 512, 1376), (1024, 512, 16))


def measure(rounds: int) -> Iterator[list[str]]:
    """One row per shape."""
    for rows, inner, columns in SHAPES:
        x, w = torch.randn(rows, inner), torch.randn(columns, inner)
        runs = {"mm": lambda x=x, w=w: torch.mm(x, w.t()), "ours": lambda x=x, w=w: product(x, w.t())}
        seconds = interleaved_medians(runs, rounds)
        speeds = [f"{2e-9 * rows * inner * columns / value:.0f}" for value in seconds.values()]
        yield [f"{rows} x {inner} x {columns}", *speeds, f"{seconds['mm'] / seconds['ours']:.2f}"]


def main() -> None:
    """Measure, and print the table."""
    options = start(PARSER)
    head = ["rows x inner x columns", "torch.mm GFLOP/s", "ours GFLOP/s", "torch.mm ÷ ours"]
    print()
    print_table(head, measure(options.rounds))
