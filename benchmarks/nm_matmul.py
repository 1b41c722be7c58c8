"""Products with a compressed N:M matrix beside the dense product: where they are faster, and where they are not.

    python benchmarks/nm_matmul.py [--size 4096] [--threads 2] [--rounds 9] [--device cuda] [--tokens 1 8 64 512]
        [--dtype float32 bfloat16] [--patterns 2:4 1:8] [--cpu-time]

Each entry is the time of the dense product, by the faster of the two libraries that torch has for it on this processor
(``leanstep.kernels.product``), over that of ``nm_matmul``, medians of interleaved runs in one process: above 1 the
compressed matrix is faster. The last column is the dense matrix's bytes over those of values and one-byte
indices, which is what a product of one token is bound by. On a machine that others use, ``--cpu-time`` counts this
process's processor time instead of the clock's.
"""

from __future__ import annotations

import argparse
import time

import torch
from nm_mask import Clock, timed
from optimizer_step import machine

from leanstep.kernels import nm_compress, nm_mask, nm_matmul, product
from leanstep.sparsity import NM

PATTERNS = ("2:4", "4:8", "1:4", "1:8", "1:16", "1:32", "1:64")


def table(
    size: int, dtype: torch.dtype, patterns: list[str], tokens: list[int], rounds: int, clock: Clock, device: str
) -> str:
    """One row per pattern, one column per number of tokens."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(size, size, generator=generator).to(device, dtype)
    inputs = [torch.randn(count, size, generator=generator).to(device, dtype) for count in tokens]
    rows = []
    for text in patterns:
        pattern = NM.parse(text)
        weight = dense * nm_mask([dense], pattern.n, pattern.m)[0]
        values, indices = nm_compress(weight, pattern.n, pattern.m)
        cells = []
        for x in inputs:
            found = timed(
                {
                    "dense": lambda x=x, w=weight: product(x, w.T),  # type: ignore[misc]
                    "ours": lambda x=x, v=values, i=indices, m=pattern.m: nm_matmul(x, v, i, m),  # type: ignore[misc]
                },
                rounds,
                clock,
                device,
            )
            cells.append(f"{found['dense'] / found['ours']:.2f} ({found['ours'] * 1e3:.2f} ms)")
        smaller = weight.nbytes / (values.nbytes + indices.nbytes)
        rows.append(f"| {text} | " + " | ".join(cells) + f" | {smaller:.1f} |")
    name = str(dtype).removeprefix("torch.")
    titles = " | ".join(f"{count} token{'s' if count > 1 else ''}" for count in tokens)
    head = [f"| {size} x {size} {name} | {titles} | bytes |", "| --- |" + " ---: |" * (len(tokens) + 1)]
    return "\n".join(head + rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), metavar="N:M")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--cpu-time", action="store_true", help="measure processor time")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(machine(options.device))
    with torch.no_grad():
        for dtype in options.dtype:
            own = (options.size, getattr(torch, dtype), options.patterns, options.tokens, options.rounds)
            print("\n" + table(*own, clock, options.device), flush=True)


if __name__ == "__main__":
    main()
