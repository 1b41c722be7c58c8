"""The table of M-FAC's state: the window of a parameter, and what its scope has beside it.

The window of a parameter of shape ``(...)`` has shape ``(m, ...)``. The window of a DTensor is a DTensor, sharded along
the same dimension of the parameter. Saving, resharding and copying therefore work as for parameters.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from leanstep.optimizers.common.saved_tensors import StateRule
from leanstep.optimizers.common.state import Entry, wide_dtype
from leanstep.optimizers.mfac.compressed import SparseRows, entries_per_row, lead_of
from leanstep.optimizers.mfac.direction import STATS
from leanstep.optimizers.mfac.window import STORAGES, new_columns

_WIDE = (torch.float32, torch.float64)


def has_window(state: dict[str, Any]) -> bool:
    """Whether the state of a parameter has a window. That of a scope alone has none."""
    return "window" in state or SparseRows.key in state


def storage_dtype(group: dict[str, Any], param: Tensor) -> torch.dtype:
    """Return the dtype of stored rows: ``storage``, or bf16 with "topk", fp64 for fp64 parameters, else fp32."""
    if group["storage"] is not None:
        return STORAGES[group["storage"]]
    return torch.bfloat16 if group["compression"] == "topk" else wide_dtype(group, param)


def block_count(param: Tensor, scope: str | int) -> int:
    """Return the number of Gram matrices of a parameter's scope."""
    return max(1, -(-param.numel() // scope)) if isinstance(scope, int) else 1


def _dense(group: dict[str, Any], param: Tensor) -> tuple[int, ...] | None:
    return None if SparseRows.accepts(param, group) else (group["window"], *param.shape)


def _sparse(group: dict[str, Any], param: Tensor, per_entry: int = 1) -> tuple[int, ...] | None:
    if not SparseRows.accepts(param, group):
        return None
    return (group["window"], *lead_of(param.shape), per_entry * entries_per_row(param.shape, group["density"]))


def _indices(group: dict[str, Any], param: Tensor) -> tuple[int, ...] | None:
    return _sparse(group, param, 2)


def _error(group: dict[str, Any], param: Tensor) -> tuple[int, ...] | None:
    return tuple(param.shape) if SparseRows.accepts(param, group) else None


def _rows_that_load(group: dict[str, Any], param: Tensor) -> StateRule:
    """Return the rule of dense rows. Earlier versions had rows in fp16."""
    return StateRule(() if group["storage"] else (*_WIDE, torch.float16), finite=True)


def _of_scope(*tail: int | str) -> Any:
    """Return the shape of what a scope has for every Gram matrix; None for empty parameters, which are in no scope."""

    def shape(group: dict[str, Any], param: Tensor) -> tuple[int, ...] | None:
        sizes = [group[size] if isinstance(size, str) else size for size in tail]
        return (block_count(param, group["scope"]), *sizes) if param.numel() else None

    return shape


# a row of a finite gradient is finite, and so is what is computed from it; one other entry would stop all later steps
_VALUES, _INDICES, _ERROR = StateRule((), finite=True), StateRule((torch.uint8,)), StateRule(_WIDE, finite=True)
WINDOW = (
    Entry("error", dtype=wide_dtype, shape=_error, new=partial(new_columns, lead=0), loads=_ERROR),
    Entry("window", dtype=storage_dtype, shape=_dense, new=new_columns, loads=_rows_that_load),
    Entry("window_values", dtype=storage_dtype, shape=_sparse, new=new_columns, loads=_VALUES),
    # int16 as pairs of bytes, because neither gloo nor NCCL can gather int16
    Entry("window_indices", dtype=torch.uint8, shape=_indices, new=new_columns, loads=_INDICES),
)

# early: the parameter that holds a scope's state may not have had a gradient
_LOADS = StateRule((), early=True, finite=True)
_STATS = _LOADS._replace(finite=False)
_COUNTS = _LOADS._replace(dtypes=(torch.int64,), cast=True, whole=True, least=0, most=2**53)
# any parameter of a scope may hold these; the step creates them
SCOPE = (
    Entry("gram", dtype=torch.float64, shape=_of_scope("window", "window"), used=False, loads=_LOADS),
    # steps, rows; on the CPU, which computes indices from them; floating as torch's counts: not every writer of
    # torch.distributed.checkpoint takes integers
    Entry("counters", dtype=torch.float64, shape=(2,), used=False, loads=_COUNTS, on_host=True),
    Entry("stats", dtype=torch.float64, shape=_of_scope(len(STATS)), used=False, loads=_STATS),
)

SCOPE_KEYS = tuple(entry.name for entry in SCOPE)

ENTRIES = (
    *WINDOW,
    Entry("momentum_buffer", dtype=wide_dtype, used=lambda group, param: bool(group["momentum"])),
    Entry("mask", dtype=torch.bool, used=False, loads=StateRule((torch.bool,))),  # of sparse groups
    *SCOPE,
    # of rows in fp16, which earlier versions had
    Entry("window_scale", dtype=torch.float32, shape=_of_scope("window"), used=False, loads=_LOADS),
)
