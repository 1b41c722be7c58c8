"""The report: a self-contained HTML page about a run, or a comparison of several. No scripts, under 300 KB."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from leanstep._files import replacing, table_lines
from leanstep._pages.charts import COLORS, compact
from leanstep._pages.page import render
from leanstep.recipes.report.budgets import compare, rows
from leanstep.recipes.report.charts import curves, layer_map, reported_curves
from leanstep.recipes.report.runlog import Run, duration, flat, number, read_run

MOST_BYTES = 300_000
_POINTS = (400, 200, 100, 50, 25, 10)  # of each curve: fewer when many runs would make the page too large
_MOST_TEXT = 12_000  # characters of a configuration or a sample
_MOST_EVALUATIONS = 25
_WORD, _ROWS, _COLUMNS = 200, 200, 40  # characters of a name; rows and columns of a table from a run's files
_TEMPLATES = Path(__file__).with_name("templates")
# section of the log -> title, file of its rows, columns to show (none: all)
_SECTIONS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "sparsity": ("Sparsity", "sparsity_report.json", ()),
    "attention": (
        "Attention norms",
        "attention_report.json",
        ("layer", "head", "rho", "certified", "sampled", "degree", "error", "cost", "drift", "status", "why"),
    ),
    "gate": (
        "Low-rank attention",
        "gate_report.json",
        ("layer", "low_rank", "calls", "low_rank_calls", "fallbacks", "error", "largest_error", "cost", "reason"),
    ),
    "optimizer": ("Optimizer", "optimizer_report.json", ()),
}
# section -> column of its rows that is drawn over the layers, and its title
_MAPS = {"sparsity": ("sparsity", "Sparsity of each matrix"), "optimizer": ("factor", "Step size of each matrix")}
_NAMES = ("name", "out", "source_file")  # they differ between any two runs
_SHARED_FACTS = ("device", "versions.torch", "versions.leanstep", "world")


def write_report(run_dirs: Sequence[str | Path], out: str | Path, *, refresh: int = 0) -> Path:
    """Write the report of one run, or the comparison of several, to ``out`` and return its path.

    ``refresh``: seconds after which a browser loads the page again; 0 for never.

    Reads config.yaml, log.jsonl, status.json, env.json, train.log, command.txt and the ``*_report.json`` files of each
    run. The report lists missing or damaged files. The write is atomic.

    Raises:
        ValueError: no folder is given, or one of them is no run folder.
        OSError: ``out`` cannot be written.
    """
    runs = [read_run(Path(folder)) for folder in run_dirs]
    if not runs:
        raise ValueError("a report needs at least one run folder")
    _name_apart(runs)
    for most_points, most_text in [(points, _MOST_TEXT) for points in _POINTS] + [(10, 400), (4, 0)]:
        page = _page(runs, most_points, most_text, refresh).encode("utf-8")
        if len(page) < MOST_BYTES:
            break
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial:
        partial.write_bytes(page)
    return out


def watch(run_dirs: Sequence[str | Path], out: str | Path, seconds: int) -> Path:
    """Write the report every ``seconds`` while a run is running, and once more at the end.

    The page tells a browser to load it again; the last one, also after Ctrl-C, does not. Raises as
    :func:`write_report`.
    """
    try:
        while any(read_run(Path(folder)).state == "running" for folder in run_dirs):
            write_report(run_dirs, out, refresh=seconds)
            time.sleep(seconds)
    finally:
        page = write_report(run_dirs, out)
    return page


def comparison_lines(run_dirs: Sequence[str | Path]) -> list[str]:
    """Lines for a terminal: a table of the runs, best validation loss first, and which of them is ahead."""
    runs = [read_run(Path(folder)) for folder in run_dirs]
    _name_apart(runs)
    table = [
        ["RUN", "OPTIMIZER", "LR", "LOSS", "PERPLEXITY", "BITS/BYTE", "STEP", "TOKENS", "TOKENS/S", "TIME", "STATE"]
    ]
    for row in _results(runs):
        run = row["run"]
        table.append([run.name, row["optimizer"], row["rate"], row["loss"], *row["numbers"], run.state])
    return [*table_lines(table), *_verdict(runs)]


def _verdict(runs: list[Run]) -> list[str]:
    """Sentences: the run of the lowest loss at equal tokens and at equal time, and how far these compare."""
    at = compare(runs)
    lines = []
    for budget, losses in ((f"{compact(at.tokens or 0)} tokens", at.at_tokens), (duration(at.seconds), at.at_seconds)):
        ranked = sorted((loss, run.name) for loss, run in zip(losses, runs, strict=True) if loss is not None)
        if len(ranked) == len(runs):
            (lowest, best), *others = ranked
            behind = ", ".join(f"{name} {loss - lowest:+.4f}" for loss, name in others if loss > lowest)
            verdict = f"{best} has the lowest validation loss, {lowest:.4f}; {behind}"
            lines.append(f"at {budget} {verdict if behind else f'all have the validation loss {lowest:.4f}'}")
    if not lines:
        return ["no verdict: not every run has a validation loss within the tokens or the time of the shortest run"]
    data = [key for key, _ in differences([flat(run.config) for run in runs]) if key.startswith("data.")]
    if data:
        lines.append(f"the runs differ in {', '.join(data[:5])}: their losses may be of other texts or sequences")
    return [*lines, "one run each: a loss also moves with the seed; `leanstep sweep RECIPE seed=0,1,2` shows how far"]


def _name_apart(runs: list[Run]) -> None:
    """Rename runs of equal names to their folders, with as many parents as necessary."""
    for depth in range(1, 6):
        names = [run.name for run in runs]
        for run in runs:
            if names.count(run.name) > 1:
                run.name = "/".join(_place(run)[-depth:])


def _place(run: Run) -> tuple[str, ...]:
    """Parts of the run folder's path, or of ``out`` as recorded: it may name variables, whose values reports omit."""
    out = str(run.setting("out") or "")
    return (out,) if "${" in out else run.folder.resolve().parts


