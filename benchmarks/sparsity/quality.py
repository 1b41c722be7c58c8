"""What N:M methods cost in accuracy: a small vision transformer on scikit-learn's digits, sparse while it trains.

    python benchmarks sparsity/quality [--seeds 3] [--steps 500] [--rate 1e-3] [--srste-lambda 2e-4] \
        [--results runs/sparse-quality.jsonl] [--figure docs/sparse-quality.svg]

SR-STE, two kinds of mask decay (MDGF) and two of structure decay (SDGF) train to 2:4, 1:4, 1:8, 1:16 and 1:32, and a
dense model beside them. All have the same model, data, steps, optimizer and learning rate; a seed decides the initial
weights and the order of the images, for all methods alike. Sparse are the MLPs and the projections to queries, keys and
values. Every method ends with a tenth of the steps at its target; nothing is tuned for any of them.

The 1797 images of 8 x 8 are split once into halves to train and to test on. The results file has a line for each run;
what is in it is not run again, so an interrupted call goes on where it stopped. Prints one markdown table of test
accuracies, says whether decay beats SR-STE where more than 80 % of the weights are zero, seed by seed, and draws the
figure. 78 runs take about a quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import append_json_line, command_line, print_table, pyplot, read_json_lines, save_svg
from models import digit_images
from torch import Tensor
from torch.nn.functional import cross_entropy

from leanstep.sparsity import NM, Schedule, sparsify, squash, verify
from leanstep.sparsity.methods import METHODS, SRSTE_LAMBDA

PATTERNS = ("2:4", "1:4", "1:8", "1:16", "1:32")
DECAYS = ("mdgf-exponential", "mdgf-linear", "sdgf-stepwise", "sdgf-geometric")
NAMES = {"srste": "SR-STE"} | {name: name[:4].upper() + name[4:] for name in DECAYS}
# above 80 % sparsity
SPARSEST = tuple(pattern for pattern in PATTERNS if NM.parse(pattern).sparsity > 0.8)
LAYERS = ("*.mlp.*", "*.[qkv]_proj")
MODEL = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
# readable on white and on black
GREY = "#808080"
COLOURS = ("#d1495b", "#2f7fd1", "#3aa6a0", "#b07d2b", "#8a63d2")
BATCH, WEIGHT_DECAY, WARMUP, FINETUNE = 32, 0.05, 0.1, 0.1
Images = tuple[Tensor, Tensor]  # pixels in [-1, 1], (count, 1, 8, 8), and digits
PARSER = command_line(
    __doc__, seeds=3, steps=500, rate=(1e-3, "learning rate of all runs"), threads=1,
    srste_lambda=(SRSTE_LAMBDA, "factor of SR-STE's term"),
    results=Path("runs/sparse-quality.jsonl"), figure=Path("docs/sparse-quality.svg"),
)  # fmt: skip


class Run(NamedTuple):
    """One training: a method ("dense" has no pattern), its target, and what else decides the result."""

    method: str
    pattern: str
    seed: int
    steps: int
    rate: float
    srste_lambda: float | None


def batches(data: Images, steps: int, seed: int) -> Iterator[Images]:
    """Epochs in random order."""
    pixels, digits = data
    chance = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(pixels), generator=chance)])
        rows, order = order[:BATCH], order[BATCH:]
        yield pixels[rows], digits[rows]


def train(run: Run, data: Images, test: Images) -> dict[str, Any]:
    """Train once and test the squashed model."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(run.seed)
    model = ViTForImageClassification(ViTConfig(**MODEL, **IMAGE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.rate, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.95))
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=int(WARMUP * run.steps))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps - warmup.total_iters)
    rate = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [warmup.total_iters])
    rules = dict.fromkeys(LAYERS, run.pattern)
    sparse = run.method != "dense"
    if sparse:
        kind = METHODS[run.method].kind or "constant"
        schedule = Schedule(kind=kind, total_steps=run.steps, finetune=FINETUNE)
        controller = sparsify(model, rules, schedule=schedule, method=run.method, srste_lambda=run.srste_lambda)
        controller.attach(optimizer)
    start = time.perf_counter()
    for pixels, digits in batches(data, run.steps, run.seed):
        cross_entropy(model(pixel_values=pixels).logits, digits).backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    seconds = time.perf_counter() - start
    if sparse and not verify(squash(model), rules).ok:
        raise AssertionError(f"{run}: the weights are not {run.pattern}")
    with torch.no_grad():
        logits = model.eval()(pixel_values=test[0]).logits
    right = float((logits.argmax(dim=1) == test[1]).double().mean())
    return {"accuracy": right, "loss": float(cross_entropy(logits, test[1])), "seconds": round(seconds, 2)}


