"""The search on joint distortion beside an evolutionary search, at equal processor time, one command.

    leanstep train llama-nano-sinkgd steps=300
    python benchmarks pruning/search --model runs/llama-nano-sinkgd/final --out runs/search.jsonl
    python benchmarks pruning/search --report docs/results/prune-search-nano.jsonl [--write]

``refined`` is ``leanstep prune --refine``: curves, dynamic programming (DP), and exchanges from its allocation.
``evolution`` is a search over levels from uniform sparsity, as EvoPress (arXiv 2410.14649) describes it, and
``evolution_from_programme`` the same from the allocation of DP. All are judged by the KL divergence to the dense
model on the same sequences, with the same score, and use the same cached inputs of blocks. The clock of all is this
process's processor time, curves included: until these are measured, the allocation is uniform. The allocations at
several times then prune the model, and the KL divergence is measured on sequences of the newest addresses, which no
search has seen. Calibration sequences are drawn anew with every seed. Differences are paired by seed, with Student's
interval.

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
from evolution import MOVES, OF_START, evolution_of, remembering

METHODS = ("refined", "evolution", "evolution_from_programme")
PARSER = command_line(
    __doc__, model=Path("runs/llama-nano-sinkgd/final"), name=("", "in the table; default: from the configuration"),
    seeds=[0, 1, 2], sparsities=[0.5, 0.6, 0.7, 0.8], budgets=([20.0, 40.0, 80.0], "processor seconds"),
    score="wanda", curves="anchored", samples=(16, "calibration sequences"),
    curve_samples=(8, "of them for the curves"), judge_samples=(32, "sequences that judge"),
    eval_samples=(48, "held-out sequences"), seq_len=256, batch_size=(4, "judging sequences in a pass"),
    out=Path("runs/prune-search.jsonl"), minutes=(math.inf, "after which no cell is begun"),
    anchor_minutes=(30.0, "for the measurements of anchored curves"),
    methods=(list(METHODS), "searches to run"),
    write=(False, "with --report: write the table into docs/"),
)  # fmt: skip
PARSER.add_argument("--report", type=Path, help="a file of results whose table to print")
SETTINGS = ("name", "score", "curves", "samples", "curve_samples", "judge_samples", "eval_samples", "seq_len",
            "batch_size", "anchor_minutes")  # fmt: skip
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
        from leanstep.pruning.measure.measurement import Measurement
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

    def judge(self, start: Any, *, remembers: bool = False) -> Any:
        """The judge of a model that is pruned by an allocation; the model stays pruned."""
        from leanstep.pruning.measure.joint import JointJudge

        pruners: dict[str, Any] = {}
        self.trial.apply(start, pruners)
        levels = remembering(pruners) if remembers else pruners
        return JointJudge(self.groups, self.judging, levels, start.counts, start.patterns)

    def programme(self, sparsity: float) -> tuple[dict[str, Any], Any]:
        """Curves, and the programme's allocation."""
        from leanstep.pruning import allocate, measure_curves

        options = self.options
        curves = measure_curves(
            self.model, self.data[: options.curve_samples], sparsity=sparsity, score=options.score,
            score_data=self.data, groups=self.groups, method=options.curves, minutes=options.anchor_minutes,
        )  # fmt: skip
        return curves, allocate([group.layer for group in self.groups], sparsity, curves=curves)

    def refined(self, sparsity: float, seed: int, seconds: float) -> Trace:
        """Curves, programme and exchanges."""
        from leanstep.pruning import Refinement
        from leanstep.pruning.allocate.allocation import layer_levels
        from leanstep.pruning.allocate.budgets import Budget
        from leanstep.pruning.allocate.descent import SearchFile, descend
        from leanstep.pruning.allocate.exchange import ExchangeSpace

        layers, begin = [group.layer for group in self.groups], time.process_time()
        trace: Trace = [(0.0, self.uniform(sparsity).counts)]
        curves, start = self.programme(sparsity)
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
        """The evolutionary search from uniform sparsity."""
        begin, start = time.process_time(), self.uniform(sparsity)
        return self._evolve([(0.0, start.counts)], start, begin, seed, seconds)

    def evolution_from_programme(self, sparsity: float, seed: int, seconds: float) -> Trace:
        """Curves, programme and the evolutionary search."""
        begin = time.process_time()
        trace: Trace = [(0.0, self.uniform(sparsity).counts)]
        _, start = self.programme(sparsity)
        trace.append((time.process_time() - begin, start.counts))
        return self._evolve(trace, start, begin, seed, seconds)

    def _evolve(self, trace: Trace, start: Any, begin: float, seed: int, seconds: float) -> Trace:
        bounds = {group.name: (round(0.05 * group.layer.numel), group.layer.numel) for group in self.groups}
        with self.snapshot.restored():
            search = evolution_of(self.judge(start, remembers=True), bounds, len(self.judging.batches), seed)
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
        row |= {} if method == "refined" else MOVES
        if method != "evolution":
            row |= {"curve_seconds": trace[1][0], "programme": self.cost(sparsity, trace[1][1])}
        return row


