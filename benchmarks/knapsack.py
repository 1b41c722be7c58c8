"""The exact knapsack on the matrices of LLaMA-7B: time and memory by size of the budget and number of levels.

    python benchmarks/knapsack.py [solve] [allocate] [--rounds 5]

``solve``: the table and the way back, beside the same recursion written out in numpy with an array of choices;
interleaved in one process, medians of processor time on one core. ``allocate``: from measured levels to exact counts,
for one sparsity, and for six from one table. Without a name, both.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from optimizer_step import machine

from leanstep.pruning import Curve, Layer, allocate, allocations_along, level_grid, solve_knapsack

BLOCKS = 32
SHAPES = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)} | {
    "gate": (11008, 4096),
    "up": (11008, 4096),
    "down": (4096, 11008),
}
# (levels per matrix, budget in units); the first is what 16 and 43 units per matrix come to at half density
SIZES = ((10, 2470), (101, 4941), (101, 9881), (101, 19763), (101, 39526))


def layers() -> list[Layer]:
    """The 224 matrices."""
    return [Layer(f"{block}.{name}", shape, block) for block in range(BLOCKS) for name, shape in SHAPES.items()]


def instance(levels: int, budget: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Costs in units, of which the dense model has 2.5 times the budget, and increasing losses."""
    rng = np.random.default_rng(0)
    matrices = layers()
    per_weight = 2.5 * budget / sum(layer.numel for layer in matrices)
    costs = [np.unique(np.linspace(0, layer.numel * per_weight, levels).astype(np.int64))[::-1] for layer in matrices]
    return costs, [np.sort(rng.random(len(cost))) for cost in costs]


def written_out(costs: list[np.ndarray], losses: list[np.ndarray], budget: int) -> tuple[list[int], float]:
    """The recursion with a stored choice for every group and state."""
    best = np.zeros(budget + 1)
    choices = []
    for cost, loss in zip(costs, losses, strict=True):
        current = np.full(budget + 1, np.inf)
        choice = np.full(budget + 1, -1, dtype=np.int16)
        for k in range(len(cost)):
            if cost[k] > budget:
                continue
            sums = best[: budget + 1 - cost[k]] + loss[k]
            better = sums < current[cost[k] :]
            current[cost[k] :][better] = sums[better]
            choice[cost[k] :][better] = k
        choices.append(choice)
        best = current
    levels, state = [], budget
    for cost, choice in zip(costs[::-1], choices[::-1], strict=True):
        levels.append(int(choice[state]))
        state -= int(cost[levels[-1]])
    return levels[::-1], float(best[-1])


def solve(rounds: int) -> None:
    """Print a row per size."""
    print("| levels | budget, units | CPU ms | table, MB | written out, CPU ms | ratio |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for levels, budget in SIZES:
        costs, losses = instance(levels, budget)
        times: dict[str, list[float]] = {"ours": [], "plain": []}
        for _ in range(rounds):
            start = time.process_time()
            table = solve_knapsack(costs, losses, budget)
            table.choose()
            times["ours"].append(time.process_time() - start)
            start = time.process_time()
            _, value = written_out(costs, losses, budget)
            times["plain"].append(time.process_time() - start)
            assert abs(value - table.value()) < 1e-9
        ours, plain = (1e3 * statistics.median(found) for found in times.values())
        print(f"| {levels} | {budget} | {ours:.0f} | {table.nbytes / 1e6:.1f} | {plain:.0f} | {plain / ours:.1f} |")


def whole(rounds: int) -> None:
    """Print the time of a whole allocation."""
    rng = np.random.default_rng(0)
    matrices, curves = layers(), {}
    for layer in matrices:
        kept = level_grid(layer.numel, 0.6)
        losses = [rng.uniform(0.5, 2) * (1 - k / layer.numel) ** 2.5 / (k / layer.numel) for k in kept]
        curves[layer.name] = Curve(layer.name, layer.numel, kept, tuple(losses), (0.0,) * len(kept), "kl")
    sparsities = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    single, seconds = [], []
    for _ in range(rounds):
        start = time.process_time()
        one = allocate(matrices, 0.6, curves=curves)
        single.append(time.process_time() - start)
        start = time.process_time()
        found = allocations_along(matrices, sparsities, curves=curves)
        seconds.append(time.process_time() - start)
        assert one.kept == found[sparsities.index(0.6)].kept
    for sparsity, allocation in zip(sparsities, found, strict=True):
        assert sum(allocation.kept.values()) == allocation.target
        gap = (allocation.lagrange_gap or 0.0) / (allocation.predicted or 1.0)
        print(f"sparsity {sparsity}: summed distortion {allocation.predicted:.4f}, the Lagrangian's {gap:.1e} more")
    print(
        f"{len(matrices)} matrices with {len(kept)} measured levels: one sparsity {statistics.median(single):.2f} s, "
        f"{len(sparsities)} from one table {statistics.median(seconds):.2f} s of processor time"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help="solve, allocate")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    parts = {"solve": solve, "allocate": whole}
    if not set(options.parts) <= set(parts):
        parser.error(f"parts are {', '.join(parts)}, not {options.parts}")
    for part in options.parts or parts:
        parts[part](options.rounds)


if __name__ == "__main__":
    main()
