"""Write sweep.html and sweep.json: the picture of validation loss against each setting, and the table."""

import json
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote

from leanstep._files import write_text
from leanstep._pages.charts import COLORS, Events, Series, chart
from leanstep._pages.page import render
from leanstep.recipes.report.runlog import number
from leanstep.recipes.sweep.grid import SEED, Plan
from leanstep.recipes.sweep.results import Results, Row, as_dict, table
from leanstep.recipes.sweep.runner import describe

_TEMPLATE = Path(__file__).with_name("templates") / "sweep.html"
_MOST_TICKS = 16
_LOG_RATIO = 4  # largest by smallest value from which an axis is logarithmic


def write_pages(plan: Plan, results: Results, ends: dict[str, dict[str, Any]]) -> Path:
    """Write sweep.json and sweep.html into the folder of the sweep, atomically; return the path of the page."""
    content = json.dumps(as_dict(plan, results, ends), indent=1, allow_nan=False)
    write_text(plan.folder / "sweep.json", content + "\n")
    page = plan.folder / "sweep.html"
    write_text(page, _page(plan, results, ends))
    return page


def _page(plan: Plan, results: Results, ends: dict[str, dict[str, Any]]) -> str:
    header, *rows = table(results)
    grid = " ".join(f"{key}={','.join(texts)}" for key, texts in plan.grid.items())
    runs = []
    for run in plan.runs:
        report = plan.folder / "runs" / run.name / "report.html"
        link = f"runs/{quote(run.name)}/report.html" if report.is_file() else ""
        runs.append((str(run), link, describe(ends[run.name]) if run.name in ends else "not started"))
    return render(
        _TEMPLATE,
        title=f"Sweep of {plan.title}"[:200],
        lead=[grid[:2000], " ".join(plan.fixed)[:2000]],
        numbers=_tiles(plan, results, ends),
        warnings=[*results.edges, *_unfinished(results)],
        measure=results.measure.capitalize(),
        curves=pictures(plan, results),
        header=header,
        keys=len(header) - 4,
        rows=rows,
        runs=runs,
        footer=[plan.folder.name],
    )


def _tiles(plan: Plan, results: Results, ends: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    best, shown = results.best, []
    if best is not None and best.mean is not None:
        error = best.standard_error
        note = "one run" if error is None else f"± {error:.4f} (standard error of {len(best.losses)} runs)"
        shown += [(f"Best {results.measure}", f"{best.mean:.4f}", note)]
        shown += [(key, text[:40], "best value") for key, text in best.values.items()]
        shown.append(("Level with it", str(len(results.level)), "within two standard errors of the difference"))
    finished = sum(len(row.losses) for row in results.rows)
    diverged = sum(row.diverged for row in results.rows)
    return [*shown, ("Runs", f"{finished} of {len(plan.runs)}", f"{diverged} diverged")]


def _unfinished(results: Results) -> list[str]:
    missing = sum(row.missing for row in results.rows)
    return [f"{missing} runs have no result yet; the same command continues the sweep"] if missing else []


def pictures(plan: Plan, results: Results) -> str:
    """Draw validation loss against each swept key; a grid over seeds alone has no picture."""
    return "".join(_picture(plan, results, key) for key in plan.grid if key != SEED)


def _picture(plan: Plan, results: Results, key: str) -> str:
    texts = plan.grid[key]
    positions = _positions(texts)
    order = sorted(texts, key=positions.__getitem__)
    by_values = {tuple(row.values.items()): row for row in results.rows}
    others = {name: plan.grid[name] for name in plan.grid if name not in (key, SEED)}
    lines = []
    for combination in product(*others.values()):
        fixed = dict(zip(others, combination, strict=True))
        settings = [tuple((name, fixed.get(name, text)) for name in results.rows[0].values) for text in order]
        rows = [by_values.get(setting, Row(dict(setting), (), 0, 0)) for setting in settings]
        lines.append((" ".join(f"{name}={text}" for name, text in fixed.items()) or "mean", rows))
    if len(lines) > COLORS - 1:
        lowest = [min((rows[i] for _, rows in lines), key=_mean_or_infinity) for i in range(len(order))]
        lines = [("best of the other settings", lowest)]
    xs = [positions[text] for text in order]
    series = [
        Series(name, xs, [row.mean for row in rows], color, dots=True, spread=[row.standard_error for row in rows])
        for color, (name, rows) in enumerate(lines)
    ]
    marks: list[tuple[float, str]] = []
    best = results.best
    if best is not None and best.mean is not None:
        series.append(Series("best", [positions[best.values[key]]], [best.mean], COLORS - 1, dots=True))
        marks = [(best.mean, f"best: {best}, {best.mean:.4f}")]
    every = math.ceil(len(order) / _MOST_TICKS)
    return chart(
        series,
        title=f"{results.measure.capitalize()} against {key}",
        x_label=key,
        y_format="{:.4f}".format,
        marks=marks,
        events=_diverged(results.rows, key, positions),
        x_ticks=[(positions[text], text[:24]) for text in order[::every]],
        wide=True,
    )


def _mean_or_infinity(row: Row) -> float:
    return math.inf if row.mean is None else row.mean


def _positions(texts: Sequence[str]) -> dict[str, float]:
    """Where each value stands: by its logarithm, by itself, or, if one is no number, by its place in the list."""
    numbers = [number(text) for text in texts]
    known = [value for value in numbers if value is not None and math.isfinite(value)]
    if len(known) < len(texts):
        return {text: float(place) for place, text in enumerate(texts)}
    if min(known) > 0 and max(known) >= _LOG_RATIO * min(known):
        return {text: math.log10(value) for text, value in zip(texts, known, strict=True)}
    return dict(zip(texts, known, strict=True))


def _diverged(rows: Sequence[Row], key: str, positions: dict[str, float]) -> Events | None:
    counts: dict[str, int] = {}
    for row in rows:
        if row.diverged:
            counts[row.values[key]] = counts.get(row.values[key], 0) + row.diverged
    texts = [f"{key}={text}: {count} diverged" for text, count in counts.items()]
    return Events("diverged", [positions[text] for text in counts], texts) if counts else None
