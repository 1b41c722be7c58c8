"""Allocations of a pruned language model beside one another: quality, processor time and memory, one command.

    python benchmarks pruning/smollm2 runs/smollm2 --dtype bfloat16
    python benchmarks pruning/evidence --model runs/smollm2 --out runs/evidence.jsonl
    python benchmarks pruning/evidence --report docs/results/prune-evidence-smollm2.jsonl [--write]

For every score, sparsity and calibration seed: uniform sparsity, OWL, ATP, the dynamic programme on curves that are
measured for each block, the programme on anchored curves of each matrix, the same refined by the search, and an
evolutionary search from uniform sparsity (EvoPress, arXiv 2410.14649) with the processor time that curves and
refinement take together. Scores see ``--samples`` sequences of the older addresses of the State of the Union text, the
curves and ATP's choice of a slope ``--curve-samples`` of them; both searches are judged on ``--judge-samples`` others.
KL divergence to the dense model and perplexity are those on sequences of the newest addresses, which nothing has seen.
Statistics are those of dense inputs for the curves, of pruned inputs for pruning.

``--recover STEPS`` trains each pruned model on the dense model's outputs for so many steps of ``--recover-batch``
sequences, drawn from ``--recover-samples`` of the older addresses, with the zeros held, and measures it once more.

``--reconstruct STEPS`` trains each block to the dense block's outputs once it is pruned, in so many steps of
``--recover-batch`` of the sequences for scores, of which an eighth judges: give more ``--samples``. Such results are in
a file of their own.

``--curve-score`` names another score for curves, slopes of ATP and searches, such as SparseGPT's for ALPS, whose level
takes many times as long. Such a cell says so, and shares the curves with the cells of that score.

Processor seconds of a cell contain its curves, whole, also where several cells share them: measured curves serve all
sparsities, and Fisher curves all anchored ones. GiB are the peak of the process, in which the model is.

``--questions N`` measures the accuracy, too, of a task of N questions: which of four continuations is that of a place
in the newest addresses. Such results are in a file of their own.

The results file has a line for each cell, and one for each set of curves, whose points lie in ``--work``; an
interrupted call goes on where it stopped. ``--minutes`` ends it in time. ``--write`` puts the table of a file into
docs/.
"""

from __future__ import annotations

import argparse
import copy
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from calibration import CalibratedModel
from common import append_json_line, command_line, machine_state, read_json_lines, timed_and_peak
from comparison.tables import measure_or_report
from continuations import write_task
from evidence_tables import ALLOCATIONS, SCORES, Cell, Row, cell_of, draw, recovered, table
from evolution import MOVES, evolution_of, remembering

# sparsities of the curves' levels, for all targets: of matrices, of blocks
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
BLOCK_LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# allocations by curves, slopes or a search
PLANNED = ("atp", "measured", "anchored", "refined", "evolution")
PARSER = command_line(
    __doc__, model=Path("runs/smollm2"), name=("SmolLM2-135M", "the model's name in the table"), seeds=[0],
    sparsities=[0.6], samples=(8, "calibration sequences"), curve_samples=(2, "of them for curves and ATP"),
    judge_samples=(8, "sequences that judge"), eval_samples=(16, "held-out sequences"), seq_len=256,
    anchor_minutes=(2.0, "for the measurements of anchored curves"), refine_minutes=(2.0, "of the refining search"),
    out=Path("runs/prune-evidence.jsonl"), work=(Path("runs/prune-evidence"), "folder of the curves' points"),
    recover=(0, "steps of recovery after pruning"), recover_batch=(8, "sequences of such a step"),
    recover_samples=(512, "sequences it draws from"),
    reconstruct=(0, "steps in which each block is reconstructed"),
    questions=(0, "of a task, whose accuracy is measured as well"),
    minutes=(math.inf, "after which no cell is begun"), write=(False, "with --report: write the table into docs/"),
)  # fmt: skip
PARSER.add_argument("--scores", nargs="+", default=["wanda"], choices=SCORES)
PARSER.add_argument("--curve-score", choices=SCORES, help="of curves, slopes of ATP and searches; default: the score")
PARSER.add_argument("--allocations", nargs="+", default=list(ALLOCATIONS), choices=ALLOCATIONS)
PARSER.add_argument("--report", type=Path, help="a file of results whose table to print")
SETTINGS = ("name", "samples", "curve_samples", "judge_samples", "eval_samples", "seq_len", "anchor_minutes",
            "refine_minutes")  # fmt: skip


