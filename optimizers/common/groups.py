"""Parameter groups: what they may hold when they are added, and what sharding engines do to them afterwards."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from leanstep.optimizers.common.checks import (
    OTHER_NAMES,
    REMOVED,
    check_choice,
    check_flags,
    check_number,
    check_rounding,
    check_switches,
    describe,
    no_option,
    refuse_complex,
)

NONFINITE = ("skip", "raise", "pass")


class CheckedGroups(torch.optim.Optimizer):
    """The part of ``LeanOptimizer`` that adds parameter groups.

    Attributes:
        _group_entries: entries of every group that are not settings, with their first values.
        _dims: the number of dimensions of every parameter, by group, when the groups were added.
    """

    _group_entries: Mapping[str, Any] = {}
    _dims: list[list[int]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check the settings of a group and add it. The given dict is not changed.

        Raises:
            ValueError, TypeError: as the constructor; a parameter is complex, in another group already, or does not
                fit the group's settings. The group is not added.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        check_switches(f"{type(self).__name__}: the group was not added", param_group, self.defaults)
        if "params" not in param_group:
            raise ValueError(
                f"{type(self).__name__}: expected 'params' in a group, got only {', '.join(map(repr, param_group))}. "
                "The group was not added."
            )
        entries = {key for key, value in param_group.items() if value is not None or key not in self._group_entries}
        if unknown := (OTHER_NAMES.keys() | REMOVED.get(self._method(), {}).keys()) & entries:
            raise TypeError(f"{no_option(self._method(), unknown, self.defaults)}. The group was not added.")
        if param_group.get("algorithm") == "balanced" and "algorithm" not in self.defaults:
            raise ValueError(
                f"{type(self).__name__}: group {param_group.get('name', len(self.param_groups))!r} has "
                "algorithm='balanced', a rule of SinkGD. The group was not added. Give such groups to a SinkGD beside "
                "this optimizer (docs/optimizers.md shows how), or make them by param_groups(model) without "
                "embeddings='balanced'."
            )
        # set before the first step: torch.distributed.checkpoint reads the keys of a fresh optimizer
        group = {"nonfinite_count": 0, **self._group_entries, **param_group, "optimizer": self._method()}
        self._check_group({**self.defaults, **group})
        try:
            super().add_param_group(group)
        except ValueError as error:
            if "param groups should be with" in str(error):
                raise self._names_differ(group, error) from None
            group_names = {p: g.get("name", i) for i, g in enumerate(self.param_groups) for p in g["params"]}
            duplicate = next((i for i, p in enumerate(group["params"]) if p in group_names), None)
            if duplicate is None:
                raise
            other = group_names[group["params"][duplicate]]
            raise ValueError(
                f"{type(self).__name__}: {error}: {describe(group, duplicate)} is in group {other!r} already"
            ) from None
        name_dtypes(self.param_groups[-1])
        try:
            self._check_params(self.param_groups[-1], param_group)
        except Exception:
            self.param_groups.pop()
            raise
        self._dims = dims_of(self.param_groups)
        self._note_settings()

    def _names_differ(self, group: dict[str, Any], error: ValueError) -> ValueError:
        """Return the error for a group that has names of its parameters where the first has none, or the reverse."""
        wanted = bool(self.param_groups) and "param_names" in self.param_groups[0]
        form = "(name, parameter) pairs, as model.named_parameters() gives" if wanted else "parameters without names"
        return ValueError(
            f"{type(self).__name__}: {error}: expected {form} in group {group.get('name', len(self.param_groups))!r}, "
            "as in the first one. The group was not added."
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError or TypeError if a setting is out of range. Subclasses extend the check to their settings."""
        owner = type(self).__name__
        check_number(owner, "learning rate", group["lr"], 0.0)
        check_number(owner, "weight_decay value", group["weight_decay"], 0.0)
        check_choice(owner, "nonfinite", group["nonfinite"], NONFINITE)
        check_flags(owner, group, ("maximize",), ("foreach",))
        check_rounding(owner, group)

    def _check_running_group(self, group: dict[str, Any]) -> None:
        """Check a group in training, as :meth:`_check_group` but for its rate: schedulers may set one below 0."""
        self._check_group({**group, "lr": 0.0})

    def _check_params(self, group: dict[str, Any], given: dict[str, Any]) -> None:
        """Raise ValueError if a parameter does not fit its new group; ``given`` lacks the default settings."""
        for position in range(len(group["params"])):
            refuse_complex(type(self).__name__, group, position)
            if not self._takes_flattened(group):
                refuse_flattened(type(self).__name__, group, position)

    def _takes_flattened(self, group: dict[str, Any]) -> bool:
        """Whether the rule of a group is right for the elements of parameters in any shape, and for parts of them."""
        return True

    def _note_settings(self) -> None:
        """Note the settings of all groups: they are checked."""
        raise NotImplementedError

    @classmethod
    def _method(cls) -> str:
        """Return the name of the optimizer's rule."""
        raise NotImplementedError


