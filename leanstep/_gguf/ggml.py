"""The number formats of GGUF files: quantised and read back by ggml itself, so that the values are those of engines."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

INSTALL = 'pip install "leanstep[gguf]"'
try:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
except ImportError as error:
    raise ImportError(f"GGUF files need the package gguf: {INSTALL}") from error

_NAMES = (
    *(
        "F32",
        "F16",
        "BF16",
        "Q8_0",
        "Q6_K",
        "Q5_1",
        "Q5_K",
        "Q5_0",
        "Q4_1",
        "Q4_K",
        "IQ4_NL",
        "Q4_0",
        "IQ4_XS",
        "MXFP4",
    ),
    *("Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS"),
)
# ggml ends the process where it must choose their codes without one
_NEED_IMPORTANCE = {"IQ2_XS", "IQ2_XXS"}
# the others scale their blocks by numbers of 16 bits
_ANY_RANGE = {"F32", "BF16", "MXFP4"}
_LARGEST = torch.finfo(torch.float16).max
# of a column, beside the largest
_LEAST_IMPORTANCE = 1e-12
# values that a thread quantises at once
_PIECE = 1 << 20


@dataclass(frozen=True)
class GgmlType:
    """A number format: ``block`` neighbouring values of a row share ``size`` bytes."""

    name: str
    block: int
    size: int
    needs_importance: bool

    @property
    def bits(self) -> float:
        """Bits of a value, scales included."""
        return 8 * self.size / self.block


#: by name, most bits first
TYPES: dict[str, GgmlType] = {
    name: GgmlType(name, *GGML_QUANT_SIZES[GGMLQuantizationType[name]], name in _NEED_IMPORTANCE) for name in _NAMES
}


def legal_types(columns: int) -> tuple[GgmlType, ...]:
    """Formats that rows of so many values can have, most bits first."""
    return tuple(type for type in TYPES.values() if columns > 0 and columns % type.block == 0)


def legal_or_larger(type: str, columns: int) -> GgmlType:
    """The format itself where rows of so many values can have it, else the next larger one that needs no importance."""
    bits = _known(type).bits
    legal = legal_types(columns)
    if TYPES[type] in legal:
        return TYPES[type]
    # scales of MXFP4 are powers of two: formats of a little more bits are far nearer
    larger = [one for one in legal if one.bits >= bits and not one.needs_importance and one.name != "MXFP4"]
    return min(larger, key=lambda one: one.bits)


def bytes_of(type: str, rows: int, columns: int) -> int:
    """Bytes of a matrix. Raises ValueError if rows of so many values cannot have the format."""
    row = _known(type)
    if columns % row.block:
        names = ", ".join(one.name for one in legal_types(columns))
        raise ValueError(f"{type} needs rows of a multiple of {row.block} values, got {columns}: choose one of {names}")
    return rows * (columns // row.block) * row.size


def quantize(weight: Tensor, type: str, importance: Tensor | None = None) -> Tensor:
    """Write a matrix in a format of ggml, by ggml.

    Args:
        weight: (rows, columns), any floating-point dtype.
        type: a name of :data:`TYPES`.
        importance: (columns,), weights of the squared errors within a row, such as mean squares of the inputs.

    Returns:
        uint8, (rows, bytes of a row), on the CPU.

    Raises:
        ValueError: the shape cannot have the format, values are not finite or too large for its scales, or
            ``importance`` is missing where it is needed, of another shape, negative or not finite.
        ImportError: ggml is not installed.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"expected a floating-point matrix, got {weight.dtype} of shape {tuple(weight.shape)}")
    rows, columns = weight.shape
    row_bytes = bytes_of(type, 1, columns)
    source = weight.detach().to("cpu", torch.float32).contiguous()
    largest = torch.tensor(0.0) if not source.numel() else torch.maximum(source.max(), -source.min())
    if not largest.isfinite():
        raise ValueError(f"cannot write values that are not finite as {type}: look for NaN and infinity in the weights")
    if largest > _LARGEST and type not in _ANY_RANGE:
        raise ValueError(f"{type} holds values up to {_LARGEST:g}, the weights have {largest:g}: choose F32 or BF16")
    weights = _checked_importance(importance, type, columns)
    data = torch.empty(rows, row_bytes, dtype=torch.uint8)
    library, code = ggml_library(), GGMLQuantizationType[type].value
    library.ggml_quantize_init(code)
    pointer = None if weights is None else weights.data_ptr()

    def quantize_rows(start: int, count: int) -> None:
        library.ggml_quantize_chunk(code, source.data_ptr(), data.data_ptr(), start * columns, count, columns, pointer)

    _in_threads(quantize_rows, rows, columns)
    return data


