"""Run a model on a device that does not hold it: its weights stay in the host's memory or files, and a block's are
copied to the device while it runs.

The copy of the next block runs on a second stream while this one computes. On the CPU, the same code copies from memory
to memory, which serves tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from leanstep._checkpoint.mapped import listen, note_use, unlisten
from leanstep._files import one_line
from leanstep._torch import COMPUTES_ON

# each weight of a block begins at a multiple of this, as in memory of its own
_ALIGNMENT = 256


def candidate_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a model may be cut into: blocks, embeddings, the head. None contains another one.

    Descends into lists (``nn.ModuleList``, ``nn.Sequential``), and into a module with most of its parent's weights, as
    ``model.model``.
    """
    return _expand(model, "", inside_list=False)


def _expand(module: nn.Module, prefix: str, *, inside_list: bool) -> Iterator[tuple[str, nn.Module]]:
    whole = sum(parameter.numel() for parameter in module.parameters())
    for child_name, child in module.named_children():
        name = f"{prefix}{child_name}"
        size = sum(parameter.numel() for parameter in child.parameters())
        if size == 0:
            continue
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            yield from _expand(child, f"{name}.", inside_list=True)
        elif not inside_list and 2 * size > whole and any(True for _ in child.children()):
            yield from _expand(child, f"{name}.", inside_list=False)
        else:
            yield name, child


