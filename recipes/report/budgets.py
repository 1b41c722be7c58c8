"""Compare runs at equal tokens, time, memory and validation loss."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from leanstep._pages.charts import compact
from leanstep.recipes.report.runlog import Run, duration

Points = list[tuple[float, float]]  # (cost, validation loss) of each evaluation, by increasing cost


@dataclass(frozen=True)
class Comparison:
    """Values of each run at the budgets that all runs share. None where a run has none.

    Attributes:
        tokens, seconds: the budgets: the fewest tokens and the shortest time of the runs.
        loss: the target, the highest of the runs' lowest validation losses: each run reaches it.
        at_tokens, at_seconds: validation losses at the budgets.
        tokens_to_loss, seconds_to_loss: what each run takes to reach the target.
        memory: the peak in GiB: on the device, or, if no run has that, of the first process with its libraries.
        memory_of: ``device`` or ``process``.
    """

    tokens: float | None
    seconds: float | None
    loss: float | None
    at_tokens: list[float | None]
    at_seconds: list[float | None]
    tokens_to_loss: list[float | None]
    seconds_to_loss: list[float | None]
    memory: list[float | None]
    memory_of: str


def compare(runs: Sequence[Run]) -> Comparison:
    """Read the validation losses of ``runs`` at equal budgets, linearly between two evaluations."""
    by_tokens, by_seconds = (
        [validations(run, "tokens") for run in runs],
        [validations(run, "elapsed_s") for run in runs],
    )
    tokens, seconds = _shared_budget(by_tokens), _shared_budget(by_seconds)
    lowest = [min((loss for _, loss in points), default=None) for points in by_tokens]
    known = [loss for loss in lowest if loss is not None]
    loss = max(known) if known and len(known) == len(runs) else None
    memory_of, memory = peak_memory(runs)
    return Comparison(
        tokens,
        seconds,
        loss,
        [_loss_at(points, tokens) for points in by_tokens],
        [_loss_at(points, seconds) for points in by_seconds],
        [_cost_of(points, loss) for points in by_tokens],
        [_cost_of(points, loss) for points in by_seconds],
        memory,
        memory_of,
    )


def peak_memory(runs: Sequence[Run]) -> tuple[str, list[float | None]]:
    """Return ("device" or "process", the peak of each run in GiB): the two are not comparable with each other."""
    on_device = [run.last("memory_gib") for run in runs]
    if any(value is not None for value in on_device):
        return "device", on_device
    return "process", [run.last("process_gib") for run in runs]


def validations(run: Run, cost: str) -> Points:
    """Return (cost, loss) of the evaluations with a finite loss; ``cost`` is a key of the training lines.

    Evaluations are logged by step; their cost is that of the step, linear between two training lines.
    """
    costs = [
        (float(step), value)
        for step, value in zip(run.column("step"), run.column(cost), strict=True)
        if step is not None and value is not None and math.isfinite(value)
    ]
    evaluations = zip(run.column("step", "evals"), run.column("loss", "evals"), strict=True)
    points = [
        (at, loss)
        for step, loss in evaluations
        if step is not None and loss is not None and math.isfinite(loss) and (at := _between(costs, step)) is not None
    ]
    return sorted(points, key=lambda point: point[0])


def rows(comparison: Comparison, names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table; columns that no run has are left out."""
    tokens, seconds, loss = comparison.tokens, comparison.seconds, comparison.loss
    columns: list[tuple[str, list[float | None], Callable[[float], str]]] = [
        (f"Loss at {compact(tokens or 0)} tokens", comparison.at_tokens, "{:.4f}".format),
        (f"Loss at {duration(seconds)}", comparison.at_seconds, "{:.4f}".format),
        (f"Tokens to loss {loss or 0:.4f}", comparison.tokens_to_loss, compact),
        (f"Time to loss {loss or 0:.4f}", comparison.seconds_to_loss, duration),
        (f"Peak {comparison.memory_of} memory (GiB)", comparison.memory, "{:.2f}".format),
    ]
    shown = [column for column in columns if any(value is not None for value in column[1])]
    if not shown:
        return [], []
    cells = [
        ["-" if (value := values[i]) is None else text(value) for _, values, text in shown] for i in range(len(names))
    ]
    return ["Run", *(title for title, _, _ in shown)], [[name, *row] for name, row in zip(names, cells, strict=True)]


def _shared_budget(runs: Sequence[Points]) -> float | None:
    return min((points[-1][0] for points in runs), default=None) if all(runs) else None


def _loss_at(points: Points, cost: float | None) -> float | None:
    return None if cost is None else _between(points, cost)


def _between(points: Points, x: float) -> float | None:
    """Interpolate linearly between the points around ``x``; None outside them."""
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if left <= x <= right:
            return high if right == left else low + (high - low) * (x - left) / (right - left)
    return points[0][1] if len(points) == 1 and points[0][0] == x else None


def _cost_of(points: Points, loss: float | None) -> float | None:
    if loss is None or not points:
        return None
    before = None
    for cost, value in points:
        if value <= loss:
            if before is None or before[1] == value:
                return cost
            return before[0] + (cost - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (cost, value)
    return None
