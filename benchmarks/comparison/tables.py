"""Markdown tables and the figure of a comparison, and their places in the documentation."""

from __future__ import annotations

import argparse
import html
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from comparison.growth import budget_table, double_reading, transfer_table, warmup_table
from comparison.methods import METHODS
from comparison.protocol import ComparisonError
from comparison.results import Results, read
from comparison.summary import BASELINE, CONFIDENCE, Row, summarise

LEFT = (0,)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = LEFT) -> str:
    """A markdown table."""
    rules = ["---" if column in left else "---:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rules, *rows))


def blocks(path: Path) -> dict[str, str]:
    """Text of each block of the documentation that a file of results decides, by the block's name."""
    results = read(path)
    rows, others = summarise(results)
    model = results.protocol.model
    if results.search.carries:
        return {f"{model}-carried": _carried(results, rows, path)}
    contents = {
        f"compare-{model}": _comparison(results, rows, others, path),
        f"chosen-{model}": _chosen(results, rows),
    }
    if reading := double_reading(results, rows):
        contents[f"chosen-{model}"] += f"\n\n{_paragraph(reading)}"
    if budgets := budget_table(results, rows):
        head, cells, reading = budgets
        contents[f"budgets-{model}"] = f"{markdown(head, cells)}\n\n{_paragraph(reading)}"
    if warmups := warmup_table(results, rows):
        contents[f"warmups-{model}"] = markdown(*warmups)
    if transfer := transfer_table(results, rows, path):
        contents[f"transfer-{model}"] = markdown(*transfer)
    return contents


def figure_path(model: str) -> str:
    """Where the figure of a model lies, from the root of the repository."""
    return f"docs/compare-{model}.svg"


def replace_blocks(text: str, contents: dict[str, str]) -> str:
    """Replace the content between ``<!-- table:NAME -->`` and ``<!-- /table:NAME -->``."""
    for name, content in contents.items():
        pattern = rf"(<!-- table:{re.escape(name)} -->\n).*?(<!-- /table:{re.escape(name)} -->)"
        text = re.sub(pattern, lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text, flags=re.DOTALL)
    return text


def page_of(name: str, root: Path) -> Path:
    """The page under docs/ with the marks of a table. Raises ComparisonError if none has them."""
    for page in sorted((root / "docs").rglob("*.md")):
        if f"<!-- table:{name} -->" in page.read_text("utf-8"):
            return page
    marks = f"<!-- table:{name} --> and <!-- /table:{name} -->"
    raise ComparisonError(f"no page under docs/ has the marks {marks}; put them where the table shall be")


def write_block(name: str, content: str, root: Path) -> Path:
    """Write a table between its marks, and return the page."""
    page = page_of(name, root)
    page.write_text(replace_blocks(page.read_text("utf-8"), {name: content}), "utf-8")
    return page


def pages(path: Path, root: Path) -> dict[Path, str]:
    """Pages of the documentation, and the figure, as a file of results decides them.

    Raises ComparisonError if no page has a place for a table.
    """
    contents, results = blocks(path), read(path)
    targets = {page: replace_blocks(page.read_text("utf-8"), contents) for page in {page_of(n, root) for n in contents}}
    rows, _ = summarise(results)
    if not results.search.carries and any(row.difference for row in rows):
        targets[root / figure_path(results.protocol.model)] = figure(rows, results.protocol.model)
    return targets


def write(path: Path, root: Path) -> list[Path]:
    """Write :func:`pages`; return those that changed."""
    targets = pages(path, root)
    changed = [target for target, text in targets.items() if not target.exists() or target.read_text("utf-8") != text]
    for target in changed:
        target.write_text(targets[target], "utf-8")
    return changed


def measure_or_report(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], None],
    table: Callable[[Path], str],
    draw: Callable[[Path, Path], None] | None = None,
) -> None:
    """Measure into the file of ``--out``, or read that of ``--report``; print its table, and ``--write`` it.

    The block of the page has the name of the file, and so has the picture that ``draw`` makes of it.
    """
    options = parser.parse_args()
    path = options.report or options.out
    if options.report is None:
        measure(options)
    elif not path.exists():
        parser.error(f"--report: expected a file of results, {path} is none")
    text = table(path)
    print(text)
    if options.write:
        root = Path(__file__).parents[2]
        try:
            write_block(path.stem, text, root)
        except ComparisonError as error:
            parser.error(f"--write: {error}")
        if draw is not None:
            draw(path, root / "docs" / f"{path.stem}.svg")


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _loss(row: Row) -> str:
    if row.mean is None or row.error is None:
        return f"{row.diverged} of {len(row.losses)} diverged"
    return f"{row.mean:.3f} ± {row.error:.3f}"


