r"""Fisher, anchored and measured curves of a small model: cost, ranks, and the allocations they lead to.

    leanstep train llama-nano-sinkgd steps=300
    python benchmarks pruning/curves --model runs/llama-nano-sinkgd/final --out runs/prune-curves-nano.jsonl
    python benchmarks pruning/curves --model digits --samples 128 --curve-samples 64 --eval-samples 256 \
        --out runs/prune-curves-vit.jsonl
    python benchmarks pruning/curves --report docs/results/prune-curves-nano.jsonl [--write]

Calibration sequences are drawn from the older addresses of the State of the Union text, anew with every seed. For
every kind of curve: processor time; for some levels, Spearman's rank correlation with the measured curves over all
matrices and the median of the ratios to them; for every sparsity, the divergence to the dense model, on sequences of
the newest addresses, of the model that its allocation prunes. Anchored curves are measured for every sparsity anew, as
``leanstep prune`` does; their cost and their ranks are means over the sparsities. The differences to the measured
curves are paired by seed, with Student's interval. ``--model digits`` trains a ViT on half of scikit-learn's digits,
draws from that half, and judges on the other; its divergence is the squared difference of logits.

That divergence is of all matrices together, whose distortions do not add up, and varies by some percent between seeds.
So allocations are also compared by the sum that dynamic programming minimizes, of the other seeds' curves.

The results file has a line for each seed; an interrupted call goes on with the next one, and with ``--work FOLDER``
inside it: curves that were resumed have no time in the table. ``--write`` puts the table of a file into docs/.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from calibration import CalibratedModel
from common import append_json_line, command_line, machine_state, machines, read_json_lines
from comparison.summary import paired_percent
from comparison.tables import markdown, measure_or_report
from torch import Tensor, nn

from leanstep.pruning import measure_curves, prune
from leanstep.pruning.measure.batches import as_batches
from leanstep.pruning.measure.curve_file import weights_hash
from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.measure.measurement import Measurement
from leanstep.pruning.score.targets import WeightSnapshot, find_targets

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
KINDS = ("measured", "anchored", "fisher")
RULES = (*KINDS, "uniform")
PARSER = command_line(
    __doc__, model=Path("runs/llama-nano-sinkgd/final"), name=("", "in the table; default: from the configuration"),
    seeds=[0, 1, 2], sparsities=[0.5, 0.6, 0.7],
    levels=([0.3, 0.5, 0.7, 0.85], "levels at which the curves are compared"), score="wanda",
    grid=(list(GRID), "levels at which they are measured"),
    samples=(16, "calibration sequences"), curve_samples=(8, "of them for the curves"), seq_len=256,
    eval_samples=(32, "held-out sequences"),
    anchor_minutes=(30.0, "for the measurements of anchored curves"), out=Path("runs/prune-curves.jsonl"),
    write=(False, "with --report: write the table into docs/"),
)  # fmt: skip
PARSER.add_argument("--work", type=Path, help="a folder in which to keep the points of an unfinished seed")
PARSER.add_argument("--report", type=Path, help="a file of results whose table to print")
SETTINGS = ("score", "samples", "curve_samples", "seq_len", "eval_samples", "grid", "levels", "sparsities",
            "anchor_minutes")  # fmt: skip
# of files that were written before these settings were; anchored curves were those of the largest sparsity alone
EARLIER = {"grid": list(GRID), "anchor_minutes": 30.0, "anchored_anew": False}

# a kind of curves, and the sparsity near which they are anchored
CurveKey = tuple[str, float | None]


class Subject(NamedTuple):
    """A model, its name, the command that made it, a function from a seed to calibration data, and the judge."""

    model: nn.Module
    name: str
    made_by: str
    draw: Callable[[int], Tensor]
    held_out: Measurement


def language_model(options: argparse.Namespace) -> Subject:
    """A checkpoint, with sequences of the addresses."""
    text = CalibratedModel(options.model, options.seq_len, options.eval_samples)
    draw = lambda seed: text.calibration(options.samples, seed)  # noqa: E731
    return Subject(text.model, text.name, text.made_by, draw, text.held_out)


def vision_transformer(options: argparse.Namespace) -> Subject:
    """A ViT trained on digits, with images of them."""
    from digits.training import Run, images, trained

    pixels = images()["train"][0]

    def draw(seed: int) -> Tensor:
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
        return pixels[order[: options.samples]]

    model = trained(Run("judge", "dense", "", seed=0, steps=600, rate=1e-3, second=0.05))
    judged = as_batches(images()["judge"][0][: options.eval_samples], model)
    return Subject(model, "a ViT on scikit-learn's digits", "", draw, Measurement(model, judged))


def run(options: argparse.Namespace) -> None:
    """Measure every missing seed."""
    torch.set_num_threads(1)
    if missing := set(options.levels) - set(options.grid):
        raise SystemExit(f"--levels {' '.join(map(str, sorted(missing)))}: not in --grid, so nothing is measured there")
    rows = read_json_lines(options.out)
    subject = (vision_transformer if str(options.model) == "digits" else language_model)(options)
    settings = {name: getattr(options, name) for name in SETTINGS}
    settings |= {"name": options.name or subject.name, "weights": weights_hash(subject.model)}
    settings |= {"made_by": subject.made_by, "metric": subject.held_out.metric.name, "anchored_anew": True}
    if not rows:
        append_json_line(options.out, settings)
    elif EARLIER | rows[0] != settings:
        raise SystemExit(f"{options.out} is of another model or other settings: give another --out")
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    present = {row["seed"] for row in rows[1:]}
    for seed in options.seeds:
        if seed not in present:
            row = measured(subject, seed, options) | machine_state()
            append_json_line(options.out, row)
            print(row, flush=True)


def measured(subject: Subject, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The line of a seed: cost of the three kinds, their agreement, and the divergence after pruning."""
    data, curves, seconds = subject.draw(seed), dict[CurveKey, dict[str, Curve]](), dict[str, float | None]()
    # what to measure: the anchored curves for each sparsity, the others once
    for kind, sparsity in (("fisher", None), *(("anchored", s) for s in options.sparsities), ("measured", None)):
        curves[kind, sparsity], seconds[name_of(kind, sparsity)] = timed(subject, seed, data, options, kind, sparsity)
    near = {sparsity: curves["anchored", sparsity] for sparsity in options.sparsities}
    costs = [seconds.pop(name_of("anchored", sparsity)) for sparsity in near]
    seconds["anchored"] = None if None in costs else round(statistics.mean(filter(None, costs)), 1)
    agreements = {
        kind: {
            f"{level:g}": mean_agreement(some, curves["measured", None], options.grid.index(level) + 1)
            for level in options.levels
        }
        for kind, some in {"anchored": list(near.values()), "fisher": [curves["fisher", None]]}.items()
    }
    snapshot = WeightSnapshot(find_targets(subject.model))
    divergence: dict[str, dict[str, float]] = {rule: {} for rule in RULES}
    counts: dict[str, dict[str, list[int]]] = {rule: {} for rule in RULES}
    for sparsity in options.sparsities:
        for rule in RULES:
            allocation: dict[str, Any] = {"allocation": "uniform"}
            if rule in KINDS:
                allocation = {"curves": curves[rule, sparsity if rule == "anchored" else None], "levels": options.grid}
            with snapshot.restored():
                result = prune(
                    subject.model, data, sparsity=sparsity, score=options.score, held_out=False, **allocation
                )
                counts[rule][f"{sparsity:g}"] = [result.allocation.counts[name] for name in curves["measured", None]]
                divergence[rule][f"{sparsity:g}"] = subject.held_out.joint().mean
    return {
        "seed": seed,
        "matrices": len(curves["measured", None]),
        "anchored": [sum(curve.source == "anchored" for curve in some.values()) for some in near.values()],
        "anchored_on": [
            next((curve.samples for curve in some.values() if curve.samples), options.curve_samples)
            for some in near.values()
        ],
        "seconds": seconds,
        "agreement": agreements,
        "divergence": divergence,
        "counts": counts,
        "measured": [
            [curve.numel, curve.counts, [float(f"{value:.5g}") for value in curve.distortion]]
            for curve in curves["measured", None].values()
        ],
    }


