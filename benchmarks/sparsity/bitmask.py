"""Products with bitmask matrices beside torch's dense product: matrices with zeros in any place.

    python benchmarks sparsity/bitmask [--rows 4096] [--columns 11008] [--threads 1] [--rounds 9] [--device cuda]
        [--tokens 1 4 16 64] [--dtype bfloat16 float32] [--sparsity 0.5 0.6 0.7 0.8] [--bits 8] [--cpu-time]

Each entry is the time of the dense product, by the faster of the two libraries that torch has for it on this processor
(``leanstep.kernels.product``), over that of ``bitmask_linear`` as ``SparseLinear`` calls it, medians of interleaved
runs in one process: above 1 the packed matrix is faster. Behind a slash is the same for our own loop over the dense
matrix (``few_token_linear`` of the C++ backend). The last column is the packed matrix's bytes over the dense matrix's.
With ``--bits 8``, values have 8 bits and a scale per row; with ``--bits 4``, 4 bits and a scale per 64 columns. On a
machine that others use, ``--cpu-time`` counts this process's processor time instead of the clock's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch
from common import clock_of, command_line, interleaved_medians, print_table, start

from leanstep.kernels import bitmask_pack, bitmask_quantize, few_token_linear, product, use_backend
from leanstep.kernels.sparse.linear import RepeatedProduct

PARSER = command_line(
    __doc__, rows=4096, columns=11008, tokens=[1, 4, 16, 64], threads=1, rounds=9, sparsity=[0.5, 0.6, 0.7, 0.8],
    device="cpu", dtype=["bfloat16", "float32"], bits=(16, "of the values: 4, 8, or 16 for those of the dtype"),
    cpu_time=(False, "measure processor time"),
)  # fmt: skip


def measure(options: argparse.Namespace, dtype: torch.dtype) -> Iterator[list[str]]:
    """One row per sparsity, one column per number of tokens."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(options.rows, options.columns, generator=generator)
    uniform = torch.rand(options.rows, options.columns, generator=generator)
    inputs = [torch.randn(tokens, options.columns, generator=generator) for tokens in options.tokens]
    inputs = [x.to(options.device, dtype) for x in inputs]
    for sparsity in options.sparsity:
        weight = torch.where(uniform < sparsity, 0.0, dense).to(options.device, dtype)
        values, mask, offsets = bitmask_pack(weight)
        scales = None
        if options.bits in (4, 8):
            values, scales = bitmask_quantize(values, offsets, mask, bits=options.bits)
        cells = []
        for x in inputs:
            runs = {
                "dense": lambda x=x, w=weight: product(x, w.T),
                "ours": partial(RepeatedProduct(), x, values, mask, offsets, options.columns, None, scales),
            }
            if options.device == "cpu":
                runs["loop"] = lambda x=x, w=weight: _dense_loop(x, w)
            seconds = interleaved_medians(runs, options.rounds, clock_of(options))
            ratios = (f"{seconds[name] / seconds['ours']:.2f}" for name in ("dense", "loop") if name in seconds)
            cells.append(f"{' / '.join(ratios)} ({seconds['ours'] * 1e3:.2f} ms)")
        size = sum(part.nbytes for part in (values, mask, offsets, scales) if part is not None)
        yield [f"{sparsity:.0%}", *cells, f"{size / weight.nbytes:.2f}"]


def _dense_loop(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Our loop, also where torch's product is taken to be faster."""
    with use_backend("cpp"):
        return few_token_linear(x, weight)


@torch.no_grad()
def main() -> None:
    """Print the tables."""
    options = start(PARSER)
    columns = [f"{count} token{'s' if count > 1 else ''}" for count in options.tokens]
    for name in options.dtype:
        print()
        head = [f"{options.rows} x {options.columns} {name}", *columns, "bytes"]
        print_table(head, measure(options, getattr(torch, name)))
