"""Run a model from one of its blocks on, with the activations of earlier blocks from a cache.

No code of a model is copied. Earlier blocks return cached outputs instead of computing. Everything around the blocks
(embeddings, masks, rotary tables, the head) runs unchanged, so that later blocks get all their keyword arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.hooks import RemovableHandle

from leanstep._checkpoint.mapped import FileTensor, Scratch
from leanstep._processes import Processes
from leanstep.pruning.cost import Cost, Plan
from leanstep.pruning.measure.batches import Batch, hooked
from leanstep.pruning.measure.blocks import candidate_blocks, set_forward
from leanstep.pruning.score.base import has_statistics
from leanstep.pruning.score.targets import Group, Target


class _Reached(Exception):
    """Ends a forward pass early."""


# model -> why activations of it are not cached, which any of its caches may have met
_NOTES: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def take_note(model: nn.Module) -> str:
    """Why a cache of a model was not used since the last call; "" if all were."""
    return _NOTES.pop(model, "")


def find_stages(model: nn.Module, batch: Batch) -> list[tuple[str, nn.Module]]:
    """Those of :func:`candidate_blocks` that a model calls exactly once, in the order of the calls."""
    modules = dict(candidate_blocks(model))
    calls: list[str] = []
    note = lambda name: lambda _module, _args: calls.append(name)  # noqa: E731
    handles = (module.register_forward_pre_hook(note(name)) for name, module in modules.items())
    with hooked(handles), torch.no_grad():
        batch.run(model)
    return [(name, modules[name]) for name in calls if calls.count(name) == 1]


class ActivationCache:
    """Runs a model on fixed batches from one of its stages on.

    The cache holds the output of the last stage before :attr:`position` for every batch: tokens x width values, in the
    model's dtype, on its device or in files. A position is the index of a stage. :attr:`starts` lists the positions
    from which the model can be run; a skip connection across a position excludes it. Cached outputs come from the
    weights at the time of :meth:`advance`.

    Args:
        model: run in its current mode.
        enabled: False runs every pass from the first stage.
        like: another cache of the same model, from which to take stages and starts instead of searching them.
        scratch: where to keep the outputs; None: in memory.
        processes: of the run; the cache has this process's share of the batches. None: it has all.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        *,
        enabled: bool = True,
        like: ActivationCache | None = None,
        scratch: Scratch | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.model, self.scratch = model, scratch
        self.processes = processes or Processes()
        self.all_batches, self.batches = batches, self.processes.share(batches)
        self.stages: list[tuple[str, nn.Module]] = []
        # the model can be run from these positions: later stages need only the output of the stage before
        self.starts: tuple[int, ...] = (0,)
        self.position = 0
        self._outputs: list[Any] = []
        self._numbers: dict[nn.Module, set[int | None]] = {}
        if enabled and like is not None and like.model is model and like.stages:
            self.stages, self.starts = like.stages, like.starts
        elif enabled:
            self._find_starts(batches[0].sample(0))

    @torch.no_grad()
    def _find_starts(self, sample: Batch) -> None:
        """Find the stages, and by trying on one sample the positions from which the model can be run."""
        self.stages = find_stages(self.model, sample)
        expected = _tensors(sample.run(self.model))
        if self._is_chain(sample, expected):
            self.starts = tuple(range(len(self.stages)))
            return
        trial = self._trial(sample)
        for position in range(1, len(self.stages)):
            # runs from the last start on, so that nothing is computed twice
            before = trial.position, trial._outputs
            trial.starts = (*self.starts, position)
            try:
                trial.advance(position)
                same = _are_equal(_tensors(trial.run(0)), expected)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception:  # of any type: later stages got the output of a stage in place of another one's
                same = False
            if same:
                self.starts = (*self.starts, position)
            else:
                trial.position, trial._outputs = before
        if len(self.starts) == 1:
            self.disable("no stage of the model needs only the output of the stage before it")

    def _trial(self, sample: Batch) -> ActivationCache:
        """A cache for one sample that tries the stages, with no start but 0 yet."""
        trial = ActivationCache(self.model, [sample], enabled=False)
        trial.stages = self.stages
        return trial

    def _is_chain(self, sample: Batch, expected: Sequence[Tensor]) -> bool:
        """Whether every stage, and what follows the last, needs only the output of the stage before it.

        Runs single stages: to try the starts one by one would run all that follow each. The inputs of a stage are
        compared between two runs in which earlier stages return other values.
        """
        trial = self._trial(sample)
        try:
            for position in range(1, len(self.stages)):
                before = trial.inputs_of(0, position)
                trial.starts = (*trial.starts, position)
                trial.advance(position)
                if not _are_equal(_tensors(trial.inputs_of(0, position)), _tensors(before)):
                    return False
            return len(self.stages) > 1 and _are_equal(_tensors(trial.run(0)), expected)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # of any type: later stages got the output of a stage in place of another one's
            return False

    def disable(self, reason: str) -> None:
        """Clear the cache, and run every pass from the first stage from now on."""
        self.reset()
        self.starts = (0,)
        _NOTES.setdefault(self.model, f"activations are not cached: {reason}")

    def span(self, target: Target) -> tuple[int, int] | None:
        """Indices of the first and the last stage with a target; None if a module of it is outside all stages."""
        if not self._numbers:
            stages = {stage: number for number, (_, stage) in enumerate(self.stages)}

            def walk(module: nn.Module, number: int | None) -> None:
                number = stages.get(module, number)
                if number not in self._numbers.setdefault(module, set()):
                    self._numbers[module].add(number)
                    for child in module.children():
                        walk(child, number)

            walk(self.model, None)
        numbers = {number for module in target.modules for number in self._numbers[module]}
        known = [number for number in numbers if number is not None]
        return (min(known), max(known)) if len(known) == len(numbers) else None

    def first_stage(self, group: Group) -> int:
        """Index of the first stage with a target of a group, 0 if one is outside all stages."""
        return min((self.span(target) or (0, 0))[0] for target in group.targets)

    def by_start(self, groups: Sequence[Group]) -> list[tuple[int, list[Group]]]:
        """Groups by the last start whose pass still runs all their targets, in the order of starts."""
        by_start: dict[int, list[Group]] = {}
        for group in groups:
            first = self.first_stage(group)
            by_start.setdefault(max(start for start in self.starts if start <= first), []).append(group)
        return sorted(by_start.items(), key=lambda item: item[0])

    def by_block(self, groups: Sequence[Group]) -> list[tuple[int, list[Group]]]:
        """As :meth:`by_start`, with an entry for each block where the blocks of several can only start together."""
        entries: list[tuple[int, list[Group]]] = []
        for start, stage in self.by_start(groups):
            blocks: dict[tuple[int, int], list[Group]] = {}
            for group in stage:
                first = self.first_stage(group)
                block = -1 if group.layer.block is None else group.layer.block
                blocks.setdefault((first, block), []).append(group)
            entries += [(start, blocks[key]) for key in sorted(blocks)]
        return entries

    def reset(self) -> None:
        """Clear the cache and return to the first stage."""
        self.position, self._outputs = 0, []

    def run(self, index: int) -> Any:
        """Run the model on a batch from :attr:`position` on; returns its output."""
        with self._cached_outputs(self.position, self._outputs[index] if self.position else None):
            return self.batches[index].run(self.model)

    def advance(self, position: int) -> None:
        """Move to a later position of :attr:`starts`, and cache its input, computed with the current weights."""
        if position == self.position:
            return
        if position not in self.starts or position < self.position:
            raise ValueError(f"cannot advance from {self.position} to {position}, only to later ones of {self.starts}")
        self.move(position, self.outputs_of(position - 1))

    def outputs_of(self, stage: int) -> list[Any]:
        """The output of a stage for every batch, computed with the current weights; in files if the cache is."""
        outputs = (self.until(index, stage)[2] for index in range(len(self.batches)))
        return [output if self.scratch is None else self.scratch.store(output) for output in outputs]

    @property
    def outputs(self) -> list[Any]:
        """Cached outputs of the stage before the position, for every batch."""
        return self._outputs

    def move(self, position: int, outputs: list[Any]) -> None:
        """Cache the input of a later position, which :meth:`outputs_of` has computed."""
        self._outputs, self.position = outputs, position

    @torch.no_grad()
    def until(self, index: int, stage: int) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Run a batch up to a stage; returns the stage's arguments, keyword arguments and output."""
        return self._until(index, stage, self.position, self._outputs[index] if self.position else None)

    @torch.no_grad()
    def inputs_of(self, index: int, stage: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments of a stage for a batch, which runs up to it."""
        captured: list[Any] = []

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            captured.append((_cloned(args), _cloned(kwargs)))
            raise _Reached

        handle = self.stages[stage][1].register_forward_pre_hook(hook, with_kwargs=True)
        self._run_to(handle, index, self.position, self._outputs[index] if self.position else None)
        return captured[0]

    def _until(self, index: int, stage: int, position: int, before: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """As :meth:`until`, from a position on, given the output of the stage before it."""
        captured: list[Any] = []

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            captured.append((args, kwargs, _cloned(output)))
            raise _Reached

        handle = self.stages[stage][1].register_forward_hook(hook, with_kwargs=True)
        self._run_to(handle, index, position, before)
        return captured[0]

    def _run_to(self, handle: RemovableHandle, index: int, position: int, before: Any) -> None:
        """Run a batch from a position on, given the output of the stage before it, to a hook that ends the pass."""
        with hooked([handle]), suppress(_Reached), self._cached_outputs(position, before):
            self.batches[index].run(self.model)

    @contextmanager
    def _cached_outputs(self, position: int, output: Any) -> Iterator[None]:
        """Context manager: stages before ``position`` return the given output instead of computing."""
        stored: list[tuple[nn.Module, Any]] = []
        # clone the output: later stages may write into it, like nn.ReLU(inplace=True)
        unused = _cloned(output) if position > 1 else None
        try:
            for number, (_, stage) in enumerate(self.stages[:position], 1):
                stored.append((stage, stage.__dict__.get("forward")))
                if number < position:
                    stage.forward = lambda *args, **kwargs: unused
                else:
                    stage.forward = lambda *args, **kwargs: _cloned(output)
            yield
        finally:
            for stage, forward in stored:
                set_forward(stage, forward)


class BlockCache(ActivationCache):
    """Runs a model on fixed batches from any of its starts on, with the inputs of all blocks cached as they are needed.

    Cached inputs come from the weights at that time: :meth:`forget` drops those that a change of weights made wrong.

    Args:
        like: a cache of the same model with its stages and starts.
        limit: most bytes of cached inputs in memory; beyond it, passes run from an earlier block. Files have no limit.
    """

    def __init__(self, like: ActivationCache, batches: Sequence[Batch], limit: float) -> None:
        super().__init__(like.model, batches, enabled=bool(like.stages), like=like, scratch=like.scratch)
        self._limit, self._size = limit, 0
        # (start, index of the batch) -> output of the stage before the start
        self._inputs: dict[tuple[int, int], Any] = {}

    def start_of(self, groups: Sequence[Group]) -> int:
        """The last start whose pass still runs all matrices of some groups."""
        return min((start for start, _ in self.by_start(groups)), default=0)

    @torch.no_grad()
    def run_from(self, start: int, index: int) -> Any:
        """Run the model on a batch from a start on; returns its output."""
        position, output = self._before(start, index)
        with self._cached_outputs(position, output):
            return self.batches[index].run(self.model)

    def forget(self, start: int) -> None:
        """Drop the inputs of the blocks after a start: weights of the stages from there on have changed."""
        for key in [key for key in self._inputs if key[0] > start]:
            self._size -= _bytes(self._inputs.pop(key))

    def _before(self, start: int, index: int) -> tuple[int, Any]:
        """The start, or an earlier one if its input does not fit into memory, and the output of the stage before it."""
        position, output = 0, None
        for at in (at for at in self.starts if 0 < at <= start):
            if (at, index) in self._inputs:
                position, output = at, self._inputs[at, index]
        if position < start:
            output = self._until(index, start - 1, position, output)[2]
            position = start
            if self.scratch is not None:
                self._inputs[start, index] = self.scratch.store(output)
            elif self._size + _bytes(output) <= self._limit:
                self._inputs[start, index] = output
                self._size += _bytes(output)
        return position, output


def _bytes(output: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(output))


def _are_equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]


def _cloned(output: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, (Tensor, FileTensor)) else leaf, output)


def cut_points_cost(plan: Plan) -> Cost:
    """What it takes to find the positions from which a chain of blocks can be run: a pass to find the blocks, one to
    compare with, and two blocks for each position.
    """
    return Cost({"search of the cut points": 4 * plan.pass_seconds(1)}, passes=4)


def activation_bytes(plan: Plan, samples: int) -> int:
    """Bytes of the activations before a block, of samples."""
    return samples * plan.shapes.tokens * plan.shapes.width * plan.shapes.itemsize


def score_samples(plan: Plan) -> int:
    """Samples whose activations are cached for the statistics of scores."""
    config = plan.config
    return plan.workload.samples if has_statistics(config.allocation, *config.scores) else 0
