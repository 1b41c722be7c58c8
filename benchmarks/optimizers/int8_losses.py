"""Validation losses with optimizer state of 8 bits beside state in the parameters' dtype, on a nano recipe.

    python benchmarks optimizers/int8_losses --out runs/int8 [--seeds 0 1 2] [--steps 100] [key=value ...]

Trains every method with both states from each seed, one run after the other. Finished runs are not repeated. Runs of
one seed share weights and batches, so their losses are compared in pairs: the table has the mean difference of int8 and
its interval of Student's t. All averages are in 8 bits, those of the AdamW fallback too, except those of vectors.
"""

from __future__ import annotations

from pathlib import Path

from common import command_line, machine_line, print_table, train_once
from comparison.summary import paired_difference

PARSER = command_line(__doc__, steps=100, seeds=[0, 1, 2])
PARSER.add_argument("--out", type=Path, required=True)
PARSER.add_argument("settings", nargs="*", metavar="key=value", help="settings of every run")
ADAMW = ["optimizer.name=sinkgd", "optimizer.groups=[{match: '', algorithm: adamw}]"]
INT8 = "optimizer.args.momentum_dtype=int8"
# name -> (recipe, its settings, those of 8 bits)
METHODS = {
    "SinkGD, momentum 0.9, Nesterov": (
        "llama-nano-sinkgd",
        ["optimizer.args.momentum=0.9", "optimizer.args.nesterov=true"],
        [INT8],
    ),
    "LANTON": ("llama-nano-lanton", [], [INT8, "optimizer.args.noise_dtype=int8"]),
    "AdamW": ("llama-nano-adamw", ADAMW, [INT8]),
    "Lion": ("llama-nano-lion", [], [INT8]),
}


def losses(name: str, out: Path, seeds: list[int], settings: list[str], *, int8: bool) -> list[float]:
    """Train a method from each seed, and return the final validation losses."""
    recipe, of_method, of_int8 = METHODS[name]
    settings = [*of_method, *(of_int8 if int8 else ()), *settings]
    folder = f"{recipe}-{'int8' if int8 else 'wide'}"
    return [train_once(recipe, out / f"{folder}-{seed}", [*settings, f"seed={seed}"])["val_loss"] for seed in seeds]


def main() -> None:
    """Train, and print the table, each row when its runs are done."""
    options = PARSER.parse_intermixed_args()
    settings = [f"steps={options.steps}", "eval.every=0", "eval.at_start=false", "checkpoint.every=0"]
    settings += options.settings
    print(f"{machine_line()}, {options.steps} steps, seeds {', '.join(map(str, options.seeds))}\n", flush=True)

    def row(name: str) -> list[str]:
        wide, eight = (losses(name, options.out, options.seeds, settings, int8=int8) for int8 in (False, True))
        difference = paired_difference(eight, wide)
        interval = f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
        texts = (" ".join(f"{loss:.4f}" for loss in values) for values in (wide, eight))
        return [name, *texts, interval, difference.reading]

    head = ["", "losses, state in the parameters' dtype", "losses, int8", "mean difference [95 % interval]", "reading"]
    print_table(head, map(row, METHODS))


if __name__ == "__main__":
    main()
