"""Checks of M-FAC's saved states: the window, its Gram matrices and their settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanstep._torch import is_dtensor, join_parts, local_part
from leanstep.optimizers.common.checks import describe
from leanstep.optimizers.common.loading import Loaded
from leanstep.optimizers.mfac.compressed import SparseRows
from leanstep.optimizers.mfac.scopes import scope_key
from leanstep.optimizers.mfac.state import SCOPE_KEYS, storage_dtype
from leanstep.optimizers.mfac.window import columns_of

# settings that determine the format of a saved window
STRUCTURAL = ("window", "scope", "storage", "compression", "density")

# of rows in fp16, which earlier versions had
_SCALE = "window_scale"


def in_wide_storage(states: dict[Any, Any], groups: list[dict[str, Any]]) -> None:
    """Set ``storage="fp16"`` of saved groups to None. :func:`check_loaded_states` converts the rows.

    Raises:
        ValueError: a scale of the rows is missing.
    """
    fp16 = [group for group in groups if isinstance(group.get("storage"), str) and group["storage"] == "fp16"]
    for group in fp16:
        group["storage"] = None
    if fp16 and any(isinstance(state, dict) and "gram" in state and _SCALE not in state for state in states.values()):
        raise _error(
            "rows in fp16 need their window_scale, which torch.distributed.checkpoint leaves out. Read the checkpoint "
            "by torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
        )


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
    scopes: dict[Any, list[tuple[str, dict[str, Any], dict[str, Any], Tensor]]] = {}
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
                key = scope_key(group, group_index, position, index)
                scopes.setdefault(key, []).append((name, group, state, param))
            index += 1
    for members in scopes.values():
        _check_scope(members)
        scales = [state.pop(_SCALE) for _, _, state, _ in members if _SCALE in state]
        for name, group, state, param in members:
            if "window" in state and state["window"].dtype == torch.float16:
                if not scales:
                    raise _error(f"the saved window of {name} is in fp16 and has no {_SCALE}")
                state["window"] = _scaled(state["window"], local_part(scales[0]), group, param)


def _scaled(window: Tensor, scales: Tensor, group: dict[str, Any], param: Tensor) -> Tensor:
    """Return rows of fp16 times their scales, powers of two, in the dtype of new rows."""
    rows, scope, factors = local_part(window), group["scope"], scales[0].view(-1, *[1] * param.dim())
    if isinstance(scope, int):
        indices = torch.arange(rows[0].numel(), device=rows.device) + (columns_of(param).offset or 0)
        factors = scales[indices // scope].T.view(rows.shape)
    scaled = rows.to(storage_dtype(group, param)) * factors
    return join_parts(scaled, window, window.shape) if is_dtensor(window) else scaled


def _check_scope(members: list[tuple[str, dict[str, Any], dict[str, Any], Tensor]]) -> None:
    """Raise ValueError unless exactly one of the parameters that share a window holds the scope's state."""
    holders = [(name, state) for name, _, state, _ in members if state.keys() & set(SCOPE_KEYS)]
    if len(holders) != 1:
        names = ", ".join(name for name, *_ in holders[:3]) or "none"
        hint = " (scope='layer' needs a state that was saved with names)" if members[0][1]["scope"] == "layer" else ""
        raise _error(f"expected one Gram matrix for the window of {members[0][0]}, got {len(holders)} ({names}){hint}")
    ((name, state),) = holders
    if missing := set(SCOPE_KEYS) - state.keys():
        raise _error(f"the saved state of {name} has no {', '.join(sorted(missing))}")


def _error(text: str) -> ValueError:
    return ValueError(
        f"MFAC: {text}; nothing was changed. Load a state that this optimizer saved, or start without it."
    )
