"""AdamW's tuned rates carried over to other optimizers, for the vision transformer without a pattern."""

from __future__ import annotations

from pathlib import Path

from common import append_json_line, machine_line
from comparison.summary import paired_difference, standard_error
from comparison.tables import markdown

from digits.search import judged_runs, read, summarise
from digits.tables import Cell
from digits.training import Run, train

NAMES = {"dense": "AdamW", "sinkgd": "SinkGD, AdamW on the rest", "lanton": "LANTON", "lion": "Lion"}


def make_carried(tuned: Path, path: Path, seeds: int) -> None:
    """Judge AdamW with the settings that ``sparsity/quality`` chose in a file, and the others by ``like_adamw``."""
    settings, cells, _ = summarise(tuned)
    adamw = next(iter(cells[Cell("dense", "")].results))
    saved, done = read(path)
    if not saved:
        append_json_line(path, {"machine": machine_line()})
    for run in judged_runs(adamw, seeds, settings["steps"]):
        for each in (run._replace(method=method) for method in NAMES):
            if each not in done:
                append_json_line(path, {"run": each._asdict(), "result": train(each)})


def table(path: Path) -> str:
    """The block of the page."""
    settings, done = read(path)
    losses = {name: [result["loss"] for run, result in done.items() if run.method == name] for name in NAMES}
    run: Run = next(iter(done))
    cells = []
    for name, values in losses.items():
        difference = paired_difference(values, losses["dense"])
        mean = f"{sum(values) / len(values):.3f} ± {standard_error(values):.3f}"
        told = ["–", "–"] if name == "dense" else [f"{difference:+.3f}", difference.reading]
        cells.append([NAMES[name], mean, *told])
    head = ["optimizer", f"cross-entropy, mean ± s.e. of {len(values)} seeds", "difference to AdamW [95 %]", "reading"]
    return (
        "`python benchmarks optimizers/compare --family digits`: a vision transformer on scikit-learn's digits,\n"
        f"{run.steps} steps, AdamW's rate {run.rate:g} for all parameters and weight decay {run.second:g};\n"
        f"{settings['machine']}.\n\n{markdown(head, cells, (0, 3))}"
    )
