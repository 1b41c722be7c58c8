"""Tensors of a saved state: what is refused, and how the others become tensors that a step can use.

A file may hold a tensor of any dtype, shape, strides and storage. Kernels take addresses, and read and write what they
expect to be there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from leanstep._torch import is_dtensor, join_parts, local_part
from leanstep.kernels.cpp_impl._build import is_dense

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_NUMBERS = (*FLOATS, torch.int64, torch.int32)

# bytes: the widest access of a kernel
_ALIGNMENT = 16

# elements that are checked at a time: the check makes a temporary
_CHUNK_ELEMENTS = 1 << 24

# fp32 counts whole numbers up to here
LAST_COUNT = 2**24


def is_fp8(value: Any) -> bool:
    """Whether a value is a plain tensor in fp8."""
    return type(value) is Tensor and value.dtype == torch.float8_e4m3fn


class Pickled:
    """A tensor in fp8 in a form that pickle can write: bytes. It is read as the tensor. torch pickles no fp8."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> Any:
        return _fp8, (self.tensor.view(torch.uint8),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.tensor, memo)


def _fp8(numbers: Tensor) -> Tensor:
    return numbers.view(torch.float8_e4m3fn)


class StateRule(NamedTuple):
    """What loading takes as one entry of a parameter's state.

    Attributes:
        dtypes: dtypes that load, besides the one in which the optimizer would create the entry.
        cast: convert to the dtype in which the optimizer would create the entry; otherwise every bit is preserved.
        early: the entry may be there before the first step, without the others.
        finite: entries are finite numbers.
        least, most: bounds of the entries.
        whole: entries are whole numbers. A Python number is taken for a tensor of shape ().
    """

    dtypes: tuple[torch.dtype, ...] = FLOATS
    cast: bool = False
    early: bool = False
    finite: bool = False
    least: float | None = None
    most: float | None = None
    whole: bool = False


COUNT = StateRule(_NUMBERS, cast=True, whole=True, least=0, most=LAST_COUNT)


class Created(NamedTuple):
    """What the optimizer would create as an entry of the state."""

    strides: tuple[int, ...]  # of this process's shard, as all below
    local_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    placements: Any  # device mesh and placements of a DTensor, else None

    @classmethod
    def of(cls, tensor: Tensor) -> Created:
        """Describe a tensor, which may be fake."""
        part = local_part(tensor)
        return cls(part.stride(), tuple(part.shape), part.dtype, part.device, _placements(tensor))


class Misfit(ValueError):
    """An entry is not what it must be. The message says what was expected and what came."""


def check_readable(value: Any) -> Tensor:
    """Return a tensor whose elements can be read; raise Misfit for anything else.

    Does not read any element: those of a tensor that is larger than its memory would end the process.
    """
    if not isinstance(value, Tensor):
        raise Misfit(f"expected a tensor, got {_brief(value)}")
    if value.is_nested:
        raise Misfit("expected a dense tensor, got a nested one")
    part = local_part(value)
    if type(part) not in (Tensor, torch.nn.Parameter) and not type(part).__module__.startswith("torch._subclasses."):
        raise Misfit(f"expected a plain tensor, got a {type(part).__name__}")
    if part.layout is not torch.strided or part.is_quantized or part.is_complex():
        kind = part.layout if part.layout is not torch.strided else part.dtype
        raise Misfit(f"expected a dense tensor of real numbers, got {str(kind).removeprefix('torch.')}")
    if part.device.type == "meta":
        raise Misfit("expected a tensor with data, got one on the meta device")
    if part._is_zerotensor():
        raise Misfit("expected a tensor with data, got one of zeros without memory")
    needed = (part.storage_offset() + _span(part)) * part.element_size() if part.numel() else 0
    if needed > part.untyped_storage().nbytes():
        raise Misfit(
            f"expected {needed} bytes of memory for shape {tuple(part.shape)}, got {part.untyped_storage().nbytes()}"
        )
    return value


def as_number_tensor(value: Any, rule: StateRule) -> Any:
    """Return a Python number, as old states have for counts, as a tensor; anything else unchanged."""
    if not rule.whole or isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    return torch.tensor(float(value) if abs(value) < 2**63 else math.inf, dtype=torch.float32, device="cpu")


def owned(value: Any) -> Tensor:
    """Return a contiguous copy of a readable tensor; raise Misfit for anything else."""
    part = local_part(check_readable(value))
    copy = torch.empty(part.shape, dtype=part.dtype, device=part.device)
    copy.copy_(_values(part))
    return join_parts(copy, value, value.shape) if is_dtensor(value) else copy


