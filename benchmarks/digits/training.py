"""One training of a small vision transformer on scikit-learn's digits, dense or with N:M sparsity."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from models import digit_images
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from leanstep.optimizers.create import OPTIMIZERS, create
from leanstep.sparsity import Schedule, sparsify, squash, verify
from leanstep.sparsity.training.methods import METHODS

LAYERS = ("*.mlp.*", "*.[qkv]_proj")
MODEL = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
ADAMW_BETAS = (0.9, 0.95)
BATCH, WEIGHT_DECAY, WARMUP, FINETUNE = 32, 0.05, 0.1, 0.1
# of the held-out half, from the start; the rest judges
TUNE_FRACTION = 0.25
Images = tuple[Tensor, Tensor]  # pixels in [-1, 1], (count, 1, 8, 8), and digits


class Run(NamedTuple):
    """One training.

    Attributes:
        kind: "tune" or "judge": the held-out images that test it.
        method: of :data:`leanstep.sparsity.training.methods.METHODS`, or "dense", which has no pattern; or "lion",
            "sinkgd", "lanton": dense, with AdamW's rates carried over.
        pattern: target, as "1:8".
        seed: of the initial weights and the order of the images.
        steps: number of steps.
        rate: learning rate.
        second: SR-STE's factor lambda; for decay, the fraction of steps at the target; for dense, the weight decay.
    """

    kind: str
    method: str
    pattern: str
    seed: int
    steps: int
    rate: float
    second: float


@lru_cache(1)
def images() -> dict[str, Images]:
    """Images to train on, to tune on and to judge on: a half, an eighth and three eighths of the 1797."""
    pixels, digits = digit_images(0)
    pixels = pixels / 8 - 1
    first = len(pixels) // 2
    second = first + round(TUNE_FRACTION * (len(pixels) - first))
    parts = {"train": slice(0, first), "tune": slice(first, second), "judge": slice(second, None)}
    return {name: (pixels[part], digits[part]) for name, part in parts.items()}


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


def train(run: Run) -> dict[str, Any]:
    """Train once and test the squashed model: accuracy, cross-entropy (inf where it is not finite), seconds."""
    kind = METHODS[run.method].kind if run.pattern else None
    if kind and run.second >= 1:  # no step would be left for the decay
        return {"accuracy": 0.0, "loss": math.inf, "seconds": 0.0}
    start = time.perf_counter()
    model = trained(run)
    seconds = time.perf_counter() - start
    pixels, digits = images()[run.kind]
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits
    accuracy = float((logits.argmax(dim=1) == digits).double().mean())
    loss = round(float(cross_entropy(logits, digits)), 5)
    if not math.isfinite(loss):
        loss = math.inf
    return {"accuracy": round(accuracy, 5), "loss": loss, "seconds": round(seconds, 2)}


def trained(run: Run) -> nn.Module:
    """The model that a training ends in, squashed and in eval mode."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(run.seed)
    model = ViTForImageClassification(ViTConfig(**MODEL, **IMAGE))
    weight_decay = WEIGHT_DECAY if run.pattern else run.second
    optimizer: torch.optim.Optimizer
    if run.method in OPTIMIZERS:
        betas = {"betas": ADAMW_BETAS} if run.method == "sinkgd" else {}
        rates = {"lr": run.rate, "weight_decay": weight_decay}
        optimizer = create(model, run.method, like_adamw=rates, say=None, **betas)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=run.rate, weight_decay=weight_decay, betas=ADAMW_BETAS)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=int(WARMUP * run.steps))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps - warmup.total_iters)
    rate = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [warmup.total_iters])
    rules = dict.fromkeys(LAYERS, run.pattern)
    sparse = bool(run.pattern)
    if sparse:
        kind = METHODS[run.method].kind
        schedule = Schedule(kind=kind or "constant", total_steps=run.steps, finetune=run.second if kind else FINETUNE)
        factor = None if kind else run.second
        sparsify(model, rules, schedule=schedule, method=run.method, srste_lambda=factor).attach(optimizer)
    for pixels, digits in batches(images()["train"], run.steps, run.seed):
        cross_entropy(model(pixel_values=pixels).logits, digits).backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    if sparse and not verify(squash(model), rules).ok:
        raise AssertionError(f"{run}: the weights are not {run.pattern}")
    return model.eval()
