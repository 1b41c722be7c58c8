"""Calibrate pruners: sum over the inputs of layers, and make pruners from the sums, or from gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold
from torch.nn.modules.conv import _ConvNd

from leanstep._processes import Processes
from leanstep._torch import device_of
from leanstep.pruning.allocate.closed_form import ComputedScores, outlier_ratio
from leanstep.pruning.compress.menu import LayerCompressor
from leanstep.pruning.config import ROUNDINGS
from leanstep.pruning.cost import Cost, Plan
from leanstep.pruning.measure.activation_cache import ActivationCache, activation_bytes, score_samples
from leanstep.pruning.measure.batches import Batch, hooked
from leanstep.pruning.score.base import (
    GRADIENTS,
    NEEDS,
    LayerPruner,
    LayerStatistics,
    has_statistics,
    split_capped,
    statistics_bytes,
)
from leanstep.pruning.score.experts import (
    ExpertProducts,
    experts_without_masked_tokens,
    one_expert_at_a_time,
    ratio,
    scaled,
    scales_of,
)
from leanstep.pruning.score.gradients import collect_gradients
from leanstep.pruning.score.scores import layer_pruner
from leanstep.pruning.score.targets import Group, Target, abbreviate, split_count

# score options that mean the same for ALPS and SparseGPT
_ALIKE = ("damping", "block_size")
# how messages write the scores with a Gram matrix
_TITLES = {"sparsegpt": "SparseGPT", "alps": "ALPS"}
# fewest inputs for which a sum of their squares is a statistic: its relative error is then about sqrt(2 / 32) = 1 / 4
_FEWEST_ROWS = 32
# weights in a block of M-FAC's Fisher matrix
_FISHER_BLOCK = 128
# what ALPS takes beyond SparseGPT: products of eigenvectors for a matrix, products with it and rankings for a level
_ALPS_EIGEN, _ALPS_PRODUCTS, _ALPS_RANKINGS = 20, 140, 12
# bytes for each weight of a matrix while it is ranked or updated, besides the matrix itself: fp32 copies, scores,
# sorted scores, an order in int64 with the workspace of the sort, and a mask
_RANKED_BYTES = 40


def statistics_for(
    cache: ActivationCache, targets: Sequence[Target], needs: Sequence[str]
) -> dict[str, LayerStatistics]:
    """Collect the statistics of some layers, with the current weights.

    Each process of the cache runs its share of the batches, and all get the sums over all batches: of squares, with the
    bits of one process.

    Args:
        cache: the model and the data. Passes run from its position to the last stage with a target.
        needs: any of ``square_sum``, ``gram``, ``gradients``; may be empty.

    Raises:
        ValueError: for a layer, other than an expert, that never ran on the data, or whose inputs cannot be collected.
        NonFiniteInputsError: for inputs that overflow; in all processes.
    """
    device = device_of(cache.model)
    statistics_by_name = {t.name: LayerStatistics.empty(needs, t.weight.shape[1], device) for t in targets}
    if "gradients" in needs:
        gradients = collect_gradients(cache.model, cache.all_batches, targets)
        for name, rows in gradients.items():
            statistics_by_name[name].gradients = rows
            statistics_by_name[name].count = int(rows.any(dim=1).sum())
    if {"square_sum", "gram"} & set(needs):
        if cache.processes.size == 1:
            collect_inputs(cache, targets, {name: statistics.add for name, statistics in statistics_by_name.items()})
        else:
            _collect_shares(cache, targets, statistics_by_name)
        for target in targets:
            if target.input_modules and not target.is_expert and not statistics_by_name[target.name].count:
                raise ValueError(f"{target.name} was never run on the calibration data; leave it out with exclude")
            statistics_by_name[target.name].check_finite(target.name)
    return statistics_by_name


def _collect_shares(
    cache: ActivationCache, targets: Sequence[Target], statistics_by_name: Mapping[str, LayerStatistics]
) -> None:
    """Collect sums over this process's batches, and add up those of all processes."""
    # of each batch alone, to be added in the order of one process
    squares: dict[str, list[Tensor]] = {name: [] for name in statistics_by_name}
    for index in range(len(cache.batches)):
        collect_inputs(cache, targets, {name: one.add for name, one in statistics_by_name.items()}, [index])
        for name, statistics in statistics_by_name.items():
            if statistics.square_sum is not None:
                squares[name].append(statistics.square_sum.cpu())
                statistics.square_sum = torch.zeros_like(statistics.square_sum)
    processes = cache.processes
    counts = processes.all_gather({name: statistics.count for name, statistics in statistics_by_name.items()})
    shares = processes.all_gather(squares)
    for name, statistics in statistics_by_name.items():
        statistics.count = sum(count[name] for count in counts)
        if statistics.gram is not None:
            statistics.gram = processes.all_reduce(statistics.gram)
        if statistics.square_sum is not None:
            for index in range(len(cache.all_batches)):
                # batches are dealt in turns
                number, owner = divmod(index, processes.size)
                statistics.square_sum += shares[owner][name][number].to(statistics.square_sum.device)


