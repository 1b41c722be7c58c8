"""The report: one self-contained HTML page about a run, or comparing several. No script, no network, under 300 KB."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from leanstep._files import replacing
from leanstep._page import style
from leanstep.recipes.report.charts import curves, reported_curves
from leanstep.recipes.report.parts import (
    attention_table,
    badge,
    cut,
    differences,
    evaluations,
    gate_table,
    lead,
    notes,
    optimizer_table,
    pairs,
    results,
    sparsity_tables,
    tiles,
)
from leanstep.recipes.report.runlog import Run, flat, read_run

__all__ = ["MOST_BYTES", "write_report"]

MOST_BYTES = 300_000
_POINTS = (400, 200, 100, 50, 25, 10)  # of each curve: fewer when many runs would make the page too large
_MOST_TEXT = 12_000  # characters of a configuration or a sample


def write_report(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the report of one run, or the comparison of several, to ``out`` and return its path.

    Reads config.yaml, log.jsonl, status.json, env.json, train.log, command.txt, optimizer_report.json and
    sparsity_report.json, attention_report.json and gate_report.json of each run;
    what is missing or damaged is named in the report. The file replaces an older one at once and whole.

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
    with replacing(out) as partial:
        partial.write_bytes(page)
    return out


def _name_apart(runs: list[Run]) -> None:
    """Give runs of one name the names of their folders, with as many parents as it takes."""
    for depth in range(1, 6):
        names = [run.name for run in runs]
        for run in runs:
            if names.count(run.name) > 1:
                run.name = "/".join(run.folder.resolve().parts[-depth:])


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
        f"<title>{escape(title)}</title><style>{style()}</style></head><body><main>{body}"
        f"<footer>leanstep {escape(version)} &middot; {' &middot; '.join(escape(str(run.folder)) for run in runs)}"
        "</footer></main></body></html>\n"
    )


def _single(run: Run, most_points: int, most_text: int) -> str:
    parts = [
        f'<div class="head"><h1>{escape(run.name)}</h1>{badge(run)}</div>',
        f'<p class="lead">{lead(run)}</p>',
        tiles(run),
        notes(run.problems),
        "<h2>Curves</h2>",
        f'<div class="grid">{curves([run], most_points)}</div>',
    ]
    if run.reported_keys("sparsity") or run.sparsity_report:
        drawn = reported_curves(run, "sparsity", min(most_points, 200))
        parts += ["<h2>Sparsity</h2>", f'<div class="grid">{drawn}</div>', sparsity_tables(run, most_text)]
    if run.reported_keys("attention") or run.attention_report:
        drawn = reported_curves(run, "attention", min(most_points, 200))
        parts += ["<h2>Attention norms</h2>", f'<div class="grid">{drawn}</div>', attention_table(run, most_text)]
    if run.reported_keys("gate") or run.gate_report:
        drawn = reported_curves(run, "gate", min(most_points, 200))
        parts += ["<h2>Low-rank attention</h2>", f'<div class="grid">{drawn}</div>', gate_table(run, most_text)]
    if run.reported_keys("optimizer") or run.optimizer_report:
        drawn = reported_curves(run, "optimizer", min(most_points, 200))
        parts += [
            "<h2>What the optimizer says</h2>",
            f'<div class="grid">{drawn}</div>',
            optimizer_table(run, most_text),
        ]
    if run.sample is not None and most_text:
        parts.append(f"<h2>A sample of its writing</h2><div class=card><blockquote>{cut(run.sample, most_text)}")
        parts.append("</blockquote></div>")
    if run.evals:
        parts += ["<h2>Evaluations</h2>", evaluations(run)]
    if run.config_text and most_text:
        parts += ["<h2>Configuration</h2>", f"<div class=card><pre>{cut(run.config_text, most_text)}</pre></div>"]
    environment = flat(run.env) | ({"command": run.command} if run.command else {})
    if environment:
        parts += ["<h2>Environment</h2>", pairs(environment)]
    return "".join(parts)


def _comparison(runs: list[Run], most_points: int, most_text: int) -> str:
    problems = [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    parts = [
        f"<h1>Comparison of {len(runs)} runs</h1>",
        '<p class="lead">Sorted by validation loss. Compare losses only between runs on the same text with the same '
        "tokenizer; bits per byte compares across tokenizers.</p>",
        "<h2>Results</h2>",
        results(runs),
        notes(problems),
        "<h2>Curves</h2>",
        f'<div class="grid">{curves(runs, most_points)}</div>',
        "<h2>What differs</h2>",
        differences([flat(run.config) for run in runs], runs, "The configurations are the same."),
        "<h2>Where they ran</h2>",
        differences([flat(run.env) for run in runs], runs, "The environments are the same.", only_different=False),
    ]
    if most_text:
        share = most_text // len(runs)
        samples = [(run.name, run.sample) for run in runs if run.sample is not None]
        if samples:
            parts.append("<h2>Samples of their writing</h2><div class=card><table><tbody>")
            parts += [f"<tr><th>{escape(name)}</th><td>{cut(sample, share)}</td></tr>" for name, sample in samples]
            parts.append("</tbody></table></div>")
    return "".join(parts)
