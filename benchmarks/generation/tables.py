"""Tables and pictures of ``sparsity/generation``, and their place in the documentation."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from common import read_json_lines
from comparison.tables import markdown, write_block

from leanstep._pages.charts import Quantity, bars

# what the pictures say over the bars; other titles stand as they are
HEADINGS = {"smollm2": "Generation by SmolLM2-135M", "llama-1b": "Generation by a LLaMA of 1.1B with random weights"}


def tables(path: Path) -> dict[str, str]:
    """Text of each block of the page, by its name: one per title."""
    return {f"generation-{title}": _block(calls) for title, calls in _titles(path).items()}


def pictures(path: Path) -> dict[str, str]:
    """Bars of speed, memory and perplexity as SVG files, by name: one per title."""
    return {f"generation-{title}.svg": _bars(title, calls) for title, calls in _titles(path).items()}


def write(path: Path, root: Path) -> None:
    """Put the tables of a file of results into their pages, and the pictures into docs/."""
    for name, text in tables(path).items():
        write_block(name, text, root)
    for name, picture in pictures(path).items():
        (root / "docs" / name).write_text(picture, "utf-8")


def _titles(path: Path) -> dict[str, list[dict[str, Any]]]:
    titles: dict[str, list[dict[str, Any]]] = {}
    for call in read_json_lines(path):
        titles.setdefault(call["title"], []).append(call)
    return titles


def _bars(title: str, calls: list[dict[str, Any]]) -> str:
    models: dict[str, dict[str, Any]] = {}
    for call in calls:
        for row in call["models"]:
            models.setdefault(row["name"], row)
    rows = list(models.values())

    def quantity(heading: str, values: list[float], text: str) -> Quantity:
        return Quantity(heading, values, [text.format(value) for value in values])

    speed = "New tokens per second" + (" of processor time" if calls[0]["cpu_time"] else "")
    quantities = [
        quantity(speed, [row["tokens_per_second"] for row in rows], "{:.1f}"),
        quantity("Resident memory, MB", [row["resident_bytes"] / 1e6 for row in rows], "{:.0f}"),
    ]
    if all("perplexity" in row for row in rows):
        quantities.append(quantity("Perplexity", [row["perplexity"] for row in rows], "{:.2f}"))
    return bars(list(models), quantities, title=HEADINGS.get(title, title), notes=[calls[0]["machine"]])


def _block(calls: list[dict[str, Any]]) -> str:
    first = calls[0]
    seen: dict[str, list[str]] = {}
    for call in calls:
        baseline = statistics.median(call["models"][0]["seconds"])
        for row in call["models"]:
            seen.setdefault(row["name"], _cells(row, baseline))
    clock = "a second of processor time" if first["cpu_time"] else "a second"
    head = ["weights", "zeros", "files, MB", "resident, MB", "perplexity", f"tokens {clock}", "ratio"]
    # a column that no model has a value for says nothing
    used = [column for column in range(len(head)) if any(cells[column] != "–" for cells in seen.values())]
    rows = [[cells[column] for column in used] for cells in seen.values()]
    return f"{_caption(calls)}\n\n{markdown([head[column] for column in used], rows)}"


def _cells(row: dict[str, Any], baseline: float) -> list[str]:
    seconds = row["seconds"]
    ratios = sorted(baseline / value for value in (statistics.median(seconds), min(seconds), max(seconds)))
    spread = f"{ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[2]:.2f})"
    return [
        row["name"],
        "–" if row["zeros"] is None else f"{100 * row['zeros']:.0f} %",
        "–" if row["file_bytes"] is None else f"{row['file_bytes'] / 1e6:.0f}",
        f"{row['resident_bytes'] / 1e6:.0f}",
        f"{row['perplexity']:.2f}" if "perplexity" in row else "–",
        f"{row['tokens_per_second']:.1f}",
        spread,
    ]


def _caption(calls: list[dict[str, Any]]) -> str:
    first = calls[0]
    loads = sorted({call["load"] for call in calls})
    load = f"{loads[0]}" if len(loads) == 1 else f"{loads[0]} to {loads[-1]}"
    perplexity = f" Perplexity of {first['tokens']:,} tokens." if first["tokens"] else ""
    return (
        f"`python benchmarks sparsity/generation --report docs/results/generation.jsonl`: {first['new_tokens']} new "
        f"tokens, batch 1, medians of {first['rounds']} turns in one process; ratio to the first row, with that of its "
        f"slowest and fastest turn.{perplexity} {first['machine']}, load {load}."
    )