def leave_out(model: nn.Module, targets: Sequence[Target], batches: Sequence[Batch]) -> tuple[list[Target], list[str]]:
    """Leave out the layers whose inputs cannot be collected: those that a model never calls, and some convolutions.

    A model may read a weight without calling its layer, as state-space models read those of depth-wise convolutions.
    Runs batches until every layer but experts has been called, the first of them on one sample alone. An expert that
    is not called has no token and stays among the targets.

    Returns:
        the other targets, and a note about each layer left out.

    Raises:
        ValueError: if no target is left.
    """
    plain = [target for target in targets if target.expert is None]
    waiting = {module for target in plain if not target.is_expert for module in target.modules}
    handles = [module.register_forward_pre_hook(lambda module, _: waiting.discard(module)) for module in waiting]
    with hooked(handles), torch.no_grad():
        for batch in (batches[0].sample(0), *batches):
            if waiting:
                batch.run(model)
    unused = {target.name for target in plain if not target.is_expert and waiting.issuperset(target.modules)}
    reasons = {
        target.name: "was never run on the calibration data" if target.name in unused else why
        for target in plain
        if (why := _no_rows(target.module)) or target.name in unused
    }
    notes = [
        f"left out, and dense: {abbreviate([name for name in reasons if reasons[name] == reason])} (the score needs "
        f"their inputs, and each {reason})"
        for reason in dict.fromkeys(reasons.values())
    ]
    if len(reasons) == len(targets):
        raise ValueError(f"{type(model).__name__} has nothing to prune: {'; '.join(notes)}")
    return [target for target in targets if target.name not in reasons], notes


@torch.no_grad()
def collect_inputs(
    cache: ActivationCache,
    targets: Sequence[Target],
    add: Mapping[str, Callable[[Tensor], Any]],
    indices: Sequence[int] | None = None,
) -> None:
    """Run batches, by default all, and pass each layer's inputs [rows, in], without masked tokens, to ``add[name]``.

    Masked tokens of experts are left out in modules of the forms that :mod:`leanstep.pruning.score.experts` knows.
    """
    current: list[Batch] = []

    def mask_of_tokens() -> Tensor | None:
        of_decoder = "decoder_input_ids" in current[0].kwargs  # such a mask does not fit the encoder's tokens
        return None if of_decoder else current[0].mask

    def give(target: Target, inputs: Tensor) -> None:
        mask = mask_of_tokens()
        if mask is not None and target.expert is None:
            if inputs.shape[: mask.dim()] == mask.shape:
                inputs = inputs[mask]
            elif inputs.dim() == 2 and len(inputs) == mask.numel():  # the model flattens its tokens
                inputs = inputs[mask.flatten()]
        add[target.name](input_rows(target.module, inputs))

    def give_expert(target: Target, inputs: Tensor, output: Tensor, of_all: bool) -> Tensor:
        if of_all:
            rows, mask = inputs.any(dim=-1), mask_of_tokens()
            if mask is not None and len(rows) == mask.numel():
                rows &= mask.flatten()
            inputs = inputs[rows]
        give(target, inputs)
        return output

    experts = [target for target in targets if target.expert is not None]
    with ExitStack() as stack:
        for target in targets:
            for module in target.input_modules if target.expert is None else ():
                handle = module.register_forward_pre_hook(
                    lambda _, args, kwargs, target=target: give(target, first_input(args, kwargs)), with_kwargs=True
                )
                stack.callback(handle.remove)
        if experts:
            stack.enter_context(one_expert_at_a_time(cache.model))
            stack.enter_context(experts_without_masked_tokens(experts, mask_of_tokens))
            stack.enter_context(ExpertProducts(experts, give_expert))
        spans = [cache.span(target) for target in targets]
        last = [span[1] for span in spans if span is not None]
        for index in range(len(cache.batches)) if indices is None else indices:
            current[:] = [cache.batches[index]]
            if len(last) == len(spans):
                cache.until(index, max(last))
            else:
                cache.run(index)


