"""The report: one self-contained HTML page about a run, or comparing several. No script, no network, under 300 KB."""

import os
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from leanstep.recipes.curves import PALETTE, STYLE, Series, chart, compact, smooth
from leanstep.recipes.runlog import Run, duration, flat, number, read_run

__all__ = ["MOST_BYTES", "write_report"]

MOST_BYTES = 300_000
_POINTS = (400, 200, 100, 50, 25, 10)  # of each curve: fewer when many runs would make the page too large
_MOST_TEXT = 12_000  # characters of a configuration or a sample


def write_report(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the report of one run, or the comparison of several, to ``out`` and return its path.

    Reads config.yaml, log.jsonl, status.json, env.json, train.log and command.txt of each run; what is missing or
    damaged is named in the report. The file replaces an older one at once and whole.

    Raises:
        ValueError: no folder is given, or one of them is no run folder.
        OSError: ``out`` cannot be written.
    """
    runs = [read_run(Path(folder)) for folder in run_dirs]
    if not runs:
        raise ValueError("a report needs at least one run folder")
    _name_apart(runs)
    for most_points, most_text in [(points, _MOST_TEXT) for points in _POINTS] + [(10, 400), (4, 0)]:
        page = _page(runs, most_points, most_text).encode()
        if len(page) < MOST_BYTES:
            break
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        partial.write_bytes(page)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return out


def _name_apart(runs: list[Run]) -> None:
    """Give runs of one name the names of their folders, with as many parents as it takes."""
    for depth in range(1, 6):
        names = [run.name for run in runs]
        for run in runs:
            if names.count(run.name) > 1:
                run.name = "/".join(run.folder.resolve().parts[-depth:])


# -- page -----------------------------------------------------------------------------------------------------------

_COLORS = {
    "light": "--page:#f6f7f9;--card:#fff;--text:#1a1d23;--muted:#5c6470;--line:#e3e6eb;--axis:#9aa2ae;--accent:#2457d6;"
    "--good:#0b7a4b;--good-back:#e2f5ec;--bad:#b42318;--bad-back:#fdeceb;--warn:#8a5a00;--warn-back:#fdf3dc;",
    "dark": "--page:#121418;--card:#1a1d23;--text:#e8eaee;--muted:#9aa3b0;--line:#2c313a;--axis:#59616e;"
    "--accent:#7aa8ff;--good:#5fd6a0;--good-back:#12301f;--bad:#ff8f86;--bad-back:#3a1614;--warn:#f0c060;"
    "--warn-back:#33270c;",
}


def _style() -> str:
    light, dark = ("".join(f"--c{i}:{colors[side]};" for i, colors in enumerate(PALETTE)) for side in (0, 1))
    return (
        f":root{{color-scheme:light dark;{_COLORS['light']}{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{_COLORS['dark']}{dark}}}}}\n" + _RULES + STYLE
    )


_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1040px;margin:0 auto;padding:32px 24px 48px}
h1{font-size:26px;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:17px;margin:34px 0 12px;letter-spacing:-.005em}
.head{display:flex;flex-wrap:wrap;align-items:center;gap:6px 14px}
.lead{color:var(--muted);margin:6px 0 0}
.badge{font-size:12.5px;font-weight:600;padding:2px 10px;border-radius:99px;white-space:nowrap}
.good{color:var(--good);background:var(--good-back)}
.bad{color:var(--bad);background:var(--bad-back)}
.warn{color:var(--warn);background:var(--warn-back)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px;margin:22px 0 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.tile span{display:block;color:var(--muted);font-size:12.5px}
.tile b{display:block;font-size:22px;font-weight:650;line-height:1.3;white-space:nowrap}
.tile small{display:block;color:var(--muted);font-size:12px;line-height:1.35}
.notes{margin:22px 0 0;padding:12px 16px 12px 34px;border-radius:10px}
.notes li{margin:2px 0;overflow-wrap:anywhere}
.grid{display:grid;grid-template-columns:1fr 1fr;gap:14px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th,td{padding:7px 10px;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
tr>:first-child{padding-left:14px}tr>:last-child{padding-right:14px}
tr:last-child>*{border-bottom:0}
thead th{color:var(--muted);font-weight:600;font-size:12.5px;white-space:nowrap}
tbody th{font-weight:500;color:var(--muted);white-space:nowrap}
td{overflow-wrap:anywhere}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.best{font-weight:700;color:var(--good)}
tbody th i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:8px;vertical-align:-1px}
pre{margin:0;padding:14px 16px;columns:2 400px;column-gap:28px;white-space:pre-wrap;overflow-wrap:anywhere;
font:12.5px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
blockquote{margin:0;padding:14px 18px;white-space:pre-wrap;overflow-wrap:anywhere;border-left:3px solid var(--accent)}
footer{margin-top:36px;color:var(--muted);font-size:12.5px;overflow-wrap:anywhere}
@media (max-width:720px){.grid{grid-template-columns:1fr}main{padding:20px 14px 32px}}
@media print{@page{margin:14mm}.tiles{grid-template-columns:repeat(4,1fr)}
body{background:#fff;font-size:10.5pt}main{max-width:none;padding:0}
.tile,tr,blockquote,.notes{break-inside:avoid}h2{break-after:avoid}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""


def _page(runs: list[Run], most_points: int, most_text: int) -> str:
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"[:200]
    body = _single(runs[0], most_points, most_text) if len(runs) == 1 else _comparison(runs, most_points, most_text)
    version = next((text for run in runs if (text := flat(run.env).get("versions.leanstep"))), "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        # whatever a configuration or a sample holds, nothing on this page may run or load
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_style()}</style></head><body><main>{body}"
        f"<footer>leanstep {escape(version)} &middot; {' &middot; '.join(escape(str(run.folder)) for run in runs)}"
        "</footer></main></body></html>\n"
    )


def _single(run: Run, most_points: int, most_text: int) -> str:
    parts = [
        f'<div class="head"><h1>{escape(run.name)}</h1>{_badge(run)}</div>',
        f'<p class="lead">{_lead(run)}</p>',
        _tiles(run),
        _notes(run.problems),
        "<h2>Curves</h2>",
        f'<div class="grid">{_curves([run], most_points)}</div>',
    ]
    if run.sample is not None and most_text:
        parts.append(f"<h2>A sample of its writing</h2><div class=card><blockquote>{_cut(run.sample, most_text)}")
        parts.append("</blockquote></div>")
    if run.evals:
        parts += ["<h2>Evaluations</h2>", _evaluations(run)]
    if run.config_text and most_text:
        parts += ["<h2>Configuration</h2>", f"<div class=card><pre>{_cut(run.config_text, most_text)}</pre></div>"]
    environment = flat(run.env) | ({"command": run.command} if run.command else {})
    if environment:
        parts += ["<h2>Environment</h2>", _pairs(environment)]
    return "".join(parts)


def _comparison(runs: list[Run], most_points: int, most_text: int) -> str:
    notes = [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    parts = [
        f"<h1>Comparison of {len(runs)} runs</h1>",
        '<p class="lead">Sorted by validation loss. Compare losses only between runs on the same text with the same '
        "tokenizer; bits per byte compares across tokenizers.</p>",
        "<h2>Results</h2>",
        _results(runs),
        _notes(notes),
        "<h2>Curves</h2>",
        f'<div class="grid">{_curves(runs, most_points)}</div>',
        "<h2>What differs</h2>",
        _differences([flat(run.config) for run in runs], runs, "The configurations are the same."),
        "<h2>Where they ran</h2>",
        _differences([flat(run.env) for run in runs], runs, "The environments are the same.", only_different=False),
    ]
    if most_text:
        share = most_text // len(runs)
        samples = [(run.name, run.sample) for run in runs if run.sample is not None]
        if samples:
            parts.append("<h2>Samples of their writing</h2><div class=card><table><tbody>")
            parts += [f"<tr><th>{escape(name)}</th><td>{_cut(sample, share)}</td></tr>" for name, sample in samples]
            parts.append("</tbody></table></div>")
    return "".join(parts)


# -- parts ----------------------------------------------------------------------------------------------------------


def _cut(text: str, most: int) -> str:
    return escape(text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} characters more)")


def _badge(run: Run) -> str:
    kind = {"done": "good", "running": "warn", "interrupted": "warn", "unknown": "warn"}.get(run.state, "bad")
    return f'<span class="badge {kind}">{escape(run.state.replace(":", ": "))}</span>'


def _notes(problems: list[str]) -> str:
    if not problems:
        return ""
    return f'<ul class="notes warn">{"".join(f"<li>{escape(problem)}</li>" for problem in problems)}</ul>'


def _lead(run: Run) -> str:
    """The description, and below it in one line what was trained, how, on what, when."""
    optimizer, rate = run.setting("optimizer.name"), run.setting("optimizer.lr")
    facts = [
        f"{parameters:,.0f} parameters" if (parameters := number(run.env.get("parameters"))) else "",
        str(run.setting("model.family") or ""),
        f"{optimizer}, lr {rate}" if optimizer else "",
        f"data {run.setting('data.source')}" if run.setting("data.source") else "",
        f"seed {run.setting('seed')}" if run.setting("seed") is not None else "",
        str(run.env.get("started") or "")[:10],
    ]
    lines = [str(run.config.get("description") or ""), " · ".join(fact for fact in facts if fact)]
    return "<br>".join(escape(line) for line in lines if line)


def _tiles(run: Run) -> str:
    final = run.final_eval
    loss, per_byte = number(final.get("loss")), number(final.get("bits_per_byte"))
    expected, verdict = run.expectation(), ""
    if expected:
        verdict = f"expected {expected[0]:g} ± {expected[1]:g}: {'met' if expected[2] else 'not met'}"
    elif loss is not None:
        verdict = f"at step {final.get('step')}"
    tiles = [("Validation loss", f"{loss:.4f}", verdict)] if loss is not None else []
    if (perplexity := number(final.get("perplexity"))) is not None:
        tiles.append(("Perplexity", f"{perplexity:.2f}", f"over {compact(number(final.get('tokens')) or 0)} tokens"))
    if per_byte is not None:
        tiles.append(("Bits per byte", f"{per_byte:.4f}", "comparable across tokenizers"))
    if (train := run.last("loss")) is not None:
        tiles.append(("Training loss", f"{train:.4f}", "last logged step"))
    step, steps = run.status.get("step"), run.status.get("steps")
    if step is not None:
        tiles.append(("Steps", f"{step:,}", f"of {steps:,}" if isinstance(steps, int) else ""))
    if (tokens := run.last("tokens")) is not None:
        tiles.append(("Tokens", compact(tokens), "trained on"))
    if (speed := run.speed()) is not None:
        tiles.append(("Tokens per second", compact(speed), "median"))
    tiles.append(("Time", duration(run.last("elapsed_s")), str(run.env.get("device") or "")))
    if (memory := run.last("memory_gib")) is not None:
        tiles.append(("Peak memory", f"{memory:.2f} GiB", "on the device"))
    cells = (
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>'
        for name, value, note in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _pairs(values: dict[str, str]) -> str:
    rows = (f"<tr><th>{escape(name)}</th><td>{escape(value[:1000])}</td></tr>" for name, value in values.items())
    return f'<div class="card"><table><tbody>{"".join(rows)}</tbody></table></div>'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric_from: int = 1) -> str:
    """A table of ready HTML cells; columns from ``numeric_from`` on are numbers, set flush right."""
    heads = "".join(f"<th{' class=n' if i >= numeric_from else ''}>{cell}</th>" for i, cell in enumerate(header))
    body = ""
    for row in rows:
        cells = "".join(
            cell if cell.startswith("<td") else f"<td{' class=n' if i >= numeric_from else ''}>{cell}</td>"
            for i, cell in enumerate(row[1:], start=1)
        )
        body += f"<tr><th>{row[0]}</th>{cells}</tr>"
    return f'<div class="card"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _evaluations(run: Run) -> str:
    shown = run.evals if len(run.evals) <= 25 else run.evals[:: -(-len(run.evals) // 24)]
    if shown[-1] is not run.evals[-1]:
        shown = [*shown, run.evals[-1]]
    keys = (("loss", "{:.4f}"), ("perplexity", "{:.2f}"), ("bits_per_byte", "{:.4f}"), ("tokens", "{:,.0f}"))
    rows = ([escape(str(row["step"])), *(_formatted(row.get(key), pattern) for key, pattern in keys)] for row in shown)
    return _table(["Step", "Loss", "Perplexity", "Bits per byte", "Tokens"], rows)


def _formatted(value: Any, pattern: str) -> str:
    known = number(value)
    return "-" if known is None else pattern.format(known)


def _results(runs: list[Run]) -> str:
    def key(pair: tuple[int, Run]) -> float:
        loss = number(pair[1].final_eval.get("loss"))
        return float("inf") if loss is None or loss != loss else loss

    ordered = sorted(enumerate(runs), key=key)
    best = min((key(pair) for pair in ordered if pair[1].state == "done"), default=None)
    rows = []
    for index, run in ordered:
        loss = _formatted(run.final_eval.get("loss"), "{:.4f}")
        swatch = f'<i style="background:var(--c{index % len(PALETTE)})"></i>'
        rows.append(
            [
                f"{swatch}{escape(run.name)}",
                f"<td>{_badge(run)}</td>",
                f"<td>{escape(str(run.setting('optimizer.name') or '-'))}</td>",
                _formatted(run.setting("optimizer.lr"), "{:g}"),
                f'<td class="n{" best" if run.state == "done" and key((index, run)) == best else ""}">{loss}</td>',
                _formatted(run.final_eval.get("perplexity"), "{:.2f}"),
                _formatted(run.final_eval.get("bits_per_byte"), "{:.4f}"),
                _formatted(run.status.get("step"), "{:,.0f}"),
                compact(tokens) if (tokens := run.last("tokens")) is not None else "-",
                compact(speed) if (speed := run.speed()) is not None else "-",
                duration(run.last("elapsed_s")),
            ]
        )
    header = ["Run", "Status", "Optimizer", "lr", "Val loss", "Perplexity", "Bits/byte", "Steps", "Tokens", "Tokens/s"]
    return _table([*header, "Time"], rows, numeric_from=3)


def _differences(columns: list[dict[str, str]], runs: list[Run], same: str, *, only_different: bool = True) -> str:
    """A table of the keys whose values differ between runs (all the keys, if asked), one column a run."""
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = []
    for key in keys:
        values = [column.get(key, "-") for column in columns]
        if len(set(values)) > 1 and key not in ("name", "out", "source_file"):
            rows.append([escape(key), *(f"<td>{escape(value[:200])}</td>" for value in values)])
        elif not only_different and key in ("device", "versions.torch", "versions.leanstep", "world"):
            rows.append([escape(key), f"<td colspan={len(runs)}>{escape(values[0][:200])}</td>"])
    if not rows:
        return f'<p class="lead">{same}</p>'
    return _table(["", *(escape(run.name) for run in runs)], rows, numeric_from=99)


# -- curves ---------------------------------------------------------------------------------------------------------


def _fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}" if abs(value) < 1000 else compact(value)


def _curves(runs: list[Run], most_points: int) -> str:
    """All charts: loss over steps, tokens and time, validation, learning rate, gradient norm, speed, memory."""
    longest = max((run.last("elapsed_s") or 0.0 for run in runs), default=0.0)
    unit, per_unit = next((u, s) for u, s in (("h", 3600.0), ("min", 60.0), ("s", 1.0)) if longest >= 2 * s or s == 1)
    alone = len(runs) == 1
    marks = []
    if alone and (expected := runs[0].expectation()):
        marks = [(expected[0], f"expected validation loss {expected[0]:g}")]
    settings = {"most_points": most_points}

    def over(key: str, scale: float = 1.0) -> Callable[[Run], list[float | None]]:
        return lambda run: [None if x is None else x / scale for x in run.column(key)]

    peaks = [peak for run in runs if (peak := max((x for x in run.column("lr") if x), default=None))]
    steps, losses = _losses(runs, over("step")), {"y_format": _fixed(3), **settings}
    charts = [
        chart([*steps, *_validation(runs, "loss")], title="Loss", x_label="step", marks=marks, wide=True, **losses)
        if alone
        else chart(_validation(runs, "loss"), title="Validation loss", x_label="step", wide=True, **losses)
        + chart(steps, title="Training loss over steps", x_label="step", wide=True, **losses),
        chart(_losses(runs, over("tokens")), title="Training loss over tokens", x_label="tokens", **losses),
        chart(
            _losses(runs, over("elapsed_s", per_unit)),
            title="Training loss over time",
            x_label=f"time ({unit})",
            **losses,
        ),
        chart(_validation(runs, "bits_per_byte"), title="Validation bits per byte", x_label="step", **losses),
        chart(
            _plain(runs, "lr"),
            title="Learning rate",
            x_label="step",
            # rates of different optimizers differ by orders of magnitude
            log_y=len(peaks) > 1 and max(peaks) > 8 * min(peaks),
            **settings,
        ),
        chart(_plain(runs, "grad_norm"), title="Gradient norm", x_label="step", log_y=True, **settings),
        chart(_plain(runs, "tokens_per_s"), title="Tokens per second", x_label="step", **settings),
        chart(_plain(runs, "memory_gib"), title="Peak device memory (GiB)", x_label="step", **settings),
    ]
    drawn = "".join(charts)
    return drawn or '<p class="lead">Nothing was logged yet.</p>'


def _losses(runs: list[Run], x_of: Callable[[Run], list[float | None]]) -> list[Series]:
    """The training loss of each run: smoothed over a neighbourhood, with the raw values faint behind it."""
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
        else:
            series.append(Series(run.name, xs, ys, index, dots=True))
    return series


def _plain(runs: list[Run], key: str) -> list[Series]:
    names = [key.replace("_", " ") if len(runs) == 1 else run.name for run in runs]
    return [
        Series(name, *_known(run.column("step"), run.column(key)), color)
        for color, (name, run) in enumerate(zip(names, runs, strict=True))
    ]
