"""The state of a parameter as a table: one row says all about one tensor, and this file reads it.

From the table of an optimizer follow which tensors a parameter gets (also fake ones), how they change with settings,
their shapes and bytes, and what loading accepts. The rows of a rounding are in ``rounding.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanstep.kernels.reference.quantization import FP8, scale_shape
from leanstep.kernels.steps.common import compute_dtype
from leanstep.optimizers.common.quantized import (
    CODES,
    average_values,
    is_quantized,
    new_scales,
    scale_key,
    store_averages,
)
from leanstep.optimizers.common.saved_tensors import COUNT, StateRule
from leanstep.optimizers.common.sharding import dtype_of, local, new_state, run, shard_of

# a fact that depends on a parameter's group and on the parameter
OfParam = Callable[[dict[str, Any], Tensor], Any]


def wide_dtype(group: dict[str, Any], param: Tensor) -> torch.dtype:
    """Return fp32, or fp64 for a parameter in fp64."""
    return compute_dtype(param.dtype)


class Entry(NamedTuple):
    """One tensor in the state of a parameter. A function below takes the parameter's group and the parameter.

    Attributes:
        name: the key in the state.
        setting: of an average: the setting that gives its dtype, or a function. None in the setting: the parameter's
            dtype, or what the average has. int8 and fp8: codes for parameters of two or more dimensions, with the
            entries ``NAME_scale`` and ``step``. A change of the setting converts the average in the next step.
        dtype: of any other entry, or a function; None: the parameter's.
        shape: before sharding, or a function, which returns None where a parameter cannot have the entry; None: the
            parameter's.
        used: whether the settings need the entry, or a function. Such an entry is created, and a saved state without
            it is refused. Others load only: a setting may have been switched off during the training.
        new: creates the entry, zeros, from the parameter, the shape and the dtype. None: with the placements of the
            parameter if it has its shape, else whole on every process.
        on_host: whether the entry stays in the host's memory, because the host reads it, or a function.
        squares: the average is of squares, whose codes differ.
        loads: what loading accepts, or a function. Codes have rules of their own.
    """

    name: str
    setting: str | OfParam | None = None
    dtype: torch.dtype | OfParam | None = None
    shape: tuple[int, ...] | OfParam | None = None
    used: bool | OfParam = True
    new: Callable[[Tensor, tuple[int, ...], torch.dtype | None], Tensor] | None = None
    on_host: bool | OfParam = False
    squares: bool = False
    loads: StateRule | OfParam = StateRule()

    def shape_of(self, group: dict[str, Any], param: Tensor) -> tuple[int, ...] | None:
        """Return the shape before sharding; None if the parameter cannot have the entry."""
        return tuple(param.shape) if self.shape is None else _value(self.shape, group, param)

    def dtype_of(self, group: dict[str, Any], param: Tensor) -> torch.dtype | None:
        """Return the dtype in memory, also of codes; None: the parameter's, or what the entry has."""
        if self.setting is None:
            return _value(self.dtype, group, param)
        dtype = dtype_of(group[self.setting] if isinstance(self.setting, str) else self.setting(group, param))
        if dtype not in CODES:
            return dtype
        return None if not is_quantized(dtype, param) else torch.uint8 if self.squares else dtype

    def device_of(self, group: dict[str, Any], param: Tensor) -> torch.device:
        """Return the device of this process's part."""
        return torch.device("cpu") if _value(self.on_host, group, param) else local(param).device

    def created(self, group: dict[str, Any], param: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return a new tensor of zeros; ``shape`` is that of the entry."""
        dtype = self.dtype_of(group, param)
        if self.new is not None:
            return self.new(param, shape, dtype)
        if self.shape is None:
            return new_state(param, dtype)
        return torch.zeros(shape, dtype=dtype, device=self.device_of(group, param))

    def is_coded(self, group: dict[str, Any], param: Tensor) -> bool:
        """Whether the entry is in codes of 8 bits."""
        return self.setting is not None and self.dtype_of(group, param) in _CODE_RULES


# loading accepts infinite and NaN scales, as other averages
_SCALES = StateRule((torch.float32,))
_CODE_RULES = {
    torch.int8: StateRule((torch.int8,), least=-127, most=127),  # kernels do not agree on the value of -128
    FP8: StateRule((FP8,), finite=True),  # NaN is no code
    torch.uint8: StateRule((torch.uint8,)),
}


class Row(NamedTuple):
    """What loading knows of one entry of a parameter's state."""

    shape: tuple[int, ...]  # before sharding
    loads: StateRule
    required: bool  # a state without it is refused


def rows_of(entries: Sequence[Entry], group: dict[str, Any], param: Tensor) -> dict[str, Row]:
    """Return what a saved state of the parameter may have. Later entries replace earlier ones of the same name."""
    rows = {}
    for entry in entries:
        if (shape := entry.shape_of(group, param)) is None:
            continue
        used, loads = _value(entry.used, group, param), _value(entry.loads, group, param)
        if (dtype := entry.dtype_of(group, param)) in _CODE_RULES and entry.setting is not None:
            loads = _CODE_RULES[dtype]
            rows[scale_key(entry.name)] = Row(scale_shape(param.shape), _SCALES, used)
            if used:  # it seeds the rounding of the codes
                rows["step"] = Row((), COUNT, used)
        rows[entry.name] = Row(shape, loads, used)
    return rows


def shapes_of(
    entries: Sequence[Entry], state: dict[str, Any], group: dict[str, Any], param: Tensor
) -> dict[str, tuple[int, ...]]:
    """Return the shapes, before sharding, of those entries of a state that depend on the parameter's shape.

    They are on its device, too.
    """
    shapes = {}
    for entry in entries:
        if entry.name not in state or isinstance(entry.shape, tuple) or entry.on_host:
            continue
        if (shape := entry.shape_of(group, param)) is not None:
            shapes[entry.name] = shape
        if scale_key(entry.name) in state:
            shapes[scale_key(entry.name)] = scale_shape(param.shape)
    return shapes


def coded(entries: Sequence[Entry], group: dict[str, Any], param: Tensor) -> list[str]:
    """Return the names of the entries that a step needs in codes of 8 bits."""
    averages = [entry for entry in entries if entry.setting is not None]
    return [e.name for e in averages if _value(e.used, group, param) and e.is_coded(group, param)]


def bytes_of(entries: Sequence[Entry], group: dict[str, Any], param: Tensor) -> int:
    """Return the bytes, before sharding, of entries without codes on the parameter's device, used or not."""
    total = 0
    for entry in entries:
        shape = entry.shape_of(group, param)
        if shape is not None and not _value(entry.on_host, group, param):
            total += math.prod(shape) * (entry.dtype_of(group, param) or param.dtype).itemsize
    return total


def update_state(
    entries: Sequence[Entry], state: dict[str, Any], group: dict[str, Any], param: Tensor, *, unused: bool = False
) -> None:
    """Create the entries that are missing, and convert those that contradict their setting.

    ``unused``: create also the entries that the settings do not use.
    """
    for entry in entries:
        if not unused and not _value(entry.used, group, param):
            continue
        if entry.setting is not None:
            _update_average(state, entry, group, param)
        elif entry.name not in state:
            if (shape := entry.shape_of(group, param)) is not None:
                state[entry.name] = entry.created(group, param, shape)
        elif callable(entry.on_host) and state[entry.name].device != (device := entry.device_of(group, param)):
            state[entry.name] = state[entry.name].to(device)  # a setting was changed after a step


def new_count(param: Tensor) -> Tensor:
    """Return the count of steps that seeds stochastic rounding, 0."""
    return torch.zeros((), dtype=torch.float32, device=local(param).device)


def _update_average(state: dict[str, Any], entry: Entry, group: dict[str, Any], param: Tensor) -> None:
    key, scales = entry.name, scale_key(entry.name)
    dtype, in_codes = entry.dtype_of(group, param), entry.is_coded(group, param)
    old = None
    if in_codes and "step" not in state:
        state["step"] = new_count(param)
    if key in state:
        if state[key].shape != param.shape:
            return  # resized after a step, which the step refuses by name
        if (scales in state) == in_codes and dtype in (None, state[key].dtype):
            return
        old = local(state[key])
        if scales in state:
            old = average_values(state, key, shard_of(param), compute_dtype(param.dtype))
            del state[scales]
    if in_codes:  # scales first: a state without the setting is refused by their name
        state[scales] = new_scales(param)
    state[key] = new_state(param, dtype)
    if old is None:
        return
    if in_codes:
        run(store_averages([old.to(compute_dtype(param.dtype))], [state], key, [shard_of(param)], [0]))
    else:
        local(state[key]).copy_(old)


def _value(fact: Any, group: dict[str, Any], param: Tensor) -> Any:
    return fact(group, param) if callable(fact) else fact