def _page(runs: list[Run], most_points: int, most_text: int, refresh: int = 0) -> str:
    version = next((text for run in runs if (text := flat(run.env).get("versions.leanstep"))), "")
    shared = {
        "version": version,
        "refresh": refresh,
        "footer": [_place(run)[-1][:_WORD] for run in runs],
        "curves": curves(runs, most_points),
    }
    if len(runs) == 1:
        return render(_TEMPLATES / "run.html", **shared, **_single(runs[0], most_points, most_text))
    return render(_TEMPLATES / "comparison.html", **shared, **_comparison(runs, most_text))


def _single(run: Run, most_points: int, most_text: int) -> dict[str, Any]:
    environment = flat(run.env) | ({"command": run.command} if run.command else {})
    return {
        "title": run.name,
        "run": run,
        "lead": _lead(run),
        "numbers": _tiles(run),
        "sections": list(_sections(run, most_points, most_text)),
        "sample": _cut(run.sample, most_text),
        "evaluations": _evaluations(run),
        "configuration": _cut(run.config_text, most_text),
        "environment": [(name[:_WORD], value[:1000]) for name, value in list(environment.items())[:_ROWS]],
    }


def _cut(text: str | None, most: int) -> str:
    if not text or not most:
        return ""
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} characters more)"


