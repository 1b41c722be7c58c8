"""The exact knapsack on the matrices of LLaMA-7B: time and memory by size of the budget and number of levels.

    python benchmarks/knapsack.py [solve] [allocate] [--rounds 5]

``solve``: the table and the way back, beside the same recursion in numpy with an array of choices; interleaved in one
process, medians of processor time on one core. ``allocate``: from measured levels to exact counts, for one sparsity,
and for six from one table. Without a name, both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import numpy as np
from common import add_tables, command_line, interleaved, print_table, start, timed

from leanstep.pruning import Curve, Layer, allocate, allocations_along, level_grid, solve_knapsack

BLOCKS = 32
SHAPES = dict.fromkeys("qkvo", (4096, 4096)) | {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
LAYERS = [Layer(f"{block}.{name}", shape, block) for block in range(BLOCKS) for name, shape in SHAPES.items()]
# (levels per matrix, budget in units); the first is what 16 and 43 units per matrix come to at half density
SIZES = ((10, 2470), (101, 4941), (101, 9881), (101, 19763), (101, 39526))
SPARSITIES = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
PARSER = command_line(__doc__, rounds=5, threads=1)
add_tables(PARSER, "solve", "allocate")


def instance(levels: int, budget: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Costs in units, of which the dense model has 2.5 times the budget, and increasing losses."""
    rng = np.random.default_rng(0)
    per_weight = 2.5 * budget / sum(layer.numel for layer in LAYERS)
    costs = [np.unique(np.linspace(0, layer.numel * per_weight, levels).astype(np.int64))[::-1] for layer in LAYERS]
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


def allocation(rounds: int) -> None:
    """Print the time of a whole allocation."""
    rng = np.random.default_rng(0)
    curves = {}
    for layer in LAYERS:
        kept = level_grid(layer.numel, 0.6)
        losses = [rng.uniform(0.5, 2) * (1 - k / layer.numel) ** 2.5 / (k / layer.numel) for k in kept]
        curves[layer.name] = Curve(layer.name, layer.numel, kept, tuple(losses), (0.0,) * len(kept), "kl")
    runs = {
        "one": lambda: timed(lambda: allocate(LAYERS, 0.6, curves=curves), time.process_time),
        "all": lambda: timed(lambda: allocations_along(LAYERS, SPARSITIES, curves=curves), time.process_time),
    }
    results = interleaved(runs, rounds, warmup=0)
    single, along = (statistics.median(seconds for seconds, _ in values) for values in results.values())
    allocations = dict(zip(SPARSITIES, results["all"][-1][1], strict=True))
    assert results["one"][-1][1].kept == allocations[0.6].kept
    for sparsity, result in allocations.items():
        assert sum(result.kept.values()) == result.target
        gap = (result.lagrange_gap or 0.0) / (result.predicted or 1.0)
        print(f"sparsity {sparsity}: summed distortion {result.predicted:.4f}, the Lagrangian's {gap:.1e} more")
    print(
        f"{len(LAYERS)} matrices with {len(kept)} measured levels: one sparsity {single:.2f} s, "
        f"{len(SPARSITIES)} from one table {along:.2f} s of processor time"
    )


if __name__ == "__main__":
    options = start(PARSER)
    if "solve" in options.tables:
        head = ["levels", "budget, units", "CPU ms", "table, MB", "written out, CPU ms", "ratio"]
        print_table(head, solve(options.rounds), left=())
    if "allocate" in options.tables:
        allocation(options.rounds)