def _no_rows(module: nn.Module) -> str:
    """Why a layer's inputs do not make one matrix [rows, in]; "" if they do."""
    if isinstance(module, nn.RNNBase):
        return "is recurrent"
    if isinstance(module, (nn.MultiheadAttention, nn.RNNCellBase)):
        return f"belongs to a {type(module).__name__}, which multiplies several inputs"
    if not isinstance(module, _ConvNd):
        return ""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return f"is a {type(module).__name__}"
    if module.groups != 1 or module.padding_mode != "zeros":
        return "has groups or a padding other than zeros, and so no one matrix of inputs"
    return "pads its two sides differently" if any(side % 2 for side in _padded(module)) else ""


def _padded(module: nn.Conv1d | nn.Conv2d) -> list[int]:
    """Zeros that a convolution adds along each dimension, on both sides together."""
    if isinstance(module.padding, str):
        sides = zip(module.dilation, module.kernel_size, strict=True)
        return [d * (k - 1) if module.padding == "same" else 0 for d, k in sides]
    return [2 * int(side) for side in module.padding]


def first_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a call of a layer, which may be given by its name."""
    return args[0] if args else next(iter(kwargs.values()))


def input_rows(module: nn.Module, inputs: Tensor) -> Tensor:
    """Inputs [rows, in] of the layer as a matrix product; convolutions are unfolded."""
    if problem := _no_rows(module):
        name = module if isinstance(module, _ConvNd) else type(module).__name__
        raise ValueError(
            f"{name} {problem}; score it by magnitude and with curves='measured', or leave it out with exclude"
        )
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return inputs.reshape(-1, inputs.shape[-1])
    padding: Any = [side // 2 for side in _padded(module)]
    sizes: list[list[int]] = [list(module.kernel_size), list(module.dilation), list(padding), list(module.stride)]
    if isinstance(module, nn.Conv1d):
        inputs = inputs.unsqueeze(-2)
        sizes = [[neutral, *size] for neutral, size in zip((1, 1, 0, 1), sizes, strict=True)]
    kernel, dilation, padding, stride = map(tuple, sizes)
    columns = unfold(inputs, kernel, dilation=dilation, padding=padding, stride=stride)  # [batch, in, positions]
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


class Pruning:
    """Makes the pruners of a score from calibration data.

    Args:
        cache: the model and the calibration data. :meth:`pruners` advances it with the current weights.
        score, options: see :func:`leanstep.pruning.layer_pruner`. An expert with too few tokens is scored by magnitude,
            and for SparseGPT by Wanda.
        same_weights: all pruners are made of the same weights of the model, so that sums of squares, 8 bytes for each
            input of a matrix, are computed once and stored.
    """

    def __init__(
        self,
        cache: ActivationCache,
        score: str,
        options: Mapping[str, Any] | None = None,
        *,
        same_weights: bool = False,
    ) -> None:
        self.cache, self.score, self.options = cache, score, dict(options or {})
        stores = same_weights and set(NEEDS[score]) <= {"square_sum"}
        self._stored: dict[str, LayerStatistics] | None = {} if stores else None
        self._starts = cache.starts
        # fewest tokens in any pass of experts that were scored by magnitude; tokens and inputs of other layers
        self._few: dict[str, int] = {}
        self._rows: dict[str, tuple[int, int]] = {}
        self._overfitted: dict[str, tuple[int, int]] = {}

    def by(self, score: str) -> Pruning:
        """With another score on the same data. Of the options, with those that ALPS and SparseGPT share."""
        if score == self.score:
            return self
        alike = _ALIKE if {score, self.score} == {"alps", "sparsegpt"} else ()
        return Pruning(self.cache, score, {name: value for name, value in self.options.items() if name in alike})

    @property
    def _is_squared(self) -> bool:
        """Whether weights are in the score by their squares."""
        return self.score not in ("magnitude", "wanda")

    @property
    def processes(self) -> Processes:
        """Those of the cache, over which the work on several matrices is spread."""
        return self.cache.processes

    def pruners(self, groups: Sequence[Group], start: int = 0) -> Pruners:
        """One pruner per matrix; their statistics take one pass over the data from the stage ``start`` on."""
        targets = [target for group in groups for target in group.targets]
        if self._stored is None:
            return Pruners(self, targets, self._statistics_for(targets, start))
        if self.cache.starts != self._starts:  # the cache was disabled: its activations changed outputs
            self._stored.clear()
            self._starts = self.cache.starts
        missing = [target for target in targets if target.name not in self._stored]
        if missing:
            self._stored |= self._statistics_for(missing, start)
        return Pruners(self, targets, {target.name: self._stored[target.name] for target in targets})

    def _statistics_for(self, targets: Sequence[Target], start: int) -> dict[str, LayerStatistics]:
        if NEEDS[self.score] and start in self.cache.starts:
            self.cache.advance(start)
        return statistics_for(self.cache, targets, NEEDS[self.score])

    def passes_for(self, groups: Sequence[Group]) -> int:
        """Passes over the data, all processes together, for the statistics that groups still need."""
        stored = self._stored or {}
        targets = [target for group in groups for target in group.targets]
        # each block runs once for the statistics and once for the input of the next
        return 2 if NEEDS[self.score] and any(target.name not in stored for target in targets) else 0

    def each(self, groups: Sequence[Group], start: int = 0) -> Iterator[tuple[Group, Pruners]]:
        """Each group with the pruners, which are released after it; statistics as by :meth:`pruners`."""
        pruners = self.pruners(groups, start)
        for group in groups:
            yield group, pruners
            pruners.release(group)

    def scores(self, groups: Sequence[Group]) -> Mapping[str, Tensor]:
        """Scores of matrices, each a group. Magnitude and Wanda are computed on every access, the others stored."""
        pruners = self.pruners(groups)
        starved, names = self._starved(pruners), [group.name for group in groups]
        if self.score in ("magnitude", "wanda"):
            scales = scales_of(groups, starved, lambda name: ratio(pruners.once(name), self._is_squared))
            return ComputedScores(
                names, lambda name: scaled(pruners.once(name).scores, scales.get(name), self._is_squared)
            )
        scores, ratios = {}, {}
        for group in groups:
            scores[group.name] = pruners[group.name].scores
            if starved:
                ratios[group.name] = ratio(pruners[group.name], self._is_squared)
            pruners.release(group)
        scales = scales_of(groups, starved, lambda name: ratios[name])
        return {name: scaled(scores[name], scales.get(name), self._is_squared) for name in names}

    def outliers(self, groups: Sequence[Group]) -> dict[str, float]:
        """Percentage of outliers among the scores of each matrix's block, or of a matrix outside all blocks."""
        blocks: dict[int | str, list[Group]] = {}
        for group in groups:
            blocks.setdefault(group.name if group.layer.block is None else group.layer.block, []).append(group)
        pruners, ratios = self.pruners(groups), {}
        starved = self._starved(pruners)
        for block in blocks.values():
            names = [group.name for group in block]
            scales = scales_of(block, starved, lambda name: ratio(pruners[name], self._is_squared))
            share = outlier_ratio([scaled(pruners[name].scores, scales.get(name), self._is_squared) for name in names])
            for group in block:
                ratios[group.name] = share
                pruners.release(group)
        return ratios

    def _starved(self, pruners: Pruners) -> set[str]:
        """Names of the experts that are scored by magnitude."""
        return {target.name for target, statistics in pruners.statistics() if self._is_starved(target, statistics)}

    def _is_starved(self, target: Target, statistics: LayerStatistics) -> bool:
        """Whether an expert got too few tokens for its score, and is scored by magnitude."""
        needs = NEEDS[self.score]
        fewest = 1 if "gradients" in needs else _FEWEST_ROWS
        return bool(needs) and target.is_expert and statistics.count < fewest

    def pruner(self, target: Target, statistics: LayerStatistics, dense: Tensor | None = None) -> LayerPruner:
        """The pruner of one matrix, of its current weights or of ``dense`` [out, in]."""
        if self.score in ROUNDINGS:
            weight, is_transposed = target.weight if dense is None else dense, target.layout == "in_out"
            return LayerCompressor(weight, statistics, is_transposed=is_transposed, **self.options)
        spacing = math.prod(target.layer.shape[2:])  # N:M groups of a convolution lie along its in-channels
        count, needs = statistics.count, NEEDS[self.score]
        weight = (target.weight if dense is None else dense).to(device_of(self.cache.model), copy=True)
        if self._is_starved(target, statistics):
            self._few[target.name] = min(count, self._few.get(target.name, count))
            scope = self.options.get("scope") or ("row" if self.score == "wanda" else None)
            return layer_pruner(weight, "magnitude", scope=scope)
        inputs = weight.shape[1]
        if self.score == "sparsegpt" and target.is_expert and 3 * count < 2 * inputs:
            # on fewer tokens its update fits these tokens, and the error on others is above Wanda's
            self._overfitted[target.name] = min((count, inputs), self._overfitted.get(target.name, (count, inputs)))
            return layer_pruner(weight, _squared_wanda, statistics, scope="row", spacing=spacing)
        if needs and not target.is_expert:
            self._rows[target.name] = (count, inputs)
        try:
            return layer_pruner(weight, self.score, statistics, spacing=spacing, **self.options)
        except ValueError as error:
            raise ValueError(f"{target.name}: {error}") from error

    def notes(self, curve_score: str | None = None) -> list[str]:
        """Remarks about layers with too few calibration tokens, for the score and for that of curves, in sentences."""
        notes, processes = [], self.cache.processes
        few, rows = processes.merged(self._few), processes.merged(self._rows)
        overfitted = processes.merged(self._overfitted)
        if few:
            counts = [f"{name} ({count})" for name, count in sorted(few.items(), key=lambda item: item[1])]
            too_few = f"fewer than {_FEWEST_ROWS} calibration tokens"
            notes.append(
                f"{len(few)} experts got {'no sample with a gradient' if self.score == 'mfac' else too_few} and were "
                f"pruned by magnitude: {abbreviate(counts)}; more samples reach more experts"
            )
        if overfitted:
            counts = [f"{name} ({count} of {inputs})" for name, (count, inputs) in sorted(overfitted.items())]
            notes.append(
                f"{len(overfitted)} experts got fewer calibration tokens than two thirds of their inputs, to which "
                f"SparseGPT's update would overfit, and were pruned by Wanda: {abbreviate(counts)}; more samples reach "
                "more experts"
            )
        needs = {*NEEDS[self.score], *NEEDS[curve_score or self.score]}
        short = {n: (count, inputs) for n, (count, inputs) in rows.items() if count < _enough(needs, inputs)}
        if short:
            fewest, inputs = min(count for count, _ in short.values()), max(n for _, n in short.values())
            of_gram = self.score if curve_score is None or "gram" in NEEDS[self.score] else curve_score
            reason = (
                f"fewer than their inputs (up to {inputs}), so that {_TITLES[of_gram]}'s Gram matrices are singular"
                if "gram" in needs
                else "too few for their statistics"
            )
            notes.append(
                f"the calibration data is short: {len(short)} matrices got {fewest} tokens or not many more, "
                f"{reason}; give more or longer samples"
            )
        return notes