def fitted(value: Tensor, rule: StateRule, created: Created | None, device: torch.device) -> Tensor:
    """Return a readable tensor of the right shape in the dtype, strides and device that a step needs.

    The result shares the memory of ``value`` where nothing has to change.

    Args:
        value: the saved tensor.
        rule: what loading accepts.
        created: what the optimizer would create; None for an entry of a rounding that its settings do not use.
        device: of the parameter, for an entry that is not created.

    Raises:
        Misfit: the dtype, the placements or a value is not allowed.
    """
    part, dtype = local_part(value), value.dtype
    if not (created and dtype == created.dtype) and dtype not in rule.dtypes:
        expected = dict.fromkeys([*([created.dtype] if created else []), *rule.dtypes])
        raise Misfit(f"expected {' or '.join(_name(d) for d in expected)}, got {_name(dtype)}")
    if created and (_placements(value) != created.placements or tuple(part.shape) != created.local_shape):
        raise Misfit(
            f"expected {_placed(created.placements)} with {created.local_shape} on this process, got "
            f"{_placed(_placements(value))} with {tuple(part.shape)}; torch.distributed.checkpoint.state_dict moves "
            "states between whole and sharded parameters"
        )
    _check_values(part, rule)
    if created:
        device, dtype = created.device, created.dtype if rule.cast else dtype
    same_strides = _same_strides(part, created.strides) if created else is_dense(part)
    if dtype == part.dtype and device == part.device and same_strides and _is_ordinary(part):
        return value.detach()
    strides = created.strides if created else torch.empty(part.shape, device="meta").stride()
    copy = torch.empty_strided(part.shape, strides, dtype=dtype, device=device)
    copy.copy_(_values(part))
    return join_parts(copy, value, value.shape) if is_dtensor(value) else copy


def _check_values(part: Tensor, rule: StateRule) -> None:
    if rule.finite and part.numel():
        rows = part.detach() if part.dim() else part.detach().view(1)
        count = max(1, _CHUNK_ELEMENTS * len(rows) // part.numel())
        # torch has no isfinite for numbers of 8 bits
        chunks = (chunk.float() if chunk.dtype.itemsize == 1 else chunk for chunk in rows.split(count))
        if not all(bool(torch.isfinite(chunk).all()) for chunk in chunks):
            raise Misfit("expected finite numbers, got infinity or NaN")
    if not rule.whole and rule.least is None:
        return
    least = -math.inf if rule.least is None else rule.least
    most = math.inf if rule.most is None else rule.most
    part = part.detach()
    if part.numel() and not part.dtype.is_floating_point:  # codes are as many as parameters: no copy of them
        part = torch.stack(part.aminmax())
    wide = part.to(torch.float64)
    good = (wide >= least) & (wide <= most)
    if rule.whole:
        good &= wide == wide.floor()
    if not bool(good.all()):
        kind = "whole numbers" if rule.whole else "numbers"
        raise Misfit(f"expected {kind} in [{least:g}, {most:g}], got {wide[~good].flatten()[0].item():g}")


def separate(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors, with copies of those whose memory overlaps with another tensor's, or with ``others``.

    An in-place update of one of them would change the other one, too.
    """
    parts = [local_part(t) for t in (*tensors, *others)]
    spans = sorted(
        (str(p.device), p.data_ptr(), p.data_ptr() + _span(p) * p.element_size(), i)
        for i, p in enumerate(parts)
        if p.numel() and _has_address(p)
    )
    overlapping: set[int] = set()
    last = ("", 0, 0, 0)  # the span with the highest end so far
    for span in spans:
        if span[0] == last[0] and span[1] < last[2]:
            overlapping |= {span[3], last[3]}
        if span[0] != last[0] or span[2] > last[2]:
            last = span
    return [_copied(tensor) if i in overlapping else tensor for i, tensor in enumerate(tensors)]


def _copied(tensor: Tensor) -> Tensor:
    copy = local_part(tensor).clone(memory_format=torch.preserve_format)
    return join_parts(copy, tensor, tensor.shape) if is_dtensor(tensor) else copy


def _has_address(part: Tensor) -> bool:
    if part.layout is not torch.strided:  # a sparse gradient
        return False
    return type(part) in (Tensor, torch.nn.Parameter) and part.device.type != "meta"


def _is_ordinary(part: Tensor) -> bool:
    """Whether kernels may read and write a tensor's memory as it is, also as elements of another size."""
    if part.is_neg() or part.is_conj() or part.is_inference() or part.dtype == torch.bool:
        return False
    offset = part.storage_offset() * part.element_size()
    return not _has_address(part) or (part.data_ptr() % _ALIGNMENT == 0 and offset % _ALIGNMENT == 0)


def _values(part: Tensor) -> Tensor:
    """Return the values of a tensor. A bool of a file may be any byte, which kernels would multiply by."""
    part = part.detach()
    return part.view(torch.uint8) != 0 if part.dtype == torch.bool else part


def _same_strides(part: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether the strides are equal where they matter."""
    pairs = zip(part.stride(), strides, part.shape, strict=True)
    return part.numel() == 0 or all(a == b or size == 1 for a, b, size in pairs)


def _span(part: Tensor) -> int:
    """Return the number of elements from the first to the last one in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))


def _placements(tensor: Tensor) -> Any:
    if not is_dtensor(tensor):
        return None
    sharded = cast("DTensor", tensor)
    return sharded.device_mesh, tuple(sharded.placements)


def _placed(placements: Any) -> str:
    return f"a DTensor of placements {placements[1]}" if placements else "an unsharded tensor"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _brief(value: Any) -> str:
    text = f"{type(value).__name__} {value!r}" if isinstance(value, (bool, int, float, str)) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."
