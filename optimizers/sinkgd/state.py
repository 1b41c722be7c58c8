"""The table of SinkGD's state, of its matrices and of AdamW's parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanstep.optimizers.common.matrices import matrix_shape, oriented
from leanstep.optimizers.common.quantized import is_quantized
from leanstep.optimizers.common.saved_tensors import COUNT, StateRule
from leanstep.optimizers.common.sharding import Shard, new_vectors
from leanstep.optimizers.common.state import Entry, wide_dtype
from leanstep.optimizers.sinkgd.adamw import uses_fused


def algorithm_of(group: dict[str, Any], param: Tensor) -> str:
    """Return the algorithm of a parameter, with "auto" resolved."""
    if group["algorithm"] != "auto":
        return group["algorithm"]
    return "sinkgd" if param.dim() >= 2 else "adamw"


def _is_adamw(group: dict[str, Any], param: Tensor) -> bool:
    return algorithm_of(group, param) == "adamw"


def _moment_dtype(group: dict[str, Any], param: Tensor) -> torch.dtype | str:
    """Return codes if they are set, else what torch's step expects: fp32 for the copies of a rounding."""
    if is_quantized(group["momentum_dtype"], param):
        return group["momentum_dtype"]
    rounded = group["rounding"] != "nearest" and param.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if rounded else param.dtype


def _power_shape(group: dict[str, Any], param: Tensor) -> tuple[int, ...] | None:
    """Return [n], or [e, n] for a stack."""
    if _is_adamw(group, param) or param.dim() < 2:
        return None
    whole = oriented(Shard(param.shape), group["transposed"], group["flatten"])
    return (*whole.shape[: len(whole.shape) == 3], matrix_shape(whole)[1])


def _step_shape(group: dict[str, Any], param: Tensor) -> tuple[int, ...] | None:
    return () if _is_adamw(group, param) else None


def _host_counts(group: dict[str, Any], param: Tensor) -> bool:
    return not is_quantized(group["momentum_dtype"], param) and not uses_fused(param, group)  # as torch's step


def _uses_momentum(group: dict[str, Any], param: Tensor) -> bool:
    return group["momentum"] != 0 and not _is_adamw(group, param)


def _uses_power(group: dict[str, Any], param: Tensor) -> bool:
    return group["spectral"] is not None and not _is_adamw(group, param)


_VECTOR = StateRule((torch.float32, torch.float64), cast=True, finite=True)
_FLAG = StateRule((torch.bool,))
_MOMENT = Entry("exp_avg", setting=_moment_dtype, used=_is_adamw, loads=StateRule(cast=True))
ENTRIES = (
    Entry("step", dtype=torch.float32, shape=_step_shape, used=_is_adamw, loads=COUNT, on_host=_host_counts),
    _MOMENT,
    _MOMENT._replace(name="exp_avg_sq", squares=True),
    Entry("momentum_buffer", setting="momentum_dtype", used=_uses_momentum),
    # of the power iteration: zero until the first finite nonzero gradient
    Entry("power_vector", dtype=wide_dtype, shape=_power_shape, used=_uses_power, new=new_vectors, loads=_VECTOR),
    Entry("power_warm", dtype=torch.bool, shape=(), used=False, loads=_FLAG, on_host=True),  # the step creates it
)
