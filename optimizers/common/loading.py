"""Checks and upgrades of a state dict before loading, and restoration of its dtypes after torch has cast them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leanstep.optimizers.common.checks import describe

if TYPE_CHECKING:
    from leanstep.optimizers.common.base import LeanOptimizer

# settings that do not identify an optimizer: those of torch's optimizers, and those that all of leanstep's have
_COMMON_SETTINGS = frozenset(
    (*inspect.signature(torch.optim.AdamW).parameters, *inspect.signature(torch.optim.SGD).parameters)
    + ("nonfinite", "rounding", "seed", "momentum_dtype")
)


def refuse_foreign(optimizer: LeanOptimizer, state_dict: dict[str, Any]) -> None:
    """Raise ValueError if another optimizer saved the state.

    The group's "optimizer" entry tells; without one, the state is refused if it lacks most of this optimizer's
    settings.
    """
    distinctive = optimizer.defaults.keys() - _COMMON_SETTINGS
    for group in state_dict["param_groups"]:
        other = group.get("optimizer")
        if other is None and 2 * len(distinctive & group.keys()) < len(distinctive):
            missing = ", ".join(sorted(distinctive - group.keys()))
            other = f"another optimizer (its groups have no {missing})"
        if other not in (None, optimizer._method()):
            raise ValueError(
                f"{type(optimizer).__name__}: the state was saved by {other}, and {optimizer._method()} cannot "
                "continue from it; nothing was changed. Load it into the optimizer that saved it, or start without it."
            )


def upgraded(optimizer: LeanOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state with the names and settings of this version. The given one is not changed.

    Raises:
        ValueError: the state was saved with a setting that no longer exists.
    """
    names, settings = optimizer._older_names, optimizer._older_settings
    for group in state_dict["param_groups"]:
        for name, values in settings.items():
            if group.get(name) not in (None, *values):
                raise ValueError(
                    f"{type(optimizer).__name__}: the state was saved with {name}={group[name]!r}, which no longer "
                    "exists; nothing was changed. Continue with the version that saved it, or start without the state."
                )

    def renamed(entries: Any) -> Any:  # hooks may add values that are no dict
        return {names.get(k, k): v for k, v in entries.items()} if names and isinstance(entries, dict) else entries

    gone = settings.keys() - optimizer.defaults.keys()
    groups = [{k: v for k, v in renamed(group).items() if k not in gone} for group in state_dict["param_groups"]]
    states = {param_id: renamed(state) for param_id, state in state_dict["state"].items()}
    return {**state_dict, "state": states, "param_groups": groups}


def refuse_misfits(optimizer: LeanOptimizer, state_dict: dict[str, Any]) -> None:
    """Raise ValueError if parameter names, or shapes of state tensors, show that the parameters' order differs."""
    names, saved_names = (
        [name for group in groups for name in group.get("param_names") or ()]
        for groups in (optimizer.param_groups, state_dict["param_groups"])
    )
    # different sets of names are accepted, as torch does: the model was renamed
    if names != saved_names and sorted(names) == sorted(saved_names):
        here, there = next(pair for pair in zip(names, saved_names, strict=True) if pair[0] != pair[1])
        raise ValueError(
            f"{type(optimizer).__name__}: the saved state has its parameters in another order ({there!r} where "
            f"{here!r} is here); nothing was changed. Build the optimizer with its parameters in the saved order."
        )
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        for position, (param, key) in enumerate(zip(group["params"], saved["params"], strict=False)):
            state = state_dict["state"].get(key, {})
            for name, shape in optimizer._state_shapes({**group, **saved}, param).items():
                if isinstance(state.get(name), Tensor) and tuple(state[name].shape) != shape:
                    named = saved.get("param_names")
                    whose = named[position] if named else f"parameter {position} of its group"
                    raise ValueError(
                        f"{type(optimizer).__name__}: {describe(group, position)} cannot take the state of {whose}, "
                        f"whose {name} has shape {tuple(state[name].shape)}; nothing was changed. Build the optimizer "
                        "with its parameters in the order of the saved state."
                    )


def restore_dtypes(optimizer: LeanOptimizer, loaded: dict[str, Any]) -> None:
    """Replace state tensors that torch has cast by the saved ones, on the parameter's device."""
    saved_ids = [i for group in loaded["param_groups"] for i in group["params"]]
    params = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    for saved_id, (group, param) in zip(saved_ids, params, strict=True):
        for key, saved in loaded["state"].get(saved_id, {}).items():
            current = optimizer.state[param].get(key)
            if not isinstance(saved, Tensor) or not isinstance(current, Tensor):
                continue
            device = current.device if key == "step" else param.device
            device = torch.device("cpu") if key in optimizer._host_state else device
            dtype = saved.dtype if optimizer._keeps_dtype(group, param, key) else current.dtype
            if current.dtype != dtype or current.device != device:
                optimizer.state[param][key] = saved.detach().clone().to(device, dtype)
