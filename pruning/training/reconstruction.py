"""Local reconstruction: train each pruned block to the dense block's outputs, in the memory of one block.

:func:`reconstruct_block` trains one block on examples, whatever compressed it: the constraint of a weight says what may
be left of it. :class:`BlockReconstruction` makes the examples while the blocks of a model are pruned one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from leanstep._checkpoint.mapped import Scratch, touched
from leanstep.optimizers import SinkGD
from leanstep.pruning.config import Progress, PruneConfig
from leanstep.pruning.cost import Cost, Plan
from leanstep.pruning.measure.activation_cache import ActivationCache, activation_bytes
from leanstep.pruning.measure.measurement import stored_by_measurement
from leanstep.pruning.measure.metrics import Distortion
from leanstep.pruning.measure.products import product_dtype
from leanstep.pruning.result import finite_values
from leanstep.pruning.score.calibration import score_seconds
from leanstep.pruning.score.targets import Group, Target, abbreviate
from leanstep.pruning.training.recovery import rate_factor

# of the examples, one in so many is held back; these judge the weights so many times in a training
_HELD_BACK, _CHECKS = 8, 4
# of the optimizer
_MOMENTUM = 0.9

# what a block computes with, of a weight that is trained: differentiable
Constraint = Callable[[Tensor], Tensor]


class Example(NamedTuple):
    """A call of a block, and the output that it should have.

    Attributes:
        args, kwargs: of the block.
        target: its first output, [samples, tokens, width] or [samples, ...].
        mask: bool [samples, tokens], True where a token counts; None: all count.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Tensor
    mask: Tensor | None = None


class BlockErrors(NamedTuple):
    """Relative errors of a block on held-back examples: pruned, and with the best trained weights (NaN: none finite).

    ``applied``: whether it has the trained weights.
    """

    before: float
    after: float
    applied: bool


def keep_zeros(weight: Tensor) -> Constraint:
    """The constraint that the present zeros of a weight stay, which holds a mask of 1 byte per weight."""
    mask = weight.detach() != 0
    # weights may be on another device than the one that trains; a product takes half of the time of torch.where
    return lambda trained: trained * mask.to(trained.device)


