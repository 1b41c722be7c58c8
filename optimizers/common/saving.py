"""What optimizers save, and tell of their state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from leanstep.optimizers.common.groups import CheckedGroups, dims_of, name_dtypes
from leanstep.optimizers.common.rounding import full_precision, multiply
from leanstep.optimizers.common.saved_tensors import Pickled, is_fp8


class StateSaving(CheckedGroups):
    """The part of ``LeanOptimizer`` that saves and reads its state."""

    def __getstate__(self) -> dict[str, Any]:
        """Return torch's state for pickle and copies, with tensors in fp8 in a form that pickle can write."""
        packed = super().__getstate__()
        return {
            **packed,
            "state": _with_entries(packed["state"], lambda value: Pickled(value) if is_fp8(value) else value),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fill in settings that an older state does not have."""
        if "state" in state:  # of a shallow copy
            unpacked = _with_entries(
                state["state"], lambda value: value.tensor if isinstance(value, Pickled) else value
            )
            state = {**state, "state": unpacked}
        super().__setstate__(state)
        for group in self.param_groups:
            group.update({key: value for key, value in self._first_values().items() if key not in group})
            name_dtypes(group)
        self._dims = dims_of(self.param_groups)
        self._note_settings()

    def _first_values(self) -> dict[str, Any]:
        values = {"optimizer": self._method(), "nonfinite_count": 0, **self._group_entries, **self.defaults}
        values.pop("differentiable", None)  # torch adds it to the defaults on loading
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict, with ``nonfinite_count`` as an int (reads the device).

        ``torch.distributed.checkpoint`` cannot load a value that is an int before the first step and a tensor after.
        """
        packed = super().state_dict()
        for group in packed["param_groups"]:
            group["nonfinite_count"] = int(group.get("nonfinite_count", 0))
        return packed

    def nonfinite_count(self) -> int:
        """Return how many times a tensor's gradient had infinite or NaN entries, over all steps (reads the device).

        Only groups with ``nonfinite="skip"`` count. Steps that ``GradScaler`` skips do not count. Every process counts
        its shards. ``group["nonfinite_count"]`` is the count of a group; state dicts contain it.
        """
        return sum(int(group.get("nonfinite_count", 0)) for group in self.param_groups)

    def state_bytes(self) -> int:
        """Return the bytes of all state tensors, 0 before the first step. Counts sharded tensors in full."""
        return sum(
            value.numel() * value.element_size()
            for state in self.state.values()
            if isinstance(state, dict)  # hooks may add other values
            for value in state.values()
            if isinstance(value, Tensor)
        )

    @torch.no_grad()
    def full_precision_state_dict(self, model: torch.nn.Module | None = None) -> dict[str, Any]:
        """Return copies of the weights in fp32 (fp64 for fp64), with the bits that ``rounding`` keeps in the state.

        Args:
            model: names the weights. The result has the entries of ``model.state_dict()``, so that a model in fp32
                loads it: floating parameters in fp32, also those that this optimizer does not have, and everything
                else as it is. None: the names of named parameters (``param_groups(model)`` or
                ``model.named_parameters()``).

        Returns:
            Name -> weight. Weights of sharded parameters are DTensors with the same placements; communicates nothing.

        Raises:
            ValueError: without a model, a group has no names.

        Notes:
            Weights of fp16 and bf16 parameters have the fp32 bits of "master", 24 bits with "split", about 16 with
            "kahan", and the parameter's own bits otherwise, or before the first step. Takes 4 bytes per parameter.
        """
        settings = {p: (self.state.get(p, {}), g["rounding"]) for g in self.param_groups for p in g["params"]}
        if model is not None:
            tensors = dict(model.state_dict(keep_vars=True))
        elif all("param_names" in group for group in self.param_groups):
            tensors = {n: p for g in self.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}
        else:
            raise ValueError(
                f"{type(self).__name__}: expected named parameters, got groups without names. Call "
                "full_precision_state_dict(model), or build the optimizer from param_groups(model)."
            )
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):  # a module's extra state
                continue
            if tensor in settings or (isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point()):
                tensors[name] = full_precision(tensor, *settings.get(tensor, ({}, "nearest")))
            else:
                tensors[name] = tensor.detach().clone()
        return tensors

    @torch.no_grad()
    def multiply_parameter(self, param: Tensor, factor: Tensor) -> bool:
        """Multiply this process's shard of a parameter in place, together with its rounding state.

        A change from outside drops what the state of ``rounding="kahan"``, "master" or "split" adds to a weight.

        Args:
            param: the parameter.
            factor: broadcasts to the shard.

        Returns:
            Whether the optimizer has the parameter; otherwise nothing is changed.
        """
        for group in self.param_groups:
            if any(param is other for other in group["params"]):
                multiply(param, self.state.get(param, {}), group["rounding"], factor)
                return True
        return False


def _with_entries(states: Any, change: Callable[[Any], Any]) -> Any:
    """Return the states of parameters with changed entries; the same object where none changes."""
    changed = {}
    for param, entries in states.items():
        if isinstance(entries, dict):
            new = {key: change(value) for key, value in entries.items()}
            if any(new[key] is not entries[key] for key in new):
                changed[param] = new
    if not changed:
        return states
    result = copy.copy(states)
    result.update(changed)
    return result
