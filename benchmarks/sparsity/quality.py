"""What N:M methods cost in accuracy: a small vision transformer on scikit-learn's digits, sparse while it trains.

    python benchmarks sparsity/quality --out runs/sparse-digits.jsonl [--workers 2] [--budget 36] [--seeds 5]
    python benchmarks sparsity/quality --report docs/results/sparse-digits.jsonl [--write]

SR-STE, two kinds of mask decay (MDGF) and two of structure decay (SDGF) train to 2:4, 1:4, 1:8, 1:16 and 1:32, and a
dense model beside them. All have the same model, data, steps and optimizer. Sparse are the MLPs and the projections to
queries, keys and values.

Each method is tuned for each target, all by the same number of runs: the learning rate, and with it SR-STE's lambda,
the fraction of the steps that a decay ends with at its target, or the dense model's weight decay. A grid of factors of
two begins as 3 x 3 around the settings in ``digits/search.py`` and widens around its best point; a best point on the
edge is an error. Tuning runs have half of the steps, one seed and an eighth of the images. That can mislead, so the
three best settings are judged with other seeds at full length on other images. The value of a seed is that of the
setting with the lowest mean loss on the other seeds: no seed chooses its own setting. A seed decides the initial
weights and the order of the images, for all methods alike, so that differences to SR-STE are paired.

The results file has a line for each run; an interrupted call goes on where it stopped. The second command prints the
tables of a file; ``--write`` puts them into docs/, with the figure. Exit codes: 0 complete, 1 a best point on the edge.
"""

from __future__ import annotations

import sys
from pathlib import Path

from common import command_line
from comparison.search import square
from digits.search import CELLS, make, summarise
from digits.tables import text, write

ROOT = Path(__file__).parents[2]
PARSER = command_line(
    __doc__, budget=(36, "tuning runs of every method and target; default: %(default)s"),
    seeds=(5, "judged runs of every method and target; default: %(default)s"),
    steps=(500, "steps of a judged run; default: %(default)s"), workers=(1, "processes; default: %(default)s"),
    out=Path("runs/sparse-digits.jsonl"), write=(False, "with --report: write the tables and the figure into docs/"),
)  # fmt: skip
PARSER.add_argument("--report", type=Path, help="a file of results whose tables to print")


def main() -> int:
    """Make the missing runs, or read a file; print the tables."""
    options = PARSER.parse_args()
    path = options.report or options.out
    if options.report is None:
        if options.budget <= (first := len(square(1))):
            PARSER.error(f"--budget: expected more than the {first} runs of the first grid, got {options.budget}")
        try:
            make(path, {name: getattr(options, name) for name in ("budget", "seeds", "steps")}, options.workers)
        except ValueError as error:
            PARSER.error(str(error))
    if not path.exists():
        PARSER.error(f"--report: expected a file of results, {path} is none")
    settings, cells, on_edge = summarise(path)
    print(text(settings, cells, len(CELLS)))
    if options.write:
        for changed in write(settings, cells, len(CELLS), ROOT):
            print(f"wrote {changed.relative_to(ROOT)}")
    for cell in on_edge:
        print(
            f"error: {' '.join(cell)}: its best settings are on the edge of the grid; raise --budget", file=sys.stderr
        )
    return 1 if on_edge else 0


if __name__ == "__main__":
    sys.exit(main())
