"""Parameter groups: what they may hold when they are added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

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
from leanstep.optimizers.common.engines import refuse_flattened

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
