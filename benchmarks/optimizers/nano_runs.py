"""Optimizers at equal tokens on the nano recipes, each at its own tuned learning rate.

    python benchmarks optimizers/nano_runs --out runs/nano [--family llama] [--seeds 0 1 2] [--tune-steps 150] \
        [--steps 300] [--optimizers lion] [key=value ...]

First every optimizer runs ``--tune-steps`` steps, with a schedule of that length, at each learning rate of its grid
(seed 0); the rate with the lowest validation loss is kept, and a rate at the edge of the grid is reported as such. Then
the recipe runs at that rate with every seed. Further ``key=value`` pairs go to every run. Finished runs are not
repeated, so an interrupted call goes on where it stopped. Prints a markdown table; writes
``curves.svg`` into the output folder.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import NamedTuple

from common import command_line, print_table, pyplot, read_json_lines, save_svg, train_once


class Entry(NamedTuple):
    """A row of the table: the recipe FAMILY-nano-RECIPE with these settings, and the learning rates to try."""

    recipe: str
    rates: tuple[float, ...]
    settings: tuple[str, ...] = ()


COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3")
_MFAC = "{window: 256, damping: 1e-4, compression: topk, density: 0.01, momentum: 0.9}"
# the grids are powers of two (M-FAC: of three) around the rates of the recipes
ENTRIES = {
    "adamw": Entry("adamw", (2e-3, 4e-3, 8e-3)),
    "lion": Entry("lion", (5e-4, 1e-3, 2e-3)),
    "sinkgd": Entry("sinkgd", (1e-2, 2e-2, 4e-2)),
    "muon": Entry("adamw", (4e-3, 8e-3, 1.6e-2), ("optimizer.name=muon", "optimizer.args={}")),
    "lanton": Entry("lanton", (1e-2, 2e-2, 4e-2)),
    "lanton-plain": Entry("lanton", (1e-2, 2e-2, 4e-2), ("optimizer.args={noise_adaptive: false}",)),
    "s-mfac": Entry("adamw", (1e-3, 3e-3, 1e-2), ("optimizer.name=mfac", f"optimizer.args={_MFAC}")),
}


PARSER = command_line(
    __doc__, seeds=[0, 1, 2], tune_steps=150, steps=(0, "steps of the final runs; the recipe's if not given"),
)  # fmt: skip
PARSER.add_argument("--out", type=Path, required=True)
PARSER.add_argument("--family", default="llama", choices=["llama", "gpt"])
PARSER.add_argument("--optimizers", nargs="+", default=list(ENTRIES), choices=list(ENTRIES))
PARSER.add_argument("settings", nargs="*", metavar="key=value", help="settings of every run")


def run(recipe: str, out: Path, overrides: list[str]) -> float:
    """Train once and return the last validation loss; inf for a run that diverged."""
    report = train_once(recipe, out, overrides)
    return report["val_loss"] if report["status"] == "done" else float("inf")


def tune(family: str, optimizer: str, out: Path, steps: int, settings: list[str]) -> float:
    """The learning rate with the lowest validation loss."""
    losses = {}
    entry = ENTRIES[optimizer]
    for lr in entry.rates:
        overrides = [f"optimizer.lr={lr}", f"steps={steps}", f"eval.every={steps}", "eval.at_start=false"]
        overrides += [*entry.settings, *settings]
        losses[lr] = run(f"{family}-nano-{entry.recipe}", out / f"tune-{optimizer}-{lr}", overrides)
        print(f"tune {optimizer} lr {lr}: validation loss {losses[lr]:.4f}", flush=True)
    best = min(losses, key=losses.__getitem__)
    if best in (entry.rates[0], entry.rates[-1]):
        print(f"note: the best rate of {optimizer}, {best}, is at the edge of its grid")
    return best


def curve(out: Path) -> list[tuple[float, float]]:
    """(million tokens, validation loss) of a run."""
    rows = read_json_lines(out / "log.jsonl")
    tokens = {row["step"]: row["tokens"] / 1e6 for row in rows if row["kind"] == "train"}
    return [(tokens[row["step"]], row["loss"]) for row in rows if row["kind"] == "eval" and row["step"] in tokens]


def speed(folders: list[Path]) -> float:
    """Median tokens per second over the log lines of the runs; runs of a busy machine do not compare."""
    rows = [row for folder in folders for row in read_json_lines(folder / "log.jsonl")]
    return statistics.median(row["tokens_per_s"] for row in rows if row["kind"] == "train")


def plot(out: Path, family: str, rates: dict[str, float], seeds: list[int]) -> None:
    """Validation loss against tokens, one line a seed."""
    figure, axes = pyplot().subplots(figsize=(6.4, 3.8))
    for colour, (optimizer, lr) in zip(COLOURS, rates.items(), strict=False):
        for i, seed in enumerate(seeds):
            label = f"{optimizer}, lr {lr:g}" if i == 0 else None
            points = zip(*curve(out / f"{optimizer}-seed{seed}"), strict=True)
            axes.plot(*points, color=colour, linewidth=1.2, alpha=0.8, label=label)
    axes.set(xlabel="million tokens", ylabel="validation loss (nats per token)")
    axes.set_title(f"{family}-nano on the State of the Union addresses, {len(seeds)} seeds")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_svg(figure, out / "curves.svg")


def main() -> None:
    """Tune, run, print, plot."""
    options = PARSER.parse_intermixed_args()
    family, out, settings = options.family, options.out, options.settings
    rates = {name: tune(family, name, out, options.tune_steps, settings) for name in options.optimizers}
    results: dict[str, list[float]] = {}
    for seed in options.seeds:
        for name, lr in rates.items():
            entry = ENTRIES[name]
            overrides = [f"optimizer.lr={lr}", f"seed={seed}", *entry.settings, *settings]
            if options.steps:
                overrides += [f"steps={options.steps}", f"eval.every={max(options.steps // 6, 1)}"]
            loss = run(f"{family}-nano-{entry.recipe}", out / f"{name}-seed{seed}", overrides)
            results.setdefault(name, []).append(loss)
            print(f"{name} lr {lr} seed {seed}: validation loss {loss:.4f}", flush=True)
    plot(out, family, rates, options.seeds)
    head = ["optimizer", "lr", "validation loss, mean of seeds", "spread", "each seed", "tokens/s"]
    rows = []
    for name, losses in sorted(results.items(), key=lambda item: statistics.mean(item[1])):
        tokens_per_s = speed([out / f"{name}-seed{seed}" for seed in options.seeds])
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        spread = f"{max(losses) - min(losses):.4f}"
        rows.append([name, f"{rates[name]:g}", f"{statistics.mean(losses):.4f}", spread, each, f"{tokens_per_s:.0f}"])
    print()
    print_table(head, rows, left=(0, 4))
