"""Optimizers at equal tokens on the nano recipes, each at its own tuned learning rate.

    python benchmarks/nano_runs.py --out runs/nano [--family llama] [--seeds 0 1 2] [--tune-steps 150] \
        [--steps 300] [--optimizers lion] [key=value ...]

First every optimizer runs ``--tune-steps`` steps, with a schedule of that length, at each learning rate of its grid
(seed 0); the rate with the lowest validation loss is kept, and a rate at the edge of the grid is reported as such. Then
the recipe runs at that rate with every seed. Further ``key=value`` pairs go to every run. Finished runs are not
repeated, so an interrupted call goes on where it stopped. Prints a markdown table; writes ``results.json`` and
``curves.svg`` into the output folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


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


def run(recipe: str, out: Path, overrides: list[str]) -> float:
    """Train once (unless done) and return the last validation loss; inf for a run that diverged."""
    status = out / "status.json"
    if not (status.exists() and json.loads(status.read_text())["status"] in ("done", "failed:nan")):
        command = [sys.executable, "-m", "leanstep", "train", recipe, f"out={out}", *overrides]
        result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if result.returncode not in (0, 3):
            raise RuntimeError(f"{' '.join(command)} exited {result.returncode}:\n{result.stderr[-2000:]}")
    report = json.loads(status.read_text())
    return report["val_loss"] if report["status"] == "done" else float("inf")


def tune(family: str, optimizer: str, out: Path, steps: int, extra: list[str]) -> dict[float, float]:
    """Validation loss by learning rate."""
    losses = {}
    entry = ENTRIES[optimizer]
    for lr in entry.rates:
        overrides = [f"optimizer.lr={lr}", f"steps={steps}", f"eval.every={steps}", "eval.at_start=false"]
        overrides += [*entry.settings, *extra]
        losses[lr] = run(f"{family}-nano-{entry.recipe}", out / f"tune-{optimizer}-{lr}", overrides)
        print(f"tune {optimizer} lr {lr}: validation loss {losses[lr]:.4f}", flush=True)
    return losses


def curve(run_dir: Path) -> tuple[list[int], list[float]]:
    """(tokens, validation loss) of a run."""
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    tokens_at = {r["step"]: r["tokens"] for r in records if r["kind"] == "train"}
    points = [(tokens_at[r["step"]], r["loss"]) for r in records if r["kind"] == "eval" and r["step"] in tokens_at]
    return [t for t, _ in points], [loss for _, loss in points]


def speed(run_dirs: list[Path]) -> float:
    """Median tokens per second over the log lines of the runs; runs of a busy machine do not compare."""
    lines = [json.loads(line) for run_dir in run_dirs for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return statistics.median(line["tokens_per_s"] for line in lines if line["kind"] == "train")


def plot(out: Path, family: str, rates: dict[str, float], seeds: list[int]) -> None:
    """Validation loss against tokens, one line a seed."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.8))
    for colour, (optimizer, lr) in zip(COLOURS, rates.items(), strict=False):
        for i, seed in enumerate(seeds):
            tokens, losses = curve(out / f"{optimizer}-seed{seed}")
            label = f"{optimizer}, lr {lr:g}" if i == 0 else None
            axes.plot([t / 1e6 for t in tokens], losses, color=colour, linewidth=1.2, alpha=0.8, label=label)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title(f"{family}-nano on the State of the Union addresses, {len(seeds)} seeds")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out / "curves.svg", metadata={"Date": None})


def main() -> None:
    """Tune, run, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--family", default="llama", choices=["llama", "gpt"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tune-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, help="steps of the final runs; the recipe's if not given")
    parser.add_argument("--optimizers", nargs="+", default=list(ENTRIES), choices=list(ENTRIES))
    parser.add_argument("--only-tune", action="store_true", help="stop after the learning rates are chosen")
    options, extra = parser.parse_known_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tuning = {name: tune(options.family, name, options.out, options.tune_steps, extra) for name in options.optimizers}
    rates = {name: min(losses, key=losses.__getitem__) for name, losses in tuning.items()}
    for name, lr in rates.items():
        if lr in (ENTRIES[name].rates[0], ENTRIES[name].rates[-1]):
            print(f"note: the best rate of {name}, {lr}, is at the edge of its grid")
    if options.only_tune:
        return
    results: dict[str, list[float]] = {}
    for seed in options.seeds:
        for name, lr in rates.items():
            entry = ENTRIES[name]
            overrides = [f"optimizer.lr={lr}", f"seed={seed}", *entry.settings, *extra]
            if options.steps is not None:
                overrides += [f"steps={options.steps}", f"eval.every={max(options.steps // 6, 1)}"]
            out = options.out / f"{name}-seed{seed}"
            results.setdefault(name, []).append(run(f"{options.family}-nano-{entry.recipe}", out, overrides))
            print(f"{name} lr {lr} seed {seed}: validation loss {results[name][-1]:.4f}", flush=True)
    record = {"tuning": {k: {str(r): v for r, v in t.items()} for k, t in tuning.items()}, "losses": results}
    (options.out / "results.json").write_text(json.dumps(record, indent=1))
    plot(options.out, options.family, rates, options.seeds)
    print(
        "\n| optimizer | lr | validation loss, mean of seeds | spread | each seed | tokens/s |\n"
        "| --- | ---: | ---: | ---: | --- | ---: |"
    )
    for name, losses in sorted(results.items(), key=lambda item: statistics.mean(item[1])):
        spread = f"{max(losses) - min(losses):.4f}"
        fast = speed([options.out / f"{name}-seed{seed}" for seed in options.seeds])
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        print(f"| {name} | {rates[name]:g} | {statistics.mean(losses):.4f} | {spread} | {each} | {fast:.0f} |")


if __name__ == "__main__":
    main()
