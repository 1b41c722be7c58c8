"""Fisher, anchored and measured curves of a small model: cost, ranks, and the allocations they lead to.

    leanstep train llama-nano-sinkgd
    python benchmarks pruning/curves --model runs/llama-nano-sinkgd/final
    python benchmarks pruning/curves --model digits --samples 128 --curve-samples 64 --eval-samples 256

Calibration sequences are drawn from the older addresses of the State of the Union text, anew with every seed. For
every kind of curve: processor time; for some levels, Spearman's rank correlation with the measured curves over all
matrices and the median of the ratios to them; for every sparsity, the divergence to the dense model, on sequences of
the newest addresses, of the model that its allocation prunes. The differences to the measured curves are paired by
seed, with Student's interval. ``--model digits`` trains a ViT on half of scikit-learn's digits, draws from that half,
and judges on the other; its divergence is the squared difference of logits.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import command_line, machine_line, print_table
from torch import Tensor, nn

from leanstep.pruning import measure_curves, prune
from leanstep.pruning.folder.files import open_checkpoint
from leanstep.pruning.folder.loading import load_model
from leanstep.pruning.folder.text import token_sequences
from leanstep.pruning.measure.batches import as_batches
from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.measure.measure import Measurement, WeightSnapshot
from leanstep.pruning.score.targets import find_targets

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
KINDS = ("measured", "anchored", "fisher")
PARSER = command_line(
    __doc__, model=Path("runs/llama-nano-sinkgd/final"), seeds=[0, 1, 2], sparsities=[0.5, 0.6, 0.7],
    levels=([0.3, 0.5, 0.7, 0.85], "levels at which the curves are compared"), score="wanda",
    samples=(16, "calibration sequences"), curve_samples=(8, "of them for the curves"), seq_len=256,
    eval_samples=(32, "held-out sequences"),
)  # fmt: skip


def main() -> None:
    """Measure, and print two tables."""
    options = PARSER.parse_args()
    torch.set_num_threads(1)
    model, draw, held_out = (vision_transformer if str(options.model) == "digits" else language_model)(options)
    measurement = Measurement(model, as_batches(held_out, model))
    snapshot = WeightSnapshot(find_targets(model))
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    ranks: dict[tuple[str, float], list[tuple[float, float]]] = {}
    losses: dict[tuple[str, float], list[float]] = {}
    for seed in options.seeds:
        data = draw(seed)
        settings = {"score": options.score, "sparsity": max(options.sparsities)}
        curves = {}
        for kind in reversed(KINDS):
            start = time.process_time()
            curves[kind] = measure_curves(
                model, data[: options.curve_samples], score_data=data, levels=LEVELS, method=kind, **settings
            )
            seconds[kind].append(time.process_time() - start)
        for kind in KINDS[1:]:
            for level in options.levels:
                ranks.setdefault((kind, level), []).append(agreement(curves[kind], curves["measured"], level))
        for sparsity in options.sparsities:
            for kind in (*KINDS, "uniform"):
                allocation = {"curves": curves[kind], "levels": LEVELS} if kind in curves else {"allocation": "uniform"}
                with snapshot.restored():
                    prune(model, data, sparsity=sparsity, score=options.score, held_out=False, **allocation)
                    losses.setdefault((kind, sparsity), []).append(measurement.joint()[0])
    print_agreement(options, seconds, ranks)
    print_losses(options, losses, measurement.metric.name)
    print(f"{len(next(iter(curves.values())))} matrices, {len(LEVELS)} levels; {machine_line()}")


def language_model(options: Any) -> tuple[nn.Module, Callable[[int], Tensor], Tensor]:
    """A language model, a function that draws calibration sequences by seed, and held-out sequences."""
    from transformers import AutoTokenizer

    from leanstep.recipes.data.sources import sotu_corpus
    from leanstep.recipes.prune import split_newest

    checkpoint = open_checkpoint(options.model)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    older, newest = split_newest(tuple(sotu_corpus().documents()))

    def sequences(documents: tuple[str, ...], count: int, seed: int) -> Tensor:
        encode = lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # noqa: E731
        return token_sequences(encode, documents, count, options.seq_len, end=tokenizer.eos_token_id, seed=seed)

    draw = lambda seed: sequences(older[::10], options.samples, seed)  # noqa: E731
    return load_model(checkpoint), draw, sequences(newest, options.eval_samples, 0)


def vision_transformer(options: Any) -> tuple[nn.Module, Callable[[int], Tensor], Tensor]:
    """A ViT trained on digits, a function that draws calibration images by seed, and held-out images."""
    from digits.training import Run, images, trained

    pixels = images()["train"][0]

    def draw(seed: int) -> Tensor:
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
        return pixels[order[: options.samples]]

    model = trained(Run("judge", "dense", "", seed=0, steps=600, rate=1e-3, second=0.05))
    return model, draw, images()["judge"][0][: options.eval_samples]


def agreement(curves: dict[str, Curve], measured: dict[str, Curve], level: float) -> tuple[float, float]:
    """Spearman's correlation over the matrices at one level, and the median ratio."""
    from scipy.stats import spearmanr

    index = LEVELS.index(level) + 1  # level 0 comes first
    a, b = ([curve.distortion[index] for curve in c.values()] for c in (curves, measured))
    ratios = [x / y for x, y in zip(a, b, strict=True) if y > 0]
    return float(spearmanr(a, b).statistic), statistics.median(ratios)


def print_agreement(options: Any, seconds: dict[str, list[float]], ranks: dict[Any, list[tuple[float, float]]]) -> None:
    """Print processor time, and correlation and ratio at the levels, as means over the seeds."""
    rows = []
    for kind in KINDS:
        row = [kind, f"{statistics.mean(seconds[kind]):.1f}"]
        for level in options.levels:
            pairs = ranks.get((kind, level), [])
            means = [statistics.mean(values) for values in zip(*pairs, strict=True)]
            row.append(f"{means[0]:.3f}, {means[1]:.2f}" if means else "–")
        rows.append(row)
    print_table(["curves", "processor s", *(f"{level:.0%}: Spearman, ratio" for level in options.levels)], rows)


def print_losses(options: Any, losses: dict[tuple[str, float], list[float]], metric: str) -> None:
    """Print the held-out divergence of every allocation, and its difference to that of the measured curves."""
    from scipy.stats import t

    rows = []
    for kind in (*KINDS, "uniform"):
        row = [kind]
        for sparsity in options.sparsities:
            own, base = losses[kind, sparsity], losses["measured", sparsity]
            cell = f"{statistics.mean(own):.4f}"
            if kind != "measured" and len(own) > 1:
                percent = [100 * (a / b - 1) for a, b in zip(own, base, strict=True)]
                half = t.ppf(0.975, len(own) - 1) * statistics.stdev(percent) / math.sqrt(len(own))
                cell += f" ({statistics.mean(percent):+.1f} ± {half:.1f} %)"
            row.append(cell)
        rows.append(row)
    print_table(["curves", *(f"{sparsity:.0%}: {metric}" for sparsity in options.sparsities)], rows)


if __name__ == "__main__":
    main()