def _enough(needs: Container[str], inputs: int) -> int:
    """Rows of a matrix from which its statistics are no longer short."""
    return inputs if "gram" in needs else _FEWEST_ROWS


def _squared_wanda(weight: Tensor, statistics: LayerStatistics | None) -> Tensor:
    """Wanda's scores from a Gram matrix, squared as SparseGPT's are."""
    assert statistics is not None and statistics.gram is not None
    return weight.square() * statistics.gram.diagonal().to(weight.device)


class Pruners:
    """The pruners of some matrices, by name; each is made on first access, from the current weights.

    A pruner and its statistics take several times the memory of the matrix. :meth:`release` frees those of a group.
    """

    def __init__(self, pruning: Pruning, targets: Sequence[Target], statistics: Mapping[str, LayerStatistics]) -> None:
        self._pruning, self._statistics = pruning, dict(statistics)
        self._targets = {target.name: target for target in targets}
        self._made: dict[str, LayerPruner] = {}

    def __getitem__(self, name: str) -> LayerPruner:
        if name not in self._made:
            self._made[name] = self.once(name)
        return self._made[name]

    def once(self, name: str) -> LayerPruner:
        """A new pruner, which is not stored."""
        return self._pruning.pruner(self._targets[name], self._statistics[name])

    def statistics(self) -> Iterator[tuple[Target, LayerStatistics]]:
        """Each matrix whose statistics are not released, with these."""
        return ((self._targets[name], statistics) for name, statistics in self._statistics.items())

    def statistics_of(self, target: Target) -> LayerStatistics:
        """Those of a matrix, which are not released."""
        return self._statistics[target.name]

    def release(self, group: Group) -> None:
        """Free the pruners of a group, and their statistics."""
        for target in group.targets:
            self._made.pop(target.name, None)
            self._statistics.pop(target.name, None)


