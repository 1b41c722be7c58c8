"""Low-rank over exact attention, forward and backward, by length: time, operations and the error made.

    python benchmarks lora/low_rank_attention [--lengths 4096 65536] [--figure FILE] [--threads 1]

One causal head of size 64 in fp32, degree 2: the two run in turns in one process, on inputs whose certified bound of
the logits (``scale * max |q| * max |k|``) is 1; the bound is what the error depends on, and the second table varies
it. A ratio below 1 means that low-rank is faster. Times are processor time of the process, all threads together.
Errors of the output and of the three gradients are relative, ``|result - exact| / |exact|``, and come from the timed
runs.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from common import command_line, print_table, pyplot, save_svg, start, timed
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from leanstep.lora import low_rank_attention
from leanstep.lora.attention.cost import AttentionShape, cost_ratio
from leanstep.lora.attention.error_bounds import largest_logit

DIM, DEGREE = 64, 2
low_rank = functools.partial(low_rank_attention, degree=DEGREE, causal=True)
exact = functools.partial(scaled_dot_product_attention, is_causal=True)
# bound of the logits of the second table, at the least length
BOUNDS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
PARSER = command_line(
    __doc__, lengths=[4096, 8192, 16384, 32768, 65536], threads=1,
    budget=(10.0, "seconds a length before it is not repeated"),
)  # fmt: skip
PARSER.add_argument("--figure", type=Path, help="where the figure goes, as SVG")


class Row(NamedTuple):
    """One length: median seconds of processor time, their ratio, that of operations, and errors of O, dQ, dK and dV."""

    length: int
    exact: float
    low_rank: float
    ratio: float
    operations: float
    errors: list[float]


def inputs(length: int, bound: float) -> tuple[list[Tensor], Tensor]:
    """q, k and v of one head with so large a bound of logits, and a gradient of the output."""
    generator = torch.Generator().manual_seed(length)
    q, k, v, grad = (torch.randn(1, 1, length, DIM, generator=generator) for _ in range(4))
    factor = math.sqrt(bound / float(largest_logit(q, k, DIM**-0.5)))
    return [x.requires_grad_() for x in (q * factor, k * factor, v)], grad


def run(function, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output and the gradients of one forward and backward pass."""
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def relative_errors(results: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Relative errors of all tensors."""
    return [float((a - b).norm() / b.norm()) for a, b in zip(results, expected, strict=True)]


def measure(length: int, budget: float) -> Row:
    """Both in turns, at most five times and until the budget of seconds is spent, at least once."""
    tensors, grad = inputs(length, 1.0)
    times: list[list[float]] = [[], []]
    while len(times[0]) < 5 and (not times[0] or sum(map(sum, times)) < budget):
        runs = [lambda f=function: run(f, tensors, grad) for function in (exact, low_rank)]
        seconds, results = zip(*(timed(function, time.process_time) for function in runs), strict=True)
        for values, value in zip(times, seconds, strict=True):
            values.append(value)
    medians = [statistics.median(values) for values in times]
    errors = relative_errors(results[1], results[0])
    shape = AttentionShape(1, 1, length, DIM, DIM)
    return Row(length, *medians, medians[1] / medians[0], cost_ratio(shape, DEGREE), errors)


def by_length(rows: list[Row]) -> None:
    """Print the first table."""
    head = ["tokens", "exact s", "low-rank s", "time ratio", "FLOP ratio", "error O", "dQ", "dK", "dV"]
    cells = (
        [f"{r.length:,}", f"{r.exact:.3g}", f"{r.low_rank:.3g}", f"{r.ratio:.2f}", f"{r.operations:.2f}"]
        + [f"{error:.1e}" for error in r.errors]
        for r in rows
    )
    print_table(head, cells, left=())


def by_bound(length: int) -> None:
    """Print the second table: errors by the bound of the logits."""
    head = ["bound of logits", "error O", "dQ", "dK", "dV"]
    errors = (relative_errors(*(run(f, *inputs(length, bound)) for f in (low_rank, exact))) for bound in BOUNDS)
    print_table(head, ([f"{b:g}", *map("{:.1e}".format, row)] for b, row in zip(BOUNDS, errors, strict=True)), left=())


def plot(rows: list[Row], path: Path) -> None:
    """Ratios of time and operations over the length, and the errors beside them."""
    lengths = [row.length for row in rows]
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(9, 3.4))
    left.loglog(lengths, [row.ratio for row in rows], "o-", label="time, measured")
    left.loglog(lengths, [row.operations for row in rows], "s--", label="operations, counted")
    left.axhline(1, color="grey", linewidth=0.8)
    left.set(title="low-rank over exact attention", xlabel="tokens", ylabel="ratio")
    for kind, errors in zip(("O", "dQ", "dK", "dV"), zip(*(row.errors for row in rows), strict=True), strict=True):
        right.loglog(lengths, errors, "o-", label=kind)
    right.set(title="relative error, logits bounded by 1", xlabel="tokens")
    for panel in (left, right):
        panel.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend()
    save_svg(figure, path)


def main() -> None:
    """Print the tables, draw the figure."""
    options = start(PARSER)
    for function in (exact, low_rank):
        run(function, *inputs(1024, 1.0))
    rows = [measure(length, options.budget) for length in sorted(options.lengths)]
    print(f"\nOne causal head of {DIM}, degree {DEGREE}, fp32, forward and backward.\n")
    by_length(rows)
    print(f"\nErrors by the bound of the logits, {rows[0].length:,} tokens:\n")
    by_bound(rows[0].length)
    if options.figure:
        plot(rows, options.figure)
