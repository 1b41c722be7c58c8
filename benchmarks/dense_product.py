"""Time of fp32 products by torch.mm over those that adapters take on this processor.

    python benchmarks/dense_product.py [--threads 2] [--rounds 15]

Interleaved, medians; 1 where both are torch.mm (``leanstep info`` says which library runs, and why).
"""

import argparse
import time

import torch
from nm_mask import timed
from optimizer_step import machine

from leanstep.kernels import product

SHAPES = ((1, 512, 512), (8, 512, 512), (64, 512, 512), (1024, 512, 512), (1024, 512, 1376), (1024, 512, 16))


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{machine('cpu')}\n\n| rows x inner x columns | torch.mm GFLOP/s | ours GFLOP/s | torch.mm ÷ ours |")
    print("| --- | ---: | ---: | ---: |")
    for rows, n, m in SHAPES:
        x, w = torch.randn(rows, n), torch.randn(m, n)
        pair = {"mm": lambda x=x, w=w: torch.mm(x, w.t()), "ours": lambda x=x, w=w: product(x, w.t())}
        found = timed(pair, args.rounds, time.perf_counter, "cpu")
        mm, ours = (2e-9 * rows * n * m / found[name] for name in pair)
        print(f"| {rows} x {n} x {m} | {mm:.0f} | {ours:.0f} | {found['mm'] / found['ours']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
