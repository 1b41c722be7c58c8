"""Does the allocation still matter once what is left is trained? Allocations x ways of training x scores.

    leanstep train llama-nano-sinkgd
    python benchmarks pruning/cross --model runs/llama-nano-sinkgd/final --out runs/prune-cross.jsonl
    python benchmarks pruning/cross --report docs/results/prune-cross.jsonl [--write]

Runs pruning/evidence twice: with ``--recover``, whose file is that of ``--out``, and with ``--reconstruct``, whose file
is beside it. Scores, recovery and reconstruction see the same sequences. Steps are so many that both ways of training
take about as long. An interrupted call goes on where it stopped.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from common import command_line, machines, read_json_lines
from comparison.summary import paired_percent
from comparison.tables import markdown, measure_or_report
from evidence_tables import ALLOCATIONS, BASELINE, RECOVERED, SCORES

PARSER = command_line(
    __doc__, model=Path("runs/llama-nano-sinkgd/final"), name=("nano LLaMA", "the model's name in the table"),
    seeds=[0, 1, 2], sparsities=[0.5, 0.6, 0.7], samples=(128, "sequences of all three"),
    recover=(60, "steps of 8 sequences"), reconstruct=(100, "steps of 8 sequences for each block"),
    out=Path("runs/prune-cross.jsonl"), write=(False, "with --report: write the table into docs/"),
)  # fmt: skip
PARSER.add_argument("--report", type=Path, help="a file of results whose table to print")
# allocations that are compared, and where a way of training has its cells: its file, and the end of their allocation
COMPARED = (BASELINE, "anchored", "refined")
WAYS = {"none": ("", ""), "reconstruction": ("-reconstructed", ""), "recovery": ("", RECOVERED)}


def run(options: argparse.Namespace) -> None:
    """Measure every missing cell."""
    shared = {"model": options.model, "name": options.name, "samples": options.samples, "seeds": options.seeds}
    shared |= {"curve-samples": 8, "eval-samples": 32, "anchor-minutes": 0.3, "refine-minutes": 0.4}
    shared |= {"scores": ["wanda", "sparsegpt"], "allocations": COMPARED, "sparsities": options.sparsities}
    recovery = {"recover": options.recover, "recover-samples": options.samples}
    for way, given in (("", recovery), ("-reconstructed", {"reconstruct": options.reconstruct})):
        out = beside(options.out, way)
        words = list[str]()
        for name, value in {**shared, **given, "out": out, "work": out.with_suffix("")}.items():
            words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
        subprocess.run([sys.executable, str(Path(__file__).parents[1]), "pruning/evidence", *words], check=True)


def beside(out: Path, way: str) -> Path:
    """The file of results of a way of training."""
    return out.with_name(f"{out.stem}{way}{out.suffix}")


def table(path: Path) -> str:
    """The block of the page: a row for each score, sparsity and way of training."""
    files = {way: read_json_lines(beside(path, way)) for way in ("", "-reconstructed")}
    cells = {
        (way, row["score"], row["sparsity"], row["allocation"], row["seed"]): row
        for way, (_, *rows) in files.items()
        for row in rows
    }
    lines = []
    for score, sparsity in sorted({key[1:3] for key in cells if key[3] == BASELINE}, key=lambda key: (key[1], key[0])):
        for label, (way, end) in WAYS.items():
            of_allocation = {
                name: {key[4]: row for key, row in cells.items() if key[:4] == (way, score, sparsity, name + end)}
                for name in COMPARED
            }
            seeds = sorted(set.intersection(*map(set, of_allocation.values())))
            if not seeds:
                continue
            kl = {name: [rows[seed]["kl"] for seed in seeds] for name, rows in of_allocation.items()}
            base = of_allocation[BASELINE]
            lines.append([
                f"{SCORES[score]} {sparsity:.0%}, {label}", ", ".join(map(str, seeds)),
                f"{statistics.mean(kl[BASELINE]):.4f}",
                *(f"{paired_percent(kl[name], kl[BASELINE]):+.1f}" for name in COMPARED[1:]),
                f"{statistics.mean(base[seed]['perplexity'] for seed in seeds):.2f}",
                f"{statistics.mean(base[seed]['seconds'] for seed in seeds):.0f}",
            ])  # fmt: skip
    (first, *rows), (second, *others) = files.values()
    head = ["then trained by", "seeds", "KL of uniform", *(f"{ALLOCATIONS[name]}, %" for name in COMPARED[1:])]
    steps = next(row for row in rows if "steps" in row)
    text = (
        f"`python benchmarks pruning/cross`, every cell in [{path.name}](../results/{path.name}) and the file beside "
        f"it: {first['name']} (SHA-256 of its weights: {first['weights'][:8]}). {first['samples']} x "
        f"{first['seq_len']} tokens for scores and training, {first['curve_samples']} of them for curves; recovery of "
        f"{steps['steps']} steps, reconstruction of {second['reconstruct']} steps a block, 8 sequences each; "
        f"{first['eval_samples']} held out. Perplexity before: "
        f"{next(row for row in rows if row['allocation'] == 'dense')['perplexity']:.2f}. Differences of KL to uniform "
        f"sparsity, trained alike, are paired by seed, with Student's 95 % interval. {machines(rows + others)}."
    )
    return f"{text}\n\n{markdown([*head, 'perplexity of uniform', 'processor s'], lines)}"


def main() -> None:
    """Measure, or read a file; print the table."""
    measure_or_report(PARSER, run, table)


if __name__ == "__main__":
    main()
