"""N:M masks: time beside sorting and copying, and how good transposable masks are.

    python benchmarks/nm_mask.py [time] [transposable] [--size 4096] [--threads 2] [--rounds 9] [--device cuda]
        [--dtype float32 bfloat16] [--patterns 2:4 1:8] [--cpu-time]

``time``: masks of one matrix of normal scores by pattern, through the op here, through argsort and topk with a scatter,
and through argsort alone, beside a copy of the matrix; interleaved in one process, medians. The copy reads and writes 8
bytes per fp32 element, a mask reads 4 and writes 1. ``transposable``: kept sum of scores of the greedy method over that
of the exact one, per tile, and the time of both. Without a name, both. On a machine that others use, ``--cpu-time``
counts this process's processor time instead of the clock's.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from optimizer_step import machine
from torch import Tensor

from leanstep.kernels import nm_mask
from leanstep.sparsity import NM, transposable_mask

PATTERNS = ("2:4", "4:8", "1:8", "1:16", "8:16", "1:32", "16:32", "8:64", "16:128", "64:128")
TRANSPOSABLE = ("2:4", "1:4", "4:8", "1:8", "8:16", "2:16", "8:32")
Clock = Callable[[], float]


def by_argsort(scores: Tensor, pattern: NM) -> Tensor:
    """What the published code does: sort every group, drop the first M - N."""
    groups = scores.abs().view(-1, pattern.m)
    dropped = groups.argsort(dim=1)[:, : pattern.m - pattern.n]
    return torch.ones(groups.shape, dtype=torch.bool, device=scores.device).scatter_(1, dropped, False)


def by_topk(scores: Tensor, pattern: NM) -> Tensor:
    """Keep the indices of the N largest."""
    groups = scores.abs().view(-1, pattern.m)
    kept = groups.topk(pattern.n, dim=1, sorted=False).indices
    return torch.zeros(groups.shape, dtype=torch.bool, device=scores.device).scatter_(1, kept, True)


def timed(runs: dict[str, Callable[[], object]], rounds: int, clock: Clock, device: str) -> dict[str, float]:
    """Median seconds of each run, interleaved in shuffled order, after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0)
    for number in range(rounds + 1):
        shuffle.shuffle(order)
        for name in order:
            begin = clock()
            runs[name]()
            if device != "cpu":
                torch.accelerator.synchronize()
            if number:
                times[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def time_table(size: int, dtype: torch.dtype, patterns: list[str], rounds: int, clock: Clock, device: str) -> str:
    """One row per pattern."""
    scores = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    target, out = torch.zeros_like(scores), torch.zeros(scores.shape, dtype=torch.bool, device=device)
    rows = []
    for text in patterns:
        pattern = NM.parse(text)
        runs: dict[str, Callable[[], object]] = {
            "ours": lambda p=pattern: nm_mask([scores], p.n, p.m, out=[out]),  # type: ignore[misc]
            "argsort": lambda p=pattern: scores.view(-1, p.m).argsort(dim=1),  # type: ignore[misc]
            "by argsort": lambda p=pattern: by_argsort(scores, p),  # type: ignore[misc]
            "by topk": lambda p=pattern: by_topk(scores, p),  # type: ignore[misc]
            "copy": lambda: target.copy_(scores),
        }
        found = timed(runs, rounds, clock, device)
        ours = found["ours"]
        rows.append(
            f"| {text} | {ours * 1e3:.1f} | {ours / found['copy']:.2f} | {found['argsort'] / ours:.1f} | "
            f"{found['by argsort'] / ours:.1f} | {found['by topk'] / ours:.1f} |"
        )
    name = str(dtype).removeprefix("torch.")
    head = [
        f"| {size} x {size} {name} | ms | ÷ copy | argsort alone ÷ ours | mask by argsort ÷ ours | by topk ÷ ours |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join(head + rows)


def transposable_table(rounds: int, clock: Clock, device: str) -> str:
    """One row per pattern and distribution of scores."""
    rows = []
    for text in TRANSPOSABLE:
        pattern = NM.parse(text)
        count = max(64, 2**16 // pattern.m**2)
        normal = torch.randn(count, pattern.m, pattern.m, generator=torch.Generator().manual_seed(0)).to(device)
        for name, scores in (("normal", normal), ("normal, to the fourth", normal**4)):
            sums = {}
            for method in ("greedy", "exact"):
                mask = transposable_mask(scores, pattern, method=method)
                sums[method] = torch.where(mask, scores.abs(), 0).sum(dim=(1, 2), dtype=torch.float64)
            ratio = sums["greedy"] / sums["exact"]
            # against masks that are N:M along the rows only, the price of the second direction
            (free,) = nm_mask([scores], pattern.n, pattern.m)
            price = float(sums["exact"].sum() / torch.where(free, scores.abs(), 0).sum(dtype=torch.float64))
            runs: dict[str, Callable[[], object]] = {
                method: lambda p=pattern, s=scores, m=method: transposable_mask(s, p, method=m)  # type: ignore[misc]
                for method in ("greedy", "exact")
            }
            found = timed(runs, max(1, rounds // 3), clock, device)
            million = scores.numel() / 1e6
            rows.append(
                f"| {text} | {name} | {count} | {float(ratio.mean()):.4f} | {float(ratio.min()):.3f} | "
                f"{float((ratio < 1 - 1e-9).double().mean()):.2f} | {price:.3f} | {found['greedy'] / million:.2f} | "
                f"{found['exact'] / million:.2f} |"
            )
    head = [
        "| pattern | scores | tiles | greedy ÷ exact, mean | worst tile | tiles below 1 | exact ÷ rows only | "
        "greedy s per M | exact s per M |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join(head + rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help="time, transposable; both if none is named")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), metavar="N:M")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--cpu-time", action="store_true", help="measure processor time")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(machine(options.device))
    if not options.what or "time" in options.what:
        for dtype in options.dtype:
            arguments = (options.size, getattr(torch, dtype), options.patterns, options.rounds, clock, options.device)
            print("\n" + time_table(*arguments))
    if not options.what or "transposable" in options.what:
        print("\n" + transposable_table(options.rounds, clock, options.device))


if __name__ == "__main__":
    main()
