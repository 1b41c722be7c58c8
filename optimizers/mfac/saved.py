"""Checks of M-FAC's saved states: the window, its Gram matrices and their settings."""

from __future__ import annotations

from typing import Any

import torch

from leanstep.optimizers.common.checks import describe
from leanstep.optimizers.common.loading import Loaded
from leanstep.optimizers.common.saved_tensors import SHAPED, StateRule
from leanstep.optimizers.mfac.compressed import SparseRows
from leanstep.optimizers.mfac.scopes import scope_key

# settings that determine the format of a saved window
STRUCTURAL = ("window", "scope", "storage", "compression", "density")

_WIDE = (torch.float32, torch.float64)

# A row of a finite gradient is finite, and so is what is computed from it. One other entry would stop all later steps.
ROWS = ("window", "window_values")
# early: the parameter that holds a scope's state may not have had a gradient
_OF_SCOPE = StateRule((), required=False, early=True, finite=True)
WINDOW_RULES = {
    "window_indices": StateRule((torch.uint8,)),
    "error": SHAPED._replace(dtypes=_WIDE, finite=True),
    "mask": SHAPED._replace(dtypes=(torch.bool,)),
}
SCOPE_RULES = {
    "gram": _OF_SCOPE,
    "counters": _OF_SCOPE._replace(dtypes=(torch.int64,), cast=True, whole=True, least=0, most=2**53, on_host=True),
    "stats": _OF_SCOPE._replace(finite=False),
    "window_scale": _OF_SCOPE,
}


def rules_of_rows(group: dict[str, Any]) -> dict[str, StateRule]:
    """Return what loading accepts as the rows of a window."""
    any_storage = group["storage"] is None and group["compression"] != "topk"
    return dict.fromkeys(ROWS, StateRule(_WIDE if any_storage else (), finite=True))


def check_loaded(groups: list[dict[str, Any]], loaded_groups: list[dict[str, Any]]) -> None:
    """Raise ValueError if a saved window has another size or format, or its parameters have other names."""
    advice = "nothing was changed. Build MFAC as it was when the state was saved, or start without it."
    for group, saved in zip(groups, loaded_groups, strict=True):
        for key in STRUCTURAL:
            if saved[key] != group[key]:
                raise ValueError(
                    f"MFAC: the state was saved with {key}={saved[key]!r}, here it is {group[key]!r}; {advice}"
                )
        names, saved_names = group.get("param_names"), saved.get("param_names")
        if names and saved_names and names != saved_names:
            pairs = zip(saved_names, names, strict=False)
            difference = next(
                (f"{a!r} where {b!r} is here" for a, b in pairs if a != b), f"{len(saved_names)} of {len(names)}"
            )
            raise ValueError(f"MFAC: the saved window has its parameters in another order ({difference}); {advice}")


def check_loaded_states(groups: list[dict[str, Any]], entries: list[Loaded]) -> None:
    """Raise ValueError for missing masks, indices outside of their rows, and scopes without one Gram matrix."""
    states = {(e.group_index, e.position): e.state for e in entries}
    scopes: dict[Any, list[tuple[str, dict[str, Any], dict[str, Any]]]] = {}
    index = 0
    for group_index, group in enumerate(groups):
        for position, param in enumerate(group["params"]):
            name, state = describe(group, position), states.get((group_index, position), {})
            if (
                group["sparse"]
                and "mask" not in state
                and not (group["masks"] and group["masks"][position] is not None)
            ):
                raise _error(f"the saved state of {name} has no mask, which sparse=True needs")
            if "window_indices" in state:
                SparseRows.check_indices(name, state, group)
            if state and param.numel():
                scopes.setdefault(scope_key(group, group_index, position, index), []).append((name, group, state))
            index += 1
    for members in scopes.values():
        _check_scope(members)


def _check_scope(members: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> None:
    """Raise ValueError unless exactly one of the parameters that share a window holds the scope's state."""
    holders = [(name, group, state) for name, group, state in members if SCOPE_RULES.keys() & state.keys()]
    if len(holders) != 1:
        names = ", ".join(name for name, *_ in holders[:3]) or "none"
        hint = " (scope='layer' needs a state that was saved with names)" if members[0][1]["scope"] == "layer" else ""
        raise _error(f"expected one Gram matrix for the window of {members[0][0]}, got {len(holders)} ({names}){hint}")
    ((name, group, state),) = holders
    needed = {key for key in SCOPE_RULES if key != "window_scale" or group["storage"] == "fp16"}
    if missing := needed - state.keys():
        raise _error(f"the saved state of {name} has no {', '.join(sorted(missing))}")


def _error(text: str) -> ValueError:
    return ValueError(
        f"MFAC: {text}; nothing was changed. Load a state that this optimizer saved, or start without it."
    )
