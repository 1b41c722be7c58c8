"""The exact knapsack on the matrices of LLaMA-7B: time and memory by size of the budget and number of levels.

    python benchmarks pruning/knapsack [--rounds 5]

The table and the way back, beside the same recursion in numpy with an array of choices; interleaved in one process,
medians of processor time on one core.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import numpy as np
from common import command_line, interleaved, print_table, start, timed

from leanstep.pruning import solve_knapsack

BLOCKS = 32
SHAPES = dict.fromkeys("qkvo", (4096, 4096)) | {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
NUMELS = [rows * columns for _ in range(BLOCKS) for rows, columns in SHAPES.values()]
# (levels per matrix, budget in units); the first is what 16 and 43 units per matrix come to at half density
SIZES = ((10, 2470), (101, 4941), (101, 9881), (101, 19763), (101, 39526))
PARSER = command_line(__doc__, rounds=5, threads=1)


def instance(levels: int, budget: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Costs in units, of which the dense model has 2.5 times the budget, and increasing losses."""
    rng = np.random.default_rng(0)
    per_weight = 2.5 * budget / sum(NUMELS)
    costs = [np.unique(np.linspace(0, numel * per_weight, levels).astype(np.int64))[::-1] for numel in NUMELS]
    return costs, [np.sort(rng.random(len(cost))) for cost in costs]


def plain_knapsack(costs: list[np.ndarray], losses: list[np.ndarray], budget: int) -> float:
    """The recursion with a stored choice for every group and state, and the least loss."""
    best = np.zeros(budget + 1)
    choices = []
    for cost, loss in zip(costs, losses, strict=True):
        current = np.full(budget + 1, np.inf)
        choice = np.full(budget + 1, -1, dtype=np.int16)
        for level in np.flatnonzero(cost <= budget):
            sums = best[: budget + 1 - cost[level]] + loss[level]
            better = sums < current[cost[level] :]
            current[cost[level] :][better] = sums[better]
            choice[cost[level] :][better] = level
        choices.append(choice)
        best = current
    state = budget
    for cost, choice in zip(costs[::-1], choices[::-1], strict=True):
        state -= int(cost[choice[state]])
    return float(best[-1])


def solve(rounds: int) -> Iterator[list[str]]:
    """One row per size."""
    for levels, budget in SIZES:
        costs, losses = instance(levels, budget)

        def table(costs=costs, losses=losses, budget=budget):
            solved = solve_knapsack(costs, losses, budget)
            solved.choose()
            return solved

        runs = {"ours": table, "plain": lambda c=costs, x=losses, b=budget: plain_knapsack(c, x, b)}
        results = interleaved({name: lambda run=run: timed(run, time.process_time) for name, run in runs.items()},
                              rounds, warmup=0)  # fmt: skip
        ours, plain = (1e3 * statistics.median(seconds for seconds, _ in values) for values in results.values())
        solved = results["ours"][-1][1]
        assert abs(results["plain"][-1][1] - solved.value()) < 1e-9
        row = [f"{ours:.0f}", f"{solved.nbytes / 1e6:.1f}", f"{plain:.0f}", f"{plain / ours:.1f}"]
        yield [str(levels), str(budget), *row]


def main() -> None:
    """Measure, and print the table."""
    options = start(PARSER)
    head = ["levels", "budget, units", "CPU ms", "table, MB", "written out, CPU ms", "ratio"]
    print_table(head, solve(options.rounds), left=())
