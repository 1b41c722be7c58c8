"""Estimate the time of pruning from the number of operations and rates that are measured on this machine."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch

from leanstep.pruning.allocate.closed_form import atp_betas_tried
from leanstep.pruning.folder.workload import Workload
from leanstep.pruning.measure.curves import level_grid, nm_level_count
from leanstep.pruning.measure.fisher.second_order import ROWS, FisherCost
from leanstep.pruning.measure.metrics import kl_divergence
from leanstep.pruning.score.base import FISHER_SCORES, NEEDS, UPDATES_WEIGHTS, has_statistics
from leanstep.pruning.score.scores import layer_pruner

if TYPE_CHECKING:
    from leanstep.pruning.training.recovery import Recovery

# forward passes that a pass of Fisher curves is worth: one, and two times two from the first block of a portion on
_FISHER_PASSES = 3
# of a judge: its first comparison, the check of its cache, and a gradient, whose activations are computed again
_JUDGE_PASSES = 6
# products with a matrix, and rankings, of a level with ALPS; products of its eigenvectors
_ALPS_PRODUCTS, _ALPS_RANKINGS, _ALPS_EIGEN = 140, 12, 20
# calls of torch in a block of a transformer, and around the blocks
_BLOCK_CALLS, _OTHER_CALLS = 60, 60
# times that the files are read or written, and hashed: copies, checks of values, comparisons with what is stored
_READS, _HASHES = 6, 2
# passes over the trained weights of an update: five alternating normalisations, masks, and the step
_UPDATE_PASSES = 30


@dataclass(frozen=True)
class Rates:
    """Seconds on this machine as it is loaded now: of an operation of a product, of a weight that is ranked, of a call
    of torch, of a logit that is compared, of a byte that is copied and that is hashed.
    """

    operation: float
    ranked: float
    call: float
    logit: float
    copied: float
    hashed: float

    @classmethod
    def measured(cls, dtype: torch.dtype, processes: int = 1) -> Rates:
        """Measure for about a second, with the threads of one of several processes."""
        threads = torch.get_num_threads()
        if processes > 1 and "OMP_NUM_THREADS" not in os.environ:  # as they are started
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
        try:
            return cls._measured(dtype)
        finally:
            torch.set_num_threads(threads)

    @classmethod
    def _measured(cls, dtype: torch.dtype) -> Rates:
        left, right = torch.randn(256, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
        weight, small = torch.randn(512, 512), torch.randn(16, 16)
        logits, raw = torch.randn(32, 8192), torch.randint(0, 255, (2**22,), dtype=torch.uint8)
        copy = torch.empty_like(raw)
        prune = lambda: layer_pruner(weight, "magnitude", scope="row").prune(weight.numel() // 2)  # noqa: E731
        compare = lambda: kl_divergence(logits.log_softmax(-1), logits.log_softmax(-1))  # noqa: E731
        return cls(
            _seconds_of(lambda: left @ right) / (2 * 256 * 1024 * 1024),
            _seconds_of(prune) / weight.numel(),
            _seconds_of(lambda: small + small),
            _seconds_of(compare) / logits.numel(),
            _seconds_of(lambda: copy.copy_(raw)) / raw.nbytes,
            _seconds_of(lambda: hashlib.sha256(raw.numpy().data)) / raw.nbytes,
        )


def _seconds_of(function: Callable[[], object], seconds: float = 0.15) -> float:
    """Mean seconds of a call, after one that is not counted."""
    function()
    begin, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < seconds:
        function()
        calls += 1
    return spent / calls


@dataclass(frozen=True)
class Sizes:
    """What the time depends on.

    Attributes:
        matrices: [out, in] of those that are pruned.
        blocks: number of blocks.
        active: parameters that are used for one token.
        outputs: logits of a token.
        tokens: of a sample.
        size: bytes of all weights.
        fisher: of Fisher curves; None: they are not estimated.
    """

    matrices: Sequence[tuple[int, int]]
    blocks: int
    active: int
    outputs: int
    tokens: int
    size: int
    fisher: FisherCost | None = None


class _ScoreTime(NamedTuple):
    """Seconds with a score: of a level of all matrices, of the statistics, and of these and pruning all matrices."""

    level: float
    statistics: float
    prune: float


class Duration:
    """Seconds of the parts of a run; once these are computed, its passes over all weights, and the kind of curves."""

    def __init__(self, sizes: Sizes, workload: Workload, rates: Rates) -> None:
        self._sizes, self._workload, self._rates = sizes, workload, rates
        of_curves = workload.config.planning_score
        self._final, self._planned = self._of_score(workload.config.score), self._of_score(of_curves)
        self._fisher = self._of_score(FISHER_SCORES.get(of_curves, of_curves))
        self.passes = 0.0
        self.curves = ""

    def _of_score(self, score: str) -> _ScoreTime:
        sizes, workload, rates = self._sizes, self._workload, self._rates
        needs = NEEDS[score]
        ranked = sum(rows * columns for rows, columns in sizes.matrices) * rates.ranked
        prepare, level = 0.0, ranked / 4
        if "gram" in needs:
            cubes = sum(columns**3 for _, columns in sizes.matrices) * rates.operation
            products = sum(2 * rows * columns**2 for rows, columns in sizes.matrices) * rates.operation
            prepare, level = cubes, products + ranked
            if score == "alps":
                prepare += _ALPS_EIGEN * cubes
                level += _ALPS_PRODUCTS * products + _ALPS_RANKINGS * ranked
        # each block runs once for the statistics and once for the input of the next
        statistics = 2 * self._pass(workload.samples) / workload.processes if needs else 0.0
        # the matrices of a block are dealt to the processes, and the batches of the statistics
        return _ScoreTime(level, statistics, statistics + (prepare + max(level, ranked)) / workload.processes)

    def _pass(self, samples: float, *, compared: bool = False, batch_size: int | None = None) -> float:
        """Of a pass of samples through all blocks."""
        sizes, rates = self._sizes, self._rates
        batches = samples / min(batch_size or self._workload.config.batch_size, max(samples, 1))
        seconds = 2 * sizes.active * sizes.tokens * samples * rates.operation
        seconds += batches * (_BLOCK_CALLS * sizes.blocks + _OTHER_CALLS) * rates.call
        return seconds + (samples * sizes.tokens * sizes.outputs * rates.logit if compared else 0.0)

    def seconds(self) -> dict[str, float]:
        """By use."""
        sizes, workload, rates = self._sizes, self._workload, self._rates
        blocks = sizes.blocks
        seconds = {
            "start and imports": time.time() - psutil.Process().create_time(),
            "files": sizes.size * (_READS * rates.copied + _HASHES * rates.hashed),
            # of a chain of blocks: one to find them, one to compare with, and two blocks for each start
            "search of the cut points": 4 * self._pass(1),
            "statistics and pruning": self._final.prune,
        }
        self.passes = 4 + 2 * workload.samples / workload.config.batch_size
        if has_statistics(workload.config.allocation, "magnitude"):
            # every process scores all matrices
            every = workload.processes * (self._final.prune - self._final.statistics)
            seconds["outliers"] = self._pass(workload.samples) / workload.processes + every
        groups = blocks if workload.config.granularity == "block" else len(sizes.matrices)
        if workload.config.method == "dp":
            self._add_curves(seconds, groups)
        if workload.config.method == "atp":
            slopes = len(atp_betas_tried(workload.sparsity, max(2, blocks)))
            joint = self._pass(workload.curve_samples, compared=True)
            seconds[f"slopes of ATP, {slopes}"] = 2 * joint + slopes * (self._planned.prune + joint)
            self.passes += slopes * 2 * workload.samples / workload.config.batch_size
        if workload.refine_samples:
            seconds["search"] = self._search()
        if workload.held_out:
            allocations = (2 if workload.config.method == "dp" else 1) + bool(workload.refine_samples)
            once = self._pass(workload.held_out, compared=True)
            # from each block on to check the cache, which every process does, and with each matrix pruned
            single = (blocks / 2 + groups / 2 / workload.processes) * once + self._final.prune
            # single matrices are pruned only within the minutes
            alone = int(min(allocations, 60 * workload.config.minutes / single)) if single else allocations
            # the dense outputs, whether they are reproducible, and those of each allocation
            together = (2 + allocations) * once + allocations * self._final.prune
            seconds["comparison on held-out data"] = together + alone * single
            self.passes += 2 + allocations + alone * (blocks + groups) / 2
        return seconds

    def _levels(self) -> int:
        """Pruned levels of a curve."""
        workload = self._workload
        if workload.config.pattern != "unstructured":
            return nm_level_count(int(workload.config.pattern.partition(":")[2])) - 1
        return len(workload.config.levels or level_grid(10**6, workload.sparsity)[1:])

    def _add_curves(self, seconds: dict[str, float], groups: int) -> None:
        sizes, workload, levels = self._sizes, self._workload, self._levels()
        number = workload.processes
        prepared = self._planned.prune + levels * self._planned.level / number
        # of one process; each measures its share of the matrices and levels
        points = groups * levels / 2 * self._pass(workload.curve_samples, compared=True)
        second_order = 0.0
        if sizes.fisher is not None:
            # each process collects its share of the matrices
            passes = _FISHER_PASSES * math.ceil(sizes.fisher.passes / number)
            weights = sum(rows * columns for rows, columns in sizes.matrices)
            second_order = passes * self._pass(workload.curve_samples, compared=True, batch_size=1)
            drawn = min(ROWS, workload.curve_samples * sizes.tokens)
            second_order += 2 * drawn * levels * weights * self._rates.operation / number
        fisher = self._fisher.prune + levels * self._fisher.level / number + second_order
        limit = 60 * workload.config.minutes
        # as the run decides, by the passes, and by the levels of scores that update weights
        levels_of_score = levels * self._planned.level if workload.config.planning_score in UPDATES_WEIGHTS else 0.0
        fits = points + levels_of_score <= limit * number
        self.curves = use = workload.config.curve_method or ("measured" if fits else "anchored")
        measured = prepared + points / number
        anchored = fisher + min(limit, measured)
        seconds[f"curves, {use}"] = {"measured": measured, "fisher": fisher}.get(use, anchored)
        self.passes += groups * levels / 2 if use == "measured" else 0
        if workload.config.correction != "none":
            # the joint distortion; then twice: statistics of all matrices, and points with the dense one, or curves to
            # second order with a gradient of all matrices and the passes of a judge; and the joint distortion again
            planned = self._planned
            compared = self._pass(workload.curve_samples, compared=True)
            joint = planned.prune + compared
            again = planned.statistics / 2 + number * (planned.prune - planned.statistics)
            again += levels * planned.level / number
            is_measured = use == "measured"
            again += points * (levels + 1) / levels / number if is_measured else second_order + _JUDGE_PASSES * compared
            seconds["correction of curves, at most"] = joint + 2 * (again + joint)
            self.passes += groups * (levels + 1) if is_measured else 2 * _JUDGE_PASSES

    def recovery(self, recovery: Recovery) -> float:
        """Seconds of all steps, of the comparisons before and after them, and of the folder's files."""
        sizes, workload, rates = self._sizes, self._workload, self._rates
        batch = min(recovery.batch_size, workload.samples)
        # forward and backward, which takes the work of two; and of the dense model
        passes = (3 if recovery.distill is False else 4) * self._pass(batch, compared=True, batch_size=batch)
        # in fp32
        weights = sum(rows * columns for rows, columns in sizes.matrices)
        update = 4 * _UPDATE_PASSES * weights * rates.copied if recovery.rank is None else 0.0
        compared = 2 * 2 * self._pass(workload.held_out, compared=True)
        return recovery.steps * (passes + update) + compared + sizes.size * _READS * rates.copied

    def _search(self) -> float:
        """Of the pruners of all matrices, which every process makes, and the search within its limits."""
        workload = self._workload
        judging = self._pass(workload.refine_samples, compared=True)
        planned = self._planned
        every = workload.processes * (planned.prune - planned.statistics)
        start = planned.statistics + every + 3 * judging
        # the result is pruned anew and measured
        start += self._final.prune + judging
        # an exchange takes half of a pass, from the first changed block on
        settings, limits = workload.config.refine, list[float]()
        if settings is not None and settings.minutes is not None:
            limits.append(60 * settings.minutes)
        if settings is not None and settings.evaluations is not None:
            limits.append(settings.evaluations * judging / 2)
        return start + min(limits, default=0.0)
