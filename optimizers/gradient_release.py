"""Optimizer steps inside the backward pass, a few parameters at a time, so that gradients are freed at once.

Each way of training completes gradients at another place:

* one process, and tensor parallelism: autograd, one parameter at a time;
* FSDP2: ``fully_shard`` calls the same hooks after the reduce-scatter of a block, for all parameters of the block;
* DistributedDataParallel: the communication hook reduces a bucket of parameters; autograd's hook would be too early.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from leanstep._torch import is_dtensor, refuse_gradient_readers
from leanstep.optimizers.common.base import GradientAverage, LeanOptimizer, count_nonfinite, dense_gradient
from leanstep.optimizers.common.checks import describe
from leanstep.optimizers.common.groups import is_flattened
from leanstep.optimizers.common.sharding import local, run, together


class GradientRelease:
    """Handle of :func:`release_gradients`. ``remove()``, or the end of the ``with`` block, removes the hooks."""

    def __init__(self, handles: list[Any], updates: _Updates) -> None:
        self._handles = handles
        self._updates = updates

    def remove(self) -> None:
        """Remove the hooks; the optimizer steps as usual again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._updates.optimizer.releases_gradients = False

    @contextlib.contextmanager
    def accumulate(self, *, keep_others: bool = False) -> Iterator[None]:
        """Add the gradients of the passes inside the ``with`` block to the next step, and free them at once.

        Run all backward passes of a step but the last one inside, each on its part of the loss. The momentum of a
        parameter takes the sum of its gradients, so the step equals that of the summed gradients up to rounding to the
        momentum's dtype. Needs no memory beyond one gradient.

        Works for rules that use the gradient through one momentum alone: :class:`SinkGD` with ``momentum`` and without
        ``nesterov``, its algorithm "sinkgd"; :class:`Lion` with equal betas and without ``cautious``. Lion's published
        betas mix gradient and momentum by two weights, and AdamW squares the gradient.

        Args:
            keep_others: let parameters of other rules keep and accumulate their gradients (``.grad``) as without
                :func:`release_gradients`, until the last pass. False: refuse them.

        Raises:
            ValueError: a parameter's rule needs the gradient itself, without ``keep_others``; its momentum has 8 bits;
                several processes train the model, which have their own ways (see :func:`release_gradients`). Nothing
                was changed.

        Notes:
            With nonfinite="skip", a parameter's non-finite gradient of one of these passes is left out of the sum, and
            counted; without this function the sum would be non-finite. Between these passes and ``step()``, the
            momentum contains the sum: save the state after ``step()``; ``zero_grad()`` does not clear it.

        Example:
            >>> model = torch.nn.Linear(4, 2, bias=False)
            >>> optimizer = SinkGD([{"params": [model.weight], "algorithm": "sinkgd"}], momentum=0.9)
            >>> release = release_gradients(model, optimizer)
            >>> first, last = torch.randn(8, 4), torch.randn(8, 4)
            >>> with release.accumulate():
            ...     (model(first).square().mean() / 2).backward()
            >>> (model(last).square().mean() / 2).backward()
            >>> optimizer.step()
        """
        self._updates.begin_accumulation(keep_others=keep_others)
        try:
            yield
        finally:
            self._updates.accumulating = False

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def release_gradients(model: nn.Module, optimizer: LeanOptimizer) -> GradientRelease:
    """Update parameters in the backward pass, as soon as their gradients are complete, and free the gradients.

    Gradient memory peaks at the largest parameter, not at the whole model; under FSDP2 at the largest block, a module
    that was given to ``fully_shard``. DistributedDataParallel keeps its buckets, which have the size of all gradients:
    take ``fully_shard`` on a mesh of shape (processes, 1) to replicate the model and free its gradients.

    The update is bit-identical to ``optimizer.step()`` after the backward pass, with two exceptions. SinkGD's AdamW
    parameters with a non-finite gradient are skipped block by block instead of together. SinkGD reduces the sums of
    sharded matrices block by block, and three or more processes may add them in another order.

    Call ``optimizer.step()`` after each backward pass as usual; it ends the step, and updates parameters whose
    gradients this function has not seen. ``zero_grad()`` and learning-rate schedulers work as before.

    Args:
        model: the model whose parameters the optimizer has, wrapped as it is called. Run one backward pass per step.
            To accumulate gradients, suspend communication in all but the last pass: ``model.no_sync()`` of
            DistributedDataParallel, ``model.set_requires_gradient_sync(False)`` of FSDP2. Gradients are then freed by
            the last pass only. One process accumulates by :meth:`GradientRelease.accumulate`, into the momentum.
        optimizer: :class:`Lion` or :class:`SinkGD`. Call the function once for each optimizer of the model.

    Returns:
        A handle with ``remove()`` and ``accumulate()``; also a context manager.

    Raises:
        TypeError: the optimizer's rule needs the gradients of several parameters together.
        ValueError: the optimizer has parameters that are not the model's; a group has nonfinite="raise", which checks
            all gradients before any update; parameters are flattened (FSDP1), hold partial sums, or have shards that
            the optimizer refuses; DistributedDataParallel looks for unused parameters, has a communication hook,
            computes in mixed precision, or wraps a part of the model; :func:`leanstep.pruning.keep_masks`,
            ``GradualPruner`` or a sparsity controller need gradients at the step. Nothing was changed.
        RuntimeError: a second backward pass completes a gradient before ``step()`` (raised by ``backward()``); the
            model runs inside a DistributedDataParallel that this function was not given (raised by its forward pass).

    Notes:
        A model on several devices of one process, whose backward pass has a thread for each, is updated by one thread
        at a time.
        Do not clip by global norm: ``clip_grad_norm_`` finds no gradient after ``backward()``. The updates of
        Lion and of SinkGD's matrices need no clipping. Do not use ``GradScaler``: the hooks would step on scaled
        gradients.
    """
    _refuse(model, optimizer)
    updates = _Updates(optimizer, whole_model=not isinstance(model, DistributedDataParallel))
    handles: list[Any] = []
    if isinstance(model, DistributedDataParallel):
        buckets = _buckets_of(model)
        buckets.add(updates)
        handles += [_OfBuckets(buckets, updates), optimizer.register_step_post_hook(lambda *_: buckets.end_step())]
    else:
        handles.append(model.register_forward_pre_hook(_refuse_data_parallel))
        for block in _blocks(model, updates.slots):
            arrived = functools.partial(updates.arrived, block)
            handles += [param.register_post_accumulate_grad_hook(arrived) for param in block]
    handles.append(optimizer.register_step_pre_hook(lambda *_: updates.update_accumulated()))
    handles.append(optimizer.register_step_post_hook(lambda *_: updates.end_step()))
    optimizer.releases_gradients = True
    return GradientRelease(handles, updates)