def prune_group(
    group: Group, pruners: Pruners | Mapping[str, LayerPruner], level: tuple[int, str]
) -> Iterator[tuple[Target, Tensor]]:
    """Prune the matrices of a group to a level, (count, N:M pattern or ""), one by one.

    Yields (target, weight) and does not write the model.
    """
    count, pattern = level
    shares: list[Any] = [pattern] * len(group.targets)
    if not pattern:
        shares = [count]
        if len(group.targets) > 1:
            nonzero = [int(pruners[target.name].given.count_nonzero()) for target in group.targets]
            shares = split_capped(count, group.sizes, nonzero, split_count)
    for target, share in zip(group.targets, shares, strict=True):
        yield target, pruners[target.name].prune(share).weight


class ScoreSeconds(NamedTuple):
    """Of a level of all matrices, of the statistics, and of these and pruning all matrices."""

    level: float
    statistics: float
    prune: float


def score_seconds(plan: Plan, score: str) -> ScoreSeconds:
    """Seconds with a score. The matrices of a block, and the batches of the statistics, are split among processes."""
    matrices, operation = plan.shapes.matrices, plan.rates.operation
    ranked = plan.shapes.pruned * plan.rates.ranked
    prepare, level = 0.0, ranked / 4
    if "gram" in NEEDS[score]:
        cubes = sum(columns**3 for _, columns in matrices) * operation
        products = sum(2 * rows * columns**2 for rows, columns in matrices) * operation
        prepare, level = cubes, products + ranked
        if score == "alps":
            prepare += _ALPS_EIGEN * cubes
            level += _ALPS_PRODUCTS * products + _ALPS_RANKINGS * ranked
    processes = plan.workload.processes
    # each block runs once for the statistics and once for the input of the next
    statistics = 2 * plan.pass_seconds(plan.workload.samples) / processes if NEEDS[score] else 0.0
    return ScoreSeconds(level, statistics, statistics + (prepare + max(level, ranked)) / processes)


