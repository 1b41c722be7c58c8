"""A check that the shards of a loaded window belong together, when ``shard_window`` spreads it over processes.

A file that one process wrote has the shard of that process alone. Its placements are those of every process, so nothing
but the numbers tells that another process has loaded it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from leanstep._torch import is_dtensor, local_part
from leanstep.optimizers.common.loading import Loaded
from leanstep.optimizers.mfac.scopes import block_count, scope_key
from leanstep.optimizers.mfac.window import BlockRows, columns_of, pieces_of

# Rows are compared as they are stored, and squared and summed in fp64 as for the Gram matrix: the order of the sums
# alone may differ, whatever the dtype of the rows.
_TOLERANCE = 1e-6

# elements that are squared at a time, in an fp64 copy
_CHUNK_ELEMENTS = 1 << 22

_ADVICE = (
    "nothing was changed. Save and load with torch.distributed.checkpoint (get_state_dict, set_state_dict), or one "
    "file per process."
)


def is_spread(groups: Sequence[dict[str, Any]], saved: Any) -> bool:
    """Whether windows are spread over processes, here or by a saved state of any form."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    saved_groups = saved.get("param_groups") if isinstance(saved, dict) else None
    saved_groups = saved_groups if isinstance(saved_groups, (list, tuple)) else []
    return any(isinstance(g, dict) and g.get("shard_window") is True for g in (*groups, *saved_groups))


class GroupReference:
    """A process group inside the state of an optimizer that is copied: copies have the group itself."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __copy__(self) -> GroupReference:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupReference:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "MFAC: an optimizer with shard_window=GROUP cannot be pickled, because a process group cannot. Save its "
            "state_dict(), build MFAC with the group, and load the state; or take shard_window=True for all processes."
        )


class ShardCheck:
    """Compares the norms of rows over all processes with the diagonals of the Gram matrices, in one all-reduce.

    Every process must call either :meth:`compare` or :meth:`abstain`, also one that refuses its state: the others wait.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], process_group: Any) -> None:
        self.done = False
        self._process_group = process_group or torch.distributed.group.WORLD
        self._spans: dict[Any, tuple[int, int, int]] = {}  # of each scope: start, Gram matrices, m
        size = 1  # the first number counts the processes that abstain
        for key, group, param in _scopes(groups):
            if key not in self._spans:
                blocks = block_count(param, group["scope"])
                self._spans[key] = (size, blocks, group["window"])
                size += blocks * group["window"]
        device = local_part(next(p for g in groups for p in g["params"])).device
        self._numbers = torch.zeros(size, dtype=torch.float64, device=device)

    def abstain(self) -> None:
        """Tell the other processes that this one refuses its state."""
        self._numbers.zero_()[0] = 1.0
        self._sum()

    @torch.no_grad()
    def compare(self, groups: Sequence[dict[str, Any]], entries: Sequence[Loaded]) -> None:
        """Raise ValueError if another process abstains, or if a row's norm is not that of the Gram matrix."""
        spread = _spread_scopes(groups)
        first_indices = [sum(len(g["params"]) for g in groups[:i]) for i in range(len(groups))]
        holders: dict[Any, dict[str, Any]] = {}
        for entry in entries:
            param_index = first_indices[entry.group_index] + entry.position
            key = scope_key(entry.group, entry.group_index, entry.position, param_index)
            if not entry.param.numel() or key not in spread:
                continue
            if "gram" in entry.state:
                holders[key] = entry.state
            if key not in self._spans:
                raise ValueError(
                    "MFAC: the saved state names its parameters, on which scopes by layer depend, and this optimizer "
                    "has no names, or others; build it from model.named_parameters(). Nothing was changed."
                )
            self._add_squares(self._view(key), entry)
        self._sum()
        if self._numbers[0] > 0:
            raise ValueError(f"MFAC: another process refuses the state that it loads; {_ADVICE}")
        for key in spread:
            if not self._fits(self._view(key), holders.get(key)):
                raise ValueError(
                    "MFAC: the shards of the saved window have other norms than its Gram matrix, or a process has "
                    f"none: they are not of one state, as when all processes load the file of one; {_ADVICE}"
                )

    def _view(self, key: Any) -> Tensor:
        start, blocks, m = self._spans[key]
        return self._numbers[start : start + blocks * m].view(blocks, m)

    def _sum(self) -> None:
        self.done = True
        torch.distributed.all_reduce(self._numbers, group=self._process_group)

    def _add_squares(self, squares: Tensor, entry: Loaded) -> None:
        """Add the squared norms of this process's part of the stored rows to ``squares`` [blocks, m]."""
        stored = next((entry.state[key] for key in ("window", "window_values") if key in entry.state), None)
        if stored is None:
            return
        scope = entry.group["scope"]
        if not is_dtensor(stored) and torch.distributed.get_rank(self._process_group) > 0:
            return  # every process has all of it, as of a parameter of no dimension
        if not isinstance(scope, int):
            squares += _squares(stored_rows(stored))
            return
        columns = columns_of(entry.param, spread=is_dtensor(stored), process_group=self._process_group)
        for piece, rows in _blocks(pieces_of(0, 0, columns, entry.state, scope), entry.group):
            squares[piece.gram : piece.gram + piece.blocks] += _squares(rows)

    @staticmethod
    def _fits(squares: Tensor, holder: dict[str, Any] | None) -> bool:
        if holder is None:
            return not bool(squares.any())
        if "window_scale" in holder:
            squares = squares * holder["window_scale"].to(squares).square()
        expected = holder["gram"].diagonal(dim1=-2, dim2=-1).to(squares)
        return bool(((squares - expected).abs() <= _TOLERANCE * expected.abs()).all())


def stored_rows(stored: Tensor) -> Tensor:
    """Return this process's part of a window's rows as one block [m, 1, size]."""
    part = local_part(stored)
    return part.reshape(part.shape[0], 1, math.prod(part.shape[1:]))


def _blocks(pieces: Sequence[Any], settings: dict[str, Any]) -> Iterator[tuple[Any, Tensor]]:
    """Yield every piece with its rows [m, blocks, size]."""
    if pieces:
        yield from zip(pieces, BlockRows(pieces, settings).windows, strict=True)


def _squares(rows: Tensor) -> Tensor:
    """Return the squared norms [blocks, m] of rows [m, blocks, size], in fp64."""
    m, blocks, size = rows.shape
    squares = torch.zeros(m, blocks, dtype=torch.float64, device=rows.device)
    together = max(1, _CHUNK_ELEMENTS // max(m * size, 1))
    for start in range(0, blocks, together):
        some = rows[:, start : start + together]
        for part in some.split(max(1, _CHUNK_ELEMENTS // (m * some.shape[1])), dim=2):
            squares[:, start : start + together] += part.double().square().sum(dim=2)
    return squares.T


def _scopes(groups: Sequence[dict[str, Any]]) -> Iterator[tuple[Any, dict[str, Any], Tensor]]:
    """Yield the scope of every parameter that has elements, with the group and the parameter."""
    index = 0
    for group_index, group in enumerate(groups):
        for position, param in enumerate(group["params"]):
            if param.numel():
                yield scope_key(group, group_index, position, index), group, param
            index += 1


def _spread_scopes(groups: Sequence[dict[str, Any]]) -> dict[Any, None]:
    """Return the scopes whose windows shard_window spreads: those of parameters that are whole on every process."""
    scopes = {key: None for key, group, _ in _scopes(groups) if group["shard_window"]}
    for key, _, param in _scopes(groups):
        if is_dtensor(param):
            scopes.pop(key, None)
    return scopes