def reconstruct_block(
    block: nn.Module,
    examples: Sequence[Example],
    constraints: Mapping[str, Constraint],
    *,
    steps: int,
    lr: float,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> BlockErrors:
    """Train weights of a block in place, on outputs that it should have; they stay as they are if that does not help.

    The loss is the mean over tokens of ``|y - t|^2 / |t|^2`` with the block's output y and the target t; where these
    are no [samples, tokens, width], over samples. A step of :class:`leanstep.SinkGD` takes one example, in an order
    that ``seed`` draws; the rate is that of :func:`leanstep.pruning.recover`. The last eighth of the examples is held
    back. It judges the weights after each quarter of the steps, as they are stored, and the best ones are taken. A loss
    or gradient that is not finite ends the training.

    Args:
        block: in its current mode; of its parameters only those in ``constraints`` change.
        examples: two or more. Each is read when its step comes.
        constraints: by parameter name, what the block computes with of the trained weight, such as
            :func:`keep_zeros`. It is applied in every pass, and to what is stored. A projection onto a grid needs a
            gradient of its own, such as that of a straight-through estimator.
        steps: number of updates.
        lr: root mean square of an entry's change in a step, of all entries of a matrix, zeros among them.
        progress: called with the number of steps taken.

    Returns:
        :class:`BlockErrors`.

    Raises:
        ValueError: for fewer than two examples.

    Notes:
        16-bit weights are trained in fp32. bf16 blocks compute in bf16 where that is fast, other 16-bit blocks in fp32.
        Memory: trained weights, gradients, momentum, constrained weights, the best weights, activations of an example.

    References:
        "A Free Lunch in LLM Compression: Revisiting Retraining after Pruning", arXiv 2510.14444.
    """
    if len(examples) < 2:
        raise ValueError(f"reconstruct_block: expected two examples or more, one to hold back, got {len(examples)}")
    # where the block computes, which may be another device than that of its weights
    device = examples[0].target.device
    parameters = dict(block.named_parameters())
    stored = {name: touched(parameters[name]) for name in constraints}
    trained = {
        name: _widened(weight.detach().to(device, copy=True)).requires_grad_() for name, weight in stored.items()
    }
    # not fp16, whose gradients would underflow
    dtypes = {weight.dtype for weight in stored.values()} | {product_dtype(torch.bfloat16, device=device)}
    computed: Callable[[Any], Any] = (lambda value: value) if dtypes == {torch.bfloat16} else _widened
    others = [*parameters.items(), *block.named_buffers()]
    rest = {name: computed(tensor.detach().to(device)) for name, tensor in others if name not in trained}

    def loss_of(weights: Mapping[str, Tensor], example: Example) -> Tensor:
        args, kwargs = tree_map(computed, (example.args, dict(example.kwargs)))
        weights = {name: computed(weight.to(device, stored[name].dtype)) for name, weight in weights.items()}
        return relative_error(functional_call(block, {**rest, **weights}, args, kwargs), example)

    def constrained() -> dict[str, Tensor]:
        return {name: constraints[name](weight) for name, weight in trained.items()}

    @torch.no_grad()
    def judge(weights: Mapping[str, Tensor]) -> float:
        losses = [loss_of(weights, examples[index]) for index in range(len(examples) - held_back, len(examples))]
        return float(torch.stack(losses).mean())

    held_back = max(1, len(examples) // _HELD_BACK)
    before, after, best = judge(stored), math.nan, dict[str, Tensor]()
    optimizer = _optimizer(trained.values())
    order, checks = _order(len(examples) - held_back, seed), {steps * part // _CHECKS for part in range(1, _CHECKS + 1)}
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * rate_factor(step - 1, steps)
        with torch.enable_grad():
            loss = loss_of(constrained(), examples[next(order)])
            loss.backward()
        norm = nn.utils.get_total_norm(weight.grad for weight in trained.values() if weight.grad is not None)
        if not bool(loss.detach().isfinite() & norm.isfinite()):
            break
        optimizer.step()
        optimizer.zero_grad()
        if step in checks:
            with torch.no_grad():
                weights = {name: weight.to(stored[name].dtype, copy=True) for name, weight in constrained().items()}
            if not (error := judge(weights)) >= after and math.isfinite(error):
                after, best = error, weights
        if progress is not None:
            progress(step)
    applied = after < before or (bool(best) and not math.isfinite(before))
    if applied:
        with torch.no_grad():
            for name, parameter in stored.items():
                touched(parameter).copy_(best[name])
    return BlockErrors(before, after, applied)


def _optimizer(weights: Iterable[Tensor]) -> SinkGD:
    """The optimizer of recovery, with momentum: a block has room for it, and few steps."""
    by_rule: dict[str, list[Tensor]] = {}
    for weight in weights:
        by_rule.setdefault("sinkgd" if weight.dim() > 1 else "adamw", []).append(weight)
    groups = [{"params": params, "algorithm": rule} for rule, params in by_rule.items()]
    return SinkGD(groups, scale=1.0, momentum=_MOMENTUM)


def relative_error(output: Any, example: Example) -> Tensor:
    """Mean over tokens of the squared error of a block's output, divided by the target's square."""
    given, target = (_widened(_first_tensor(value)) for value in (output, example.target))
    features = tuple(range(2 if target.dim() == 3 else 1, target.dim()))
    squares = target.square().sum(features).clamp(min=torch.finfo(target.dtype).tiny)
    errors = (given - target).square().sum(features) / squares
    is_masked = example.mask is not None and example.mask.shape == errors.shape and bool(example.mask.any())
    return errors[example.mask].mean() if is_masked else errors.mean()


def _first_tensor(output: Any) -> Tensor:
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def _widened(value: Any) -> Any:
    """A 16-bit tensor in fp32; anything else as it is."""
    is_narrow = isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < 4
    return value.float() if is_narrow else value


def _order(count: int, seed: int) -> Iterator[int]:
    """Numbers of examples without end, each pass over all of them in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _constraint(target: Target, encoded: tuple[str, Tensor] | None) -> Constraint | None:
    """What keeps a matrix at its level: its zeros, or the values of its codes; None for levels without single codes."""
    weight, is_transposed = target.owned, target.layout == "in_out"
    if encoded is None:
        return keep_zeros(weight)
    from leanstep.pruning.compress.menu import constraint_of

    return constraint_of(*encoded, weight, is_transposed=is_transposed)


class _Examples(Sequence[Example]):
    """Calls of a stage with the inputs that the pruned stages before it give, and its dense outputs."""

    def __init__(self, cache: ActivationCache, stage: int, targets: Sequence[Any]) -> None:
        self._cache, self._stage, self._targets = cache, stage, targets

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # of slices there is no use
        args, kwargs = self._cache.inputs_of(index, self._stage)
        target = _first_tensor(Scratch.open(self._targets[index]))
        return Example(args, kwargs, target, self._cache.batches[index].mask)


class BlockReconstruction:
    """Trains the blocks of a model while it is pruned: :meth:`before` and :meth:`after` the pruning of each.

    Blocks are the stages of a cache with the pruned model's activations. A second cache has the dense model's, which
    has passed a block before that is pruned.

    Args:
        cache: of the calibration data, at its first stage.
        config: with ``reconstruct`` and ``reconstruction_rate``.
        blocks: number of calls of :meth:`after`.
        progress: called with (steps taken, steps in all, "reconstruction").

    Raises:
        ValueError: for a model of which no block can be run alone, or data of a single batch.
    """

    def __init__(self, cache: ActivationCache, config: PruneConfig, blocks: int, progress: Progress | None) -> None:
        assert config.reconstruct is not None
        check_blocks(cache)
        self._cache, self._progress, self._blocks = cache, progress, blocks
        self._dense = ActivationCache(cache.model, cache.all_batches, like=cache, scratch=cache.scratch)
        self._targets: list[Any] = []
        self.steps, self.lr = config.reconstruct, config.reconstruction_rate
        # of each block that was trained, by its name; and those that were not
        self.errors: dict[str, BlockErrors] = {}
        self._skipped: list[str] = []
        self._done = 0

    def before(self, block: Sequence[Group]) -> None:
        """Compute the dense outputs of the stage with some matrices, with the dense weights that it has now."""
        spans = {self._cache.span(target) for group in block for target in group.targets}
        last = max((span[1] for span in spans if span is not None), default=0)
        self._targets = []
        if len(spans) == 1 and (last, last) in spans and last in self._dense.starts and self._dense.position <= last:
            self._dense.advance(last)
            self._targets = self._dense.outputs_of(last)
        elif (last, last) in spans and self._dense.position == last + 1:  # the embedding before it has changed since
            self._targets = self._dense.outputs
        following = [start for start in self._dense.starts if start > last]
        if following and following[0] == last + 1 and self._targets:
            self._dense.move(last + 1, self._targets)
        elif following and self._dense.position < following[0]:
            self._dense.advance(following[0])

    def after(self, block: Sequence[Group], encoded: dict[str, tuple[str, Tensor]]) -> None:
        """Train the stage with some matrices, which are changed now.

        Args:
            encoded: with a menu, level and bytes or scales of each; bytes get the trained codes, if they have any.
        """
        stage = self._cache.first_stage(block[0])
        if self._targets:
            name, module = self._cache.stages[stage]
            self._cache.advance(stage)
            parameters = {parameter: own for own, parameter in module.named_parameters()}
            targets = [target for group in block for target in group.targets]
            constraints: dict[str, Any] = {
                parameters[target.owned]: constraint
                for target in targets
                if (constraint := _constraint(target, encoded.get(target.name))) is not None
            }
            examples, self._targets = _Examples(self._cache, stage, self._targets), []
            self.errors[name] = reconstruct_block(
                module, examples, constraints, steps=self.steps, lr=self.lr, progress=self._report
            )
            for target in targets if self.errors[name].applied else ():
                grid = constraints.get(parameters[target.owned])
                if grid is not None and target.name in encoded:
                    encoded[target.name] = grid.write(target.weight)
        else:
            self._skipped += [group.name for group in block]
        self._done += 1
        self._report(0)

    def _report(self, step: int) -> None:
        if self._progress is not None:
            self._progress(self._done * self.steps + step, self._blocks * self.steps, "reconstruction")

    def notes(self) -> list[str]:
        """Remarks about blocks that have the weights of pruning, in sentences."""
        notes = []
        unstable = [name for name, errors in self.errors.items() if math.isnan(errors.after)]
        worse = [name for name, errors in self.errors.items() if not errors.applied and name not in unstable]
        for names, reason in ((unstable, "their loss was not finite"), (worse, "training did not lower their error")):
            if names:
                notes.append(f"{len(names)} blocks stayed as they were pruned, because {reason}: {abbreviate(names)}")
        if self._skipped:
            notes.append(f"not reconstructed, because no block that runs alone has them: {abbreviate(self._skipped)}")
        return notes

    def to_dict(self, held_out: Distortion | None) -> dict[str, Any]:
        """Plain values, for JSON: settings, errors of each block, and the model's distortion on held-out data."""
        blocks = [{"name": name} | finite_values(errors._asdict()) for name, errors in self.errors.items()]
        distortion = None if held_out is None else finite_values(held_out._asdict())
        return {"steps": self.steps, "lr": self.lr, "blocks": blocks, "held_out": distortion}


def check_blocks(cache: ActivationCache) -> None:
    """Raise ValueError for a model of which no block can be run alone, and for data of a single batch."""
    if len(cache.starts) < 2:
        raise ValueError(
            f"reconstruct trains block by block, and no block of {type(cache.model).__name__} can be run alone; leave "
            "out reconstruct (--reconstruct), or train the whole model after pruning (--recover)"
        )
    if len(cache.batches) < 2:
        raise ValueError(
            "reconstruct holds back an eighth of the calibration data: expected two batches or more, got one; give "
            "more samples (--samples) or a smaller batch_size (--batch-size)"
        )


def reconstruction_cost(plan: Plan) -> Cost:
    """What it takes to prune anew with each block trained after it."""
    config, workload, shapes = plan.config, plan.workload, plan.shapes
    steps, batch = config.reconstruct or 0, min(config.batch_size, workload.samples)
    held_back = batch * max(1, workload.samples // batch // _HELD_BACK) if batch else 0
    # forward and backward, which takes the work of two; the checks; the dense chain
    passes = 3 * plan.pass_seconds(steps * batch) + plan.pass_seconds((1 + _CHECKS) * held_back + workload.samples)
    seconds = passes + score_seconds(plan, config.score).prune + plan.pass_seconds(workload.held_out, compared=True)
    # weights, gradients, momentum, an update and what the block computes with in fp32, a mask, and the best weights
    weights = shapes.largest_block * (20 + 1 + 2 * shapes.itemsize)
    rows = max(sum(sum(matrix) for matrix in block) for block in shapes.blocks)
    return plan.cost(
        {"reconstruction of blocks": seconds},
        passes=2 * workload.samples / config.batch_size,
        stored={
            **stored_by_measurement(plan, workload.held_out),
            "activations before a block": activation_bytes(plan, 4 * workload.samples + 2 * workload.held_out),
        },
        working={"training of a block": weights + 4 * batch * shapes.tokens * (rows + 8 * shapes.width)},
    )