def _lead(run: Run) -> list[str]:
    optimizer, rate = run.setting("optimizer.name"), run.setting("optimizer.lr")
    facts = [
        f"{parameters:,.0f} parameters" if (parameters := number(run.env.get("parameters"))) else "",
        str(run.setting("model.family") or ""),
        f"{optimizer}, lr {rate}" if optimizer else "",
        f"data {run.setting('data.source')}" if run.setting("data.source") else "",
        f"seed {run.setting('seed')}" if run.setting("seed") is not None else "",
        str(run.env.get("started") or "")[:10],
    ]
    lines = [str(run.config.get("description") or ""), " · ".join(fact[:_WORD] for fact in facts if fact)]
    return [line[:2000] for line in lines if line]


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """The main results as (name, value, note)."""
    final = run.final_eval
    loss, per_byte = number(final.get("loss")), number(final.get("bits_per_byte"))
    expected, verdict = run.expectation(), ""
    if expected:
        verdict = f"expected {expected[0]:g} ± {expected[1]:g}: {'met' if expected[2] else 'not met'}"
    elif loss is not None:
        verdict = f"at step {final.get('step')}"
    shown = [("Validation loss", f"{loss:.4f}", verdict)] if loss is not None else []
    if (averaged := number(final.get("ema_loss"))) is not None:
        shown.append(("Validation loss", f"{averaged:.4f}", "averaged weights"))
    if (perplexity := number(final.get("perplexity"))) is not None:
        shown.append(("Perplexity", f"{perplexity:.2f}", f"over {compact(number(final.get('tokens')) or 0)} targets"))
    if per_byte is not None:
        shown.append(("Bits per byte", f"{per_byte:.4f}", "comparable across tokenizers"))
    if (train := run.last("loss")) is not None:
        shown.append(("Training loss", f"{train:.4f}", "last logged step"))
    step, steps = number(run.status.get("step")), number(run.status.get("steps"))
    if step is not None:
        shown.append(("Steps", _count(step), "" if steps is None else f"of {_count(steps)}"))
    if spikes := run.spikes():
        shown.append(("Loss spikes", f"{spikes[0] + spikes[1]:,}", f"{spikes[0]:,} skipped, {spikes[1]:,} rolled back"))
    if (tokens := run.last("tokens")) is not None:
        shown.append(("Tokens", compact(tokens), "targets trained on"))
    if (speed := run.median("tokens_per_s")) is not None:
        shown.append(("Tokens per second", compact(speed), "targets, median"))
    if (work := run.median("tflops")) is not None:
        used = run.median("mfu")
        shown.append(("Model TFLOP/s", compact(work), "6N + 12Lhs" if used is None else f"{used:.1%} of the peak"))
    shown.append(("Time", duration(run.last("elapsed_s")), str(run.env.get("device") or "")[:_WORD]))
    if (memory := run.last("memory_gib")) is not None:
        shown.append(("Peak memory", f"{memory:.2f} GiB", "on the device"))
    elif (memory := run.last("process_gib")) is not None:
        shown.append(("Peak memory", f"{memory:.2f} GiB", "of the first process, libraries included"))
    return shown


def _sections(run: Run, most_points: int, most_text: int) -> Iterator[dict[str, Any]]:
    """Sections of the methods in this run: curves, and rows of the final report."""
    layers = run.sparsity_report.get("layers")
    rows = {
        "sparsity": layers if isinstance(layers, list) else [],
        "attention": run.attention_report,
        "gate": run.gate_report,
        "optimizer": run.optimizer_report,
    }
    for name, (title, file, columns) in _SECTIONS.items():
        if run.reported_keys(name) or rows[name] or (name == "sparsity" and run.sparsity_report):
            yield {
                "title": title,
                "curves": _map(rows[name], name) + reported_curves(run, name, min(most_points, 200)),
                "operations": _operations(run) if name == "sparsity" else [],
                "table": _table([row for row in rows[name] if isinstance(row, dict)], columns, most_text),
                "file": file,
            }


def _map(rows: list[Any], section: str) -> str:
    return layer_map(rows, *_MAPS[section]) if section in _MAPS else ""


def _operations(run: Run) -> list[tuple[str, str, str]]:
    counts = run.sparsity_report.get("operations")
    known = {name: number(value) for name, value in counts.items()} if isinstance(counts, dict) else {}
    dense = known.get("dense")
    rows = [(name[:_WORD], value) for name, value in known.items() if value is not None][:_ROWS]
    return [(name, compact(value), f"{value / dense:.3f}" if dense else "-") for name, value in rows]