def name_of(kind: str, sparsity: float | None) -> str:
    """Of curves, in names of files."""
    return kind if sparsity is None else f"{kind}-{sparsity:g}"


def timed(
    subject: Subject, seed: int, data: Tensor, options: argparse.Namespace, kind: str, sparsity: float | None
) -> tuple[dict[str, Curve], float | None]:
    """Curves, and the processor seconds that they take; None for what goes on inside of them from a file of points."""
    settings = {"score": options.score, "levels": options.grid, "minutes": options.anchor_minutes}
    settings |= {"method": kind, "sparsity": max(options.sparsities) if sparsity is None else sparsity}
    points = options.work and options.work / f"{options.out.stem}-{seed}-{name_of(kind, sparsity)}.jsonl"
    resumed, start = points is not None and points.exists(), time.process_time()
    curves = measure_curves(subject.model, data[: options.curve_samples], score_data=data, resume=points, **settings)
    seconds = round(time.process_time() - start, 1)
    if points is None:
        return curves, seconds
    times = points.with_suffix(".seconds")  # of curves that a call measured from their begin to their end
    if not resumed:
        times.write_text(str(seconds))
    return curves, float(times.read_text()) if times.exists() else None


def mean_agreement(some: Sequence[Mapping[str, Curve]], reference: Mapping[str, Curve], index: int) -> list[float]:
    """:func:`agreement` as a mean over several sets of curves."""
    pairs = [agreement(curves, reference, index) for curves in some]
    return [statistics.mean(column) for column in zip(*pairs, strict=True)]


