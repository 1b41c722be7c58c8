"""The original weights of matrices that are changed, to restore them bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from leanstep._checkpoint.mapped import touched
from leanstep.pruning.score.targets import Target, as_matrix

Stored = Callable[[str], Tensor | None]


class WeightSnapshot:
    """The original parameters of some targets.

    Args:
        targets: matrices that will be changed.
        stored: function from a parameter's name to its stored values on the CPU, or to None. Parameters equal to their
            stored values are not copied. Without a function, all are.
    """

    def __init__(self, targets: Sequence[Target], stored: Stored | None = None) -> None:
        self._parameters = {target.parameter: getattr(target.module, target.attribute) for target in targets}
        self._stored = stored
        self._copies: dict[str, Tensor] | None = None
        self._changed = False

    @torch.no_grad()
    def take(self) -> None:
        """Copy the parameters that are not stored. Call it before changing weights."""
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
        return torch.equal(value.to(parameter.device), touched(parameter))

    @torch.no_grad()
    def restore(self) -> None:
        """Restore all weights, bit for bit."""
        if not self._changed or self._copies is None:
            return
        for name, parameter in self._parameters.items():
            touched(parameter).copy_(self._original(name))
        self._changed = False

    def matrix(self, target: Target) -> Tensor:
        """The original weight [out, in] of a target, to be read. Call :meth:`take` before."""
        value = self._original(target.parameter)
        return as_matrix(value if target.expert is None else value[target.expert], target.layout)

    def _original(self, name: str) -> Tensor:
        assert self._copies is not None
        value = self._copies.get(name)
        if value is None and self._stored is not None:
            value = self._stored(name)
        assert value is not None
        return value

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Context manager: restores all weights on exit, bit for bit."""
        self.take()
        try:
            yield
        finally:
            self.restore()

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Context manager: restores all weights if an error is raised inside."""
        try:
            yield
        except BaseException:
            self.restore()
            raise
