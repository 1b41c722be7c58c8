"""N:M masks: time beside sorting and copying, and how good transposable masks are.

    python benchmarks sparsity/mask [time] [transposable] [--size 4096] [--threads 2] [--rounds 9] [--device cuda]
        [--dtype float32 bfloat16] [--patterns 2:4 1:8] [--cpu-time]

``time``: masks of one matrix of normal scores by pattern, through the op here, through argsort and topk with a scatter,
and through argsort alone, beside a copy of the matrix; interleaved in one process, medians. The copy reads and writes 8
bytes per fp32 element, a mask reads 4 and writes 1. ``transposable``: kept sum of scores of the greedy method over that
of the exact one, per tile, and the time of both. Without a name, both. On a machine that others use, ``--cpu-time``
counts this process's processor time instead of the clock's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from common import Clock, add_tables, clock_of, command_line, interleaved_medians, print_table, start
from torch import Tensor

from leanstep.kernels import nm_mask
from leanstep.sparsity import NM, transposable_mask

PATTERNS = ["2:4", "4:8", "1:8", "1:16", "8:16", "1:32", "16:32", "8:64", "16:128", "64:128"]
TRANSPOSABLE = ("2:4", "1:4", "4:8", "1:8", "8:16", "2:16", "8:32")
PARSER = command_line(
    __doc__, size=4096, threads=0, rounds=9, patterns=PATTERNS, device="cpu", dtype=["float32"],
    cpu_time=(False, "measure processor time"),
)  # fmt: skip
add_tables(PARSER, "time", "transposable")


def by_argsort(scores: Tensor, pattern: NM) -> Tensor:
    """The published code: sort every group, drop the first M - N."""
    groups = scores.abs().view(-1, pattern.m)
    dropped = groups.argsort(dim=1)[:, : pattern.m - pattern.n]
    return torch.ones(groups.shape, dtype=torch.bool, device=scores.device).scatter_(1, dropped, False)


def by_topk(scores: Tensor, pattern: NM) -> Tensor:
    """Keep the indices of the N largest."""
    groups = scores.abs().view(-1, pattern.m)
    largest = groups.topk(pattern.n, dim=1, sorted=False).indices
    return torch.zeros(groups.shape, dtype=torch.bool, device=scores.device).scatter_(1, largest, True)


def mask_times(scores: Tensor, patterns: list[str], rounds: int, clock: Clock) -> Iterator[list[str]]:
    """One row per pattern."""
    target, out = torch.zeros_like(scores), torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    for pattern in map(NM.parse, patterns):
        runs = {
            "ours": lambda p=pattern: nm_mask([scores], p.n, p.m, out=[out]),
            "argsort": lambda p=pattern: scores.view(-1, p.m).argsort(dim=1),
            "by argsort": lambda p=pattern: by_argsort(scores, p),
            "by topk": lambda p=pattern: by_topk(scores, p),
            "copy": lambda: target.copy_(scores),
        }
        ours, *others, copy = interleaved_medians(runs, rounds, clock).values()
        yield [str(pattern), f"{ours * 1e3:.1f}", f"{ours / copy:.2f}", *(f"{other / ours:.1f}" for other in others)]


def transposable(rounds: int, clock: Clock, device: str) -> Iterator[list[str]]:
    """One row per pattern and distribution of scores."""
    for pattern in map(NM.parse, TRANSPOSABLE):
        tiles = max(64, 2**16 // pattern.m**2)
        normal = torch.randn(tiles, pattern.m, pattern.m, generator=torch.Generator().manual_seed(0)).to(device)
        for name, scores in (("normal", normal), ("normal, to the fourth", normal**4)):
            runs = {m: lambda p=pattern, s=scores, m=m: transposable_mask(s, p, method=m) for m in ("greedy", "exact")}
            greedy, exact = (torch.where(run(), scores.abs(), 0).double().sum(dim=(1, 2)) for run in runs.values())
            ratio = greedy / exact
            # against masks that are N:M along the rows only, the price of the second direction
            (free,) = nm_mask([scores], pattern.n, pattern.m)
            price = float(exact.sum() / torch.where(free, scores.abs(), 0).sum(dtype=torch.float64))
            below = float((ratio < 1 - 1e-9).double().mean())
            quality = [f"{float(ratio.mean()):.4f}", f"{float(ratio.min()):.3f}", f"{below:.2f}", f"{price:.3f}"]
            seconds = interleaved_medians(runs, max(1, rounds // 3), clock).values()
            yield [str(pattern), name, str(tiles), *quality, *(f"{1e6 * s / scores.numel():.2f}" for s in seconds)]


def main() -> None:
    """Print the tables."""
    options = start(PARSER)
    clock, size = clock_of(options), options.size
    for name in options.dtype if "time" in options.tables else ():
        scores = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
        scores = scores.to(options.device, getattr(torch, name))
        head = [f"{size} x {size} {name}", "ms", "÷ copy"]
        head += ["argsort alone ÷ ours", "mask by argsort ÷ ours", "by topk ÷ ours"]
        print()
        print_table(head, mask_times(scores, options.patterns, options.rounds, clock))
    if "transposable" in options.tables:
        head = ["pattern", "scores", "tiles", "greedy ÷ exact, mean", "worst tile", "tiles below 1"]
        head += ["exact ÷ rows only", "greedy s per M", "exact s per M"]
        print()
        print_table(head, transposable(options.rounds, clock, options.device), left=(0, 1))