def agreement(curves: Mapping[str, Curve], reference: Mapping[str, Curve], index: int) -> tuple[float, float]:
    """Spearman's correlation over the matrices at the level of one index, with level 0 first; and the median ratio."""
    from scipy.stats import spearmanr

    a, b = ([curve.distortion[index] for curve in c.values()] for c in (curves, reference))
    ratios = [x / y for x, y in zip(a, b, strict=True) if y > 0]
    return float(spearmanr(a, b).statistic), statistics.median(ratios)


def table(path: Path) -> str:
    """The block of the page: caption, agreement, and divergence of the pruned model."""
    settings, *rows = read_json_lines(path)
    settings = EARLIER | settings
    if not rows:
        raise SystemExit(f"{path} has no seed that was measured to the end; run it without --report")
    seeds = ", ".join(str(row["seed"]) for row in rows)
    made = f", made by `{settings['made_by']}`" if settings["made_by"] else ""
    length = f" x {settings['seq_len']} tokens" if settings["metric"].startswith("kl") else " images"
    caption = (
        f"`python benchmarks pruning/curves`, {settings['name']} (SHA-256 of its weights: {settings['weights'][:8]})"
        f"{made}: {rows[0]['matrices']} matrices, {len(settings['grid'])} levels, score {settings['score']}; "
        f"{settings['curve_samples']}{length} for the curves of {settings['samples']} for the score, "
        f"{settings['eval_samples']} others for the divergence ({settings['metric']}) of the pruned models; "
        f"calibration seeds {seeds}. Spearman's rank correlation with the measured curves over all matrices at a "
        f"level, and the median of the ratios to them. Differences to the measured curves' allocation are paired by "
        f"seed, with Student's 95 % interval{'' if len(rows) > 1 else '; one seed has none'}."
        f"{_anchored(settings, rows)} {machines(rows)}."
    )
    parts = [caption, _agreement_table(settings, rows), _divergence_table(settings, rows)]
    if len(rows) > 1 and all("counts" in row for row in rows):
        parts.append(_sum_table(settings, rows))
    return "\n\n".join(parts)