def dequantize(data: Tensor, type: str, columns: int) -> Tensor:
    """Read a matrix of :func:`quantize` (uint8, rows x bytes of a row) as fp32, (rows, columns), by ggml.

    Raises:
        ValueError: the bytes are not those of such rows.
        ImportError: ggml is not installed.
    """
    row_bytes = bytes_of(type, 1, columns)
    if data.dtype != torch.uint8 or data.dim() != 2 or data.shape[1] != row_bytes:
        raise ValueError(
            f"{columns} values as {type} are uint8 rows of {row_bytes} bytes, got {data.dtype} of {tuple(data.shape)}"
        )
    source = data.cpu().contiguous()
    values = torch.empty(len(source), columns, dtype=torch.float32)
    if type == "F32":  # ggml reads it as it is
        return values.copy_(source.view(torch.float32))
    to_float = _traits(ggml_library(), type).to_float

    def read_rows(start: int, count: int) -> None:
        to_float(source.data_ptr() + start * row_bytes, values.data_ptr() + 4 * start * columns, count * columns)

    _in_threads(read_rows, len(source), columns)
    return values


def _known(type: str) -> GgmlType:
    if type not in TYPES:
        raise ValueError(f"unknown type {type!r}: expected one of {', '.join(TYPES)}")
    return TYPES[type]


def _checked_importance(importance: Tensor | None, type: str, columns: int) -> Tensor | None:
    if importance is None:
        if TYPES[type].needs_importance:
            raise ValueError(f"{type} needs the importance of each column: measure it, or choose a type of more bits")
        return None
    weights = importance.detach().to("cpu", torch.float32).contiguous()
    if weights.shape != (columns,):
        raise ValueError(f"expected one importance for each of {columns} columns, got shape {tuple(weights.shape)}")
    if not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError("the importance of columns must be finite and not negative: look for NaN in the inputs")
    # ggml's sums of products overflow for large ones, where it ends the process, and a block without any becomes zeros
    largest = float(weights.max()) if columns else 0.0
    if not largest:
        return torch.ones(columns)
    scaled = weights.double() * 2.0 ** -math.frexp(largest)[1]
    return scaled.clamp(min=_LEAST_IMPORTANCE).float()


def _in_threads(work: Callable[[int, int], None], rows: int, columns: int) -> None:
    """Call a function with starts and numbers of rows, in as many threads as torch has: rows are independent."""
    step = max(1, _PIECE // max(1, columns))
    if rows <= step:
        return work(0, rows)
    starts = range(0, rows, step)
    with ThreadPoolExecutor(max(1, min(torch.get_num_threads(), len(starts)))) as threads:
        list(threads.map(lambda start: work(start, min(step, rows - start)), starts))


class _Traits(ctypes.Structure):
    """``ggml_type_traits`` up to the function that reads."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


_POINTER = ctypes.c_void_p
_FUNCTIONS = {
    "ggml_quantize_init": (None, [ctypes.c_int]),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p],
    ),
    "ggml_get_type_traits": (ctypes.POINTER(_Traits), [ctypes.c_int]),
    "ggml_version": (ctypes.c_char_p, []),
    "ggml_commit": (ctypes.c_char_p, []),
}


@functools.cache
def ggml_library() -> ctypes.CDLL:
    """The library of ggml that the package llama-cpp-py-sync brings.

    Raises:
        ImportError: there is none.
        ValueError: it lacks a function, or its formats are others than those of the package gguf.
    """
    library = open_library("ggml-base")
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name, None)
        if function is None:
            raise ValueError(f"{library._name} has no function {name}: {INSTALL} installs a version that has it")
        function.restype, function.argtypes = result, arguments
    for type in TYPES.values():
        traits = _traits(library, type.name)
        if (traits.blck_size, traits.type_size) != (type.block, type.size):
            raise ValueError(f"{library._name} has another {type.name} than the package gguf: {INSTALL} installs both")
    return library


def ggml_version() -> str:
    """Version and commit of the library, by which its codes may differ. Raises as :func:`ggml_library`."""
    library = ggml_library()
    return f"{library.ggml_version().decode()} {library.ggml_commit().decode()}"


def open_library(name: str) -> ctypes.CDLL:
    """Open a library of the package llama-cpp-py-sync. Raises ImportError if there is none."""
    spec = importlib.util.find_spec("llama_cpp_py_sync")
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.glob(f"lib{name}.*"))
    if not files:
        raise ImportError(f"GGUF files need the package llama-cpp-py-sync with its library {name}: {INSTALL}")
    try:
        return ctypes.CDLL(str(files[0]))
    except OSError as error:
        raise ImportError(f"{files[0]} cannot be opened ({error}): {INSTALL} installs one for this machine") from error


def _traits(library: ctypes.CDLL, type: str) -> _Traits:
    return library.ggml_get_type_traits(GGMLQuantizationType[type].value).contents
