"""Stored forms of one weight: a bit mask with its values, or N:M values with positions; and the weight back.

A weight of shape (..., in) is a matrix (rows, in) of its flattened leading dimensions.

* ``bitmask``: ``NAME_values`` (nnz,), row after row; ``NAME_mask`` (rows, ceil(in / 32)) int32, bit j of word k for
  column 32 k + j; ``NAME_offsets`` (rows + 1,) int64, where each row begins in the values. Codes have ``NAME_scales``,
  and weight = code * scale: for int8, (rows,) fp32; for int4, (rows, ceil(in / 64)) bf16. Two codes of int4 are in a
  uint8, so that ``NAME_values`` is (ceil(nnz / 2),), the first code in the lower half.
* ``nm``, for groups along ``in``: ``NAME_nm_values`` (rows, in / M, N) of the weight's dtype, and ``NAME_nm_indices``,
  uint8, ``ceil(rows * in / M * N * bits / 8)`` bytes with bits = ceil(log2 M): bit i of the stream of indices in bit
  i % 8 of byte i // 8.

A negative zero is stored as a value, so weights come back bit for bit, unless they were quantised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from leanstep.kernels import bitmask_pack, bitmask_quantize, bitmask_unpack, bitmask_validate
from leanstep.kernels.nm.matmul import nm_compress, nm_decompress
from leanstep.sparsity.patterns import NM
from leanstep.sparsity.training.masks import group_dims, tightest

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
# most entries of a weight of zeros alone: a few bytes of a file would ask for any amount of memory
MOST_ZEROS = 2**30
_LONGEST_GROUP = 256  # an index has 8 bits at most


class Form(NamedTuple):
    """How a weight is stored.

    Attributes:
        shape: of the dense weight, two or three dimensions.
        dtype: of the dense weight, as safetensors names it: F32, F16 or BF16.
        pattern: of the N:M form, with its dimension; None for a bit mask.
        dim: of :attr:`matrix`, along which the groups of ``pattern`` lie.
        codes: "int8" or "int4" for quantised values, else None.
        is_flat: whether ``dim`` counts the dimensions of the flattened matrix, or else of the weight as it is.
    """

    shape: tuple[int, ...]
    dtype: str
    pattern: NM | None = None
    dim: int = 1
    codes: str | None = None
    is_flat: bool = True

    @property
    def matrix(self) -> tuple[int, ...]:
        """Shape (rows, columns) of the weight with its leading dimensions flattened; its shape unless ``is_flat``."""
        return (math.prod(self.shape[:-1]), self.shape[-1]) if self.is_flat else self.shape

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
    def coded(cls, weight: Tensor, codes: str | None) -> Form:
        """The form of a matrix with a bit mask, and codes for all values."""
        return cls(tuple(weight.shape), DTYPE_NAMES[weight.dtype], codes=codes)

    @classmethod
    def from_json(cls, entry: Any, *, is_flat: bool = True) -> Form:
        """The form of an entry. Raises ValueError for one that :meth:`to_json` does not write."""
        if not isinstance(entry, dict):
            raise ValueError(f"expected an object, got {entry!r}")
        shape: Any = entry.get("shape")
        dtype, stored = entry.get("dtype"), entry.get("stored")
        sizes = isinstance(shape, list) and all(type(size) is int and is_flat <= size < _MOST for size in shape)
        if not sizes or (is_flat and len(shape) not in (2, 3)) or math.prod(shape) >= _MOST:
            raise ValueError(f"expected a shape{' of two or three dimensions' * is_flat}, got {shape!r}")
        if is_flat and dtype not in WEIGHT_DTYPES:
            raise ValueError(f"expected a dtype of {', '.join(WEIGHT_DTYPES)}, got {dtype!r}")
        form = cls(tuple(shape), dtype, is_flat=is_flat)  # type: ignore[arg-type]
        if stored == "nm":
            pattern, dim = NM.parse(str(entry.get("pattern"))), entry.get("dim")
            if pattern.m > _LONGEST_GROUP or type(dim) is not int or not 0 <= dim < len(form.matrix):
                raise ValueError(
                    f"expected M of at most {_LONGEST_GROUP} and a dim of {form.matrix}, got {pattern} and {dim!r}"
                )
            if pattern.n == 0 and math.prod(shape) > MOST_ZEROS:
                raise ValueError(f"expected at most {MOST_ZEROS:,} entries of pattern {pattern}, got shape {shape}")
            form = form._replace(pattern=pattern, dim=dim)
        elif stored == "bitmask":
            codes = next((name for name, row in CODES.items() if row[0] == entry.get("values")), None)
            form = form._replace(codes=codes)
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
        if self.pattern is not None:
            values, size = nm_sizes(self.pattern, self.dim, self.matrix)
            return {"nm_values": (self.dtype, values), "nm_indices": ("U8", (size,))}
        rows, columns = self.matrix
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "values": (CODES[self.codes][1] if self.codes else self.dtype, (nnz,)),
            "mask": ("I32", (rows, -(-columns // 32))),
            "offsets": ("I64", (rows + 1,)),
            "scales": ("F32", (rows,)),
        }
        if self.codes == "int4":
            shapes |= {"values": ("U8", (-(-nnz // 2),)), "scales": ("BF16", (rows, -(-columns // 64)))}
        return {part: shapes[part] for part in self.parts}

    def size(self, nnz: int) -> int:
        """Bytes of its tensors; ``nnz`` is the number of values of a bit mask."""
        return sum(math.prod(shape) * DTYPES[name].itemsize for name, shape in self.part_shapes(nnz).values())


def part_name(name: str, part: str, separator: str = "_") -> str:
    """Name under which a part of a weight is stored."""
    return f"{name}{separator}{part}"


def smallest_layout(tensor: Tensor) -> tuple[NM, int] | None:
    """The pattern and dimension (2 of experts, 1 or 0) that make a tensor smallest; None if none makes it smaller."""
    if tensor.dim() < 2 or not tensor.is_floating_point():
        return None
    layouts = [(pattern, dim) for dim in group_dims(tensor) if (pattern := tightest(tensor, dim)) is not None]
    sizes = [compressed_bytes(tensor.shape, tensor.element_size(), *layout) for layout in layouts]
    return layouts[sizes.index(min(sizes))] if sizes and min(sizes) < tensor.nbytes else None


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
    size = form.size(int(nonzero_bits(matrix).count_nonzero()))
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


def compress(weight: Tensor, form: Form, scales: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of a weight in a form, by the endings of their names; with the ``scales`` of its codes, if given."""
    matrix = weight.reshape(form.matrix).contiguous()
    if form.pattern is not None:
        return dict(zip(form.parts, pack_nm(matrix, form.pattern, form.dim), strict=True))
    values, mask, offsets = bitmask_pack(matrix)
    if not form.codes:
        return {"values": values, "mask": mask, "offsets": offsets}
    codes, scales = bitmask_quantize(values, offsets, mask, bits=CODES[form.codes][2], scales=scales)
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


