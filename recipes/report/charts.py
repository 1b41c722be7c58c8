"""The charts of a report."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from leanstep._pages.charts import Events, Series, chart, compact, heat_map, smooth
from leanstep.recipes.report.budgets import peak_memory, validations
from leanstep.recipes.report.runlog import Run, number

_LONGEST = 100  # characters of a name
# model.layers.3.mlp.up_proj.weight[0]: block 3, up_proj
_BLOCK = re.compile(r"\.(\d{1,4})\.")
_ENDING = re.compile(r"(\.weight)?(\[\d+\])*$")
_MOST_CHARTS, _MOST_LINES = 12, 16  # of the optimizer's numbers; a model has hundreds of layers
_MOST_EVENTS = 100


def _fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}" if abs(value) < 1000 else compact(value)


def curves(runs: list[Run], most_points: int) -> str:
    """Draw loss over steps, tokens and time, validation, learning rate, gradient norm, speed and memory."""
    longest = max((run.last("elapsed_s") or 0.0 for run in runs), default=0.0)
    unit, per_unit = next((u, s) for u, s in (("h", 3600.0), ("min", 60.0), ("s", 1.0)) if longest >= 2 * s or s == 1)
    alone = len(runs) == 1
    marks = []
    if alone and (expected := runs[0].expectation()):
        marks = [(expected[0], f"expected validation loss {expected[0]:g}")]
    draw = partial(chart, most_points=most_points)
    draw_loss = partial(draw, y_format=_fixed(3))

    def over(key: str, scale: float = 1.0) -> Callable[[Run], list[float | None]]:
        return lambda run: [None if x is None else x / scale for x in run.column(key)]

    peaks = [peak for run in runs if (peak := max((x for x in run.column("lr") if x), default=None))]
    training, validation = _losses(runs, over("step")), _validation(runs, "loss")
    if alone:
        events = _spike_events(runs[0])
        losses = draw_loss(
            [*training, *validation], title="Loss", x_label="step", marks=marks, events=events, wide=True
        )
    else:
        losses = draw_loss(validation, title="Validation loss", x_label="step", wide=True)
        losses += draw_loss(training, title="Training loss over steps", x_label="step", wide=True)
        losses += _validation_costs(runs, draw_loss, unit, per_unit)
    over_time = _losses(runs, over("elapsed_s", per_unit))
    # rates of different optimizers differ by orders of magnitude
    log_rates = len(peaks) > 1 and max(peaks) > 8 * min(peaks)
    charts = [
        losses,
        draw_loss(_losses(runs, over("tokens")), title="Training loss over tokens", x_label="tokens"),
        draw_loss(over_time, title="Training loss over time", x_label=f"time ({unit})"),
        draw_loss(_validation(runs, "bits_per_byte"), title="Validation bits per byte", x_label="step"),
        draw(_plain(runs, "lr"), title="Learning rate", x_label="step", log_y=log_rates),
        draw(_plain(runs, "grad_norm"), title="Gradient norm", x_label="step", log_y=True),
        draw(_plain(runs, "tokens_per_s"), title="Tokens per second", x_label="step"),
        draw(_plain(runs, "memory_gib"), title="Peak device memory (GiB)", x_label="step"),
    ]
    return "".join(charts) or '<p class="lead">Nothing was logged yet.</p>'


def _validation_costs(runs: list[Run], draw_loss: Callable[..., str], unit: str, per_unit: float) -> str:

    def over(cost: str, scale: float = 1.0) -> list[Series]:
        series = []
        for color, run in enumerate(runs):
            points = validations(run, cost)
            series.append(Series(run.name, [x / scale for x, _ in points], [y for _, y in points], color, dots=True))
        return series

    memory_of, peaks = peak_memory(runs)
    last = [(peak, number(run.final_eval.get("loss"))) for peak, run in zip(peaks, runs, strict=True)]
    memory = [
        Series(run.name, [peak], [loss], color, dots=True)
        for color, (run, (peak, loss)) in enumerate(zip(runs, last, strict=True))
        if peak is not None and loss is not None
    ]
    return "".join(
        [
            draw_loss(over("tokens"), title="Validation loss over tokens", x_label="tokens"),
            draw_loss(over("elapsed_s", per_unit), title="Validation loss over time", x_label=f"time ({unit})"),
            draw_loss(memory, title="Validation loss against memory", x_label=f"peak {memory_of} memory (GiB)"),
        ]
    )


def _spike_events(run: Run) -> Events:
    texts: dict[float, str] = {}
    for entry in run.spike_entries[-_MOST_EVENTS:]:
        step, loss = number(entry.get("spike_step")), number(entry.get("loss"))
        done = {"skip": "skipped", "rollback": f"rolled back to step {entry['step']}"}.get(str(entry.get("action")))
        if step is not None and loss is not None and done is not None:
            text = f"step {step:.0f}, loss {_fixed(3)(loss)}: {done}"
            texts[step] = f"{texts[step]}; {text}" if step in texts else text
    return Events("loss spikes", list(texts), list(texts.values()))


def _losses(runs: list[Run], x_of: Callable[[Run], list[float | None]]) -> list[Series]:
    series = []
    for color, run in enumerate(runs):
        xs, ys = _known(x_of(run), run.column("loss"))
        name = "training" if len(runs) == 1 else run.name
        width = len(ys) // 40
        if width:
            series.append(Series(name, xs, ys, color, "faint"))
        series.append(Series(name, xs, smooth(ys, width), color))
    return series


def _known(xs: list[float | None], ys: list[float | None]) -> tuple[list[float], list[float | None]]:
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if x is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _validation(runs: list[Run], key: str) -> list[Series]:
    series = []
    for index, run in enumerate(runs):
        xs, ys = _known(run.column("step", "evals"), run.column(key, "evals"))
        if len(runs) == 1:
            series.append(Series("validation", xs, ys, 1, "dash", dots=True))
            averaged = run.column(f"ema_{key}", "evals")
            if any(value is not None for value in averaged):
                pairs = _known(run.column("step", "evals"), averaged)
                series.append(Series("validation, averaged weights", *pairs, 2, "dash", dots=True))
        else:
            series.append(Series(run.name, xs, ys, index, dots=True))
    return series


def _plain(runs: list[Run], key: str) -> list[Series]:
    names = [key.replace("_", " ") if len(runs) == 1 else run.name for run in runs]
    return [
        Series(name, *_known(run.column("step"), run.column(key)), color)
        for color, (name, run) in enumerate(zip(names, runs, strict=True))
    ]


def layer_map(rows: Sequence[Any], key: str, title: str) -> str:
    """Draw a number of each layer's row over kinds of matrices and blocks, or nothing where no name has a block."""
    cells = []
    for row in rows:
        value = number(row.get(key)) if isinstance(row, dict) else None
        name = str(row.get("name"))[:_LONGEST] if isinstance(row, dict) else ""
        block = _BLOCK.search(name)
        if block is not None and value is not None:
            cells.append((_ENDING.sub("", name, count=1).rpartition(".")[2], int(block[1]), value))
    return heat_map(cells, title=title, x_label="block")