class _Slot(NamedTuple):
    """Where an optimizer has a parameter."""

    group_index: int
    first_index: int  # number of parameters in the groups before
    position: int


class _Updates:
    """Updates of some parameters at a time, each parameter once a step."""

    def __init__(self, optimizer: LeanOptimizer, *, whole_model: bool) -> None:
        self.optimizer = optimizer
        self.accumulating = False
        self._whole_model = whole_model  # False: DistributedDataParallel, whose buckets never accumulate
        self._accumulated: set[Tensor] = set()
        # autograd runs the hooks of every GPU's parameters in a thread of its own
        self._lock = threading.RLock()
        self.slots: dict[Tensor, _Slot] = {}
        self._stepped: set[Tensor] = set()
        self._block: Sequence[Tensor] = ()
        self._waiting: list[Tensor] = []  # parameters of the block whose gradients are complete
        first_index = 0
        for group_index, group in enumerate(optimizer.param_groups):
            for position, param in enumerate(group["params"]):
                if param.requires_grad:
                    self.slots[param] = _Slot(group_index, first_index, position)
            first_index += len(group["params"])

    def arrived(self, block: Sequence[Tensor], param: Tensor) -> None:
        """Note that the gradient of a parameter is complete; update its block if that was the last one.

        A gradient of another block shows that the rest of a block has none in this pass. The last block waits for
        ``step()`` in that case.
        """
        with self._lock:
            self.refuse_second(param)
            if self.accumulating:
                self._accumulate(param)
                return
            if block is not self._block:
                self._update_waiting()
                self._block = block
            self._waiting.append(param)
            if len(self._waiting) == len(block):
                self._update_waiting()

    def refuse_second(self, param: Tensor) -> None:
        """Raise RuntimeError if a parameter was updated since the last step."""
        if param in self._stepped:
            raise RuntimeError(
                "release_gradients: a second backward pass reached a parameter before optimizer.step(). The "
                "first pass used and freed its gradient, so gradients cannot be accumulated: run all passes but the "
                "last inside `with release.accumulate():`; with several processes, suspend communication in them "
                "(no_sync or set_requires_gradient_sync); use larger batches; or do without release_gradients."
            )

    def begin_accumulation(self, *, keep_others: bool) -> None:
        """Let the next backward passes accumulate, or raise ValueError for parameters whose rules cannot."""
        if not self._whole_model:
            raise ValueError(
                "release_gradients: accumulate() is for one process, got a DistributedDataParallel. Nothing was "
                "changed. Run all passes but the last inside `with model.no_sync():`."
            )
        if not keep_others:
            refuse_accumulation(self.optimizer)
        self.accumulating = True

    def _accumulate(self, param: Tensor) -> None:
        slot = self.slots[param]
        _wait_for_offload([param])
        if add_to_average(self.optimizer, self.optimizer.param_groups[slot.group_index], slot.position):
            self._accumulated.add(param)

    def update_accumulated(self) -> None:
        """Update parameters that have accumulated gradients, but got none in the last pass."""
        for param in self._accumulated - self._stepped:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
                self.update([param])

    def end_step(self) -> None:
        """Begin a new step. ``optimizer.step()`` has updated the parameters that still waited."""
        self._accumulated.clear()
        self._stepped.clear()
        self._waiting.clear()
        self._block = ()

    def _update_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        self.update(waiting)

    @torch.no_grad()
    def update(self, params: Sequence[Tensor]) -> None:
        """Update parameters of the optimizer by their gradients, and free the gradients."""
        if not self._stepped:
            self.optimizer._check_changed_groups()
        _wait_for_offload(params)
        positions: dict[tuple[int, int], list[int]] = {}
        for param in params:
            slot = self.slots[param]
            positions.setdefault((slot.group_index, slot.first_index), []).append(slot.position)
        rules = []
        for (group_index, first_index), only in sorted(positions.items()):
            # looked up at every step: loading a state replaces the groups
            rules += self.optimizer._group_steps(self.optimizer.param_groups[group_index], first_index, sorted(only))
        run(together(rules))
        self._stepped.update(params)
        for param in params:
            param.grad = None