def dims_of(groups: list[dict[str, Any]]) -> list[list[int]]:
    """Return the number of dimensions of every parameter, by group."""
    return [[param.dim() for param in group["params"]] for group in groups]


def name_dtypes(group: dict[str, Any]) -> None:
    """Replace the dtypes in a group's settings by their names; see :func:`dtype_of`."""
    for key, value in group.items():
        if isinstance(value, torch.dtype):
            group[key] = str(value).removeprefix("torch.")


# ---- sharding engines
#
# DTensors say how they are sharded. These engines do not: FSDP1 and ZeRO-2/3 flatten parameters, torch's ZeRO-1 gives
# each process some of them, and a stage of a pipeline has some of the layers.

_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"
_PIPELINING = "torch.distributed.pipelining.stage"


def is_flattened(param: Tensor) -> bool:
    """Whether FSDP1 has flattened a parameter: torch's mark, also on the views that use_orig_params=True shows."""
    return bool(getattr(param, "_fsdp_flattened", False))


def inside_zero() -> bool:
    """Whether torch's ZeroRedundancyOptimizer calls, on several processes. It leaves no other sign of itself."""
    if _ZERO not in sys.modules or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return False
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == _ZERO:
            return True
    return False


def in_pipeline(groups: list[dict[str, Any]]) -> bool:
    """Whether parameters belong to one of several stages of torch.distributed.pipelining. Looks at all objects."""
    module = sys.modules.get(_PIPELINING)
    if module is None:
        return False
    ids = {id(param) for group in groups for param in group["params"]}
    stages = [o for o in gc.get_objects() if issubclass(type(o), module._PipelineStageBase) and o.num_stages > 1]
    return any(id(param) in ids for stage in stages for param in stage.submod.parameters())


def refuse_flattened(owner: str, group: dict[str, Any], position: int) -> None:
    """Raise ValueError if FSDP1 has flattened a parameter."""
    if is_flattened(group["params"][position]):
        raise _flattened(owner, describe(group, position), "FSDP1 has flattened it")


def refuse_replaced(owner: str, group: dict[str, Any], position: int, dims: list[int]) -> None:
    """Raise ValueError if a group lost parameters since it was added, or the one here has other dimensions.

    DeepSpeed's ZeRO replaces the parameters of a group by one vector, after the optimizer was built.
    """
    count, now = len(group["params"]), group["params"][position].dim()
    if count < len(dims):
        change = f"its group had {len(dims)} parameters when the optimizer was built, and has {count} now"
    elif position < len(dims) and now != dims[position]:
        change = f"it had {dims[position]} dimensions when the optimizer was built, and has {now} now"
    else:
        return
    name = f"parameter {position} {tuple(group['params'][position].shape)} of group {group.get('name', '(unnamed)')!r}"
    raise _flattened(owner, name, change)


def _flattened(owner: str, name: str, change: str) -> ValueError:
    return ValueError(
        f"{owner}: expected {name} as the model has it, but {change}. A sharding engine that flattens parameters "
        "(FSDP1, DeepSpeed ZeRO) leaves no rows and columns, and a part of each gradient; nothing was changed. Shard "
        "by FSDP2 (torch.distributed.fsdp.fully_shard; Accelerate: fsdp_version=2) or take DDP."
    )


def partial_model(owner: str, setting: str, engine: str, advice: str) -> ValueError:
    """Return the error of a rule over all parameters where a process has only some of them."""
    return ValueError(
        f"{owner}: {setting} needs all parameters of the model, but {engine} gives this process some of them whole and "
        f"would make another step than one process. {advice}; FSDP2 and DDP take every setting."
    )
