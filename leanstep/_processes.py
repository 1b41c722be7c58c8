"""Several processes that work on one model together: which work each does, and what they tell one another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from leanstep._memory import free_memory

T = TypeVar("T")

# one process may search or compute for long while the others wait; the end of a process closes its connections at once
_PATIENCE = timedelta(days=7)


class ProcessEndedError(RuntimeError):
    """Another process of the run has ended, so that this one cannot go on."""


class Processes:
    """The processes that work on one model together, each with the whole model and all data.

    All call the same functions in the same order. The first decides what depends on time, and writes files.

    Args:
        group: of torch.distributed, with the backend gloo; None: this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def from_environment(cls) -> Processes:
        """The processes that torchrun started; this process alone where it started none.

        Raises:
            ValueError: for processes on several machines.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        if local != size:
            raise ValueError(
                f"expected the processes of one machine, which share a disk, got {size} of which {local} are here"
            )
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_PATIENCE)
        return cls(dist.group.WORLD)

    @property
    def is_first(self) -> bool:
        """Whether this process decides and writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every ``size``-th item, from the ``rank``-th on."""
        return items[self.rank :: self.size]

    def portion(self, items: Sequence[T]) -> Sequence[T]:
        """A run of consecutive items, about as long in each process."""
        begin, end = (len(items) * number // self.size for number in (self.rank, self.rank + 1))
        return items[begin:end]

    def from_first(self, function: Callable[[], T]) -> T:
        """The value of a function that the first process alone calls. Its ValueError or OSError is raised in all."""
        if self.size == 1:
            return function()
        content: list[Any] = [None, None]
        if self.is_first:
            try:
                content[0] = function()
            except (ValueError, OSError) as error:
                content[1] = error
        with _connected():
            dist.broadcast_object_list(content, self._global(0), self.group)
        if content[1] is not None:
            raise content[1]
        return content[0]

    def free_memory(self, device: str | torch.device) -> int | None:
        """Free bytes of a device that this process may take: an equal part of the machine's, all of a GPU's."""
        free = free_memory(device)
        return free if free is None or torch.device(device).type != "cpu" else free // self.size

    def all_gather(self, value: T) -> list[T]:
        """The values of all processes, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _connected():
            dist.all_gather_object(values, value, self.group)
        return values

    def merged(self, values: Mapping[str, T]) -> dict[str, T]:
        """The entries of all processes."""
        return {name: value for part in self.all_gather(dict(values)) for name, value in part.items()}

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, with the same bits in each; may be the tensor itself."""
        if self.size == 1:
            return tensor
        total = tensor.cpu().contiguous()
        with _connected():
            dist.all_reduce(total, group=self.group)
        return total.to(tensor.device)

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """A tensor of the process ``source``; the others give one of its shape and dtype, which is overwritten."""
        if self.size == 1:
            return tensor
        content = tensor.cpu().contiguous()
        # as bytes: any dtype, and the same bits in each
        with _connected():
            dist.broadcast(content.view(-1).view(torch.uint8), self._global(source), self.group)
        return content.to(tensor.device)

    def _global(self, rank: int) -> int:
        assert self.group is not None
        return dist.get_global_rank(self.group, rank)


def is_first_to_fail() -> bool:
    """Whether no other process of the run has called this before. An error of several is printed once then."""
    if not (dist.is_available() and dist.is_initialized()):
        return int(os.environ.get("RANK", "0")) == 0
    try:
        return dist.distributed_c10d._get_default_store().add("leanstep.failed", 1) == 1
    except RuntimeError:  # the process that serves the store has ended, with an error of its own
        return False


@contextmanager
def _connected() -> Iterator[None]:
    """Context manager: gloo's errors about a lost connection become a :class:`ProcessEndedError`; others stay."""
    try:
        yield
    except RuntimeError as error:
        # gloo has no class of errors: those that its transport meets name its files
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise ProcessEndedError("another process of this run has ended, and this one cannot go on alone") from error