@dataclass(eq=False)
class _Block:
    """A block's parameters, and where each begins in a slot, in bytes."""

    module: nn.Module
    parameters: list[nn.Parameter]
    offsets: list[int]
    nbytes: int

    @classmethod
    def of(cls, module: nn.Module) -> _Block:
        parameters, offsets, end = list(module.parameters()), [], 0
        for parameter in parameters:
            offsets.append(end)
            end += -(-parameter.nbytes // _ALIGNMENT) * _ALIGNMENT
        return cls(module, parameters, offsets, end)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The parameters' places in a buffer of bytes, with their shapes and strides."""
        views = []
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            entries = buffer[offset : offset + parameter.nbytes].view(parameter.dtype)
            stride = torch.empty_like(parameter.data, device="meta").stride()
            views.append(entries.as_strided(parameter.shape, stride))
        return views


class _Slot:
    """Room for one block on the device, and pinned memory of the same size on the way there.

    Attributes:
        block: the one whose weights are here; None: none.
    """

    def __init__(self, nbytes: int, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self.block: _Block | None = None
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._stream = stream
        self._staging = self.buffer
        if device.type != "cpu":
            self._staging = torch.empty(nbytes, dtype=torch.uint8, pin_memory=stream is not None)
        # the end of the last copy, and of the last computation that read it: None if that is not known
        self._copied = None if stream is None else torch.cuda.Event()
        self._read: torch.cuda.Event | None = None

    def fill(self, block: _Block) -> None:
        """Begin to copy a block's weights."""
        if self._copied is not None:
            self._copied.synchronize()  # the staging memory may still be read
        for parameter, view in zip(block.parameters, block.views(self._staging), strict=True):
            view.copy_(note_use(parameter).data)
        self.block = block
        if self._staging is self.buffer:
            return
        if self._stream is None or self._copied is None:
            self.buffer[: block.nbytes].copy_(self._staging[: block.nbytes])
            return
        if self._read is None:
            self._stream.wait_stream(torch.cuda.current_stream(self.buffer.device))
        else:
            self._stream.wait_event(self._read)
        with torch.cuda.stream(self._stream):
            self.buffer[: block.nbytes].copy_(self._staging[: block.nbytes], non_blocking=True)
            self._copied.record(self._stream)

    def wait(self) -> None:
        """Let the computation wait for the copy."""
        self._read = None
        if self._copied is not None:
            torch.cuda.current_stream(self.buffer.device).wait_event(self._copied)

    def mark_read(self) -> None:
        """Note that all work that reads the block has been enqueued."""
        if self._stream is not None:
            self._read = torch.cuda.Event()
            self._read.record(torch.cuda.current_stream(self.buffer.device))


@dataclass(frozen=True)
class _SavedWeight:
    """A weight that autograd saved for the backward pass, by its place in the slot of its block."""

    block: _Block
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class BlockMover:
    """Context manager: a model in host memory computes on a device, with the weights of at most two blocks there.

    Blocks are those of :func:`candidate_blocks`. While a block's ``forward`` runs, its parameters are copies on the
    device; at any other time they are on the host, where they may be read and written after
    :func:`leanstep._checkpoint.mapped.touched`, which drops the copy. Buffers, and parameters outside of all blocks,
    are on the device. A backward pass copies the weights that it needs again.

    Args:
        model: on the CPU.
        device: on which it computes.

    Notes:
        Memory: twice the largest block on the device, and as much of pinned memory on the host. Every pass over more
        than two blocks copies all of them.
    """

    def __init__(self, model: nn.Module, device: str | torch.device) -> None:
        self.model, self.device = model, torch.device(device)
        self._blocks = [_Block.of(module) for _, module in candidate_blocks(model)]
        self._slots: list[_Slot] = []
        # the block that ran after a block the last time, to be copied ahead
        self._next: dict[_Block, _Block] = {}
        self._last: _Block | None = None
        # of the block that runs, and of those that it was called from
        self._running: list[_Slot] = []
        self._is_whole = False

    def __enter__(self) -> BlockMover:
        inside = {id(parameter) for block in self._blocks for parameter in block.parameters}
        for parameter in self.model.parameters():
            if id(parameter) not in inside:
                parameter.data = note_use(parameter).data.to(self.device)
        self._move_buffers(self.device)
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        largest = max((block.nbytes for block in self._blocks), default=0)
        self._slots = [_Slot(largest, self.device, stream) for _ in range(min(2, len(self._blocks)))]
        for block in self._blocks:
            block.module.forward = partial(self._run, block, block.module.forward)
            for parameter in block.parameters:
                listen(parameter, self._drop)
        _MOVERS[self.model] = self
        COMPUTES_ON[self.model] = self.device
        return self

    def __exit__(self, *error: object) -> None:
        _MOVERS.pop(self.model, None)
        COMPUTES_ON.pop(self.model, None)
        for block in self._blocks:
            forward = block.module.forward
            assert isinstance(forward, partial)
            original = forward.args[1]
            if getattr(original, "__self__", None) is block.module and original.__name__ == "forward":
                del block.module.forward
            else:
                block.module.forward = original
            for parameter in block.parameters:
                unlisten(parameter)
        self._slots.clear()
        for parameter in self.model.parameters():
            parameter.data = parameter.data.cpu()
        self._move_buffers(torch.device("cpu"))

    @property
    def resident(self) -> list[nn.Module]:
        """The blocks whose weights are on the device."""
        return [slot.block.module for slot in self._slots if slot.block is not None]

    @property
    def is_whole(self) -> bool:
        """Whether all weights are on the device."""
        return self._is_whole

    def hold(self) -> None:
        """Keep all weights on the device from now on."""
        self._is_whole = True
        for parameter in {id(p): p for block in self._blocks for p in block.parameters}.values():
            parameter.data = note_use(parameter).data.to(self.device, copy=True)
        for slot in self._slots:
            slot.block = None

    @torch.no_grad()
    def try_on(self, sample: Any) -> str:
        """Run a :class:`Batch`; if that fails, :meth:`hold` the weights, and return a note why."""
        try:
            sample.run(self.model)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of any type: the model reads a weight while its block does not run
            self.hold()
            return f"the device {self.device} held the whole model, whose blocks do not run alone: {one_line(error)}"
        return ""

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Context manager: all weights are on the device; what is written to them inside is lost."""
        if self._is_whole:
            yield
            return
        parameters = {id(p): p for block in self._blocks for p in block.parameters}.values()
        hosts = [parameter.data for parameter in parameters]
        try:
            self.hold()
            yield
        finally:
            self._is_whole = False
            for parameter, host in zip(parameters, hosts, strict=True):
                parameter.data = host

    def _run(self, block: _Block, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if self._is_whole:
            return forward(*args, **kwargs)
        if self._last is not None:
            self._next[self._last] = block
        self._last = block
        slot = self._loaded(block)
        slot.wait()
        hosts = [parameter.data for parameter in block.parameters]
        self._running.append(slot)
        try:
            for parameter, view in zip(block.parameters, block.views(slot.buffer), strict=True):
                parameter.data = view
            if torch.is_grad_enabled():
                # autograd would hold the device's copies of all blocks, or read the host's in their place
                with saved_tensors_hooks(partial(self._pack, slot), self._unpack):
                    return _outside(slot, forward(*args, **kwargs))
            return _outside(slot, forward(*args, **kwargs))
        finally:
            for parameter, host in zip(block.parameters, hosts, strict=True):
                parameter.data = host
            self._running.pop()
            slot.mark_read()
            if not self._running and (ahead := self._next.get(block)) is not None:
                self._loaded(ahead)

    def _loaded(self, block: _Block) -> _Slot:
        """The slot of a block, which is filled if the block is not on the device; the other one was used last."""
        slot = next((slot for slot in self._slots if slot.block is block), None)
        if slot is None:
            slot = next((slot for slot in self._slots if slot not in self._running), None)
            if slot is None:
                raise RuntimeError(
                    f"{len(self._slots) + 1} blocks of {type(self.model).__name__} run inside each other"
                )
            slot.block = None
            slot.fill(block)
        if len(self._slots) > 1 and slot is self._slots[0]:
            self._slots.reverse()
        return slot

    def _drop(self, parameter: Tensor) -> None:
        """Forget the copies of a parameter that may be about to change."""
        for slot in self._slots:
            is_there = slot.block is not None and any(parameter is one for one in slot.block.parameters)
            if is_there and slot not in self._running:
                slot.block = None

    def _pack(self, slot: _Slot, tensor: Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() != slot.buffer.untyped_storage().data_ptr():
            return tensor
        assert slot.block is not None
        return _SavedWeight(slot.block, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: Any) -> Tensor:
        if not isinstance(saved, _SavedWeight):
            assert isinstance(saved, Tensor)
            return saved
        slot = self._loaded(saved.block)
        slot.wait()
        empty = torch.empty(0, dtype=saved.dtype, device=self.device)
        return empty.set_(slot.buffer.untyped_storage(), saved.offset, saved.shape, saved.stride)

    def _move_buffers(self, device: torch.device) -> None:
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)


def _outside(slot: _Slot, output: Any) -> Any:
    """An output without views of the slot, which the next block overwrites."""
    address = slot.buffer.untyped_storage().data_ptr()
    is_inside = lambda leaf: isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() == address  # noqa: E731
    return tree_map(lambda leaf: leaf.clone() if is_inside(leaf) else leaf, output)


# of models that are inside their context
_MOVERS: WeakKeyDictionary[nn.Module, BlockMover] = WeakKeyDictionary()


@contextmanager
def whole_on_device(model: nn.Module) -> Iterator[None]:
    """Context manager: all weights of a model are where it computes, as gradients by them need."""
    if model not in _MOVERS:
        yield
        return
    with _MOVERS[model].whole():
        yield


@contextmanager
def recomputed_blocks(model: nn.Module, again: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Context manager: autograd stores the inputs of a block, and a backward pass computes its activations again.

    Blocks are those of :func:`candidate_blocks` with children. The context that ``again`` makes is around a block while
    it is computed again. Blocks that a :class:`BlockMover` moves are not computed again, unless it holds them all:
    autograd stores their activations on the device.

    Raises:
        RuntimeError: in the pass, for a block that writes into its inputs; what it computed from them is lost.
    """

    def run(forward: Any, *args: Any, **kwargs: Any) -> Any:
        contexts = lambda: (nullcontext(), _Reusable(again))  # noqa: E731
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [tensor._version for tensor in inputs]
        # keywords of the block, which may have names of the function's own
        output = checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, context_fn=contexts)
        if versions != [tensor._version for tensor in inputs]:
            raise RuntimeError("a block writes into its inputs and cannot be computed again")
        return output

    moves = model in _MOVERS and not _MOVERS[model].is_whole
    with ExitStack() as stack:
        for _, block in () if moves else candidate_blocks(model):
            if any(True for _ in block.children()):
                stack.callback(set_forward, block, block.__dict__.get("forward"))
                block.forward = partial(run, block.forward)
        yield


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is a lack of memory, of the host's too, for which torch has no class."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class _Reusable:
    """A context manager for several passes of one graph: enters a new one of ``make`` each time."""

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make, self._entered = make, list[AbstractContextManager[Any]]()

    def __enter__(self) -> None:
        self._entered.append(self._make())
        self._entered[-1].__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.pop().__exit__(*error)


def set_forward(module: nn.Module, forward: Any) -> None:
    """Set the ``forward`` of a module; None: that of its class."""
    if forward is None:
        del module.forward
    else:
        module.forward = forward
