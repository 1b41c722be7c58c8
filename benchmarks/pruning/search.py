"""The search on joint distortion beside an evolutionary search, at equal processor time, one command.

    leanstep train llama-nano-sinkgd steps=300
    python benchmarks pruning/search --model runs/llama-nano-sinkgd/final --out runs/search.jsonl
    python benchmarks pruning/search --report docs/results/prune-search-nano.jsonl [--write]

``refined`` is ``leanstep prune --refine``: curves, the dynamic programme, and exchanges from its allocation.
``evolution`` is a search over levels from uniform sparsity, as EvoPress (arXiv 2410.14649) describes it. Both are
judged by the KL divergence to the dense model on the same sequences, with the same score, and use the same cached
inputs of blocks. The clock of both is this process's processor time, and that of the first includes its curves: until
these are measured, its allocation is uniform. The allocations that both have at several times then prune the model, and
the KL divergence is measured on sequences of the newest addresses, which neither has seen. Calibration sequences are
drawn anew with every seed. Differences are paired by seed, with Student's interval.

The results file has a line for each cell; an interrupted call goes on where it stopped, and ``--minutes`` ends it in
time. ``--write`` puts the table of a file into docs/.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from calibration import CalibratedModel
from common import append_json_line, command_line, machine_state, machines, read_json_lines
from comparison.summary import Interval, paired_percent
from comparison.tables import markdown, measure_or_report
from evolution import Evolution

PARSER = command_line(
    __doc__, model=Path("runs/llama-nano-sinkgd/final"), name=("", "in the table; default: from the configuration"),
    seeds=[0, 1, 2], sparsities=[0.5, 0.6, 0.7, 0.8], budgets=([20.0, 40.0, 80.0], "processor seconds"),
    score="wanda", curves="anchored", samples=(16, "calibration sequences"),
    curve_samples=(8, "of them for the curves"), judge_samples=(32, "sequences that judge"),
    eval_samples=(48, "held-out sequences"), seq_len=256, batch_size=(4, "judging sequences in a pass"),
    out=Path("runs/prune-search.jsonl"), minutes=(math.inf, "after which no cell is begun"),
    write=(False, "with --report: write the table into docs/"),
)  # fmt: skip
PARSER.add_argument("--report", type=Path, help="a file of results whose table to print")
SETTINGS = ("name", "score", "curves", "samples", "curve_samples", "judge_samples", "eval_samples", "seq_len")
METHODS = ("refined", "evolution")
Counts = dict[str, int]
Trace = list[tuple[float, Counts]]  # processor seconds since the start, and the allocation from then on


class _Over(Exception):
    """The time of a search is over."""


class Bench:
    """A model, its texts, and what is measured on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        from leanstep.pruning import find_targets
        from leanstep.pruning.score.targets import make_groups

        self.options = options
        self.text = CalibratedModel(options.model, options.seq_len, options.eval_samples)
        self.model, self.snapshot, self.held_out = self.text.model, self.text.snapshot, self.text.held_out
        self.groups = make_groups(find_targets(self.model), "matrix")

    def calibrate(self, seed: int) -> None:
        """Draw the calibration sequences of a seed; scores, and the sequences that judge."""
        from leanstep.pruning.measure.activation_cache import ActivationCache
        from leanstep.pruning.measure.batches import as_batches
        from leanstep.pruning.measure.checks import Trial
        from leanstep.pruning.measure.measure import Measurement
        from leanstep.pruning.score.calibration import Pruning

        options = self.options
        data = self.text.calibration(options.samples + options.judge_samples, seed)
        self.data, judging = data[: options.samples], data[options.samples :]
        cache = ActivationCache(self.model, as_batches(self.data, self.model), like=self.held_out.cache)
        self.trial = Trial(self.groups, Pruning(cache, options.score), self.snapshot)
        batches = as_batches(judging, self.model, batch_size=options.batch_size)
        self.judging = Measurement(self.model, batches, like=cache)

    def uniform(self, sparsity: float) -> Any:
        """The uniform allocation."""
        from leanstep.pruning import allocate

        return allocate([group.layer for group in self.groups], sparsity, method="uniform")

    def judge(self, start: Any) -> Any:
        """The judge of a model that is pruned by an allocation; the model stays pruned."""
        from leanstep.pruning.measure.joint import JointJudge

        pruners: dict[str, Any] = {}
        self.trial.apply(start, pruners)
        return JointJudge(self.groups, self.judging, pruners, start.counts, start.patterns)

    def refined(self, sparsity: float, seed: int, seconds: float) -> Trace:
        """Curves, programme and exchanges."""
        from leanstep.pruning import Refinement, allocate, measure_curves
        from leanstep.pruning.allocate.allocation import layer_levels
        from leanstep.pruning.allocate.budgets import Budget
        from leanstep.pruning.allocate.descent import SearchFile, descend
        from leanstep.pruning.allocate.exchange import ExchangeSpace

        options, layers, begin = self.options, [group.layer for group in self.groups], time.process_time()
        trace: Trace = [(0.0, self.uniform(sparsity).counts)]
        curves = measure_curves(
            self.model, self.data[: options.curve_samples], sparsity=sparsity, score=options.score,
            score_data=self.data, groups=self.groups, method=options.curves,
        )  # fmt: skip
        start = allocate(layers, sparsity, curves=curves)
        trace.append((time.process_time() - begin, start.counts))
        space = ExchangeSpace(layer_levels(layers, curves, Budget("params", start.target)), start.target)

        def progress(*_: Any) -> None:
            now = time.process_time() - begin
            if judge.counts != trace[-1][1]:
                trace.append((now, dict(judge.counts)))
            if now > seconds:
                raise _Over

        with self.snapshot.restored():
            judge = self.judge(start)
            with suppress(_Over):
                descend(judge, space, Refinement(evaluations=10**9, seed=seed), SearchFile(None, {}), progress)
        return trace

    def evolution(self, sparsity: float, seed: int, seconds: float) -> Trace:
        """The evolutionary search."""
        begin, start = time.process_time(), self.uniform(sparsity)
        trace: Trace = [(0.0, start.counts)]
        bounds = {group.name: (round(0.05 * group.layer.numel), group.layer.numel) for group in self.groups}
        with self.snapshot.restored():
            judge = self.judge(start)
            search = Evolution(start.counts, bounds, judge.at, len(self.judging.batches), seed)
            while time.process_time() - begin < seconds:
                if search.generation():
                    trace.append((time.process_time() - begin, search.parent))
        return trace

    def cost(self, sparsity: float, counts: Counts) -> float:
        """KL divergence on the held-out sequences of the model that an allocation prunes."""
        from dataclasses import replace

        allocation = replace(self.uniform(sparsity), counts=counts)
        assert sum(counts.values()) == allocation.target
        return self.trial.joint(self.held_out, allocation).mean

    def cells(self, seed: int, sparsity: float, method: str) -> dict[str, Any]:
        """One search, and the held-out cost at its times."""
        options = self.options
        search: Callable[..., Trace] = getattr(self, method)
        trace = search(sparsity, seed, max(options.budgets))
        costs = {}
        for budget in options.budgets:
            counts = [counts for seconds, counts in trace if seconds <= budget][-1]
            costs[f"{budget:g}"] = self.cost(sparsity, counts)
        row: dict[str, Any] = {"seed": seed, "sparsity": sparsity, "method": method, "held_out": costs}
        row["uniform"] = self.cost(sparsity, trace[0][1])
        row["changes"] = len(trace) - 1
        if method == "refined":
            row |= {"curve_seconds": trace[1][0], "programme": self.cost(sparsity, trace[1][1])}
        return row


