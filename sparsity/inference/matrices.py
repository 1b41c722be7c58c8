"""Stored forms of one weight: a bit mask with its values, or N:M values with positions; and the weight back.

A weight of shape (..., in) is a matrix (rows, in) of its flattened leading dimensions.

* ``bitmask``: ``NAME_values`` (nnz,), row after row; ``NAME_mask`` (rows, ceil(in / 32)) int32, bit j of word k for
  column 32 k + j; ``NAME_offsets`` (rows + 1,) int64, where each row begins in the values. Codes have ``NAME_scales``,
  and weight = code * scale: for int8, (rows,) fp32; for int4, (rows, ceil(in / 64)) bf16. Two codes of int4 are in a
  uint8, so that ``NAME_values`` is (ceil(nnz / 2),), the first code in the lower half.
* ``nm``: ``NAME_nm_values`` and ``NAME_nm_indices``, as :mod:`leanstep.sparsity.files` defines them.

A negative zero is stored as a value, so weights come back bit for bit, unless they were quantised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanstep.kernels import bitmask_pack, bitmask_quantize, bitmask_unpack, bitmask_validate
from leanstep.sparsity.files import (
    MOST_ZEROS,
    check_nm,
    compressed_bytes,
    nm_sizes,
    pack_nm,
    smallest_layout,
    unpack_nm,
)
from leanstep.sparsity.patterns import NM

# safetensors' names of the dtypes that tensors of a checkpoint have
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# of weights that can be stored without zeros
WEIGHT_DTYPES = ("F32", "F16", "BF16")
# codes of quantised values -> their name in a manifest, the dtype of the tensor, bits
CODES = {"int8": ("I8", "I8", 8), "int4": ("I4", "U8", 4)}
_MOST = 2**48  # entries of a weight, far beyond any model


class Form(NamedTuple):
    """How a weight is stored.

    Attributes:
        shape: of the dense weight, two or three dimensions.
        dtype: of the dense weight, as safetensors names it: F32, F16 or BF16.
        pattern: of the N:M form, with its dimension; None for a bit mask.
        dim: 0 or 1, of the flattened matrix.
        codes: "int8" or "int4" for quantised values, else None.
    """

    shape: tuple[int, ...]
    dtype: str
    pattern: NM | None = None
    dim: int = 1
    codes: str | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape (rows, columns) of the weight with its leading dimensions flattened."""
        return math.prod(self.shape[:-1]), self.shape[-1]

    @property
    def parts(self) -> tuple[str, ...]:
        """Endings of the names of its tensors."""
        if self.pattern is not None:
            return ("nm_values", "nm_indices")
        return ("values", "mask", "offsets", "scales") if self.codes else ("values", "mask", "offsets")

    def to_json(self) -> dict[str, Any]:
        """The form's entry of the manifest."""
        entry: dict[str, Any] = {"shape": list(self.shape), "dtype": self.dtype}
        if self.pattern is not None:
            return {**entry, "stored": "nm", "pattern": str(self.pattern), "dim": self.dim}
        return {**entry, "stored": "bitmask", "values": CODES[self.codes][0] if self.codes else self.dtype}

    @classmethod
    def from_json(cls, entry: Any) -> Form:
        """The form of an entry. Raises ValueError for one that :meth:`to_json` does not write."""
        if not isinstance(entry, dict):
            raise ValueError(f"expected an object, got {entry!r}")
        shape: Any = entry.get("shape")
        dtype, stored = entry.get("dtype"), entry.get("stored")
        sizes = isinstance(shape, list) and all(type(size) is int and 0 < size < _MOST for size in shape)
        if not sizes or len(shape) not in (2, 3) or math.prod(shape) >= _MOST:
            raise ValueError(f"expected a shape of two or three dimensions, got {shape!r}")
        if dtype not in WEIGHT_DTYPES:
            raise ValueError(f"expected a dtype of {', '.join(WEIGHT_DTYPES)}, got {dtype!r}")
        if stored == "nm":
            pattern, dim = NM.parse(str(entry.get("pattern"))), entry.get("dim")
            if pattern.m > 256 or type(dim) is not int or dim not in (0, 1):
                raise ValueError(f"expected M of at most 256 and dim 0 or 1, got {pattern} and {dim!r}")
            if pattern.n == 0 and math.prod(shape) > MOST_ZEROS:
                raise ValueError(f"expected at most {MOST_ZEROS:,} entries of pattern {pattern}, got shape {shape}")
            form = cls(tuple(shape), dtype, pattern, dim)
        elif stored == "bitmask":
            codes = next((name for name, row in CODES.items() if row[0] == entry.get("values")), None)
            form = cls(tuple(shape), dtype, codes=codes)
        else:
            raise ValueError(f"expected stored: bitmask or nm, got {stored!r}")
        if form.to_json() != entry:
            raise ValueError(f"expected {form.to_json()}, got {entry}")
        return form

    def most_values(self, size: int) -> int:
        """Number of values in ``NAME_values`` of this size; with int4, the last byte may hold one code less."""
        return 2 * size if self.codes == "int4" else size

    def part_shapes(self, nnz: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of each of its tensors; ``nnz`` is the number of values of a bit mask."""
        rows, columns = self.matrix
        if self.pattern is not None:
            values, size = nm_sizes(self.pattern, self.dim, self.matrix)
            return {"nm_values": (self.dtype, values), "nm_indices": ("U8", (size,))}
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "values": (CODES[self.codes][1] if self.codes else self.dtype, (nnz,)),
            "mask": ("I32", (rows, -(-columns // 32))),
            "offsets": ("I64", (rows + 1,)),
            "scales": ("F32", (rows,)),
        }
        if self.codes == "int4":
            shapes |= {"values": ("U8", (-(-nnz // 2),)), "scales": ("BF16", (rows, -(-columns // 64)))}
        return {part: shapes[part] for part in self.parts}


def part_name(name: str, part: str) -> str:
    """Name under which a part of a weight is stored."""
    return f"{name}_{part}"


def smallest_form(weight: Tensor, *, codes: str | None = None) -> Form | None:
    """The stored form of fewest bytes; None where that is the dense tensor, or for no weight of 2 or 3 dimensions.

    Args:
        weight: on the CPU.
        codes: "int8" or "int4" for the values of sparse weights; then every sparse form is a bit mask.
    """
    dtype = DTYPE_NAMES.get(weight.dtype, "")
    if dtype not in WEIGHT_DTYPES or weight.dim() not in (2, 3) or not weight.numel():
        return None
    matrix = weight.flatten(0, -2)
    form = Form(tuple(weight.shape), dtype)
    shapes = form.part_shapes(int(nonzero_bits(matrix).count_nonzero()))
    size = sum(math.prod(shape) * DTYPES[name].itemsize for name, shape in shapes.values())
    layout = smallest_layout(matrix)
    if layout is not None and compressed_bytes(matrix.shape, matrix.element_size(), *layout) < size and not codes:
        try:
            pack_nm(matrix, *layout)
            return form._replace(pattern=layout[0], dim=layout[1])
        except ValueError:  # negative zeros that have no room
            pass
    if layout is None and size >= weight.nbytes:
        return None
    return form._replace(codes=codes) if size < weight.nbytes or codes else None


def nonzero_bits(weight: Tensor) -> Tensor:
    """Where a floating-point tensor has any bit set: nonzeros, NaN and negative zeros."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return weight.contiguous().view(kinds[weight.element_size()]) != 0


def compress(weight: Tensor, form: Form) -> dict[str, Tensor]:
    """The tensors of a weight in a form, by the endings of their names."""
    matrix = weight.flatten(0, -2).contiguous()
    if form.pattern is not None:
        return dict(zip(form.parts, pack_nm(matrix, form.pattern, form.dim), strict=True))
    values, mask, offsets = bitmask_pack(matrix)
    if not form.codes:
        return {"values": values, "mask": mask, "offsets": offsets}
    codes, scales = bitmask_quantize(values, offsets, mask, bits=CODES[form.codes][2])
    return {"values": codes, "mask": mask, "offsets": offsets, "scales": scales}


def check_parts(form: Form, parts: Mapping[str, Tensor]) -> None:
    """Raise ValueError for tensors that no weight of this form has: offsets, masks, scales, dtypes, shapes.

    Also for scales by which the largest code leaves the range of the weight's dtype.
    """
    if form.pattern is not None:
        check_nm(parts["nm_values"], parts["nm_indices"], form.pattern, form.dim, form.matrix)
        return
    bitmask_validate(parts["values"], parts["mask"], parts["offsets"], form.matrix, parts.get("scales"))
    if form.codes:
        largest = parts["scales"].double() * (2 ** (CODES[form.codes][2] - 1) - 1)
        beyond = ~largest.to(DTYPES[form.dtype]).isfinite()
        if beyond.any():
            at = beyond.nonzero()[0].tolist()
            scale = float(parts["scales"][tuple(at)])
            raise ValueError(f"the scale {scale:g} of row {at[0]} takes codes of {form.codes} beyond {form.dtype}")


def decompress(form: Form, parts: Mapping[str, Tensor]) -> Tensor:
    """The dense weight. Raises ValueError as :func:`check_parts`, and for N:M indices out of range or order."""
    check_parts(form, parts)
    if form.pattern is not None:
        matrix = unpack_nm(parts["nm_values"], parts["nm_indices"], form.pattern, form.dim, form.matrix)
    else:
        dtype = DTYPES[form.dtype] if form.codes else None
        matrix = bitmask_unpack(
            parts["values"], parts["mask"], parts["offsets"], form.matrix, parts.get("scales"), dtype
        )
    return matrix.view(form.shape)
