"""The scopes of M-FAC: which parameters share a window's Gram matrix, in which form, and what a scope keeps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanstep._torch import local_part
from leanstep.optimizers.mfac.compressed import LowRankRows, SparseRows
from leanstep.optimizers.mfac.direction import STATS
from leanstep.optimizers.mfac.settings import SHARED
from leanstep.optimizers.mfac.window import BlockRows, Columns, DenseRows, columns_of

# the first one that accepts a parameter stores its rows
FORMS: tuple[type[DenseRows], ...] = (SparseRows, LowRankRows, DenseRows)


class Member(NamedTuple):
    """A parameter of a scope. ``grad`` is None if it has none at this step."""

    group: dict[str, Any]
    position: int
    number: int  # among the parameters of all groups
    param: Tensor
    grad: Tensor | None
    state: dict[str, Any]
    columns: Columns


class Scope(NamedTuple):
    """Parameters whose gradients form the rows of one window (of several, with blocks).

    Attributes:
        members: those that have state.
        settings: the shared ones.
        scope_state: the state of the first member, which also holds ``gram``, ``counters``, ``stats`` and
            ``window_scale``.
    """

    members: list[Member]
    settings: dict[str, Any]
    scope_state: dict[str, Any]


def scope_key(group: dict[str, Any], number: int, position: int, index: int) -> tuple[Any, ...]:
    """What the parameters of one scope have in common."""
    scope = group["scope"]
    if scope == "model":
        return ("model",)
    if scope == "group":
        return ("group", number)
    names = group.get("param_names")
    if scope == "layer" and names:
        return ("layer", names[position].rpartition(".")[0])
    return ("parameter", index)


def shared_settings(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings of a scope's groups that must agree.

    Raises:
        ValueError: if they do not; the message names the setting and the groups' values.
    """
    first = groups[0]
    for group in groups[1:]:
        for key in SHARED:
            if group[key] != first[key]:
                raise ValueError(
                    f"MFAC: groups that share a window (scope={first['scope']!r}) need one {key}, got {first[key]!r} "
                    f"and {group[key]!r}. Give them the same, or build them with scope='group'."
                )
    return {key: first[key] for key in SHARED}


def init_window(state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
    """Create the window of a parameter, of zero rows, unless it is there."""
    if not any(form.key in state for form in FORMS):
        columns = columns_of(param, spread=group["shard_window"])
        _new_form(param, group).init_state(state, param, columns, group)


def window_bytes(param: Tensor, group: dict[str, Any]) -> int:
    """Bytes that :func:`init_window` allocates here, or will."""
    return _new_form(param, group).state_bytes(param, columns_of(param, spread=group["shard_window"]), group)


def _new_form(param: Tensor, group: dict[str, Any]) -> type[DenseRows]:
    return next(form for form in FORMS if form.accepts(param, group))


def form_of(state: dict[str, Any], scope: str | int) -> type[DenseRows]:
    """The form that a parameter's window has."""
    return BlockRows if isinstance(scope, int) else next(form for form in FORMS if form.key in state)


def init_scope_state(state: dict[str, Any], param: Tensor, settings: dict[str, Any]) -> None:
    """Create what a scope keeps: the Gram matrix of its rows, two counters, and stats of its last step."""
    m, device = settings["window"], local_part(param).device
    blocks = _block_count(param, settings["scope"])
    state["gram"] = torch.zeros(blocks, m, m, dtype=torch.float64, device=device)
    state["counters"] = torch.zeros(2, dtype=torch.int64)  # steps, rows; on the host, which chooses rows by them
    state["stats"] = torch.zeros(blocks, len(STATS), dtype=torch.float64, device=device)
    if settings["storage"] == "fp16":
        state["window_scale"] = torch.ones(blocks, m, dtype=torch.float32, device=device)


def scope_state_bytes(param: Tensor, group: dict[str, Any]) -> int:
    """Bytes of what :func:`init_scope_state` allocates on the device."""
    m, scale = group["window"], 4 if group["storage"] == "fp16" else 0
    return _block_count(param, group["scope"]) * (8 * m * m + scale * m + 8 * len(STATS))


def _block_count(param: Tensor, scope: str | int) -> int:
    """How many Gram matrices the scope of a parameter has."""
    return max(1, -(-param.numel() // scope)) if isinstance(scope, int) else 1
