"""The results of a sweep: mean and standard error of each setting, the best one, and whether it lies on an edge."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from leanstep.recipes.report.runlog import number
from leanstep.recipes.sweep.grid import SEED, TOKENIZER, Plan
from leanstep.recipes.sweep.ledger import DIVERGED, DONE

LOSS, BITS = "validation loss", "bits per byte"


@dataclass(frozen=True)
class Row:
    """The runs of one setting.

    Attributes:
        values: the swept keys without the seed, and their texts.
        losses: validation losses of the runs that are done, or their bits per byte.
        diverged, missing: numbers of runs without one: NaN or a loss above the limit; failed, stopped or not started.
    """

    values: dict[str, str]
    losses: tuple[float, ...]
    diverged: int
    missing: int

    @property
    def mean(self) -> float | None:
        """Mean loss. None if a run diverged: the others alone would flatter the setting."""
        return fmean(self.losses) if self.losses and not self.diverged else None

    @property
    def standard_error(self) -> float | None:
        """Standard deviation / sqrt(n); None for fewer than two losses, or without a mean."""
        return stdev(self.losses) / math.sqrt(len(self.losses)) if len(self.losses) > 1 and not self.diverged else None

    @property
    def is_complete(self) -> bool:
        """Whether all runs are done."""
        return not self.missing and self.mean is not None

    def __str__(self) -> str:
        return " ".join(f"{key}={text}" for key, text in self.values.items()) or "all runs"


@dataclass(frozen=True)
class Results:
    """The table of a sweep.

    Attributes:
        rows: one per setting, in the order of the grid.
        best: the complete setting of the lowest mean; None while no setting is complete.
        level: other complete settings within two standard errors of the difference to the best.
        edges: a sentence for each key whose best value is the smallest or the largest one.
        measure: what the losses are.
    """

    rows: list[Row]
    best: Row | None
    level: list[Row]
    edges: list[str]
    measure: str = LOSS

    @property
    def ordered(self) -> list[Row]:
        """The rows, lowest mean first, those without a mean last."""
        return sorted(self.rows, key=lambda row: math.inf if row.mean is None else row.mean)


def summarize(plan: Plan, ends: dict[str, dict[str, Any]]) -> Results:
    """Average the validation losses of ``ends``, the last end entry of each run, over the seeds.

    In a sweep over ``ema.decay`` they are those of the averaged weights, which alone depend on it. In one over
    ``data.tokenizer`` they are bits per byte, since losses per token of different tokenizers do not compare.
    """
    losses = ("ema_loss", "val_loss") if "ema.decay" in plan.grid else ("val_loss",)
    measure = BITS if TOKENIZER in plan.grid else LOSS
    settings: dict[tuple[tuple[str, str], ...], list[dict[str, Any]]] = {}
    for run in plan.runs:
        settings.setdefault(run.setting, []).append(ends.get(run.name, {}))
    rows = [_row(dict(setting), entries, losses, per_byte=measure == BITS) for setting, entries in settings.items()]
    complete = [row for row in rows if row.is_complete]
    best = min(complete, key=lambda row: row.mean or 0.0, default=None)
    level = [] if best is None else [row for row in complete if row is not best and _is_level(row, best)]
    is_tied = best is not None and any(row.mean == best.mean for row in level)
    return Results(rows, best, level, [] if best is None or is_tied else _edges(plan, best), measure)


def _row(values: dict[str, str], entries: Sequence[dict[str, Any]], keys: Sequence[str], *, per_byte: bool) -> Row:
    """The row of a setting; the loss of a run is the first of ``keys`` that its entry has, or that in bits per byte."""
    done = [entry for entry in entries if entry.get("status") == DONE]
    losses = [next((value for key in keys if (value := number(entry.get(key))) is not None), None) for entry in done]
    if per_byte:
        losses = [_per_byte(loss, entry) for loss, entry in zip(losses, done, strict=True)]
    sound = tuple(loss for loss in losses if loss is not None and math.isfinite(loss))
    diverged = sum(entry.get("status") == DIVERGED for entry in entries)
    return Row(values, sound, diverged, len(entries) - len(sound) - diverged)


def _per_byte(loss: float | None, entry: dict[str, Any]) -> float | None:
    """A loss per token in bits per byte, as its run counted them; None if it did not."""
    bits, of_loss = number(entry.get("bits_per_byte")), number(entry.get("val_loss"))
    return None if loss is None or not bits or not of_loss else loss * bits / of_loss


def _is_level(row: Row, best: Row) -> bool:
    """Whether the means are equal, or two standard errors of the difference cover it, where they are known."""
    if row.mean == best.mean:
        return True
    if row.standard_error is None or best.standard_error is None or row.mean is None or best.mean is None:
        return False
    return row.mean - best.mean <= 2 * math.hypot(row.standard_error, best.standard_error)


def _edges(plan: Plan, best: Row) -> list[str]:
    sentences = []
    for key, texts in plan.grid.items():
        numbers = [number(text) for text in texts]
        if key == SEED or any(value is None for value in numbers):
            continue
        best_value = number(best.values[key])
        for name, limit, advice in (("smallest", min, "smaller"), ("largest", max, "larger")):
            if best_value == limit(value for value in numbers if value is not None):
                sentences.append(
                    f"{key}={best.values[key]} is the {name} value of the grid: the best one may be {advice}"
                )
    return sentences


def table(results: Results) -> list[list[str]]:
    """Header and rows as text, lowest mean first."""
    keys = list(results.rows[0].values) if results.rows else []
    lines = [[*keys, "mean loss" if results.measure == LOSS else f"mean {BITS}", "standard error", "runs", ""]]
    for row in results.ordered:
        notes = ["best"] if row is results.best else ["level with the best"] if row in results.level else []
        notes += [f"{row.diverged} diverged"] if row.diverged else []
        notes += [f"{row.missing} missing"] if row.missing else []
        lines.append(
            [
                *row.values.values(),
                "-" if row.mean is None else f"{row.mean:.4f}",
                "-" if row.standard_error is None else f"{row.standard_error:.4f}",
                str(len(row.losses) + row.diverged),
                ", ".join(notes),
            ]
        )
    return lines


def as_dict(plan: Plan, results: Results, ends: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The content of sweep.json."""

    def row_facts(row: Row) -> dict[str, Any]:
        facts = {"values": row.values, "mean": row.mean, "standard_error": row.standard_error}
        return {**facts, "losses": list(row.losses), "diverged": row.diverged, "missing": row.missing}

    return {
        "recipe": plan.recipe,
        "overrides": list(plan.fixed),
        "grid": plan.grid,
        "measure": results.measure,
        "best": None if results.best is None else results.best.values,
        "level_with_best": [row.values for row in results.level],
        "edges": results.edges,
        "settings": [row_facts(row) for row in results.rows],
        "runs": [
            {"name": run.name, "values": run.values, **{"status": "not started"}, **_facts(ends.get(run.name, {}))}
            for run in plan.runs
        ],
    }


def _facts(entry: dict[str, Any]) -> dict[str, Any]:
    """The facts of an end entry; JSON has no NaN, so numbers that are not finite are null."""
    facts = {key: value for key, value in entry.items() if key not in ("kind", "run")}
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in facts.items()}
