"""What changes with the number of steps, with the warm-up, and with the size of the model."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

from comparison.methods import METHODS
from comparison.protocol import ComparisonError, Run
from comparison.results import Results, final_loss, read
from comparison.search import EdgeError, judged_runs, plan
from comparison.summary import BASELINE, Row, paired_difference, standard_error

_HEAD = ("loss, mean ± s.e.", "rank", "difference to tuned AdamW [95 %]")


def budget_table(results: Results, rows: list[Row]) -> tuple[list[str], list[list[str]], str] | None:
    """Head, cells and reading of the methods judged with half of the steps and with all; None if fewer than two are.

    Rows with a seed that diverged are left out.
    """
    whole = {row.method: row.losses for row in rows if row.mean is not None}
    halves = {row.method: losses for row in rows if (losses := _judged(results, row.chosen, "half")) is not None}
    methods = [method for method in whole if method in halves]
    if len(methods) < 2:
        return None
    columns = []
    for losses in ({m: halves[m] for m in methods}, {m: whole[m] for m in methods}):
        order = sorted(methods, key=lambda m, by=losses: statistics.mean(by[m]))
        columns.append({m: _budget_cells(losses, m, order.index(m) + 1) for m in methods})
    steps = results.protocol.judge_steps
    head = ["optimizer", *(f"{steps // 2} steps: {name}" for name in _HEAD), *(f"{steps}: {name}" for name in _HEAD)]
    cells = [[METHODS[m].title, *columns[0][m], *columns[1][m]]
             for m in methods]  # fmt: skip
    return head, cells, _order_reading(methods, halves, whole)


def double_reading(results: Results, rows: list[Row]) -> str:
    """Whether twice the chosen hidden rate would have been better at full length; "" where it was not judged.

    Tuning runs are shorter than judged ones, and may prefer another rate.
    """
    texts = []
    for row in rows:
        losses = _judged(results, row.chosen, "double")
        if losses is not None and row.mean is not None:
            difference = paired_difference(losses, row.losses)
            texts.append(
                f"{METHODS[row.method].title} {statistics.mean(losses):.3f}, {difference:+.3f}, {difference.reading}"
            )
    if not texts:
        return ""
    return f"Judged with twice the hidden rate, mean loss and difference to the chosen one: {'; '.join(texts)}."


def differences(results: Results, rows: list[Row], first: str, second: str) -> Iterator[str]:
    """A line for the judged runs of two methods, and one for those with half of the steps: their paired difference."""
    settings = {row.method: row.chosen for row in rows}
    if lacking := [name for name in (first, second) if name not in settings]:
        raise ComparisonError(f"--between: no complete row of {lacking[0]}; the file has {', '.join(settings)}")
    for kind in ("judge", "half"):
        ours, theirs = (_judged(results, settings[name], kind) for name in (first, second))
        if ours and theirs:
            yield f"{kind}: {first} - {second}: {paired_difference(ours, theirs):+.3f}"


def warmup_table(results: Results, rows: list[Row]) -> tuple[list[str], list[list[str]]] | None:
    """Losses with the chosen and with the other warm-up, and differences to AdamW where both have the better one.

    Tuning runs are shorter than judged ones, and may prefer another warm-up. The losses that are compared also choose
    the better of the two, for AdamW as for the others. Rows of defaults have one. None unless AdamW has both.
    """
    both = {row.method: (row.losses, _judged(results, row.chosen, "warmup")) for row in rows if row.mean is not None}
    if BASELINE not in both or both[BASELINE][1] is None:
        return None
    better = {method: min((ls for ls in pair if ls), key=statistics.mean) for method, pair in both.items()}
    cells = []
    for row in rows:
        if row.method not in both or METHODS[row.method].start and both[row.method][1] is None:
            continue
        chosen, other = both[row.method]
        second = judged_runs(row.chosen, results.protocol, "warmup")[0].warmup
        difference = paired_difference(better[row.method], better[BASELINE])
        cells.append([
            METHODS[row.method].title,
            f"{row.chosen.warmup:.0%}: {_mean(chosen)}",
            "–" if other is None else f"{second:.0%}: {_mean(other)}, {paired_difference(other, chosen):+.3f}",
            *(["–", "–"] if row.method == BASELINE else [f"{difference:+.3f}", difference.reading]),
        ])  # fmt: skip
    head = [
        "optimizer",
        "chosen warm-up",
        "other warm-up, difference to the chosen",
        "the better, difference to AdamW's [95 %]",
        "reading",
    ]
    return head, cells


def _mean(losses: tuple[float, ...]) -> str:
    return f"{statistics.mean(losses):.3f} ± {standard_error(losses):.3f}"


def _judged(results: Results, chosen: Run, kind: str) -> tuple[float, ...] | None:
    """Losses of all seeds of a kind of judged runs; None unless all are there and finite."""
    runs = judged_runs(chosen, results.protocol, kind)
    if any(run not in results.rows for run in runs):
        return None
    losses = tuple(final_loss(results.rows[run]) for run in runs)
    return losses if all(map(math.isfinite, losses)) else None


def _budget_cells(losses: dict[str, tuple[float, ...]], method: str, rank: int) -> list[str]:
    values = losses[method]
    difference = "–"
    if method != BASELINE and BASELINE in losses:
        difference = f"{paired_difference(values, losses[BASELINE]):+.3f}"
    return [_mean(values), str(rank), difference]


def _order_reading(
    methods: list[str], halves: dict[str, tuple[float, ...]], whole: dict[str, tuple[float, ...]]
) -> str:
    """Which pairs change places, and whether their intervals allow to say so."""
    changes = []
    for first, second in itertools.combinations(methods, 2):
        early, late = paired_difference(halves[first], halves[second]), paired_difference(whole[first], whole[second])
        if early.mean * late.mean < 0:
            told = "at both the interval of their difference leaves out zero"
            if "no difference seen" in (early.reading, late.reading):
                told = "an interval of their difference holds zero"
            changes.append(f"{METHODS[first].title} and {METHODS[second].title} ({told})")
    if not changes:
        return "The order by mean loss is the same with half of the steps and with all."
    return f"These change places between half of the steps and all: {'; '.join(changes)}."


def transfer_table(results: Results, rows: list[Row], path: Path) -> tuple[list[str], list[list[str]]] | None:
    """Best rates here beside those of the nano model of the same family, whose file lies beside this one.

    The last column is the tuning loss, on this model, at the nano's rates, minus the lowest: what it costs not to tune
    again. Weight decay and warm-up are the first of the protocol in both. None without such a file, or for the nano.
    """
    family, _, size = results.protocol.model.partition("-")
    nano = path.with_name(f"{family}-nano.jsonl")
    if size == "nano" or size.endswith("lora") or not nano.exists():
        return None
    smaller, cells = read(nano), []
    for row in rows:
        before = _chosen_rates(smaller, row.method)
        if row.chosen.hidden_lr is None or before is None:
            continue
        grid, now = _grid_losses(results, row.method), (row.chosen.hidden_lr, row.chosen.other_lr)
        moved = [f"{a:g} ({a / b:g} x)" for a, b in zip(now, before, strict=True)]
        cost = _cost(grid, before)
        cells.append([METHODS[row.method].label, *(f"{rate:g}" for rate in before), *moved, cost])
    if not cells:
        return None
    head = ["optimizer", "nano: hidden lr", "nano: other lr", "hidden lr", "other lr", "tuning loss lost at nano's"]
    return head, cells


def _cost(grid: dict[tuple[float | None, float | None], float], rates: tuple[float, float]) -> str:
    """Tuning loss at a pair of rates minus the lowest, in words where it has none."""
    if rates not in grid:
        return "not tried"
    return f"{grid[rates] - min(grid.values()):+.3f}" if math.isfinite(grid[rates]) else "diverged"


def _chosen_rates(results: Results, method: str) -> tuple[float, float] | None:
    """Hidden and other learning rate that the search chose; None where it has not, or ended on an edge."""
    if method not in results.search.starts:
        return None
    try:
        best = plan(method, results.protocol, results.search, results.losses).chosen
    except EdgeError:
        return None
    if best is None or best.hidden_lr is None or best.other_lr is None:
        return None
    return best.hidden_lr, best.other_lr


def _grid_losses(results: Results, method: str) -> dict[tuple[float | None, float | None], float]:
    """Tuning loss by hidden and other learning rate, with the weight decay and warm-up of the search."""
    protocol = results.protocol
    first = protocol.weight_decays[0], protocol.warmups[0]
    return {
        (run.hidden_lr, run.other_lr): loss
        for run, loss in results.losses.items()
        if (run.kind, run.method, run.weight_decay, run.warmup) == ("tune", method, *first)
    }
