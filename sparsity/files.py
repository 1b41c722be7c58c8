"""Safetensors files that store N:M weights without zeros: values, and packed indices of ceil(log2 M) bits each.

A weight of shape (out, in) with groups along ``in`` becomes ``NAME.nm_values`` (out, in / M, N) of the same dtype and
``NAME.nm_indices``, a uint8 vector of ``ceil(out * in / M * N * bits / 8)`` bytes, bit i of the stream in bit i % 8 of
byte i // 8. Other tensors are stored unchanged. The file's metadata has ``layout`` and its checksum, ``layout_crc32``.
The layout lists the weights, tied names, and checksums of all tensors with their dtypes and shapes.
"""

from __future__ import annotations

import json
import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from leanstep._checkpoint import TensorFile
from leanstep._files import one_line, replacing
from leanstep.kernels.nm.matmul import nm_compress, nm_decompress
from leanstep.sparsity.patterns import NM, as_pattern
from leanstep.sparsity.squash import check_finished, plain_state_dict
from leanstep.sparsity.training.masks import group_dims, tightest
from leanstep.sparsity.training.modules import sparse_layers

FORMAT = "leanstep-nm-1"
_VALUES, _INDICES = ".nm_values", ".nm_indices"
# most entries of a weight of zeros alone: a few bytes of a file would ask for any amount of memory
MOST_ZEROS = 2**30


class Stored(NamedTuple):
    """The stored form of one tensor; ``pattern`` is None if it is stored unchanged."""

    name: str
    pattern: NM | None
    dense_bytes: int
    stored_bytes: int


def export_compressed(
    model: nn.Module | Mapping[str, Tensor], path: str | Path, *, patterns: Mapping[str, NM | str] | None = None
) -> list[Stored]:
    """Write a sparse model without its zeros.

    Args:
        model: a model, squashed or at the end of its schedule, or a state dict of plain names.
        path: the file to write, ``*.safetensors``; an existing file is replaced.
        patterns: tensor name -> pattern, for groups along dimension 1. None: the targets of a model that trains sparse;
            for any other model, the sparsest pattern that each matrix obeys, if that makes the matrix smaller.

    Returns:
        One row per stored tensor, with its bytes before and after.

    Raises:
        ValueError: for a weight that violates its pattern, a weight with more negative zeros than its pattern has room
            for, an unfinished schedule, an unknown name, or a pattern with M above 256. Nothing is written.
        OSError: if the file cannot be written.

    Notes:
        :func:`load_compressed` restores every tensor bit for bit.
    """
    state, layouts = _state_and_layouts(model, patterns)
    stored: dict[str, Tensor] = {}
    layout: dict[str, Any] = {"tensors": {}, "aliases": {}}
    rows, first_names, addresses = [], dict[tuple[Any, ...], str](), set[int]()
    for name, tensor in state.items():
        memory = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        # a view of another dtype, or of the conjugate, has other values in the same memory
        identity = (*memory, tensor.dtype, tensor.is_conj(), tensor.is_neg())
        if tensor.numel() and identity in first_names:
            layout["aliases"][name] = first_names[identity]
            continue
        first_names[identity] = name
        dense = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        if name not in layouts:
            # safetensors refuses two tensors of one memory
            address = dense.untyped_storage().data_ptr()
            stored[name] = dense.clone() if address in addresses else dense
            addresses.add(address)
            rows.append(Stored(name, None, dense.nbytes, dense.nbytes))
            continue
        pattern, dim = layouts[name]
        values, indices = _compress(name, dense, pattern, dim)
        stored[name + _VALUES], stored[name + _INDICES] = values, indices
        layout["tensors"][name] = {"pattern": str(pattern), "dim": dim, "shape": list(dense.shape)}
        rows.append(Stored(name, pattern, dense.nbytes, values.nbytes + indices.nbytes))
    layout["crc32"] = {name: _checksum(tensor) for name, tensor in stored.items()}
    text = json.dumps(layout)
    metadata = {"format": FORMAT, "layout": text, "layout_crc32": str(zlib.crc32(text.encode()))}
    with replacing(Path(path)) as partial:
        save_file(stored, partial, metadata=metadata)
    return rows


