"""The table of LANTON's state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanstep.optimizers.common.saved_tensors import LAST_COUNT, StateRule
from leanstep.optimizers.common.sharding import local, new_vectors
from leanstep.optimizers.common.state import Entry, wide_dtype
from leanstep.optimizers.lanton.layers import estimate_dtype, form_of, norm_of, stores_gradient
from leanstep.optimizers.lanton.variance import KEY, KEY_RULE, rows_shape


def _stores_gradient(group: dict[str, Any], param: Tensor) -> bool:
    return stores_gradient(group)


def _row_shape(group: dict[str, Any], param: Tensor) -> tuple[int, ...] | None:
    return rows_shape(group, param) if norm_of(group, param) == "rms" else None


def _uses_rows(group: dict[str, Any], param: Tensor) -> bool:
    return group["variance"] is not None and norm_of(group, param) == "rms"


def _is_adaptive(group: dict[str, Any], param: Tensor) -> bool:
    return group["noise_adaptive"]


def _noise_dtype(group: dict[str, Any], param: Tensor) -> torch.dtype:
    return estimate_dtype(local(param).device)


def _noise_shape(group: dict[str, Any], param: Tensor) -> tuple[int]:
    return (form_of(group, param).estimates,)


_H = StateRule((torch.float64, torch.float32), cast=True, finite=True, least=0)
_COUNT = StateRule((torch.float32,), whole=True, least=-1, most=LAST_COUNT)
ENTRIES = (
    Entry("momentum_buffer", setting="momentum_dtype"),
    Entry(KEY, dtype=wide_dtype, shape=_row_shape, used=_uses_rows, new=new_vectors, loads=KEY_RULE),
    Entry("noise", dtype=_noise_dtype, shape=_noise_shape, used=_is_adaptive, loads=_H),
    # number of estimates in H; -1 until there is a previous gradient
    Entry("noise_steps", dtype=torch.float32, shape=_noise_shape, used=_is_adaptive, loads=_COUNT),
    Entry("previous_grad", setting="noise_dtype", used=_stores_gradient),
    Entry("half_grad", used=False, loads=StateRule(early=True)),  # between two calls for the halves of a batch
)