def _table(reported: list[dict[str, Any]], columns: tuple[str, ...], most_text: int) -> dict[str, Any]:
    """A table with as many rows as fit, and ``columns`` or all columns."""
    shown = reported[: max(1, most_text // 120)]
    present = list(dict.fromkeys(key for row in shown for key in row))
    header = [key for key in columns if key in present] if columns else present[:_COLUMNS]
    cells = [[_cell(row.get(key, "")) for key in header] for row in shown]
    return {"header": [key[:_WORD] for key in header], "rows": cells, "left_out": len(reported) - len(shown)}


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:200]


def _evaluations(run: Run) -> list[list[str]]:
    """Rows of the validations, evenly spaced if there are many, the last one included."""
    shown = run.evals
    if len(shown) > _MOST_EVALUATIONS:
        shown = run.evals[:: -(-len(run.evals) // (_MOST_EVALUATIONS - 1))]
        if shown[-1] is not run.evals[-1]:
            shown = [*shown, run.evals[-1]]
    formats = {"loss": "{:.4f}", "perplexity": "{:.2f}", "bits_per_byte": "{:.4f}", "tokens": "{:,.0f}"}
    return [[str(row["step"]), *(_format(row.get(key), text) for key, text in formats.items())] for row in shown]


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _format(value: Any, text: str) -> str:
    known = number(value)
    return "-" if known is None else text.format(known)


def _comparison(runs: list[Run], most_text: int) -> dict[str, Any]:
    configurations, environments = [flat(run.config) for run in runs], [flat(run.env) for run in runs]
    header, budgets = rows(compare(runs), [run.name for run in runs])
    return {
        "budgets": {"header": header, "rows": budgets},
        "title": f"{len(runs)} runs: {', '.join(run.name for run in runs)}"[:200],
        "runs": runs,
        "results": _results(runs),
        "problems": [f"{run.name}: {problem}" for run in runs for problem in run.problems],
        "configurations": differences(configurations),
        "environments": differences(environments, always=_SHARED_FACTS),
        "samples": [(run.name, text) for run in runs if (text := _cut(run.sample, most_text // len(runs)))],
    }


def _results(runs: list[Run]) -> list[dict[str, Any]]:
    """A row for each run, best validation loss first."""

    def loss_of(run: Run) -> float:
        loss = number(run.final_eval.get("loss"))
        return float("inf") if loss is None or loss != loss else loss

    ordered = sorted(enumerate(runs), key=lambda pair: loss_of(pair[1]))
    best = min((loss_of(run) for run in runs if run.state == "done"), default=float("inf"))
    return [
        {
            "run": run,
            "color": index % COLORS,
            "optimizer": str(run.setting("optimizer.name") or "-")[:_WORD],
            "rate": _format(run.setting("optimizer.lr"), "{:g}"),
            "loss": _format(run.final_eval.get("loss"), "{:.4f}"),
            "best": run.state == "done" and loss_of(run) == best < float("inf"),
            "numbers": [
                _format(run.final_eval.get("perplexity"), "{:.2f}"),
                _format(run.final_eval.get("bits_per_byte"), "{:.4f}"),
                _format(run.status.get("step"), "{:,.0f}"),
                compact(tokens) if (tokens := run.last("tokens")) is not None else "-",
                compact(speed) if (speed := run.median("tokens_per_s")) is not None else "-",
                duration(run.last("elapsed_s")),
            ],
        }
        for index, run in ordered
    ]


def differences(columns: list[dict[str, str]], always: tuple[str, ...] = ()) -> list[tuple[str, list[str]]]:
    """List (key, values of all runs) where runs differ, and (key, [value]) for equal keys in ``always``."""
    rows = []
    for key in dict.fromkeys(key for column in columns for key in column):
        values = [column.get(key, "-")[:200] for column in columns]
        if len(set(values)) > 1 and key not in _NAMES:
            rows.append((key, values))
        elif key in always:
            rows.append((key, values[:1]))
    return [(key[:_WORD], values) for key, values in rows[:_ROWS]]