def _difference(row: Row) -> tuple[str, str]:
    if row.method == BASELINE or row.difference is None:
        return "–", "–"
    mean, low, high = row.difference
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]", row.difference.reading


def _cells(row: Row) -> list[str]:
    step = "–" if row.step_seconds is None else f"{row.step_seconds * 1e3:.0f}"
    memory = f"{row.bytes / 1e6:.1f}{' *' if row.on_frontier else ''}"
    tokens = "–" if row.tokens is None else f"{row.tokens:.2f}"
    timed = _number(row.loss_at_time)
    if row.time_difference is not None:
        timed += f", {row.time_difference:+.3f}"
    return [METHODS[row.method].label, _loss(row), *_difference(row), timed, step, tokens, memory]


def _comparison(results: Results, rows: list[Row], others: dict[str, str], path: Path) -> str:
    protocol = results.protocol
    head = [
        "optimizer", f"loss, mean ± s.e. of {len(protocol.judge_seeds)} seeds", "difference to tuned AdamW [95 %]",
        "reading", "at AdamW's time, difference [95 %]", "ms a step", "tokens to AdamW's loss", "MB",
    ]  # fmt: skip
    tuned = [_cells(row) for row in rows if METHODS[row.method].start]
    default = [_cells(row) for row in rows if not METHODS[row.method].start]
    parts = [*_caption(results, path)]
    if tuned:
        parts += [f"Tuned, {results.search.budget} runs each:", markdown(head, tuned, (0, 3))]
    if default:
        parts += ["With the defaults of the class, not tuned:", markdown(head, default, (0, 3))]
    compared = sum(row.difference is not None for row in rows)
    if compared:
        parts.append(f"![differences to tuned AdamW with intervals](../{Path(figure_path(protocol.model)).name})")
    if rows:
        parts.append(_paragraph(_legend(results, compared)))
    if others and results.rows:
        parts.append(_paragraph(_unfinished(others)))
    return "\n\n".join(parts)


def _carried(results: Results, rows: list[Row], path: Path) -> str:
    protocol, (hidden, other) = results.protocol, results.search.starts[BASELINE]
    seeds = f"loss, mean ± s.e. of {len(protocol.judge_seeds)} seeds"
    head = ["optimizer", seeds, "difference to AdamW [95 %]", "reading", "MB"]
    cells = [[METHODS[row.method].title, _loss(row), *_difference(row), f"{row.bytes / 1e6:.1f}"] for row in rows]
    text = (
        f"AdamW has the settings of its search on this model: rates of {hidden:g} for hidden matrices and {other:g} "
        f"for the rest, weight decay {protocol.weight_decays[0]:g}, warm-up {protocol.warmups[0]:.0%}. The others "
        "have the same by `like_adamw`, or the defaults of the class and this warm-up. Nothing is tuned for them. The "
        "interval is Student's, paired by seed."
    )
    return "\n\n".join([*_caption(results, path), markdown(head, cells, (0, 3)), _paragraph(text)])


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _caption(results: Results, path: Path) -> list[str]:
    protocol, environments = results.protocol, results.environments()
    data = protocol.config.data
    text = {"sotu": "the State of the Union addresses"}.get(data.source, data.path or data.source)
    tokens = protocol.judge_steps * protocol.config.batch.tokens_per_step / 1e6
    made = "no run is finished yet"
    if environments:
        commits = ", ".join(dict.fromkeys(row["commit"] for row in environments))
        machine = environments[0]
        made = f"{machine['processor']}, one thread on a shared machine, torch {machine['torch']}, commit {commits}"
    return [
        _paragraph(
            f"{protocol.model} on {text}, {protocol.judge_steps} steps ({tokens:.2g} M tokens), {protocol.precision}; "
            f"{made}. [How optimizers are compared](../protocol.md) has the rules, "
            f"[{path.name}](../results/{path.name}) every run; this command makes the tables of it:"
        ),
        f"`python benchmarks optimizers/compare --report docs/results/{path.name} --write`",
    ]