def runs(options: argparse.Namespace) -> list[Run]:
    """Every run, seed by seed, so that what is there after an interruption is comparable."""
    targets = [("dense", ""), *((method, pattern) for pattern in PATTERNS for method in NAMES)]
    return [
        Run(method, pattern, seed, options.steps, options.rate, options.srste_lambda if method == "srste" else None)
        for seed in range(options.seeds)
        for method, pattern in targets
    ]


def results(path: Path, runs: list[Run]) -> dict[Run, dict[str, Any]]:
    """Results of all runs, from the file or made now and added to it."""
    done = {Run(**row["run"]): row["result"] for row in read_json_lines(path)}
    missing = [run for run in runs if run not in done]
    pixels, digits = digit_images(0)
    pixels, half = pixels / 8 - 1, len(pixels) // 2
    data, test = (pixels[:half], digits[:half]), (pixels[half:], digits[half:])
    for i, run in enumerate(missing):
        done[run] = train(run, data, test)
        append_json_line(path, {"run": run._asdict(), "result": done[run]})
        print(f"{i + 1}/{len(missing)} {run.method} {run.pattern} seed {run.seed}: {done[run]}", flush=True)
    return {run: done[run] for run in runs}


def mean_and_spread(values: list[float]) -> str:
    """In percent, with the standard deviation over seeds."""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def print_accuracies(done: dict[Run, dict[str, Any]]) -> None:
    """Print test accuracy in percent, mean and standard deviation of the seeds, by target and method."""
    rows = (
        [pattern, f"{NM.parse(pattern).sparsity:.1%}"]
        + [mean_and_spread(accuracies(done, method, pattern)) for method in NAMES]
        for pattern in PATTERNS
    )
    print_table(["target", "zeros", *NAMES.values()], rows)
    dense = accuracies(done, "dense", "")
    print(f"\nDense: {mean_and_spread(dense)}; {len(dense)} seeds, test accuracy in percent.\n")


def accuracies(done: dict[Run, dict[str, Any]], method: str, pattern: str) -> list[float]:
    """One per seed, in their order."""
    return [result["accuracy"] for run, result in done.items() if (run.method, run.pattern) == (method, pattern)]


def print_gains(done: dict[Run, dict[str, Any]]) -> None:
    """Print the gain of each kind of decay over SR-STE above 80 % sparsity, the same seed and target compared."""
    print(f"Gain over SR-STE at {', '.join(SPARSEST)}, in points, the same seed and target compared:")
    for method in DECAYS:
        gains: dict[str, list[float]] = {}
        for pattern in SPARSEST:
            pairs = zip(accuracies(done, method, pattern), accuracies(done, "srste", pattern), strict=True)
            gains[pattern] = [100 * (ours - theirs) for ours, theirs in pairs]
        every = list(itertools.chain(*gains.values()))
        error = f" (standard error {statistics.stdev(every) / len(every) ** 0.5:.2f})"
        each = ", ".join(f"{statistics.mean(values):+.1f} at {pattern}" for pattern, values in gains.items())
        better, worse = sum(gain > 0 for gain in every), sum(gain < 0 for gain in every)
        print(
            f"* {NAMES[method]}: {statistics.mean(every):+.2f}{error}, better in {better} and worse in {worse} of "
            f"{len(every)} pairs; {each}"
        )


def plot(done: dict[Run, dict[str, Any]], path: Path) -> None:
    """Accuracy against the fraction of zeros, with the range of the seeds; greys that show on light and dark pages."""
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), GREY)
    plt = pyplot()
    plt.rcParams |= {"font.size": 10, **colours}
    figure, axes = plt.subplots(figsize=(7.2, 3.8))
    for i, (method, name) in enumerate(NAMES.items()):
        values = [[100 * value for value in accuracies(done, method, pattern)] for pattern in PATTERNS]
        means = [statistics.mean(each) for each in values]
        ends = [[abs(mean - end(each)) for mean, each in zip(means, values, strict=True)] for end in (min, max)]
        # side by side, so that the ranges can be told apart
        positions = [x + 0.07 * (i - len(NAMES) // 2) for x in range(len(PATTERNS))]
        axes.errorbar(positions, means, ends, color=COLOURS[i], marker="o", markersize=4, linewidth=1.3, label=name)
    dense = 100 * statistics.mean(accuracies(done, "dense", ""))
    axes.axhline(dense, color=GREY, linewidth=1.2, linestyle="--", label="dense")
    axes.set_xticks(range(len(PATTERNS)), [f"{text}\n{NM.parse(text).sparsity:.1%} zeros" for text in PATTERNS])
    axes.set_ylabel("test accuracy, %")
    axes.set_title("Digits, small vision transformer: mean and range of the seeds", color=GREY, fontsize=10)
    axes.grid(axis="y", color=GREY, alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    save_svg(figure, path, transparent=True)


def main() -> None:
    """Measure, and print the table."""
    options = PARSER.parse_args()
    torch.set_num_threads(options.threads)
    done = results(options.results, runs(options))
    print()
    print_accuracies(done)
    print_gains(done)
    plot(done, options.figure)
