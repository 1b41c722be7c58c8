"""Pruners and gradients of all matrices of a model, with only those of one at a time in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from leanstep._checkpoint.mapped import FileTensor, Scratch
from leanstep.pruning.score.base import LayerPruner, LayerStatistics
from leanstep.pruning.score.calibration import Pruners, Pruning
from leanstep.pruning.score.targets import Group, Target, WeightSnapshot


class PrunersInFiles(Mapping[str, LayerPruner]):
    """The pruners of all matrices by name. Files hold their statistics; each is made anew where it is used.

    The pruner that was made last stays in memory. It is the one that :class:`Pruners` would have, bit for bit.

    Args:
        pruning: makes the pruners.
        snapshot: of the dense weights.
        scratch: where the files are.
    """

    def __init__(self, pruning: Pruning, snapshot: WeightSnapshot, scratch: Scratch) -> None:
        self._pruning, self._snapshot, self._scratch = pruning, snapshot, scratch
        self._targets: dict[str, Target] = {}
        self._statistics: dict[str, Any] = {}
        self._last: tuple[str, LayerPruner] | None = None

    def add(self, group: Group, pruners: Pruners) -> None:
        """Store the statistics of a group's matrices."""
        for target in group.targets:
            self._targets[target.name] = target
            self._statistics[target.name] = self._scratch.store(vars(pruners.statistics_of(target)))

    def __getitem__(self, name: str) -> LayerPruner:
        if self._last is None or self._last[0] != name:
            target = self._targets[name]
            self._last = None  # not two at the same time
            statistics = LayerStatistics(**Scratch.open(self._statistics[name]))
            self._last = name, self._pruning.pruner(target, statistics, self._snapshot.matrix(target))
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)

    def release(self, group: Group) -> None:
        """Free the statistics of a group, and its pruners."""
        self._last = None
        for target in group.targets:
            self._targets.pop(target.name, None)
            self._statistics.pop(target.name, None)


class GradientSums(Mapping[str, Tensor]):
    """Sums of gradients of the parameters of some matrices; as a mapping, fp32 [out, in] of each matrix by name.

    Args:
        device: of the gradients.
        scratch: where the sums are; None: in memory.
    """

    def __init__(self, targets: Sequence[Target], device: torch.device, scratch: Scratch | None = None) -> None:
        self._targets = {target.name: target for target in targets}
        self._device, self._scratch = device, scratch
        # by parameter, in the dtype of the gradients
        self._sums: dict[str, Tensor | FileTensor] = {}

    def add(self, parameter: str, gradient: Tensor) -> None:
        """Add a gradient of a parameter."""
        before = self._sums.get(parameter)
        if before is None:
            self._sums[parameter] = gradient if self._scratch is None else self._scratch.store(gradient)
        elif isinstance(before, FileTensor):
            before.add(gradient)
        else:
            before.add_(gradient)

    @property
    def is_finite(self) -> bool:
        """Whether all sums are."""
        return all(bool(Scratch.open(one).isfinite().all()) for one in self._sums.values())

    def __getitem__(self, name: str) -> Tensor:
        target = self._targets[name]
        total = self._sums.get(target.parameter)
        if total is None:  # the output does not depend on it
            return torch.zeros_like(target.weight, dtype=torch.float32, device=self._device)
        return target.matrix_in(Scratch.open(total).detach()).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)

    def first_order(self, changes: Iterable[tuple[Target, Tensor]]) -> float:
        """First-order change of what was differentiated if matrices get other weights: <gradient, change of W>."""
        return sum(
            float((self[target.name] * (weight.float() - target.weight.to(weight.device).float())).sum())
            for target, weight in changes
        )


@contextmanager
def gradients_to(receive: Callable[[str, Tensor], None], parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Context manager: a backward pass gives each gradient to ``receive(name, gradient)`` and stores none of them.

    ``parameters`` are leaves that require gradients. What their ``.grad`` was, it is again afterwards.
    """
    stored = {name: parameter.grad for name, parameter in parameters.items()}

    def hook(name: str) -> Callable[[Tensor], None]:
        def pass_on(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            receive(name, gradient)

        return pass_on

    handles = []
    try:
        for name, parameter in parameters.items():
            parameter.grad = None
            handles.append(parameter.register_post_accumulate_grad_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in parameters.items():
            parameter.grad = stored[name]