def statistics_cost(plan: Plan) -> Cost:
    """What it takes to collect statistics and to prune all matrices once."""
    config, workload, final = plan.config, plan.workload, score_seconds(plan, plan.config.score)
    seconds = {"statistics and pruning": final.prune}
    if has_statistics(config.allocation, "magnitude"):
        # every process scores all matrices
        every = workload.processes * (final.prune - final.statistics)
        seconds["outliers"] = plan.pass_seconds(workload.samples) / workload.processes + every
    return plan.cost(
        seconds,
        passes=2 * workload.samples / config.batch_size,
        stored={"activations before a block": activation_bytes(plan, 2 * score_samples(plan))},
        working={
            "activations of a batch": _batch_bytes(plan),
            "statistics of a block": _block_statistics_bytes(plan),
            "pruner of a matrix": _working_pruner_bytes(plan),
        },
    )


def pruner_bytes(plan: Plan, shape: tuple[int, int]) -> int:
    """Bytes that a pruner by the score of curves holds between two levels: its matrix, the order, and factors."""
    (rows, columns), itemsize, samples = shape, plan.shapes.itemsize, plan.workload.samples
    ranked = plan.config.pattern == "unstructured"  # else the scores are computed for each level
    wide = 4 if itemsize < 4 else 0  # fp32 beside the matrix
    # by weight, and by pair of inputs
    weight, pair = itemsize, 0
    match plan.config.planning_score:
        case "magnitude":
            weight += 4 * ranked
        case "wanda":
            weight += (2 if columns < 2**15 else 4) * ranked
        case "sparsegpt":
            weight, pair = weight + wide, 4
        case "alps":  # a pruner of SparseGPT, the Gram matrix, its eigenvectors, and the scaled weights
            weight, pair = weight + 2 * wide + 4, 12
        case _:  # gradients in fp32, factors of the Fisher matrix in fp64, its inverse's diagonal, and the order
            drawn = min(GRADIENTS, samples)
            factors = 8 * drawn**2 // _FISHER_BLOCK if drawn < _FISHER_BLOCK else 8 * _FISHER_BLOCK
            weight += wide + 4 * drawn + factors + 8 + 4 * ranked
    return rows * columns * weight + columns**2 * pair