def run(options: argparse.Namespace) -> None:
    """Measure every missing cell."""
    from leanstep.pruning.measure.measure import evaluating

    torch.set_num_threads(1)
    rows, bench = read_json_lines(options.out), Bench(options)
    settings = {name: getattr(options, name) for name in (*SETTINGS, "budgets")}
    settings |= {"name": options.name or bench.text.name, "weights": bench.text.weights, "made_by": bench.text.made_by}
    if not rows:
        append_json_line(options.out, settings)
    elif rows[0] != settings:
        raise SystemExit(f"{options.out} is of another model or other settings: give another --out")
    end = time.monotonic() + 60 * options.minutes
    present = {(row["seed"], row["sparsity"], row["method"]) for row in rows[1:]}
    for seed in options.seeds:
        cells = list(itertools.product([seed], options.sparsities, METHODS))
        missing = [cell for cell in cells if cell not in present]
        if missing:
            bench.calibrate(seed)
        for cell in missing:
            if time.monotonic() > end:
                return
            with evaluating(bench.model):
                row = bench.cells(*cell) | machine_state()
            append_json_line(options.out, row)
            print(row, flush=True)


def table(path: Path) -> str:
    """The block of the page: held-out divergence by sparsity and time, and the paired differences."""
    settings, *rows = read_json_lines(path)
    by_cell: dict[tuple[float, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_cell.setdefault((row["sparsity"], row["method"]), {})[row["seed"]] = row
    lines, readings = [], list[Interval]()
    for sparsity, budget in itertools.product(sorted({row["sparsity"] for row in rows}), settings["budgets"]):
        ours, theirs = (by_cell.get((sparsity, method), {}) for method in METHODS)
        seeds = sorted(set(ours) & set(theirs))
        if not seeds:
            continue
        pairs = [(ours[seed]["held_out"][f"{budget:g}"], theirs[seed]["held_out"][f"{budget:g}"]) for seed in seeds]
        programme = [ours[seed]["programme"] for seed in seeds]
        mine, other = zip(*pairs, strict=True)
        intervals = [paired_percent(mine, base) for base in (programme, other)]
        if len(seeds) > 1:
            readings.append(intervals[1])
        means = [statistics.mean(column) for column in zip(*pairs, strict=True)]
        numbers = (statistics.mean(ours[seed]["uniform"] for seed in seeds), statistics.mean(programme), *means)
        columns = (*(f"{value:.4f}" for value in numbers), *(f"{interval:+.1f}" for interval in intervals))
        lines.append([f"{sparsity:.0%}", f"{budget:g}", str(len(seeds)), *columns])
    head = ["sparsity", "processor s", "seeds", "uniform", "programme", "refined", "evolution",
            "refined to programme, %", "refined to evolution, %"]  # fmt: skip
    curve_seconds = [row["curve_seconds"] for row in rows if row["method"] == "refined"]
    machine = settings.get("machine") or machines(rows)
    made = f", made by `{settings['made_by']}`" if settings.get("made_by") else ""
    caption = (
        f"`python benchmarks pruning/search`, {settings['name']} (SHA-256 of its weights: "
        f"{settings['weights'][:8]}){made}, score {settings['score']}, {settings['curves']} "
        f"curves ({min(curve_seconds):.1f} to {max(curve_seconds):.1f} processor seconds, which the refined search's "
        f"time includes), {settings['judge_samples']} x {settings['seq_len']} tokens that judge: KL divergence to the "
        f"dense model on {settings['eval_samples']} other sequences, mean over the seeds. {machine}."
    )
    return "\n\n".join([caption, markdown(head, lines), reading(readings, len(lines) - len(readings))])


def reading(intervals: list[Interval], single: int) -> str:
    """What the intervals let one say; ``single`` rows have one seed, and so no interval."""
    alone = f"{single} rows have one seed, and no interval." if single else ""
    if not intervals:
        return alone
    ahead, behind = sum(i.high < 0 for i in intervals), sum(i.low > 0 for i in intervals)
    rest = "" if ahead + behind == len(intervals) else "; in the others no difference is seen"
    return (
        f"Paired by seed, 95 % intervals: the refined search is ahead of the evolutionary in {ahead} of "
        f"{len(intervals)} rows, behind in {behind}{rest}. {alone}"
    ).rstrip()


def main() -> None:
    """Measure, or read a file; print the table."""
    measure_or_report(PARSER, run, table)


if __name__ == "__main__":
    main()
