"""Tables and figure of ``sparsity/quality``, and their place in the documentation."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from common import pyplot, save_svg
from comparison.summary import Interval, paired_difference, standard_error
from comparison.tables import markdown, write_block

from digits.training import Run
from leanstep.sparsity import NM

FIGURE = "docs/sparse-quality.svg"
NAMES = {
    "srste": "SR-STE", "mdgf-exponential": "MDGF-exponential", "mdgf-linear": "MDGF-linear",
    "sdgf-stepwise": "SDGF-stepwise", "sdgf-geometric": "SDGF-geometric",
}  # fmt: skip
# settings of a cell that are judged: tuning runs are half as long, and have one seed
FINALISTS = 3
# readable on white and on black
GREY = "#808080"
COLOURS = ("#d1495b", "#2f7fd1", "#3aa6a0", "#b07d2b", "#8a63d2")


class Cell(NamedTuple):
    """A method and its target; "dense" has none."""

    method: str
    pattern: str


class Judged(NamedTuple):
    """Judged settings of a cell, by tuning loss, with their results by seed."""

    results: dict[Run, list[dict[str, Any]]]

    @property
    def chosen(self) -> list[dict[str, Any]]:
        """By seed, the result of the setting whose mean loss over the other seeds is the lowest."""
        by_setting = list(self.results.values())
        losses = [[result["loss"] for result in results] for results in by_setting]
        return [
            min(zip(losses, by_setting, strict=True), key=lambda pair: sum(pair[0]) - pair[0][seed])[1][seed]
            for seed in range(len(losses[0]))
        ]

    @property
    def accuracies(self) -> list[float]:
        """Test accuracies in percent, by seed."""
        return [100 * result["accuracy"] for result in self.chosen]

    @property
    def losses(self) -> list[float]:
        """Test cross-entropies, by seed."""
        return [result["loss"] for result in self.chosen]

    @property
    def mean_losses(self) -> list[float]:
        """Mean test cross-entropy of every setting."""
        return [statistics.mean(result["loss"] for result in results) for results in self.results.values()]


Cells = dict[Cell, Judged]


class Measure(NamedTuple):
    """What is judged: its name, values by seed, digits to print, and 1 where more is better, -1 where less is."""

    name: str
    of: Callable[[Judged], list[float]]
    digits: int
    better: int


ACCURACY = Measure("Test accuracy in percent", lambda judged: judged.accuracies, 1, 1)
LOSS = Measure("Test cross-entropy", lambda judged: judged.losses, 3, -1)


def text(settings: dict[str, Any], cells: Cells, expected: int) -> str:
    """The block of the page: accuracies and losses, differences to SR-STE, judged settings."""
    patterns = list(dict.fromkeys(cell.pattern for cell in cells if cell.pattern))
    methods = [method for method in NAMES if any(cell.method == method for cell in cells)]
    head = ["target", "zeros", *(NAMES[method] for method in methods)]

    def table(entry: Callable[..., str], *measure: Measure) -> str:
        rows = [
            [p, f"{NM.parse(p).sparsity:.1%}", *(entry(cells, Cell(method, p), *measure) for method in methods)]
            for p in patterns
        ]
        return markdown(head, rows)

    parts = [_caption(settings, cells)]
    if len(cells) < expected:
        parts.append(f"{expected - len(cells)} of {expected} cells are not complete.")
    for measure in (ACCURACY, LOSS):
        parts += [f"{measure.name}, mean ± standard error:", table(_mean, measure)]
        parts.append(
            "Difference to SR-STE, seed by seed, with its 95 % interval; bold where the interval leaves out zero:"
        )
        parts += [table(_difference, measure), _reading(cells, measure)]
    parts += [
        "Judged settings, the lowest tuning loss first: learning rate · lambda, or fraction of the steps at the "
        "target, and mean test cross-entropy:",
        table(_settings),
        _misled(cells),
    ]
    parts.append(f"![accuracy against sparsity](../{Path(FIGURE).name})")
    return "\n\n".join(parts)


def _caption(settings: dict[str, Any], cells: Cells) -> str:
    dense = cells.get(Cell("dense", ""))
    means = ", ".join(_mean(cells, Cell("dense", ""), measure) for measure in (ACCURACY, LOSS))
    reference = f" Dense: {means}." if dense else ""
    return (
        "`python benchmarks sparsity/quality`: a vision transformer of 2 layers, width 128, on scikit-learn's digits; "
        f"MLPs, q, k and v sparse; {settings['steps']} steps. Every method is tuned for every target with "
        f"{settings['budget']} runs of half the steps. Up to three settings of the lowest tuning losses are judged, "
        f"each with {settings['seeds']} other seeds on 674 other images. The value of a seed is that of the setting "
        f"with the lowest mean cross-entropy on the other seeds. {settings['machine']}.{reference}"
    )


def _mean(cells: Cells, cell: Cell, measure: Measure) -> str:
    if cell not in cells:
        return "–"
    values = measure.of(cells[cell])
    return f"{statistics.mean(values):.{measure.digits}f} ± {standard_error(values):.{measure.digits}f}"


def difference(cells: Cells, cell: Cell, measure: Measure = ACCURACY) -> Interval | None:
    """Paired difference of a cell to SR-STE."""
    base = Cell("srste", cell.pattern)
    if cell not in cells or base not in cells or cell == base:
        return None
    return paired_difference(measure.of(cells[cell]), measure.of(cells[base]))


def _difference(cells: Cells, cell: Cell, measure: Measure) -> str:
    interval = difference(cells, cell, measure)
    if interval is None:
        return "–"
    mean, low, high = (f"{value:+.{measure.digits}f}" for value in (interval.mean, interval.low, interval.high))
    entry = f"{mean} [{low}, {high}]"
    return entry if interval.low <= 0 <= interval.high else f"**{entry}**"


def _reading(cells: Cells, measure: Measure) -> str:
    better, worse, equal = [], [], 0
    for cell in cells:
        interval = difference(cells, cell, measure)
        if interval is None:
            continue
        name = f"{NAMES[cell.method]} at {cell.pattern}"
        if interval.low <= 0 <= interval.high:
            equal += 1
        else:
            (better if measure.better * interval.mean > 0 else worse).append(name)
    total = equal + len(better) + len(worse)
    parts = [f"No difference to SR-STE is seen in {equal} of {total} cells."]
    if better:
        parts.append(f"Better than SR-STE: {', '.join(better)}.")
    if worse:
        parts.append(f"Worse than SR-STE: {', '.join(worse)}.")
    parts.append("An interval holds for one cell: of twenty, one may miss its true difference.")
    return " ".join(parts)


def _settings(cells: Cells, cell: Cell) -> str:
    if cell not in cells:
        return "–"
    pairs = zip(cells[cell].results, cells[cell].mean_losses, strict=True)
    return "<br>".join(f"{run.rate:g} · {run.second:g}: {loss:.3f}" for run, loss in pairs)


def _misled(cells: Cells) -> str:
    """How often tuning chose another setting than judging, and which cells have fewer settings than the others."""
    judged = [cell.mean_losses for cell in cells.values() if len(cell.results) > 1]
    misled = sum(losses[0] > min(losses) for losses in judged)
    full = [cell for cell, each in cells.items() if len(each.results) == FINALISTS]
    names = ", ".join(f"{NAMES.get(cell.method, cell.method)} at {cell.pattern or 'no target'}" for cell in full)
    note = (
        f" {FINALISTS} settings are judged of {names or 'no cell'}, fewer of the others: their differences may change."
    )
    if len(full) == len(cells):
        note = ""
    return (
        f"Short tuning misleads: in {misled} of the {len(judged)} cells with several judged settings, another than the "
        f"one of the lowest tuning loss has the lowest test cross-entropy.{note}"
    )


def write(settings: dict[str, Any], cells: Cells, expected: int, root: Path) -> list[Path]:
    """Write the block of the page and the figure; return both files."""
    page = write_block("sparse-quality", text(settings, cells, expected), root)
    plot(cells, root / FIGURE)
    return [page, root / FIGURE]


def plot(cells: Cells, path: Path) -> None:
    """Accuracy against the fraction of zeros, with standard errors; greys that show on light and dark pages."""
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), GREY)
    plt = pyplot()
    plt.rcParams |= {"font.size": 10, **colours}
    figure, axes = plt.subplots(figsize=(7.2, 3.8))
    patterns = list(dict.fromkeys(cell.pattern for cell in cells if cell.pattern))
    for i, (method, name) in enumerate(NAMES.items()):
        present = [(x, cells[Cell(method, p)].accuracies) for x, p in enumerate(patterns) if Cell(method, p) in cells]
        # side by side, so that the intervals can be told apart
        positions = [x + 0.07 * (i - len(NAMES) // 2) for x, _ in present]
        means = [statistics.mean(values) for _, values in present]
        errors = [standard_error(values) for _, values in present]
        axes.errorbar(positions, means, errors, color=COLOURS[i], marker="o", markersize=4, linewidth=1.3, label=name)
    if Cell("dense", "") in cells:
        dense = statistics.mean(cells[Cell("dense", "")].accuracies)
        axes.axhline(dense, color=GREY, linewidth=1.2, linestyle="--", label="dense")
    axes.set_xticks(range(len(patterns)), [f"{each}\n{NM.parse(each).sparsity:.1%} zeros" for each in patterns])
    axes.set_ylabel("test accuracy, %")
    axes.set_title("Digits, small vision transformer: mean and standard error", color=GREY, fontsize=10)
    axes.grid(axis="y", color=GREY, alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    save_svg(figure, path, transparent=True)
