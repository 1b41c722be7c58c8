"""Restore weights and modes after a model was changed: copies in memory, or values read again from files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from leanstep.pruning.score.targets import Target

Stored = Callable[[str], Tensor | None]


class WeightSnapshot:
    """The original parameters of some targets.

    Args:
        targets: matrices that will be changed.
        stored: returns a parameter's values on the CPU by its name, or None. Where they equal the model's, no copy is
            made. None: everything is copied.
    """

    def __init__(self, targets: Sequence[Target], stored: Stored | None = None) -> None:
        self._parameters = {target.parameter: getattr(target.module, target.attribute) for target in targets}
        self._stored = stored
        self._copies: dict[str, Tensor] | None = None
        self._changed = False

    @torch.no_grad()
    def take(self) -> None:
        """Copy what is not stored; to be called before the weights are changed."""
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
        """Restore all weights, bit for bit."""
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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager: eval mode without gradients; restores the modes of all modules on exit."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def restored_weights(targets: Sequence[Target]) -> Iterator[None]:
    """Context manager: restores these matrices on exit, bit for bit."""
    saved = [target.weight.clone() for target in targets]
    try:
        yield
    finally:
        for target, weight in zip(targets, saved, strict=True):
            target.weight.copy_(weight)


def weights_hash(model: nn.Module) -> str:
    """Hash of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
