"""The scopes of M-FAC: which parameters share a window's Gram matrix, and where it is kept."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanstep.optimizers.common.sharding import local
from leanstep.optimizers.mfac.blocks import BlockPart
from leanstep.optimizers.mfac.columns import Columns, columns_of
from leanstep.optimizers.mfac.lowrank import LowRankPart, init_low_rank, is_low_rank, low_rank_bytes
from leanstep.optimizers.mfac.sparse import SparsePart, init_sparse, is_sparse, sparse_bytes
from leanstep.optimizers.mfac.window import Part, Piece, dense_bytes, init_dense

# settings that all groups of a scope must agree on
SHARED = (
    "scope", "window", "damping", "damping_schedule", "scaling", "storage", "compression", "density", "rank",
    "momentum_on", "warmup_steps", "max_update_norm", "precondition", "precondition_every", "window_every",
    "shard_window", "nonfinite", "foreach",
)  # fmt: skip
# and those that a saved window depends on
STRUCTURAL = ("window", "scope", "storage", "compression", "density", "rank")

# columns of `figures`, one row per Gram matrix
FIGURES = ("jittered", "eigen", "clipped", "ratio", "decrease", "norm")


class Member(NamedTuple):
    """A parameter of a scope. ``grad`` is None where it has none at this step."""

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
        home: the state that holds ``gram``, ``counts``, ``figures`` and ``window_scale``.
    """

    members: list[Member]
    settings: dict[str, Any]
    home: dict[str, Any]


def form_of(param: Tensor, settings: dict[str, Any]) -> str:
    """In which form a parameter's rows are kept: "dense", "topk" or "lowrank"."""
    if settings["compression"] == "topk" and is_sparse(param.shape, settings["density"]):
        return "topk"
    if settings["compression"] == "lowrank" and is_low_rank(param.shape, settings["rank"]):
        return "lowrank"
    return "dense"


_INIT = {"dense": init_dense, "topk": init_sparse, "lowrank": init_low_rank}
_BYTES = {"dense": dense_bytes, "topk": sparse_bytes, "lowrank": low_rank_bytes}
_FORM_BY_KEY = {"window": Part, "window_values": SparsePart, "window_left": LowRankPart}


def init_window(state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
    """Create the window of a parameter, of zero rows, unless it is there."""
    if not any(key in state for key in _FORM_BY_KEY):
        columns = columns_of(param, spread=group["shard_window"])
        _INIT[form_of(param, group)](state, param, columns, group)


def window_bytes(param: Tensor, group: dict[str, Any]) -> int:
    """Bytes that :func:`init_window` allocates here, or will."""
    columns = columns_of(param, spread=group["shard_window"])
    return _BYTES[form_of(param, group)](param, columns, group)


def part_class(state: dict[str, Any], scope: str | int) -> type[Part]:
    """The operations for the form that a parameter's window has."""
    if isinstance(scope, int):
        return BlockPart
    return next(kind for key, kind in _FORM_BY_KEY.items() if key in state)


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


def block_count(param: Tensor, scope: str | int) -> int:
    """How many Gram matrices the scope of a parameter has."""
    return max(1, -(-param.numel() // scope)) if isinstance(scope, int) else 1


def shared_settings(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings of a scope's groups that must agree.

    Raises:
        ValueError: where they do not; the message names the setting and the groups' values.
    """
    keys = (*SHARED, "momentum") if groups[0]["momentum_on"] == "gradient" else SHARED
    first = groups[0]
    for group in groups[1:]:
        for key in keys:
            if group[key] != first[key]:
                raise ValueError(
                    f"MFAC: groups that share a window (scope={first['scope']!r}) need one {key}, got {first[key]!r} "
                    f"and {group[key]!r}. Give them the same, or build them with scope='group'."
                )
    return {key: first[key] for key in keys}


def init_home(state: dict[str, Any], param: Tensor, settings: dict[str, Any]) -> None:
    """Create what a scope keeps: the Gram matrix of its rows, two counts, and figures of its last step."""
    m, device = settings["window"], local(param).device
    blocks = block_count(param, settings["scope"])
    state["gram"] = torch.zeros(blocks, m, m, dtype=torch.float64, device=device)
    state["counts"] = torch.zeros(2, dtype=torch.int64)  # steps, rows; on the host, which chooses rows by them
    state["figures"] = torch.zeros(blocks, len(FIGURES), dtype=torch.float64, device=device)
    if settings["storage"] == "fp16":
        state["window_scale"] = torch.ones(blocks, m, dtype=torch.float32, device=device)


def home_bytes(param: Tensor, group: dict[str, Any]) -> int:
    """Bytes of what :func:`init_home` allocates on the device."""
    m, scale = group["window"], 4 if group["storage"] == "fp16" else 0
    return block_count(param, group["scope"]) * (8 * m * m + scale * m + 8 * len(FIGURES))


def pieces_of(member: int, first_slot: int, columns: Columns, state: Any, scope: Any) -> list[Piece]:
    """The columns of a parameter that are held here: whole blocks in one piece, and what is left at either end.

    Raises:
        ValueError: for blocks of a parameter whose part here is not one range of it.
    """
    held = math.prod(columns.shape)
    if not isinstance(scope, int):
        return [Piece(member, first_slot, None, state)]
    if columns.offset is None:
        raise ValueError(
            f"MFAC: scope={scope} cuts parameters into ranges of elements, but a part of shape {columns.shape} of one "
            "that is sharded along another dimension than 0 is no range; use scope='layer' or 'model'"
        )
    start, end = columns.offset, columns.offset + held
    first, last = -(-start // scope), end // scope  # the blocks from first to last are here as a whole
    pieces: list[Piece] = []
    for low, high, block in ((start, min(first * scope, end), start // scope), (max(last * scope, start), end, last)):
        if low < high and (first <= last or not pieces):
            pieces.append(Piece(member, first_slot + block, (low - start, high - start), state))
    if first < last:
        span = (first * scope - start, last * scope - start)
        pieces.append(Piece(member, first_slot + first, span, state, last - first))
    return pieces
