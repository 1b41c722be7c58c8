"""Allocations on a small convolutional network and real images: one-shot, without data, and with fine-tuning between.

    pip install -e '.[bench]'
    python benchmarks/prune_digits.py [--seeds 0 1 2] [--model vit]

The network (three convolutions with batch norms, and a head; about 24 thousand weights) is trained on scikit-learn's
1797 digits of 8 x 8, of which a fifth, drawn by the seed, is held out. Every layer is pruned by magnitude, the head and
the first convolution too, as in the paper. One-shot: no training afterwards; as it is, and with the statistics of the
batch norms taken anew (on the calibration images). Without data: curves, and those statistics, on N(0, 1) images.
Iterative: the sparsities 1 - 0.5^i, four epochs with the masks kept after each. Prints a markdown table of the accuracy
on the held-out images, and beside it how much all layers together distort the logits of the calibration images, as a
multiple of the sum that DP minimized: far from 1, the smallest sum need not be the best allocation.

``--model vit`` takes a vision transformer of transformers instead (patches of 2 x 2, four blocks of width 48, about 110
thousand weights in them), which has no batch norms and whose embeddings and head are left as they are.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from bench_extra import needed
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


def make_vit() -> nn.Module:
    """A vision transformer for images of 8 x 8."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=48,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=8,
            patch_size=2,
            num_channels=1,
            num_labels=10,
        )
    )


MODELS = {"cnn": (make_network, 20), "vit": (make_vit, 40)}


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Of either network."""
    output = model(images)
    return output if isinstance(output, Tensor) else output.logits


def load(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, and held-out ones; images of mean 0 and variance 1 over the training set."""
    found = needed("sklearn.datasets").load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(seed))
    images = torch.from_numpy(found.data).float().view(-1, 1, 8, 8)[order]
    labels = torch.from_numpy(found.target).long()[order]
    cut = len(order) - len(order) // 5
    images = (images - images[:cut].mean()) / images[:cut].std()
    return images[:cut], labels[:cut], images[cut:], labels[cut:]


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
            nn.functional.cross_entropy(logits(model, images[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100 * float((logits(model, images).argmax(-1) == labels).double().mean())


def pruner(model: nn.Module, data: Tensor, allocation: str) -> Callable[[float], Any]:
    """Prune the model to a sparsity, by magnitude, with curves of the squared error of the logits."""
    return lambda sparsity: prune(
        model,
        data,
        sparsity=sparsity,
        allocation=allocation,
        score="magnitude",
        metric="mse_logits",
        held_out=False,
        batch_size=CALIBRATION,
    )


@torch.no_grad()
def ratio(dense: nn.Module, pruned: nn.Module, images: Tensor, summed: float) -> float:
    """Distortion of the logits with all layers pruned, over the sum of those with one."""
    return float((logits(pruned, images) - logits(dense, images)).double().square().mean()) / summed


def run(seed: int, network: str) -> dict[tuple[str, str], float]:
    """(setting, allocation) -> accuracy, and (setting, RATIO) -> DP's ratio."""
    torch.manual_seed(seed)
    images, labels, test, test_labels = load(seed)
    make, epochs = MODELS[network]
    dense = make()
    train(dense, images, labels, epochs)
    found = {("dense", ""): accuracy(dense, test, test_labels)}
    calibration, noise = images[:CALIBRATION], torch.randn(CALIBRATION, 1, 8, 8)
    for sparsity in ONE_SHOT:
        setting = f"one-shot {sparsity:.0%}"
        for name, data in (*((name, calibration) for name in ALLOCATIONS), (NO_DATA, noise)):
            model = copy.deepcopy(dense)
            result = pruner(model, data, name.partition(",")[0])(sparsity)
            found[setting, name] = accuracy(model, test, test_labels)
            if name == "dp":
                found[setting, RATIO] = ratio(dense, model, calibration, result.allocation.predicted)
            if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
                renew_batch_norms(model, data)
                found[f"{setting}, norms anew", name] = accuracy(model, test, test_labels)
    for name in ALLOCATIONS:
        model = copy.deepcopy(dense)
        torch.manual_seed(seed)  # the same batches for all
        reached = iter(ITERATIVE)

        def fine_tune(keeper: MaskKeeper, model: nn.Module = model, name: str = name, reached: Any = reached) -> None:
            train(model, images, labels, 4, keeper)
            found[f"iterative {next(reached):.1%}", name] = accuracy(model, test, test_labels)

        prune_iteratively(model, ITERATIVE, pruner(model, calibration, name), fine_tune)
    return found


def main() -> None:
    """Run all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="cnn", choices=MODELS)
    options = parser.parse_args()
    runs = []
    for seed in options.seeds:
        runs.append(run(seed, options.model))
        print(f"seed {seed}: dense {runs[-1]['dense', '']:.1f}", flush=True)
    columns = [*ALLOCATIONS, NO_DATA, RATIO]
    settings = list(dict.fromkeys(setting for setting, _ in runs[0] if setting != "dense"))
    settings.sort(key=lambda setting: (setting.startswith("iterative"), setting.endswith("anew")))
    print(
        f"\naccuracy in %, mean of {len(runs)} seeds; dense {statistics.mean(one['dense', ''] for one in runs):.1f}\n"
    )
    print(f"| | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}")
    for setting in settings:
        means = {
            name: statistics.mean(one[setting, name] for one in runs) for name in columns if (setting, name) in runs[0]
        }
        best = max(value for name, value in means.items() if name != RATIO)
        cells = []
        for name in columns:
            text = "-" if name not in means else f"{means[name]:.{2 if name == RATIO else 1}f}"
            cells.append(f"**{text}**" if name != RATIO and means.get(name) == best else text)
        print(f"| {setting} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
