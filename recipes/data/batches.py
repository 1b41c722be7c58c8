"""The sequences of each micro batch: a pure function of seed and position.

The epochs, each in its own order, form one endless list of sequences. An optimizer step takes the next
``tokens_per_step / seq_len`` sequences, also across the end of an epoch, and distributes them round-robin: the first
micro batch of each process, then the second of each. So the number of windows read (one a step, and those that a
rollback left out) gives the position, and a step has the same sequences on any number of processes.
"""

from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Sampler

from leanstep.recipes.data.sequences import IGNORED, LoadedData, shuffled

Batch = dict[str, torch.Tensor]


class MicroBatches(Sampler[list[int]]):
    """Batch sampler over the endless list: ``count`` batches of ``batch_size`` indices from position ``start`` on.

    Accelerate distributes the batches over processes in turn. Memory: two permutations (8 bytes a sequence each).
    """

    drop_last = True

    def __init__(self, length: int, seed: int, batch_size: int, start: int, count: int) -> None:
        self.length, self.seed, self.batch_size, self.start, self.count = length, seed, batch_size, start, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        # an order is computed once an epoch, and a batch may span two epochs
        order = lru_cache(2)(partial(shuffled, self.length, self.seed))
        for number in range(self.count):
            first = self.start + number * self.batch_size
            positions = (divmod(position, self.length) for position in range(first, first + self.batch_size))
            yield [int(order(epoch)[index]) for epoch, index in positions]


class Windows:
    """The micro batches of one process, grouped into optimizer steps: the windows ``start`` to ``start + count - 1``.

    Iterating gives lists of ``accumulation`` batches on the accelerator's device. :meth:`state` is the position after
    the last window, for a checkpoint.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        data: LoadedData,
        *,
        seed: int,
        micro_batch_size: int,
        accumulation: int,
        start: int,
        count: int,
    ) -> None:
        self._data, self._device, self._accumulation = data, accelerator.device, accumulation
        self.sequences = micro_batch_size * accumulation * accelerator.num_processes
        self._count = count
        # a loader's iterator draws a seed, which must not come from the generator of dropout
        generator = torch.Generator().manual_seed(0)
        if data.stream:
            # not prepared: each process reads its own stream, and Accelerate's loader would read one batch ahead
            self._loader: Any = DataLoader(data.train, batch_size=micro_batch_size, drop_last=True, generator=generator)
        else:
            sampler = MicroBatches(
                len(data.train),
                seed,
                micro_batch_size,
                start=start * self.sequences,
                count=self._count * accumulation * accelerator.num_processes,
            )
            loader = DataLoader(data.train, batch_sampler=sampler, generator=generator)
            self._loader = accelerator.prepare(loader)

    def __iter__(self) -> Iterator[list[Batch]]:
        batches = iter(self._loader)
        for _ in range(self._count):
            window = islice(batches, self._accumulation)
            yield [{key: value.to(self._device) for key, value in batch.items()} for batch in window]

    def positions(self, window: int) -> list[int] | None:
        """First and last position of a window, counted from 0; None for a stream."""
        if self._data.stream:
            return None
        return [window * self.sequences, (window + 1) * self.sequences - 1]

    def state(self) -> dict[str, Any] | None:
        """State of the stream; None for map-style data, whose position follows from the step."""
        return self._data.train.state_dict() if self._data.stream else None


def count_targets(window: list[Batch]) -> torch.Tensor:
    """Number of targets in a window, int64 scalar: labels other than -100, without each sequence's first."""
    # position t predicts token t + 1, so the first label is never a target
    return torch.stack([(batch["labels"][:, 1:] != IGNORED).sum() for batch in window]).sum()
