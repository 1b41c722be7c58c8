"""Allocations on a small convolutional network and real images: one-shot, without data, and with fine-tuning between.

    pip install -e '.[bench]'
    python benchmarks pruning/digits [--seeds 0 1 2]

The network (three convolutions with batch norms, and a head; about 24 thousand weights) is trained on scikit-learn's
1797 digits of 8 x 8, of which a fifth, drawn by the seed, is held out. Every layer is pruned by magnitude, the head and
the first convolution too, as in the paper. One-shot: no training afterwards; as it is, and with the statistics of the
batch norms taken anew (on the calibration images). Without data: curves, and those statistics, on N(0, 1) images.
Iterative: the sparsities 1 - 0.5^i, four epochs with the masks kept after each. Prints a markdown table of the accuracy
on the held-out images, and beside it how much all layers together distort the logits of the calibration images, as a
multiple of the sum that DP minimized: far from 1, the smallest sum need not be the best allocation.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import command_line, print_table
from models import digit_images
from torch import Tensor, nn

from leanstep.pruning import MaskKeeper, iterative_sparsities, prune, prune_iteratively, renew_batch_norms

ALLOCATIONS = ("uniform", "global", "lamp", "erk", "dp")
ONE_SHOT = (0.6, 0.7, 0.8, 0.9)
ITERATIVE = iterative_sparsities(0.98, 0.5)
CALIBRATION = 256
NO_DATA, RATIO = "dp, no data", "joint / summed, dp"


def make_network() -> nn.Module:
    """Three convolutions and a head."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)),
    )


PARSER = command_line(__doc__, seeds=[0, 1, 2])


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, keeper: MaskKeeper | None = None) -> None:
    """AdamW with a cosine, batches of 64."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    if keeper is not None:
        keeper.attach(optimizer)
    steps = epochs * -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Accuracy in percent."""
    return 100 * float((model(images).argmax(-1) == labels).double().mean())


def pruner(model: nn.Module, data: Tensor, allocation: str) -> Callable[[float], Any]:
    """A function that prunes the model to a sparsity, by magnitude, with curves of the squared error of the logits."""
    options = {"allocation": allocation, "score": "magnitude", "metric": "mse_logits", "held_out": False}
    return lambda sparsity: prune(model, data, sparsity=sparsity, batch_size=CALIBRATION, **options)


def run(seed: int) -> dict[tuple[str, str], float]:
    """(setting, allocation) -> accuracy, and (setting, RATIO) -> DP's ratio."""
    torch.manual_seed(seed)
    images, labels = digit_images(seed)
    size = len(images) - len(images) // 5
    images = (images - images[:size].mean()) / images[:size].std()  # of mean 0 and variance 1 over the training set
    images, labels, test, test_labels = images[:size], labels[:size], images[size:], labels[size:]
    dense = make_network()
    train(dense, images, labels, 20)
    results = {("dense", ""): accuracy(dense, test, test_labels)}
    calibration, noise = images[:CALIBRATION], torch.randn(CALIBRATION, 1, 8, 8)
    for sparsity in ONE_SHOT:
        setting = f"one-shot {sparsity:.0%}"
        for name, data in (*((name, calibration) for name in ALLOCATIONS), (NO_DATA, noise)):
            model = copy.deepcopy(dense)
            result = pruner(model, data, name.partition(",")[0])(sparsity)
            results[setting, name] = accuracy(model, test, test_labels)
            if name == "dp":
                with torch.no_grad():
                    joint = (model(calibration) - dense(calibration)).double().square().mean()
                results[setting, RATIO] = float(joint) / result.allocation.predicted
            renew_batch_norms(model, data)
            results[f"{setting}, norms anew", name] = accuracy(model, test, test_labels)
    for name in ALLOCATIONS:
        model = copy.deepcopy(dense)
        torch.manual_seed(seed)  # the same batches for all
        reached = iter(ITERATIVE)

        def fine_tune(keeper: MaskKeeper, model: nn.Module = model, name: str = name, reached: Any = reached) -> None:
            train(model, images, labels, 4, keeper)
            results[f"iterative {next(reached):.1%}", name] = accuracy(model, test, test_labels)

        prune_iteratively(model, ITERATIVE, pruner(model, calibration, name), fine_tune)
    return results


def main() -> None:
    """Run all seeds and print the table."""
    options = PARSER.parse_args()
    runs = []
    for seed in options.seeds:
        runs.append(run(seed))
        print(f"seed {seed}: dense {runs[-1]['dense', '']:.1f}", flush=True)
    means = {key: statistics.mean(results[key] for results in runs) for key in runs[0]}
    print(f"\naccuracy in %, mean of {len(runs)} seeds; dense {means.pop(('dense', '')):.1f}\n")
    settings = list(dict.fromkeys(setting for setting, _ in means))
    settings.sort(key=lambda setting: (setting.startswith("iterative"), setting.endswith("anew")))
    columns = [*ALLOCATIONS, NO_DATA]

    def row(setting: str) -> list[str]:
        values = [means.get((setting, name)) for name in columns]
        best = max(value for value in values if value is not None)
        texts = ["-" if value is None else f"{value:.1f}" for value in values]
        texts = [f"**{text}**" if value == best else text for text, value in zip(texts, values, strict=True)]
        return [setting, *texts, f"{means[setting, RATIO]:.2f}" if (setting, RATIO) in means else "-"]

    print_table(["", *columns, RATIO], map(row, settings))