def run(options: argparse.Namespace) -> None:
    """Measure every missing cell."""
    from leanstep.pruning.measure.batches import evaluating

    if unknown := sorted(set(options.methods).difference(METHODS)):
        raise SystemExit(f"--methods: the searches are {', '.join(METHODS)}, not {', '.join(unknown)}")
    torch.set_num_threads(1)
    rows, bench = read_json_lines(options.out), Bench(options)
    settings = {name: getattr(options, name) for name in (*SETTINGS, "budgets")}
    settings |= {"name": options.name or bench.text.name, "weights": bench.text.weights, "made_by": bench.text.made_by}
    if not rows:
        append_json_line(options.out, settings)
    elif rows[0] != {name: settings[name] for name in rows[0]}:  # files of earlier versions lack some settings
        raise SystemExit(f"{options.out} is of another model or other settings: give another --out")
    end = time.monotonic() + 60 * options.minutes
    present = {(row["seed"], row["sparsity"], row["method"]) for row in rows[1:]}
    for seed in options.seeds:
        cells = list(itertools.product([seed], options.sparsities, options.methods))
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
    cells = {method: {(row["sparsity"], row["seed"]) for row in rows if row["method"] == method} for method in METHODS}
    # an unfinished rival would hide the rows that are complete without it
    rivals = [rival for rival in METHODS[1:] if rival == "evolution" or cells[rival] >= cells["evolution"]]
    lines, readings = [], {rival: list[Interval]() for rival in rivals}
    for sparsity, budget in itertools.product(sorted({row["sparsity"] for row in rows}), settings["budgets"]):
        by_seed = {method: by_cell.get((sparsity, method), {}) for method in ("refined", *rivals)}
        seeds = sorted(set.intersection(*map(set, by_seed.values())))
        if not seeds:
            continue
        mine = by_seed["refined"]
        bases = {name: [mine[seed][name] for seed in seeds] for name in ("uniform", "programme")}
        costs = {name: [row[seed]["held_out"][f"{budget:g}"] for seed in seeds] for name, row in by_seed.items()}
        to = {name: paired_percent(costs["refined"], base) for name, base in (bases | costs).items()}
        is_refined = costs["refined"] != bases["programme"]
        for rival in rivals if len(seeds) > 1 and is_refined else ():
            readings[rival].append(to[rival])
        numbers = [f"{statistics.mean(values):.4f}" for values in (*bases.values(), *costs.values())]
        differences = [f"{to[name]:+.1f}" for name in ("programme", *rivals)]
        lines.append([f"{sparsity:.0%}", f"{budget:g}", str(len(seeds)), *numbers, *differences])
    names = [
        rival.replace("_from_programme", " from DP")
        + "*" * any(row["method"] == rival and _is_of_start(row) for row in rows)
        for rival in rivals
    ]
    head = ["sparsity", "processor s", "seeds", "uniform", "DP", "refined", *names,
            *(f"refined to {name}, %" for name in ("DP", *names))]  # fmt: skip
    said = [reading(name, each, len(lines) - len(each)) for name, each in zip(names, readings.values(), strict=True)]
    return "\n\n".join([_caption(settings, rows), markdown(head, lines), *said])


def _caption(settings: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    curve_seconds = [row["curve_seconds"] for row in rows if "curve_seconds" in row]
    machine = settings.get("machine") or machines(rows)
    made = f", made by `{settings['made_by']}`" if settings.get("made_by") else ""
    return (
        f"`python benchmarks pruning/search`, {settings['name']} (SHA-256 of its weights: "
        f"{settings['weights'][:8]}){made}, score {settings['score']}, {settings['curves']} "
        f"curves ({min(curve_seconds):.1f} to {max(curve_seconds):.1f} processor seconds, which the time of a search "
        f"from DP includes), {settings['judge_samples']} x {settings['seq_len']} tokens that judge: KL "
        f"divergence to the dense model on {settings['eval_samples']} other sequences, mean over the seeds. {machine}."
    ) + (f" {OF_START}" if any(map(_is_of_start, rows)) else "")


def _is_of_start(row: dict[str, Any]) -> bool:
    return row["method"] != "refined" and not row.get("moves")


def reading(rival: str, intervals: list[Interval], rest: int) -> str:
    """What the intervals let one say of the refined search and one other; the ``rest`` of the rows do not count."""
    alone = f"{rest} rows have one seed, or no refinement yet, and do not count." if rest else ""
    if not intervals:
        return alone
    ahead, behind = sum(i.high < 0 for i in intervals), sum(i.low > 0 for i in intervals)
    others = "" if ahead + behind == len(intervals) else "; in the others no difference is seen"
    return (
        f"Paired by seed, 95 % intervals: the refined search is ahead of {rival} in {ahead} of {len(intervals)} rows, "
        f"behind in {behind}{others}. {alone}"
    ).rstrip()


def main() -> None:
    """Measure, or read a file; print the table."""
    measure_or_report(PARSER, run, table)


if __name__ == "__main__":
    main()