class Bench:
    """A model and the results so far; :meth:`run` measures what is missing."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, rows = options, read_json_lines(options.out)
        self.text = CalibratedModel(
            options.model, options.seq_len, options.eval_samples, scratch=options.work / "outputs"
        )
        self.model = self.text.model
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        settings = {name: getattr(options, name) for name in SETTINGS}
        settings |= {"weights": self.text.weights, "dtype": dtype}
        if options.reconstruct:
            settings |= {"reconstruct": options.reconstruct, "batch": options.recover_batch}
        if options.questions:
            settings |= {"questions": options.questions}
            self.task = str(write_task(self.text.newest, options.questions, options.work / "task"))
        if not rows:
            append_json_line(options.out, settings)
        elif rows[0] != settings:
            raise SystemExit(f"{options.out} is of another model or other settings: give another --out")
        self.rows = {cell_of(row): row for row in rows[1:]}
        self.dense = copy.deepcopy(self.model) if options.recover else None
        self.end = time.monotonic() + 60 * options.minutes

    def run(self) -> None:
        """Measure every missing cell, in the order of scores, seeds, sparsities and allocations."""
        options, dense = self.options, Cell("", 0.0, 0, "dense")
        if dense not in self.rows:
            self.record(dense, self.cost())
        for score in options.scores:
            for seed in options.seeds:
                for sparsity in options.sparsities:
                    for allocation in options.allocations:
                        cell = Cell(score, sparsity, seed, allocation)
                        missing = cell not in self.rows or options.recover and recovered(cell) not in self.rows
                        if missing and time.monotonic() < self.end:
                            self.measure(cell)

    def cost(self) -> Row:
        """Costs of the present weights on held-out text, and accuracy in percent if there are questions."""
        values: Row = self.text.cost()
        if self.options.questions:
            from leanstep.recipes.data.tasks import Tasks

            (score,) = Tasks([self.task]).evaluate(self.model, self.text.tokenizer, 8, lambda *_: None)
            values |= {"accuracy": 100 * score.value, "stderr": 100 * (score.stderr or 0.0)}
        return values

    def record(self, cell: Cell, values: Row) -> None:
        """Append a result to the file."""
        row = cell._asdict() | values | machine_state()
        self.rows[cell] = row
        append_json_line(self.options.out, row)
        print(row, flush=True)

    def measure(self, cell: Cell) -> None:
        """Prune by one cell, and measure the pruned model."""
        options = self.options
        data = self.text.calibration(options.samples + options.judge_samples, cell.seed)
        self.data, self.judging = data[: options.samples], data[options.samples :]
        self.curve_data = self.data[: options.curve_samples]
        prune: Callable[[Cell], Row] = getattr(self, f"_{cell.allocation}", self._rule)
        shared = self._curve_rows(cell)
        with self.text.snapshot.restored():
            more, used = timed_and_peak(lambda: prune(cell))
            values = self.cost() | more
            for row in shared:
                used = {"seconds": used["seconds"] + row["seconds"], "gib": max(used["gib"], row["gib"])}
            if cell not in self.rows:
                planned = cell.allocation in PLANNED and self._curve_score(cell) != cell.score
                self.record(cell, values | used | ({"curve_score": self._curve_score(cell)} if planned else {}))
            if options.recover:
                more, used = timed_and_peak(lambda: self._recover(cell))
                self.record(recovered(cell), self.cost() | {"kl_before": values["kl"]} | more | used)

    def _recover(self, cell: Cell) -> Row:
        from leanstep.pruning import Recovery, recover

        options = self.options
        data = self.text.calibration(options.recover_samples, cell.seed)
        settings = Recovery(options.recover, batch_size=options.recover_batch, seed=cell.seed)
        result = recover(self.model, data, settings, teacher=self.dense)
        return {"steps": options.recover, "batch": options.recover_batch, "samples": options.recover_samples,
                "lr": result.settings.lr}  # fmt: skip

    # -- the allocations; each prunes the model ------------------------------------------------------------------------

    def _rule(self, cell: Cell) -> Row:
        self._prune(cell, allocation=cell.allocation, curve_data=self.curve_data)
        return {}

    def _measured(self, cell: Cell) -> Row:
        self._prune(cell, curves=self._curves(cell, "measured"), granularity="block", levels=BLOCK_LEVELS)
        return {}

    def _anchored(self, cell: Cell) -> Row:
        curves = self._curves(cell, "anchored")
        self._prune(cell, curves=curves, levels=LEVELS)
        return {}

    def _refined(self, cell: Cell) -> Row:
        from leanstep.pruning import Refinement

        settings = Refinement(minutes=self.options.refine_minutes, data=self.judging, seed=cell.seed)
        result = self._prune(cell, curves=self._curves(cell, "anchored"), levels=LEVELS, refine=settings)
        return {name: result.refinement[name] for name in ("evaluations", "accepted", "passes", "points")}

    def _evolution(self, cell: Cell) -> Row:
        """The evolutionary search, for the processor seconds of curves and refinement."""
        from leanstep.pruning import allocate, find_targets
        from leanstep.pruning.measure.activation_cache import ActivationCache
        from leanstep.pruning.measure.batches import as_batches, evaluating
        from leanstep.pruning.measure.checks import Trial
        from leanstep.pruning.measure.joint import JointJudge
        from leanstep.pruning.measure.measurement import Measurement
        from leanstep.pruning.score.calibration import Pruning
        from leanstep.pruning.score.targets import make_groups

        refined = self.rows.get(cell._replace(allocation="refined"))
        if self.options.reconstruct:
            raise SystemExit("--reconstruct goes without evolution: leave it out of --allocations")
        if refined is None:
            raise SystemExit("evolution has the time of refined: name both in --allocations")
        uniform, score = self.rows.get(cell._replace(allocation="uniform")), self._curve_score(cell)
        if score != cell.score and uniform is None:
            raise SystemExit("evolution has to know how long pruning takes: name uniform first in --allocations")
        begin, limit = time.process_time(), refined["seconds"]
        groups = make_groups(find_targets(self.model), "matrix")
        start = allocate([group.layer for group in groups], cell.sparsity, method="uniform")
        cache = ActivationCache(self.model, as_batches(self.data, self.model), like=self.text.held_out.cache)
        judging = Measurement(self.model, as_batches(self.judging, self.model, batch_size=1), like=cache)
        trial, pruners = Trial(groups, Pruning(cache, score), self.text.snapshot), dict[str, Any]()
        with evaluating(self.model):
            trial.apply(start, pruners)
            # what it will take to prune by the result
            again = time.process_time() - begin if score == cell.score or uniform is None else uniform["seconds"]
            judge = JointJudge(groups, judging, remembering(pruners), start.counts, start.patterns)
            bounds = {group.name: (round(0.05 * group.layer.numel), group.layer.numel) for group in groups}
            search, generations = evolution_of(judge, bounds, len(judging.batches), cell.seed), 0
            while time.process_time() - begin + again < limit:
                search.generation()
                generations += 1
            self.text.snapshot.restore()
            replace(trial, pruning=Pruning(cache, cell.score)).apply(replace(start, counts=search.parent))
        return {"generations": generations} | MOVES

    def _prune(self, cell: Cell, **settings: Any) -> Any:
        from leanstep.pruning import prune

        if cell.allocation in PLANNED:
            settings["curve_score"] = self._curve_score(cell)
        if self.options.reconstruct:
            settings |= {"reconstruct": self.options.reconstruct, "batch_size": self.options.recover_batch}
        return prune(self.model, self.data, sparsity=cell.sparsity, score=cell.score, held_out=False, **settings)

    def _curve_score(self, cell: Cell) -> str:
        """The score of the curves of a cell, of its slopes, and of its search."""
        return self.options.curve_score or cell.score

    # -- curves --------------------------------------------------------------------------------------------------------

    def _curve_rows(self, cell: Cell) -> list[Row]:
        """Results of the curves that a cell uses; those that are missing are measured."""
        kinds = {"measured": ["measured"], "anchored": ["fisher", "anchored"], "refined": ["fisher", "anchored"]}
        rows = []
        for kind in kinds.get(cell.allocation, []):
            key = self._curves_of(cell, kind)
            if key not in self.rows:
                shutil.rmtree(self._folder(key), ignore_errors=True)
                self.record(key, timed_and_peak(lambda kind=kind: self._curves(cell, kind) and {})[1])
            elif not self._folder(key).exists():
                self._curves(cell, kind)  # of an earlier call whose folder is gone
            rows.append(self.rows[key])
        return rows

    def _curves(self, cell: Cell, kind: str) -> Mapping[str, Any]:
        from leanstep.pruning import measure_curves

        options, folder = self.options, self._folder(self._curves_of(cell, kind))
        file = folder / "points.jsonl"
        if not folder.exists():
            folder.mkdir(parents=True)
            fisher = self._folder(self._curves_of(cell, "fisher")) / "points.jsonl"
            if kind == "anchored":
                shutil.copy(fisher, file)
        settings: Row = {"levels": LEVELS, "minutes": options.anchor_minutes}
        if kind == "measured":
            settings = {"levels": BLOCK_LEVELS, "granularity": "block"}
        return measure_curves(
            self.model, self.curve_data, sparsity=cell.sparsity, score=self._curve_score(cell), score_data=self.data,
            method=kind, resume=file, **settings,
        )  # fmt: skip

    def _curves_of(self, cell: Cell, kind: str) -> Cell:
        return curves_of(cell._replace(score=self._curve_score(cell)), kind)

    def _folder(self, key: Cell) -> Path:
        return self.options.work / f"{key.score}-{key.seed}-{key.allocation.replace(' ', '-')}-{key.sparsity:g}"


def curves_of(cell: Cell, kind: str) -> Cell:
    """The cell of curves of a kind; measured and Fisher curves serve all sparsities."""
    return cell._replace(allocation=f"curves {kind}", sparsity=cell.sparsity if kind == "anchored" else 0.0)


def run(options: argparse.Namespace) -> None:
    """Measure what the file of results does not have."""
    torch.set_num_threads(1)
    Bench(options).run()


def main() -> None:
    """Measure, or read a file; print the table."""
    measure_or_report(PARSER, run, table, draw)


if __name__ == "__main__":
    main()
