"""N:M patterns by each score beside one another: quality, processor time and memory, one command.

    python benchmarks pruning/smollm2 runs/smollm2
    python benchmarks pruning/patterns --model runs/smollm2 --name SmolLM2-135M --out runs/patterns.jsonl
    python benchmarks pruning/patterns --report docs/results/prune-patterns-smollm2.jsonl [--write]

Every matrix gets the pattern, along the inputs. Scores see ``--samples`` sequences of the older addresses of the State
of the Union text, drawn anew with every seed; KL divergence to the dense model and perplexity are those on sequences of
the newest addresses. Differences are paired by seed, with Student's interval.

The results file has a line for each cell; an interrupted call goes on where it stopped. ``--write`` puts the table of a
file into docs/.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

import torch
from calibration import CalibratedModel
from common import append_json_line, command_line, machine_state, machines, read_json_lines, timed_and_peak
from comparison.summary import paired_percent
from comparison.tables import markdown, measure_or_report
from evidence_tables import SCORES

PARSER = command_line(
    __doc__, model=Path("runs/smollm2"), name=("", "in the table; default: from the configuration"), seeds=[0, 1, 2],
    patterns=["2:4", "4:8"], samples=(8, "calibration sequences"), eval_samples=(16, "held-out sequences"), seq_len=256,
    out=Path("runs/prune-patterns.jsonl"), write=(False, "with --report: write the table into docs/"),
)  # fmt: skip
PARSER.add_argument("--scores", nargs="+", default=["wanda", "sparsegpt", "alps"], choices=SCORES)
PARSER.add_argument("--report", type=Path, help="a file of results whose table to print")
SETTINGS = ("name", "samples", "eval_samples", "seq_len")
# to which the other scores are compared
BASELINE = "sparsegpt"
Row = dict[str, Any]


def run(options: argparse.Namespace) -> None:
    """Measure every missing cell."""
    from leanstep.pruning import prune

    torch.set_num_threads(1)
    text, rows = CalibratedModel(options.model, options.seq_len, options.eval_samples), read_json_lines(options.out)
    settings = {name: getattr(options, name) for name in SETTINGS} | {"name": options.name or text.name}
    settings |= {"weights": text.weights, "dtype": str(text.model.dtype).removeprefix("torch."), "dense": text.cost()}
    if not rows:
        append_json_line(options.out, settings)
    elif rows[0] | {"dense": ()} != settings | {"dense": ()}:
        raise SystemExit(f"{options.out} is of another model or other settings: give another --out")
    present = {(row["seed"], row["pattern"], row["score"]) for row in rows[1:]}
    for seed, pattern, score in itertools.product(options.seeds, options.patterns, options.scores):
        if (seed, pattern, score) in present:
            continue
        data = text.calibration(options.samples, seed)
        how = {"pattern": pattern, "allocation": "uniform", "score": score, "held_out": False}
        with text.snapshot.restored():
            _, used = timed_and_peak(lambda data=data, how=how: prune(text.model, data, **how))
            row = {"seed": seed, "pattern": pattern, "score": score} | text.cost() | used | machine_state()
        append_json_line(options.out, row)
        print(row, flush=True)


def table(path: Path) -> str:
    """The block of the page: a row for each pattern and score."""
    settings, *rows = read_json_lines(path)
    cells: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        cells.setdefault((row["pattern"], row["score"]), {})[row["seed"]] = row
    lines = []
    for pattern, score in sorted(cells, key=lambda cell: (cell[0], list(SCORES).index(cell[1]))):
        of_seed, base = cells[pattern, score], cells.get((pattern, BASELINE), {})
        shared = sorted(set(of_seed) & set(base))
        kl, perplexity, seconds = (
            statistics.mean(row[key] for row in of_seed.values()) for key in ("kl", "perplexity", "seconds")
        )
        difference = "–"
        if score != BASELINE and shared:
            interval = paired_percent([of_seed[seed]["kl"] for seed in shared], [base[seed]["kl"] for seed in shared])
            difference = f"{interval:+.1f}"
        peak = max(row["gib"] for row in of_seed.values())
        lines.append([f"{pattern}, {SCORES[score]}", ", ".join(map(str, sorted(of_seed))), f"{kl:.4f}", difference,
                      f"{perplexity:.2f}", f"{seconds:.1f}", f"{peak:.2f}"])  # fmt: skip
    head = ["", "seeds", "KL", f"to {SCORES[BASELINE]}, %", "perplexity", "processor s", "peak, GiB"]
    length = settings["seq_len"]
    caption = (
        f"`python benchmarks pruning/patterns`, {settings['name']} (SHA-256 of its weights: "
        f"{settings['weights'][:8]}), {settings['dtype']}, perplexity {settings['dense']['perplexity']:.2f} before "
        f"pruning: the same pattern for every matrix, {settings['samples']} x {length} tokens for the scores, "
        f"{settings['eval_samples']} x {length} held out. Differences are paired by seed, with Student's 95 % "
        f"interval. {machines(rows)}."
    )
    return f"{caption}\n\n{markdown(head, lines)}"


def main() -> None:
    """Measure, or read a file; print the table."""
    measure_or_report(PARSER, run, table)


if __name__ == "__main__":
    main()
