"""The file of a recovery, from which an interrupted one goes on."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanstep._checkpoint.files import load_pickled
from leanstep._files import one_line, replacing
from leanstep.pruning.measure.curve_file import check_identity

# seconds between two states; more where saving one takes more than a twentieth of them
_SECONDS = 60.0
_SHARE = 20


class RecoveryFile:
    """Trained weights, state of the optimizer and losses of a recovery, replaced as it goes on.

    Args:
        path: the file; None stores nothing.
        identity: everything that the recovery depends on.

    Raises:
        ValueError: for a file of another recovery (the message lists the differences) or another format.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = path, dict(identity)
        # why an interrupted run will begin again; "" if it will not
        self.note = ""
        self._content: dict[str, Any] | None = None
        self._next = time.monotonic() + _SECONDS
        if path is not None and os.path.lexists(path):
            try:
                self._content = _checked(load_pickled(path))
            except (ValueError, OSError) as error:
                raise ValueError(
                    f"{path} holds no state of a recovery ({one_line(error)}); remove it to begin again"
                ) from None
            check_identity(path, self._content["identity"], self.identity)

    @torch.no_grad()
    def restore(self, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> list[float]:
        """Set weights and optimizer to the stored state; returns the losses of the steps that it has taken."""
        if self._content is None:
            return []
        content, self._content = self._content, None
        stored = content["weights"]
        if {name: (w.shape, w.dtype) for name, w in stored.items()} != {
            n: (p.shape, p.dtype) for n, p in trained.items()
        }:
            raise ValueError(f"{self.path} holds the state of another model; remove it to begin again")
        try:
            optimizer.load_state_dict(content["optimizer"])
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{self.path} holds no state of this optimizer ({one_line(error)}); remove it") from None
        for name, parameter in trained.items():
            parameter.copy_(stored[name])
        return list(content["losses"])

    def save(self, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
        """Replace the file if the last state is old enough. A disk without room ends that, with a note."""
        begin = time.monotonic()
        if self.path is None or begin < self._next:
            return
        # copies: a view of a mapped file would be stored with the whole file
        weights = {name: parameter.detach().cpu().clone() for name, parameter in trained.items()}
        content = {"identity": self.identity, "weights": weights, "optimizer": optimizer.state_dict()}
        try:
            with replacing(self.path) as partial:
                torch.save(content | {"losses": losses}, partial)
        except (OSError, RuntimeError) as error:  # torch's own where the disk is full
            self.note = (
                f"the state of recovery could not be saved, and an interrupted run begins again: {one_line(error)}"
            )
            self.path = None
        end = time.monotonic()
        self._next = end + max(_SECONDS, _SHARE * (end - begin))


def stored_distill(path: Path) -> bool | None:
    """Whether an interrupted recovery learns the dense model's outputs; None without a file, or if it does not say."""
    if not os.path.lexists(path):
        return None
    with suppress(ValueError, OSError):  # which RecoveryFile refuses
        settings = _checked(load_pickled(path))["identity"].get("settings")
        if isinstance(settings, dict) and isinstance(settings.get("distill"), bool):
            return bool(settings["distill"])
    return None


def _checked(content: Any) -> dict[str, Any]:
    """The content of a file; raises ValueError if it is none of a recovery."""
    types = {"identity": dict, "weights": dict, "optimizer": dict, "losses": list}
    if not isinstance(content, dict) or any(not isinstance(content.get(name), kind) for name, kind in types.items()):
        raise ValueError("expected identity, weights, optimizer and losses")
    if not all(isinstance(name, str) and isinstance(weight, Tensor) for name, weight in content["weights"].items()):
        raise ValueError("expected weights by name")
    if not all(type(loss) is float and math.isfinite(loss) for loss in content["losses"]):
        raise ValueError("expected finite losses")
    return content