def all_pruners_bytes(plan: Plan) -> int:
    """Bytes of the pruners of all matrices, by the score of curves."""
    return sum(pruner_bytes(plan, shape) for shape in plan.shapes.matrices)


def all_statistics_bytes(plan: Plan) -> int:
    """Bytes of the statistics of all matrices, for the score of curves."""
    score, samples = plan.config.planning_score, plan.workload.samples
    return sum(statistics_bytes(matrix, [score], samples) for matrix in plan.shapes.matrices)


def _batch_bytes(plan: Plan) -> int:
    """Largest of a block's activations and the logits of one batch."""
    shapes, workload, most = plan.shapes, plan.workload, plan.config.batch_size
    largest_in, largest_out = (max(matrix[side] for matrix in shapes.matrices) for side in (1, 0))
    samples = min(most, max(workload.samples, workload.held_out))
    block = samples * shapes.tokens * ((4 * shapes.width + 3 * largest_out) * shapes.itemsize + 8 * largest_in)
    compared = min(most, max(workload.curve_samples, workload.held_out))
    # the logits of a batch, and in fp32 those of one sample and their logarithms
    logits = shapes.tokens * shapes.outputs * (max(compared, 1) * shapes.itemsize + 12)
    return max(block, logits)


def _block_statistics_bytes(plan: Plan) -> int:
    shapes, outliers = plan.shapes, 0
    if plan.config.allocation == "owl":  # Wanda's sums of all matrices, and scores and pruners of a block
        outliers = sum(8 * columns for _, columns in shapes.matrices)
        outliers += shapes.largest_block * (4 + shapes.itemsize)
    scores, samples = plan.config.scores, plan.workload.samples
    by_block = (sum(statistics_bytes(matrix, scores, samples) for matrix in block) for block in shapes.blocks)
    return max(outliers, *by_block)


def _working_pruner_bytes(plan: Plan) -> int:
    """Of the largest matrix while it is ranked or updated, and what is held of the matrices that change together."""
    shapes = plan.shapes
    factor = 20 if any("gram" in NEEDS[score] for score in plan.config.scores) else 0
    each = _RANKED_BYTES + shapes.itemsize
    largest = max(rows * columns * each + factor * columns**2 for rows, columns in shapes.matrices)
    if plan.config.method != "dp" or plan.config.granularity != "block":
        return largest
    # copies before and after, and ranks; Cholesky factors
    each = 2 * shapes.itemsize + 2
    return largest + max(
        sum(rows * columns * each + factor // 5 * columns**2 for rows, columns in block) for block in shapes.blocks
    )