def _legend(results: Results, compared: int) -> str:
    text = ""
    if compared:
        text += (
            f"The interval is Student's, paired by seed, {CONFIDENCE:.0%} for each row alone; it is not corrected for "
            f"the {compared} rows that are compared. "
        )
    text += (
        "A loss at AdamW's time is read from the run's curve: a slower method is read before the end of its schedule, "
        "a faster one gets no extra steps. Tokens to AdamW's loss are a fraction of AdamW's, where all seeds reach it. "
        "MB are weights, gradients and optimizer state; * marks rows that no other row beats with as little memory. "
        "Weight decay and warm-up are the best of a small set, the same for all, and may lie at its end. "
    )
    if results.timing is not None:
        text += (
            f"A step is processor time of one thread, interleaved; other processes used "
            f"{results.timing['other_load']:.0%} of the machine's processors meanwhile. "
        )
    return text + f"{results.protocol.judge_steps} steps of a small model say little about larger runs."


def _unfinished(others: dict[str, str]) -> str:
    names: dict[str, list[str]] = {}
    for method, reason in others.items():
        names.setdefault(reason, []).append(METHODS[method].label + ("" if METHODS[method].start else " with defaults"))
    texts = [f"{reason[0].upper()}{reason[1:]}: {'; '.join(methods)}." for reason, methods in names.items()]
    return f"Rows that are not complete are not in the table. {' '.join(texts)}"


def _chosen(results: Results, rows: list[Row]) -> str:
    head = ["optimizer", "hidden lr", "other lr", "weight decay", "warm-up", "tuning loss", "tuning runs", "each seed"]
    lines = []
    for row in rows:
        run, name = row.chosen, METHODS[row.method].label
        seeds = ", ".join("diverged" if math.isinf(loss) else f"{loss:.4f}" for loss in row.losses)
        if run.hidden_lr is None:
            settings = [f"{name}, defaults", *["the class's"] * 3, f"{run.warmup:.0%}", "–"]
        else:
            loss = next(results.losses[k] for k in results.rows if k.kind == "tune" and _same_settings(k, run))
            other = f"{run.other_lr:g}" if results.protocol.num_rates == 2 else "–"
            rates = [f"{run.hidden_lr:g}", other, f"{run.weight_decay:g}"]
            settings = [name, *rates, f"{run.warmup:.0%}", f"{loss:.4f}"]
        lines.append([*settings, str(row.tuning_runs), seeds])
    return markdown(head, lines) if lines else "No row is complete."


def _same_settings(run: object, other: object) -> bool:
    names = ("method", "hidden_lr", "other_lr", "weight_decay", "warmup")
    return all(getattr(run, name) == getattr(other, name) for name in names)


def figure(rows: list[Row], model: str) -> str:
    """SVG of the differences to the baseline with their intervals, one line a row; zero is a vertical line."""
    shown = [row for row in rows if row.difference is not None]
    bounds = [bound for row in shown if row.difference for bound in row.difference] or [0.0]
    low, high = min(0.0, *bounds), max(0.0, *bounds)
    margin = 0.05 * (high - low) or 1.0
    low, high = low - margin, high + margin
    width, left, line, top = 760, 270, 22, 30
    height = top + line * len(shown) + 40

    def x(value: float) -> float:
        return round(left + (value - low) / (high - low) * (width - left - 20), 1)

    marks = [
        f'<line x1="{x(0)}" x2="{x(0)}" y1="{top - 6}" y2="{height - 34}" stroke="#888" stroke-dasharray="3 3"/>',
        f'<text x="{x(0)}" y="{height - 20}" text-anchor="middle">0</text>',
    ]
    for edge in (low + margin, high - margin):
        if edge:
            marks.append(f'<text x="{x(edge)}" y="{height - 20}" text-anchor="middle">{edge:+.2f}</text>')
    for number, row in enumerate(shown):
        assert row.difference is not None
        y = top + line * number + 8
        mean, first, last = row.difference
        name = METHODS[row.method].title
        colour = "#888" if first <= 0 <= last else "#1f6f54" if mean < 0 else "#b3452c"
        marks += [
            f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{html.escape(name)}</text>',
            f'<line x1="{x(first)}" x2="{x(last)}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>',
            f'<circle cx="{x(mean)}" cy="{y}" r="4" fill="{colour}"/>',
        ]
    title = f"{model}: loss minus that of tuned AdamW, 95 % intervals"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12" role="img">\n<title>{title}</title>\n<rect width="100%" height="100%" fill="white"/>\n'
        f'<text x="{left}" y="16" font-weight="bold">{title}</text>\n' + "\n".join(marks) + "\n</svg>\n"
    )
