"""Processor time to prune a matrix to one level, by score.

    python benchmarks pruning/levels --out runs/prune-levels.jsonl
    python benchmarks pruning/levels --report docs/results/prune-levels.jsonl [--write]

Matrices of random weights, with Gram matrices of ``--tokens`` random inputs whose columns correlate. A pruner is made,
which serves all levels, and prunes its matrix to ``--sparsity``. One thread, medians of ``--repeats`` rounds in which
the scores take turns. Every call appends its rows with the commit that it measured; the table has the last ones of each
commit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import append_json_line, command_line, machine_state, machines, read_json_lines
from comparison.tables import markdown, measure_or_report

SCORES = ("wanda", "sparsegpt", "alps")
SHAPES = ((576, 576), (1536, 576), (576, 1536))  # of SmolLM2-135M
PARSER = command_line(
    __doc__, sparsity=0.6, tokens=2048, repeats=5, out=Path("runs/prune-levels.jsonl"),
    write=(False, "with --report: write the table into docs/"),
)  # fmt: skip
PARSER.add_argument("--report", type=Path, help="a file of results whose table to print")


def run(options: argparse.Namespace) -> None:
    """Measure, and append to the file."""
    torch.set_num_threads(1)
    for shape in SHAPES:
        seconds: dict[str, list[tuple[float, float]]] = {score: [] for score in SCORES}
        for turn in range(options.repeats):
            for score in SCORES:
                seconds[score].append(time_level(score, shape, options, turn))
        for score, pairs in seconds.items():
            prepare, level = (statistics.median(times) for times in zip(*pairs, strict=True))
            row = {"score": score, "shape": shape, "sparsity": options.sparsity, "tokens": options.tokens}
            append_json_line(options.out, row | {"prepare": prepare, "level": level} | machine_state())


def time_level(score: str, shape: tuple[int, int], options: argparse.Namespace, seed: int) -> tuple[float, float]:
    """Processor seconds to make a pruner, and to prune by it."""
    from leanstep.pruning import LayerStatistics, layer_pruner

    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=draw)
    inputs = torch.randn(options.tokens, 64, generator=draw) @ torch.randn(64, shape[1], generator=draw)
    inputs += torch.randn(inputs.shape, generator=draw)
    sums = inputs.double().square().sum(dim=0)
    statistics_of = LayerStatistics(options.tokens, square_sum=sums, gram=inputs.T @ inputs)
    begin = time.process_time()
    pruner = layer_pruner(weight, score, statistics_of)
    made = time.process_time()
    pruner.prune(round(weight.numel() * (1 - options.sparsity)))
    return made - begin, time.process_time() - made


def table(path: Path) -> str:
    """The block of the page: milliseconds by score and shape, a column for each commit."""
    rows = read_json_lines(path)
    commits = list(dict.fromkeys(commit_of(row) for row in rows))
    last = {(row["score"], tuple(row["shape"]), commit_of(row)): row for row in rows}
    lines = []
    for score, shape in dict.fromkeys((score, shape) for score, shape, _ in last):
        of_commit = [last.get((score, shape, commit)) for commit in commits]
        cells = [f"{1000 * row['prepare']:.1f} + {1000 * row['level']:.1f}" if row else "–" for row in of_commit]
        lines.append([f"{score}, {shape[0]} x {shape[1]}", *cells])
    text = (
        f"`python benchmarks pruning/levels`, in [{path.name}](../results/{path.name}): milliseconds of processor "
        f"time to make a pruner and to prune to {rows[0]['sparsity']:.0%}, medians; {machines(rows)}."
    )
    return f"{text}\n\n{markdown(['score, [out, in]', *(f'commit {commit}' for commit in commits)], lines)}"


def commit_of(row: dict[str, Any]) -> str:
    """The commit that a row measured."""
    return str(row["machine"]).rpartition("commit ")[2]


def main() -> None:
    """Measure, or read a file; print the table."""
    measure_or_report(PARSER, run, table)


if __name__ == "__main__":
    main()
