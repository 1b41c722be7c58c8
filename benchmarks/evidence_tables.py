"""The tables of pruning/evidence: models by score, sparsity and allocation, beside one another."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from common import machines, pyplot, read_json_lines, save_svg
from comparison.summary import paired_difference, paired_percent
from comparison.tables import markdown
from evolution import OF_START

ALLOCATIONS = {
    "uniform": "uniform", "owl": "OWL", "atp": "ATP", "measured": "DP measured by block", "anchored": "DP anchored",
    "refined": "DP anchored and refined", "evolution": "evolution",
}  # fmt: skip
_COLOURS = {
    "uniform": "#7a828e", "owl": "#b3246f", "atp": "#6b46c8", "measured": "#0b8a6a", "anchored": "#2457d6",
    "refined": "#d9660b", "evolution": "#a8860b",
}  # fmt: skip
SCORES = {"wanda": "Wanda", "sparsegpt": "SparseGPT", "alps": "ALPS"}
# to which the others are compared
BASELINE = "uniform"
# after the allocation, in cells of models that were trained after pruning
RECOVERED = " recovered"
# (score, allocation) beside another; "" stands for each score
PAIRS = (
    ("", "anchored", "", "measured"), ("", "anchored", "", "owl"), ("", "anchored", "", "atp"),
    ("", "refined", "", "anchored"), ("", "refined", "", "evolution"), ("", "evolution", "", "anchored"),
    ("", "evolution", "", "atp"), ("sparsegpt", "uniform", "wanda", "uniform"),
    ("sparsegpt", "uniform", "wanda", "refined"), ("sparsegpt", "anchored", "wanda", "anchored"),
    ("sparsegpt", "anchored", "wanda", "refined"), ("alps", "uniform", "sparsegpt", "uniform"),
    ("alps", "anchored", "sparsegpt", "anchored"),
)  # fmt: skip
Row = dict[str, Any]


class Cell(NamedTuple):
    """What one line of the results is about; ``allocation`` may be a kind of curves, "dense", or end in RECOVERED."""

    score: str
    sparsity: float
    seed: int
    allocation: str


def recovered(cell: Cell) -> Cell:
    """The cell of the same pruned model after recovery."""
    return cell._replace(allocation=cell.allocation + RECOVERED)


def cell_of(row: Row) -> Cell:
    """The cell of a line of the results."""
    return Cell(**{name: row[name] for name in Cell._fields})


def table(path: Path) -> str:
    """The block of the page: a row for each score, sparsity and allocation that the file has, and what is missing."""
    settings, *rows = read_json_lines(path)
    results = {cell_of(row): row for row in rows}
    cells = [cell for cell in results if cell.allocation in ALLOCATIONS]
    order = sorted({(list(SCORES).index(cell.score), cell.sparsity) for cell in cells})
    lines = [
        line
        for score, sparsity in order
        for line in _lines({c: results[c] for c in cells if (c.score, c.sparsity) == (list(SCORES)[score], sparsity)})
    ]
    head = ["", "seeds", "KL", "to uniform, %", "perplexity", "to uniform, %", "processor s", "peak, GiB"]
    dense = next(row for row in rows if row["allocation"] == "dense")
    parts = [_caption(path, settings, rows, dense["perplexity"]), markdown(head, lines), _legend(rows)]
    parts += [_accuracies({cell: results[cell] for cell in cells}, dense, settings), _pairs(cells, results)]
    parts += [_recovered_table(results), _missing(cells)]
    return "\n\n".join(filter(None, parts))


def _lines(cells: Mapping[Cell, Row]) -> Iterator[list[str]]:
    by_allocation: dict[str, dict[int, Row]] = {}
    for cell, row in cells.items():
        by_allocation.setdefault(cell.allocation, {})[cell.seed] = row
    first = next(iter(cells))
    base = by_allocation.get(BASELINE, {})
    for name, label in ALLOCATIONS.items():
        of_seed = by_allocation.get(name, {})
        if not of_seed:
            continue
        means = {key: statistics.mean(row[key] for row in of_seed.values()) for key in ("kl", "perplexity", "seconds")}
        yield [
            f"{SCORES[first.score]} {first.sparsity:.0%}, {label}{_of_start(name, of_seed)}{_of_curves(of_seed)}",
            ", ".join(map(str, sorted(of_seed))),
            f"{means['kl']:.4f}",
            "–" if name == BASELINE else difference(of_seed, base),
            f"{means['perplexity']:.2f}",
            "–" if name == BASELINE else difference(of_seed, base, "perplexity"),
            f"{means['seconds']:.1f}",
            f"{max(row['gib'] for row in of_seed.values()):.2f}",
        ]


def _accuracies(cells: Mapping[Cell, Row], dense: Row, settings: Row) -> str:
    """Accuracies of the task beside those of uniform sparsity, in points; "" where none was measured."""
    if "accuracy" not in dense:
        return ""
    lines, groups = [["before pruning", "", f"{dense['accuracy']:.1f} ± {dense['stderr']:.1f}", ""]], {}
    for cell in cells:
        groups.setdefault(cell._replace(seed=0), []).append(cell)
    for first, of_seed in groups.items():
        base = [cell._replace(allocation=BASELINE) for cell in of_seed]
        mine, other = ([cells[cell]["accuracy"] for cell in part if cell in cells] for part in (of_seed, base))
        paired = len(mine) == len(other) > 1 and first.allocation != BASELINE
        lines.append([
            f"{SCORES[first.score]} {first.sparsity:.0%}, {ALLOCATIONS[first.allocation]}",
            ", ".join(str(cell.seed) for cell in of_seed),
            f"{statistics.mean(mine):.1f} ± {max(cells[cell]['stderr'] for cell in of_seed):.1f}",
            f"{paired_difference(mine, other):+.1f}" if paired else "–",
        ])  # fmt: skip
    return (
        f"Accuracy on {settings['questions']} questions: which of four continuations of 12 words follows 24 words of "
        "the newest addresses (chance: 25 %). After ±, the harness's standard error over the questions, which are the "
        "same for all rows. Differences are paired by seed, with Student's 95 % interval:\n\n"
        + markdown(["", "seeds", "accuracy, %", "to uniform, points"], lines)
    )


def _of_start(name: str, rows: Mapping[int, Row]) -> str:
    """The mark of :data:`evolution.OF_START`."""
    return "*" if name == "evolution" and not all(row.get("moves") for row in rows.values()) else ""


def _of_curves(rows: Mapping[int, Row]) -> str:
    """By whose curves, slopes or search, if that is another score."""
    scores = {SCORES[row["curve_score"]] for row in rows.values() if "curve_score" in row}
    return f" (of {' and '.join(sorted(scores))})" if scores else ""


def difference(rows: Mapping[int, Row], base: Mapping[int, Row], key: str = "kl") -> str:
    """Difference of the KL divergence, or the perplexity, in percent, paired by seed, with its interval; of one seed
    without.
    """
    seeds = sorted(set(rows) & set(base))
    if not seeds:
        return "–"
    interval = paired_percent([rows[seed][key] for seed in seeds], [base[seed][key] for seed in seeds])
    return f"{interval:+.1f}"


def plotted(path: Path) -> dict[str, dict[str, dict[float, tuple[float, float]]]]:
    """Mean KL and its standard error over the seeds, by score, allocation and sparsity; of two seeds or more."""
    values: dict[str, dict[str, dict[float, list[float]]]] = {}
    for row in read_json_lines(path)[1:]:
        if row["allocation"] in ALLOCATIONS:
            of_score = values.setdefault(row["score"], {})
            of_score.setdefault(row["allocation"], {}).setdefault(row["sparsity"], []).append(row["kl"])
    return {
        score: {
            name: {
                sparsity: (statistics.mean(kl), statistics.stdev(kl) / len(kl) ** 0.5)
                for sparsity, kl in sorted(values[score][name].items())
                if len(kl) > 1
            }
            for name in ALLOCATIONS
            if name in values[score]
        }
        for score in SCORES
        if score in values
    }


def identity(points: Any) -> str:
    """Hash of what a figure shows, which its file names."""
    return sha256(json.dumps(points).encode()).hexdigest()[:16]


def draw(path: Path, target: Path) -> None:
    """Draw KL over sparsity, a panel for each score with several sparsities; bars are standard errors."""
    points = plotted(path)
    panels = {score: by for score, by in points.items() if len(by.get(BASELINE, {})) > 1}
    if not panels:
        return
    size = (11 if len(panels) > 1 else 6, 3.8)
    figure, axes = pyplot().subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axis, (score, by_allocation) in zip(axes[0], panels.items(), strict=True):
        for name, of_sparsity in by_allocation.items():
            means, errors = zip(*of_sparsity.values(), strict=True)
            style = {"color": _COLOURS[name], "lw": 2.4 if name == "refined" else 1.2, "label": ALLOCATIONS[name]}
            axis.errorbar([f"{s:.0%}" for s in of_sparsity], means, errors, fmt="o-", ms=3, capsize=2, **style)
        axis.set(title=f"{SCORES[score]}'s scores", xlabel="zeros", yscale="log")
    axes[0][0].set_ylabel("KL divergence to the dense model")
    axes[0][0].legend(frameon=False, fontsize=8)
    save_svg(figure, target, description=identity(points))


def _caption(path: Path, settings: Row, rows: list[Row], dense: float) -> str:
    length, trained = settings["seq_len"], ""
    if steps := settings.get("reconstruct"):
        trained = f" Each block was reconstructed in {steps} steps of {settings['batch']} x {length} of the former."
    return (
        f"`python benchmarks pruning/evidence`, every cell in [{path.name}](../results/{path.name}): "
        f"{settings['name']} (SHA-256 of its weights: {settings['weights'][:8]}), {settings['dtype']}, "
        f"perplexity {dense:.2f} before pruning. {settings['samples']} x {length} tokens for scores, "
        f"{settings['curve_samples']} x {length} of them for curves and ATP, {settings['judge_samples']} x {length} "
        f"others that judge both searches, {settings['eval_samples']} x {length} held out. The measurements of "
        f"anchored curves end after {settings['anchor_minutes']:g} min by the clock, the refining search after "
        f"{settings['refine_minutes']:g}.{trained} {machines(rows)}."
    )


def _legend(rows: list[Row]) -> str:
    other = ""
    if any("curve_score" in row for row in rows):
        other = " A score in brackets is that of the curves, of the slopes of ATP, and of the search."
    if any(_of_start(row["allocation"], {0: row}) for row in rows):
        other += f" {OF_START}"
    return (
        "KL is the divergence to the dense model on held-out text. Differences of it and of the perplexity to uniform "
        "sparsity are paired by seed, with Student's 95 % interval; a row of one seed has none, and its difference may "
        "be chance. "
        "Seeds draw other calibration sequences; the model and the held-out text are the same, and the intervals say "
        "nothing of others. Processor seconds include all curves, and no comparison with uniform sparsity, which "
        f"`leanstep prune` makes. Peaks are of the whole process, by the commit of each row.{other}"
    )


def _pairs(cells: list[Cell], results: Mapping[Cell, Row]) -> str:
    lines = []
    for sparsity in sorted({cell.sparsity for cell in cells}):
        for score, (of_score, allocation, base_score, base) in itertools.product(SCORES, PAIRS):
            if of_score not in ("", score):
                continue
            mine, other = (
                {cell.seed: results[cell] for cell in cells if cell[:2] + cell[3:] == (s or score, sparsity, name)}
                for s, name in ((of_score, allocation), (base_score, base))
            )
            if len(set(mine) & set(other)) > 1:
                names = (
                    f"{ALLOCATIONS[allocation]}{_of_start(allocation, mine)}, to "
                    f"{SCORES[base_score] + ' ' if base_score else ''}{ALLOCATIONS[base]}{_of_start(base, other)}"
                )
                lines.append([f"{SCORES[score]} {sparsity:.0%}, {names}", difference(mine, other)])
    return markdown(["of the same seeds", "KL, %"], lines) if lines else ""


def _recovered_table(results: Mapping[Cell, Row]) -> str:
    """Models after recovery, by score, sparsity and allocation, and how the steps were made; "" without any."""
    groups: dict[tuple[str, float, str], dict[int, Row]] = {}
    for cell, row in results.items():
        if cell.allocation.endswith(RECOVERED):
            groups.setdefault((cell.score, cell.sparsity, cell.allocation.removesuffix(RECOVERED)), {})[cell.seed] = row
    if not groups:
        return ""
    lines = []
    order = sorted(groups, key=lambda key: (list(SCORES).index(key[0]), key[1], list(ALLOCATIONS).index(key[2])))
    for score, sparsity, name in order:
        rows, base = groups[score, sparsity, name], groups.get((score, sparsity, BASELINE), {})
        before, after, perplexity, seconds = (
            statistics.mean(row[key] for row in rows.values()) for key in ("kl_before", "kl", "perplexity", "seconds")
        )
        lines.append(
            [f"{SCORES[score]} {sparsity:.0%}, {ALLOCATIONS[name]}", ", ".join(map(str, sorted(rows))), f"{before:.4f}",
             f"{after:.4f}", "–" if name == BASELINE else difference(rows, base), f"{perplexity:.2f}", f"{seconds:.0f}",
             f"{max(row['gib'] for row in rows.values()):.2f}"]
        )  # fmt: skip
    ways = {
        (row["steps"], row["batch"], row["samples"], row["lr"]) for rows in groups.values() for row in rows.values()
    }
    text = "; ".join(
        f"{steps} steps of {batch} sequence{'s' * (batch != 1)} out of {samples}, lr {lr:g}"
        for steps, batch, samples, lr in sorted(ways)
    )
    head = ["after recovery", "seeds", "KL before", "KL", "to uniform, %", "perplexity", "processor s", "peak, GiB"]
    return (
        f"After recovery on the dense model's outputs with the zeros held, as `leanstep prune --recover` ({text}); "
        f"processor seconds and peak of the recovery alone:\n\n{markdown(head, lines)}"
    )


def _missing(cells: list[Cell]) -> str:
    seeds = sorted({cell.seed for cell in cells})
    texts = []
    for score, label in SCORES.items():
        for sparsity in (0.5, 0.6, 0.7):
            names = [
                name
                for key, name in ALLOCATIONS.items()
                if not any(Cell(score, sparsity, seed, key) in cells for seed in seeds)
            ]
            if len(names) == len(ALLOCATIONS):
                texts.append(f"{label} {sparsity:.0%}")
            elif names == [name for key, name in ALLOCATIONS.items() if key != BASELINE]:
                texts.append(f"{label} {sparsity:.0%}: all but {BASELINE}")
            elif names:
                texts.append(f"{label} {sparsity:.0%}: {', '.join(names)}")
    return f"Not measured: {'; '.join(texts)}." if texts else ""