def _anchored(settings: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    """How many matrices were measured for anchored curves, and on what, where the time did not suffice for all."""
    counts = [count for row in rows for count in _numbers(row.get("anchored", row["matrices"]))]
    samples = [count for row in rows for count in _numbers(row.get("anchored_on", settings["curve_samples"]))]
    if min(counts) == rows[0]["matrices"] and min(samples) == settings["curve_samples"]:
        return ""
    kind = "sequences" if settings["metric"].startswith("kl") else "images"
    matrices = "all matrices" if min(counts) == rows[0]["matrices"] else f"{_range(counts)} of the matrices"
    first = "the first" if max(samples) == 1 else f"the first {_range(samples)}"
    on = "" if min(samples) == settings["curve_samples"] else f" on {first} of these {kind}"
    return (
        f" Anchored curves measure {matrices}{on}, in at most {60 * settings['anchor_minutes']:g} s by the clock after "
        "the Fisher curves."
    )


def _numbers(value: int | list[int]) -> list[int]:
    """Of each sparsity, or of files whose curves were anchored once."""
    return value if isinstance(value, list) else [value]


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def _agreement_table(settings: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = []
    for kind in KINDS:
        seconds = [row["seconds"][kind] for row in rows if row["seconds"][kind] is not None]
        line = [kind, f"{statistics.mean(seconds):.1f}" if seconds else "–"]
        for level in settings["levels"]:
            pairs = [row["agreement"][kind][f"{level:g}"] for row in rows] if kind in KINDS[1:] else []
            means = [statistics.mean(column) for column in zip(*pairs, strict=True)]
            line.append(f"{means[0]:.3f}, {means[1]:.2f}" if means else "–")
        lines.append(line)
    first, *rest = settings["levels"]
    head = ["curves", "processor s", f"{first:.0%}: Spearman, ratio", *(f"{level:.0%}" for level in rest)]
    return markdown(head, lines)


def _divergence_table(settings: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = []
    for rule in RULES:
        line = [rule]
        for sparsity in settings["sparsities"]:
            values, base = ([row["divergence"][name][f"{sparsity:g}"] for row in rows] for name in (rule, "measured"))
            difference = "" if rule == "measured" else f" ({paired_percent(values, base):+.1f} %)"
            line.append(f"{statistics.mean(values):.4f}{difference}")
        lines.append(line)
    line = ["anchored, to fisher"]
    for sparsity in settings["sparsities"]:
        values, base = ([row["divergence"][name][f"{sparsity:g}"] for row in rows] for name in ("anchored", "fisher"))
        line.append(f"{paired_percent(values, base):+.1f} %")
    lines.append(line)
    return markdown(["divergence", *(f"{sparsity:.0%}" for sparsity in settings["sparsities"])], lines)


def _sum_table(settings: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    """Sums of distortions by the measured curves of other seeds, above those of the measured curves' allocation."""
    judges = [[_judge(*curve) for curve in row["measured"]] for row in rows]

    def sums(rule: str, sparsity: float) -> list[float]:
        """Of each seed's allocation, the mean over the other seeds' curves."""
        counts = [row["counts"][rule][f"{sparsity:g}"] for row in rows]
        by_judge = [[sum(map(Curve.at, judge, some)) for judge in judges] for some in counts]
        return [statistics.mean(each[:seed] + each[seed + 1 :]) for seed, each in enumerate(by_judge)]

    lines = [
        [rule, *(f"{paired_percent(sums(rule, s), sums('measured', s)):+.2f} %" for s in settings["sparsities"])]
        for rule in RULES[1:]
    ]
    return markdown(["sum of distortions", *(f"{sparsity:.0%}" for sparsity in settings["sparsities"])], lines)


def _judge(numel: int, counts: list[int], distortion: list[float]) -> Curve:
    """A measured curve, joined between its levels as the programme joins them."""
    return Curve("", numel, tuple(counts), tuple(distortion), (0.0,) * len(counts), "").dense_grid()


def main() -> None:
    """Measure, or read a file; print the table."""
    measure_or_report(PARSER, run, table)


if __name__ == "__main__":
    main()