def load_compressed(path: str | Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Read a file of :func:`export_compressed`.

    Args:
        path: the file to read.
        model: a plain model of the same architecture to load the file into, or None. It changes only if the whole file
            is valid.

    Returns:
        The dense state dict, bit for bit as exported.

    Raises:
        ValueError: for a truncated or damaged file (a wrong checksum or index), another format, a model that is sparse
            itself, or a model with other names or shapes.

    Notes:
        Warns for a file of a version before 0.1.0, which has checksums of the N:M weights only.
    """
    path = Path(path)
    layout, stored = _read(path)
    _compare_checksums(path, stored, layout)
    state: dict[str, Tensor] = {}
    try:
        for name, entry in layout["tensors"].items():
            state[name] = _decompress(f"{path}: {name}", stored.pop(name + _VALUES), stored.pop(name + _INDICES), entry)
        state |= stored
        state |= {name: state[target] for name, target in layout["aliases"].items()}
    except KeyError as error:
        raise ValueError(f"load_compressed: {path} is damaged: it has no tensor {error}") from None
    if model is not None:
        _load_into(model, state, path)
    return state


def is_compressed(path: str | Path) -> bool:
    """Whether the header of a file is that of :func:`export_compressed`."""
    try:
        with TensorFile(Path(path)) as file:
            return file.metadata.get("format") == FORMAT
    except (ValueError, OSError):
        return False


def compressed_bytes(shape: torch.Size | tuple[int, ...], itemsize: int, pattern: NM, dim: int = 1) -> int:
    """Bytes of the values and packed indices of a weight: ``count * itemsize + ceil(count * ceil(log2 M) / 8)``."""
    size = shape[dim]
    count = int(np.prod(shape)) // max(size, 1) * -(-size // pattern.m) * pattern.n
    return count * itemsize + -(-count * index_bits(pattern.m) // 8)


def index_bits(m: int) -> int:
    """Bits of one index, ``ceil(log2 m)``."""
    return (m - 1).bit_length()


def pack_indices(indices: Tensor, m: int) -> Tensor:
    """Pack uint8 indices below m into a uint8 vector, as a bit stream with the lowest bit of each index first."""
    bits = np.arange(index_bits(m), dtype=np.uint8)
    stream = (indices.numpy().reshape(-1, 1) >> bits) & 1
    return torch.from_numpy(np.packbits(stream.reshape(-1), bitorder="little"))


def unpack_indices(packed: Tensor, count: int, m: int) -> Tensor:
    """Unpack the first ``count`` indices of a bit stream, as uint8."""
    width = index_bits(m)
    stream = np.unpackbits(packed.numpy(), count=count * width, bitorder="little").reshape(count, width)
    weights = np.left_shift(1, np.arange(width)).astype(np.uint16)
    return torch.from_numpy((stream * weights).sum(axis=1).astype(np.uint8))


def _compress(name: str, dense: Tensor, pattern: NM, dim: int) -> tuple[Tensor, Tensor]:
    try:
        return pack_nm(dense, pattern, dim)
    except ValueError as error:
        raise ValueError(f"export_compressed: {name}: {error}") from None


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
    return values.contiguous(), pack_indices(indices, pattern.m)


def _decompress(where: str, values: Tensor, packed: Tensor, entry: dict[str, Any]) -> Tensor:
    pattern, dim, shape = _checked_entry(where, entry)
    try:
        check_nm(values, packed, pattern, dim, shape)
        if entry.get("crc32") not in (None, [_bytes_checksum(values), _bytes_checksum(packed)]):
            raise ValueError("the checksum is wrong: values or indices were changed after writing")
        return unpack_nm(values, packed, pattern, dim, shape)
    except (ValueError, RuntimeError) as error:  # wrong indices; a shape that no memory holds
        raise ValueError(f"load_compressed: {where}: {one_line(error)}") from None


def nm_sizes(pattern: NM, dim: int, shape: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Shape of the values, and bytes of the packed indices, of a weight of ``shape``."""
    others = (size for i, size in enumerate(shape) if i != dim)
    expected = (*others, -(-shape[dim] // pattern.m), pattern.n)
    return expected, -(-math.prod(expected) * index_bits(pattern.m) // 8)


def check_nm(values: Tensor, packed: Tensor, pattern: NM, dim: int, shape: Sequence[int]) -> None:
    """Raise ValueError for values or packed indices that are not those of a weight of ``shape``."""
    expected, size = nm_sizes(pattern, dim, shape)
    if tuple(values.shape) != expected or packed.dtype != torch.uint8 or tuple(packed.shape) != (size,):
        raise ValueError(
            f"expected values {expected} for {pattern} of {list(shape)} and {size} bytes of indices, got "
            f"{tuple(values.shape)} and {tuple(packed.shape)} of {packed.dtype}"
        )


def unpack_nm(values: Tensor, packed: Tensor, pattern: NM, dim: int, shape: Sequence[int]) -> Tensor:
    """Restore the dense weight of :func:`pack_nm`. Raises ValueError for indices out of range or order."""
    indices = unpack_indices(packed, values.numel(), pattern.m).view(values.shape)
    rows = nm_decompress(values, indices, pattern.m)
    return rows[..., : shape[dim]].movedim(-1, dim).contiguous()


def _checked_entry(where: str, entry: Any) -> tuple[NM, int, list[int]]:
    """Check a weight's entry of the layout; returns its pattern, dimension and shape."""
    try:
        pattern, dim, shape = NM.parse(entry["pattern"]), entry["dim"], entry["shape"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"load_compressed: {where}: the layout is damaged: {error}") from None
    sizes = isinstance(shape, list) and all(type(size) is int and 0 <= size < 2**48 for size in shape)
    if not sizes or type(dim) is not int or not 0 <= dim < len(shape) or pattern.m > 256:
        raise ValueError(
            f"load_compressed: {where}: the layout is damaged: pattern {pattern}, dim {dim!r}, shape {shape!r}"
        )
    if pattern.n == 0 and math.prod(shape) > MOST_ZEROS:
        raise ValueError(
            f"load_compressed: {where}: expected a weight of zeros alone (pattern {pattern}) to have at most "
            f"{MOST_ZEROS:,} entries, got shape {shape}: no stored value bounds it"
        )
    return pattern, dim, shape


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The layout in a file's header, and the stored tensors."""
    try:
        with TensorFile(path, writable=True) as file:
            metadata = file.metadata
            names = file.names if metadata.get("format") == FORMAT else ()
            stored = {name: file.tensor(name) for name in names}
    except FileNotFoundError:
        raise ValueError(f"load_compressed: {path} is not there") from None
    except ValueError as error:
        raise ValueError(f"load_compressed: {error}: it is truncated, or not a safetensors file") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"load_compressed: {path} has the format {metadata.get('format')!r}, expected {FORMAT!r}, as "
            "export_compressed writes it; plain safetensors files are read by safetensors.torch.load_file"
        )
    text = metadata.get("layout", "")
    if metadata.get("layout_crc32", str(zlib.crc32(text.encode()))) != str(zlib.crc32(text.encode())):
        raise ValueError(f"load_compressed: the header of {path} is damaged: the checksum of its layout is wrong")
    try:
        layout = json.loads(text)
        sections = {key: layout.get(key) for key in ("tensors", "aliases", "crc32")}
        if not all(isinstance(sections[key], dict) for key in ("tensors", "aliases")):
            raise ValueError("expected objects 'tensors' and 'aliases'")
        if not all(isinstance(target, str) for target in sections["aliases"].values()):
            raise ValueError("expected aliases that are names of tensors")
        if ("layout_crc32" in metadata) != isinstance(sections["crc32"], dict):
            raise ValueError("expected checksums of the tensors and of the layout, or neither")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"load_compressed: the header of {path} is damaged: {error}") from None
    return sections, stored


def _compare_checksums(path: Path, stored: Mapping[str, Tensor], layout: Mapping[str, Any]) -> None:
    checksums = layout["crc32"]
    if checksums is None:
        warnings.warn(
            f"load_compressed: {path} was written by an earlier version, without checksums of all its tensors; export "
            "it again to have them",
            stacklevel=3,
        )
        return
    differing = sorted(stored.keys() ^ checksums.keys())
    if differing:
        raise ValueError(f"load_compressed: {path} is damaged: only its tensors or only its layout has {differing[0]}")
    wrong = [name for name, tensor in stored.items() if _checksum(tensor) != checksums[name]]
    if wrong:
        raise ValueError(f"load_compressed: {path}: the checksum is wrong: {wrong[0]} was changed after writing")


def _state_and_layouts(
    model: nn.Module | Mapping[str, Tensor], patterns: Mapping[str, NM | str] | None
) -> tuple[dict[str, Tensor], dict[str, tuple[NM, int]]]:
    """The plain state, and the (pattern, dimension) of each tensor to compress."""
    layouts: dict[str, tuple[NM, int]] = {}
    if isinstance(model, nn.Module):
        check_finished(sparse_layers(model), "export_compressed", "squash it with unfinished='keep' first")
        state = plain_state_dict(model)
        for layer in sparse_layers(model):
            layouts |= dict.fromkeys(layer.names, (layer.target, layer.dim))
    else:
        state = dict(model)
    if patterns is not None:
        unknown = [name for name in patterns if name not in state]
        if unknown:
            raise ValueError(f"export_compressed: there is no tensor {unknown[0]!r}; the names are {', '.join(state)}")
        layouts = {name: (as_pattern(pattern), 1) for name, pattern in patterns.items()}
    elif not layouts:
        layouts = {name: layout for name, tensor in state.items() if (layout := smallest_layout(tensor)) is not None}
    return state, layouts


def smallest_layout(tensor: Tensor) -> tuple[NM, int] | None:
    """The pattern and dimension (2 of experts, 1 or 0) that make a tensor smallest; None if none makes it smaller."""
    if tensor.dim() < 2 or not tensor.is_floating_point():
        return None
    layouts = [(pattern, dim) for dim in group_dims(tensor) if (pattern := tightest(tensor, dim)) is not None]
    sizes = [compressed_bytes(tensor.shape, tensor.element_size(), *layout) for layout in layouts]
    return layouts[sizes.index(min(sizes))] if sizes and min(sizes) < tensor.nbytes else None


def _load_into(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    target = model.state_dict()
    if any(".parametrizations." in name for name in target):
        raise ValueError(
            "load_compressed: the model has parametrized weights, but the file holds plain ones; load it into a plain "
            "model, and call sparsify on that to continue training"
        )
    differing = sorted(target.keys() ^ state.keys())
    differing += [name for name in target.keys() & state.keys() if target[name].shape != state[name].shape]
    if differing:
        raise ValueError(f"load_compressed: {path} is of another model: {', '.join(differing[:5])} differ")
    model.load_state_dict(state)


def _checksum(tensor: Tensor) -> int:
    """Checksum of dtype, shape and bytes."""
    return zlib.crc32(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), _bytes_checksum(tensor))


def _bytes_checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