def reported_curves(run: Run, section: str, most_points: int) -> str:
    """Draw the numbers of a section of the log: "optimizer", "sparsity", "attention" or "gate".

    Keys ``A/x`` and ``A/y`` are lines of one chart ``A``; other keys have a chart each.
    """
    groups: dict[str, list[str]] = {}
    for key in run.reported_keys(section):
        groups.setdefault(key.partition("/")[0], []).append(key)
    charts = []
    for name, keys in list(groups.items())[:_MOST_CHARTS]:
        # evenly spaced layers
        shown = keys if len(keys) <= _MOST_LINES else [keys[i * len(keys) // _MOST_LINES] for i in range(_MOST_LINES)]
        share = f" ({len(shown)} of {len(keys)})" if len(shown) < len(keys) else ""
        series = [
            Series(
                (key.partition("/")[2] or key)[:_LONGEST],
                *_known(run.column("step"), run.reported_column(section, key)),
                color,
            )
            for color, key in enumerate(shown)
        ]
        values = [y for line in series for y in line.y if y is not None]
        # layers often differ by orders of magnitude
        log_y = bool(values) and min(values) > 0 and max(values) > 30 * min(values)
        title = f"{section.capitalize()}: {name[:_LONGEST]}{share}"
        charts.append(chart(series, title=title, x_label="step", log_y=log_y, most_points=most_points))
    return "".join(charts)
