"""Products with a compressed N:M matrix beside the dense product: where they are faster, and where they are not.

    python benchmarks sparsity/matmul [--size 4096] [--threads 2] [--rounds 9] [--device cuda] [--tokens 1 8 64 512]
        [--dtype float32 bfloat16] [--patterns 2:4 1:8] [--cpu-time]

Each entry is the time of the dense product, by the faster of the two libraries that torch has for it on this processor
(``leanstep.kernels.product``), over that of ``nm_matmul``, and behind a slash over that of ``bitmask_linear``, medians
of interleaved runs in one process: above 1 the compressed matrix is faster. The last column is the dense matrix's bytes
over those of values and one-byte indices, which bounds a product of one token. On a machine that others use,
``--cpu-time`` counts this process's processor time instead of the clock's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from common import clock_of, command_line, interleaved_medians, print_table, start

from leanstep.kernels import bitmask_linear, bitmask_pack, nm_compress, nm_mask, nm_matmul, product
from leanstep.sparsity import NM

PATTERNS = ["2:4", "4:8", "1:4", "1:8", "1:16", "1:32", "1:64"]
PARSER = command_line(
    __doc__, size=4096, tokens=[1, 8, 64, 512], threads=0, rounds=9, patterns=PATTERNS, device="cpu",
    dtype=["float32", "bfloat16"], cpu_time=(False, "measure processor time"),
)  # fmt: skip


def measure(options: argparse.Namespace, dtype: torch.dtype) -> Iterator[list[str]]:
    """One row per pattern, one column per number of tokens."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int) -> torch.Tensor:
        return torch.randn(rows, options.size, generator=generator).to(options.device, dtype)

    dense = normal(options.size)
    inputs = [normal(tokens) for tokens in options.tokens]
    for pattern in map(NM.parse, options.patterns):
        weight = dense * nm_mask([dense], pattern.n, pattern.m)[0]
        compressed = nm_compress(weight, pattern.n, pattern.m)
        # a masked weight has negative zeros, which a bit mask would store
        masked = bitmask_pack(weight + 0.0)
        cells = []
        for x in inputs:
            runs = {
                "dense": lambda x=x, w=weight: product(x, w.T),
                "positions": lambda x=x, c=compressed, m=pattern.m: nm_matmul(x, *c, m),
                "mask": lambda x=x, packed=masked: bitmask_linear(x, *packed, options.size),
            }
            seconds = interleaved_medians(runs, options.rounds, clock_of(options))
            cells.append(" / ".join(f"{seconds['dense'] / seconds[form]:.2f}" for form in ("positions", "mask")))
        yield [str(pattern), *cells, f"{weight.nbytes / sum(tensor.nbytes for tensor in compressed):.1f}"]


@torch.no_grad()
def main() -> None:
    """Print the tables."""
    options = start(PARSER)
    columns = [f"{count} token{'s' if count > 1 else ''}" for count in options.tokens]
    for name in options.dtype:
        print()
        head = [f"{options.size} x {options.size} {name}", *columns, "bytes"]
        print_table(head, measure(options, getattr(torch, name)))