def compressed_bytes(shape: torch.Size | tuple[int, ...], itemsize: int, pattern: NM, dim: int = 1) -> int:
    """Bytes of the values and packed indices of a weight: ``count * itemsize + ceil(count * ceil(log2 M) / 8)``."""
    size = shape[dim]
    count = int(np.prod(shape)) // max(size, 1) * -(-size // pattern.m) * pattern.n
    return count * itemsize + -(-count * index_bits(pattern.m) // 8)


def nm_sizes(pattern: NM, dim: int, shape: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Shape of the values, and bytes of the packed indices, of a weight of ``shape``."""
    others = (size for i, size in enumerate(shape) if i != dim)
    expected = (*others, -(-shape[dim] // pattern.m), pattern.n)
    return expected, -(-math.prod(expected) * index_bits(pattern.m) // 8)


def pack_nm(dense: Tensor, pattern: NM, dim: int) -> tuple[Tensor, Tensor]:
    """The values and packed indices of a weight with groups along ``dim``.

    Raises:
        ValueError: for a weight that violates the pattern, or has more negative zeros than the pattern has room for.
            The message lacks the weight's name.
    """
    rows = dense.movedim(dim, -1)
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % pattern.m)).contiguous()
    values, indices = nm_compress(padded, pattern.n, pattern.m)
    restored = nm_decompress(values, indices, pattern.m)
    # bytes tell negative zeros from positive ones
    if not torch.equal(restored.contiguous().view(torch.uint8), padded.view(torch.uint8)):
        raise ValueError(
            f"it has more negative zeros than {pattern} has room for; add 0.0 to the weight (or squash it), which "
            "makes them positive"
        )
    # the lowest bit of each index first
    stream = (indices.numpy().reshape(-1, 1) >> np.arange(index_bits(pattern.m), dtype=np.uint8)) & 1
    return values.contiguous(), torch.from_numpy(np.packbits(stream.reshape(-1), bitorder="little"))


def unpack_nm(values: Tensor, packed: Tensor, pattern: NM, dim: int, shape: Sequence[int]) -> Tensor:
    """Restore the dense weight of :func:`pack_nm`. Raises ValueError for indices out of range or order."""
    count, width = values.numel(), index_bits(pattern.m)
    stream = np.unpackbits(packed.numpy(), count=count * width, bitorder="little").reshape(count, width)
    weights = np.left_shift(1, np.arange(width)).astype(np.uint16)
    indices = torch.from_numpy((stream * weights).sum(axis=1).astype(np.uint8)).view(values.shape)
    rows = nm_decompress(values, indices, pattern.m)
    return rows[..., : shape[dim]].movedim(-1, dim).contiguous()


def check_nm(values: Tensor, packed: Tensor, pattern: NM, dim: int, shape: Sequence[int]) -> None:
    """Raise ValueError for values or packed indices that are not those of a weight of ``shape``."""
    expected, size = nm_sizes(pattern, dim, shape)
    if tuple(values.shape) != expected or packed.dtype != torch.uint8 or tuple(packed.shape) != (size,):
        raise ValueError(
            f"expected values {expected} for {pattern} of {list(shape)} and {size} bytes of indices, got "
            f"{tuple(values.shape)} and {tuple(packed.shape)} of {packed.dtype}"
        )


def index_bits(m: int) -> int:
    """Bits of one index, ``ceil(log2 m)``."""
    return (m - 1).bit_length()