def _wait_for_offload(params: Sequence[Tensor]) -> None:
    """Wait for the gradients of FSDP2's CPUOffloadPolicy.

    torch before 2.13 calls hooks while it copies gradients to the CPU, on the stream of the copies.
    """
    on_host = [cast("Any", p).device_mesh for p in params if is_dtensor(p) and p.device.type == "cpu"]
    if any(mesh.device_type != "cpu" for mesh in on_host):
        torch.accelerator.current_stream().synchronize()


# ---- blocks: autograd and FSDP2


def _blocks(model: nn.Module, slots: dict[Tensor, _Slot]) -> Iterator[list[Tensor]]:
    """Yield the parameters of the optimizer, those of an FSDP2 module together and all others alone.

    FSDP2 completes the gradients of a module together and holds them in one tensor. Their update shares collectives.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    owners: dict[Tensor, nn.Module] = {}
    for module in model.modules():  # the innermost module comes last
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            owners.update(dict.fromkeys(module.parameters(), module))
    blocks: dict[Any, list[Tensor]] = {}
    for param in slots:
        alone = param not in owners or not is_dtensor(param)  # ignored parameters of FSDP2 are plain
        blocks.setdefault(param if alone else owners[param], []).append(param)
    yield from blocks.values()


def _refuse_data_parallel(model: nn.Module, args: Any) -> None:
    """Raise RuntimeError in a forward pass inside a DistributedDataParallel: autograd's hooks come before it."""
    if DistributedDataParallel._get_active_ddp_module() is not None:
        raise RuntimeError(
            "release_gradients: the model runs inside a DistributedDataParallel, which reduces gradients later than "
            "they would be used. Nothing was changed. Call release_gradients with the DistributedDataParallel."
        )


# ---- buckets: DistributedDataParallel

