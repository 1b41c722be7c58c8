"""What matrices were before they are pruned, to be put back: in memory, or read again from where it is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from leanstep.pruning.score.targets import Target

__all__ = ["Originals", "Stored"]

Stored = Callable[[str], Tensor | None]


class Originals:
    """The parameters of some targets as they are before anything is written to them.

    Args:
        targets: matrices that will be pruned.
        stored: gives a parameter's values by its name, on the CPU, or None where it has none. What it gives is compared
            with the model, and where it is the same, no copy is made. None: everything is copied.
    """

    def __init__(self, targets: Sequence[Target], stored: Stored | None = None) -> None:
        self._parameters = {target.parameter: getattr(target.module, target.attribute) for target in targets}
        self._stored = stored
        self._copies: dict[str, Tensor] | None = None
        self._changed = False

    @torch.no_grad()
    def before_changes(self) -> None:
        """Make sure that all can be put back; to be called while the weights are the original ones."""
        if self._copies is None:
            self._copies = {
                name: parameter.detach().clone()
                for name, parameter in self._parameters.items()
                if not self._is_stored(name, parameter)
            }
        self._changed = True

    def _is_stored(self, name: str, parameter: Tensor) -> bool:
        value = None if self._stored is None else self._stored(name)
        if value is None or value.dtype != parameter.dtype or value.shape != parameter.shape:
            return False
        return torch.equal(value.to(parameter.device), parameter)

    @torch.no_grad()
    def restore(self) -> None:
        """Put back everything, bit for bit."""
        if not self._changed or self._copies is None:
            return
        for name, parameter in self._parameters.items():
            value = self._copies.get(name)
            if value is None:
                assert self._stored is not None
                value = self._stored(name)
            assert value is not None
            parameter.copy_(value)
        self._changed = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever is written into the matrices inside, they are afterwards what they were."""
        self.before_changes()
        try:
            yield
        finally:
            self.restore()

    @contextmanager
    def kept_on_error(self) -> Iterator[None]:
        """The same, if an error is raised inside."""
        try:
            yield
        except BaseException:
            self.restore()
            raise
