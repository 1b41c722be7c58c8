"""Rows of the comparison from a file of results: means, paired differences, equal time, equal tokens, equal memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from scipy import stats

from comparison.methods import METHODS
from comparison.protocol import Protocol, Run
from comparison.results import Results, final_loss
from comparison.search import EdgeError, judged_runs, plan

BASELINE = "adamw"
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean with its confidence interval; the ends are NaN where there is none."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """``mean [low, high]``, or the mean alone."""
        ends = "" if math.isnan(self.low) else f" [{self.low:{spec}}, {self.high:{spec}}]"
        return f"{self.mean:{spec}}{ends}"

    @property
    def reading(self) -> str:
        """What the interval of a difference of losses lets one say."""
        if self.low <= 0 <= self.high:
            return "no difference seen"
        return "lower loss" if self.mean < 0 else "higher loss"


@dataclass(frozen=True)
class Row:
    """A method whose tuning and judging are complete.

    Attributes:
        chosen: the settings that are judged.
        tuning_runs: number of tuning runs.
        losses: final loss of each seed; inf where a run diverged.
        mean, error: of the losses, and its standard error; None if a seed diverged.
        difference: paired difference to the baseline; None for the baseline, or if a seed of either diverged.
        step_seconds: processor seconds of a training step; None without a timing.
        loss_at_time: mean loss when the baseline is done, by processor seconds.
        time_difference: paired difference of these losses to the baseline, as ``difference``.
        tokens: tokens to the baseline's final loss, as a fraction of the baseline's; None if a seed does not reach it.
        bytes: weights, gradients and optimizer state.
        on_frontier: whether no row with as few bytes has a lower mean loss.
    """

    method: str
    chosen: Run
    tuning_runs: int
    losses: tuple[float, ...]
    mean: float | None
    error: float | None
    difference: Interval | None
    step_seconds: float | None
    loss_at_time: float | None
    time_difference: Interval | None
    tokens: float | None
    bytes: int
    on_frontier: bool

    @property
    def diverged(self) -> int:
        """Number of seeds that diverged."""
        return sum(map(math.isinf, self.losses))


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Mean of ``values - baseline``, paired by position, with the interval of Student's t."""
    differences = [value - base for value, base in zip(values, baseline, strict=True)]
    mean = statistics.mean(differences)
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)) * standard_error(differences)
    return Interval(mean, mean - margin, mean + margin)


def paired_percent(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Mean of ``values / baseline - 1`` in percent, paired by position, as :func:`paired_difference`."""
    percent = [100 * (value / base - 1) for value, base in zip(values, baseline, strict=True)]
    if len(percent) == 1:
        return Interval(percent[0], math.nan, math.nan)
    return paired_difference(percent, [0.0] * len(percent))


def loss_at_step(curve: Sequence[Sequence[float]], step: float) -> float | None:
    """Loss at a step of a curve of (step, tokens, loss), linear between evaluations.

    None before the first one; the last one's after it.
    """
    if step < curve[0][0]:
        return None
    for (left, _, above), (right, _, below) in zip(curve, curve[1:], strict=False):
        if step <= right:
            return above + (below - above) * (step - left) / (right - left)
    return curve[-1][2]


def tokens_to_loss(curve: Sequence[Sequence[float]], loss: float) -> float | None:
    """Tokens at which a curve first has a loss, linear between evaluations; None if it never has.

    A curve that has it at its first evaluation gives the tokens of that.
    """
    previous = None
    for _, tokens, value in curve:
        if value <= loss:
            if previous is None:
                return tokens
            return previous[0] + (tokens - previous[0]) * (previous[1] - loss) / (previous[1] - value)
        previous = tokens, value
    return None


def summarise(results: Results) -> tuple[list[Row], dict[str, str]]:
    """Rows by mean loss, and the methods that have none, each with the reason."""
    protocol, losses, budget = results.protocol, results.losses, results.search.budget
    complete: dict[str, tuple[Run, int]] = {}
    others: dict[str, str] = {}
    for method in filter(results.search.takes, METHODS):
        if METHODS[method].start and method not in results.search.starts:
            others[method] = "not begun"
            continue
        try:
            state = plan(method, protocol, results.search, losses)
        except EdgeError:
            others[method] = f"its best learning rates are on the edge of those tried in {budget} runs"
            continue
        if state.chosen is not None and not state.missing:
            complete[method] = state.chosen, len(state.counted)
        elif state.chosen is not None:
            count = len(state.missing)
            done = count < len(protocol.judge_seeds) or METHODS[method].start
            others[method] = f"{count} judged runs to go" if done else "not begun"
        else:
            count = sum(run in losses for run in state.counted)
            others[method] = f"{count} of {budget} tuning runs done" if count else "not begun"
    rows = [_row(results, method, *complete[method], BASELINE in complete) for method in complete]
    frontier = {row.method for row in rows if not any(_beats(other, row) for other in rows)}
    rows = [replace(row, on_frontier=row.method in frontier) for row in rows]
    return sorted(rows, key=lambda row: math.inf if row.mean is None else row.mean), others


def _beats(other: Row, row: Row) -> bool:
    """Whether ``other`` takes no more bytes than ``row`` and has a lower mean loss."""
    if row.mean is None:
        return other.mean is not None
    return other.mean is not None and other.bytes <= row.bytes and other.mean < row.mean


def _row(results: Results, method: str, chosen: Run, tuning_runs: int, with_baseline: bool) -> Row:
    protocol = results.protocol
    lines = [results.rows[run] for run in judged_runs(chosen, protocol)]
    losses = tuple(map(final_loss, lines))
    sound = all(map(math.isfinite, losses))
    row = Row(method, chosen, tuning_runs, losses, None, None, None, step_seconds(results, method), None, None, None,
              sum(lines[0]["bytes"].values()), False)  # fmt: skip
    if not sound:
        return row
    values: dict[str, Any] = {"mean": statistics.mean(losses), "error": standard_error(losses)}
    if with_baseline:
        base = _baseline_lines(results, protocol)
        targets = [final_loss(line) for line in base]
        timed = _losses_at_time(results, method, lines)
        values["loss_at_time"] = None if timed is None else statistics.mean(timed)
        if method != BASELINE and all(map(math.isfinite, targets)):
            values["difference"] = paired_difference(losses, targets)
            values["time_difference"] = None if timed is None else paired_difference(timed, targets)
        reached = [tokens_to_loss(line["losses"], target) for line, target in zip(lines, targets, strict=True)]
        if all(tokens is not None for tokens in reached):
            whole = [line["losses"][-1][1] for line in base]
            values["tokens"] = statistics.mean(a / b for a, b in zip(reached, whole, strict=True))
    return replace(row, **values)


def _baseline_lines(results: Results, protocol: Protocol) -> list[dict[str, Any]]:
    chosen = plan(BASELINE, protocol, results.search, results.losses).chosen
    assert chosen is not None
    return [results.rows[run] for run in judged_runs(chosen, protocol)]


def step_seconds(results: Results, method: str) -> float | None:
    """Processor seconds of a step of training with a method."""
    if results.timing is None or method not in results.timing["optimizers"]:
        return None
    return results.timing["model"] + results.timing["optimizers"][method]


def _losses_at_time(results: Results, method: str, lines: list[dict[str, Any]]) -> list[float] | None:
    mine, base = step_seconds(results, method), step_seconds(results, BASELINE)
    if mine is None or base is None:
        return None
    steps = results.protocol.judge_steps * base / mine
    losses = [loss_at_step(line["losses"], steps) for line in lines]
    values = [loss for loss in losses if loss is not None]
    return values if len(values) == len(losses) else None