# DistributedDataParallel keeps its communication hook, and takes no second one
_buckets: weakref.WeakKeyDictionary[DistributedDataParallel, _Buckets] = weakref.WeakKeyDictionary()


class _Buckets:
    """A communication hook of DistributedDataParallel that updates the parameters of a bucket after its reduction.

    A bucket is updated when the next one is ready, so that its reduction runs beside the backward pass.
    """

    def __init__(self, parallel: DistributedDataParallel) -> None:
        self._updates: list[_Updates] = []  # one for each optimizer; without any, the hook only reduces
        self._group = parallel.process_group
        self._reducing: list[tuple[torch.futures.Future[Any], list[tuple[Tensor, Tensor]]]] = []
        self._updated: list[Tensor] = []
        parallel.register_comm_hook(None, lambda state, bucket: self._reduce(bucket))

    def add(self, updates: _Updates) -> None:
        """Update the parameters of one more optimizer, or of one that is here already in another way."""
        self._updates = [each for each in self._updates if each.optimizer is not updates.optimizer] + [updates]

    def remove(self, updates: _Updates) -> None:
        """Leave the parameters of an optimizer to its step."""
        self._updates = [each for each in self._updates if each is not updates]

    def end_step(self) -> None:
        """Forget what a backward pass that failed has left."""
        self._reducing, self._updated = [], []

    def _reduce(self, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
        for updates in self._updates:
            for param in bucket.parameters():
                updates.refuse_second(param)
        # the products and sums of DistributedDataParallel without a hook, to the same bits
        buffer = bucket.buffer().mul_(1.0 / self._group.size())
        work = torch.distributed.all_reduce(buffer, group=self._group, async_op=True)
        future = work.get_future()
        if self._updates:
            if not self._reducing:
                torch.autograd.Variable._execution_engine.queue_callback(self._end_pass)
            self._update_reduced()
            self._reducing.append((future, list(zip(bucket.parameters(), bucket.gradients(), strict=True))))
        return future.then(lambda done: done.value()[0])

    def _update_reduced(self) -> None:
        reducing, self._reducing = self._reducing, []
        for future, gradients in reducing:
            future.wait()
            for updates in self._updates:
                params = [param for param, _ in gradients if param in updates.slots]
                for param, grad in gradients:
                    if param in updates.slots:
                        param.grad = grad
                updates.update(params)
                self._updated += params

    def _end_pass(self) -> None:
        """Update the last bucket. DistributedDataParallel sets all gradients after this, and they are freed then."""
        self._update_reduced()
        torch.autograd.Variable._execution_engine.queue_callback(self._free)

    def _free(self) -> None:
        for param in self._updated:
            param.grad = None
        self._updated = []


class _OfBuckets(NamedTuple):
    """The handle of one optimizer among those whose parameters the buckets update."""

    buckets: _Buckets
    updates: _Updates

    def remove(self) -> None:
        """Leave the parameters to the optimizer's step."""
        self.buckets.remove(self.updates)


def _buckets_of(parallel: DistributedDataParallel) -> _Buckets:
    """The communication hook of a DistributedDataParallel, which gets it in the first call.

    Raises:
        ValueError: it has another hook already.
    """
    if parallel not in _buckets:
        try:
            _buckets[parallel] = _Buckets(parallel)
        except RuntimeError as error:
            raise ValueError(
                "release_gradients: expected a DistributedDataParallel without a communication hook, but it has one "
                "already, and takes no second one. Nothing was changed. Do without the hook or without "
                "release_gradients."
            ) from error
    return _buckets[parallel]


# ---- refusals


def _refuse(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise before anything changes if parameters cannot be updated inside the backward pass."""
    if not isinstance(optimizer, LeanOptimizer) or not optimizer._separable:
        separable = sorted(cls.__name__ for cls in LeanOptimizer.__subclasses__() if cls._separable)
        raise TypeError(
            f"release_gradients: {type(optimizer).__name__} cannot step parameters one by one; "
            f"expected one of {', '.join(separable)}"
        )
    refuse_gradient_readers(optimizer)
    if isinstance(model, DistributedDataParallel):
        _refuse_settings(model)
    if any(isinstance(module, DistributedDataParallel) for module in model.modules() if module is not model):
        raise ValueError(
            "release_gradients: a DistributedDataParallel wraps a part of the model and reduces gradients later than "
            "they would be used. Nothing was changed. Wrap the whole model, and give that to release_gradients."
        )
    of_model = {id(p) for p in model.parameters()}
    for group in optimizer.param_groups:
        if group["nonfinite"] == "raise":
            raise ValueError("release_gradients: nonfinite='raise' must see all gradients first; use 'skip' or 'pass'")
        for position, param in enumerate(group["params"]):
            if id(param) not in of_model:
                raise ValueError("release_gradients: the optimizer holds parameters that the model does not")
            if is_flattened(param):
                raise ValueError(
                    f"release_gradients: FSDP1 has flattened {describe(group, position)} and reduces its gradient "
                    "later than it would be used. Nothing was changed. Shard by FSDP2 "
                    "(torch.distributed.fsdp.fully_shard), or use step() alone."
                )
            if param.requires_grad:
                optimizer._check_placements(group, position, param)


def _refuse_settings(parallel: DistributedDataParallel) -> None:
    """Raise ValueError for settings under which DistributedDataParallel changes gradients after their bucket."""
    advice = {
        # whether all processes leave a parameter unused is known after the pass; buckets have zeros for it
        "find_unused_parameters": "Set it to False, and freeze parameters that have no gradients.",
        "static_graph": "Set it to False; checkpointing with use_reentrant=False does not need it.",
        "mixed_precision": "Take torch.autocast in its place.",
    }
    for name, change in advice.items():
        if getattr(parallel, name, None):
            raise ValueError(
                f"release_gradients: expected a DistributedDataParallel without {name}, under which gradients change "
                f"after their buckets are reduced. Nothing was changed. {change}"
            )


# --- sums inside a momentum, for rules that use the gradient through that momentum alone ------------------------------
#
# A step computes m = w * m + (1 - w) * g, with the weight w of the old momentum. Adding (1 - w) / w * g to m beforehand
# has the effect of adding g to the gradient of that step.


def refuse_accumulation(optimizer: LeanOptimizer) -> None:
    """Raise ValueError if a step needs the gradient of a parameter itself, or if a parameter is sharded."""
    for group in optimizer.param_groups:
        for position, param in enumerate(group["params"]):
            if param.requires_grad and not isinstance(reason := average_of(optimizer, group, param), GradientAverage):
                raise ValueError(
                    "release_gradients: accumulate() expected rules that use gradients through a momentum alone, but "
                    f"{type(optimizer).__name__}'s step of {describe(group, position)} {reason}. Nothing was changed. "
                    "Take accumulate(keep_others=True), which keeps such gradients until the last pass, or larger "
                    "batches."
                )


def keeping_gradients(optimizer: LeanOptimizer) -> list[Tensor]:
    """Return the parameters that keep their gradients until the last pass, under ``accumulate(keep_others=True)``."""
    return [
        param
        for group in optimizer.param_groups
        for param in group["params"]
        if param.requires_grad and not isinstance(average_of(optimizer, group, param), GradientAverage)
    ]


def average_of(optimizer: LeanOptimizer, group: dict[str, Any], param: Tensor) -> GradientAverage | str:
    """Return the average that takes a parameter's gradients, or why there is none, as the end of a sentence."""
    if hasattr(param, "device_mesh"):
        return "is that of a shard, whose processes accumulate by set_requires_gradient_sync(False)"
    return optimizer._gradient_average(group, param)


@torch.no_grad()
def add_to_average(optimizer: LeanOptimizer, group: dict[str, Any], position: int) -> bool:
    """Add the gradient of a parameter to its average and free it; return False if there is no such average.

    A gradient with non-finite entries is left out and counted, unless the group has nonfinite="pass".
    """
    param = group["params"][position]
    average = average_of(optimizer, group, param)
    if not isinstance(average, GradientAverage):
        return False
    if param.grad is not None:
        addend = local(dense_gradient(type(optimizer).__name__, group, position, param))
        buffer = local(optimizer._state_of(group, position, param)[average.key])
        if group["nonfinite"] == "skip":
            finite = torch.isfinite(addend).all()
            addend = torch.where(finite, addend, 0.0)
            count_nonfinite(group, (~finite).reshape(1))
        factor = (1.0 - average.weight) / average.weight
        buffer.add_(addend, alpha=-factor if group["maximize"] else factor)
    param.grad = None
    return True
