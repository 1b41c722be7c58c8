"""Safetensors files that store N:M weights without zeros: values, and packed indices of ceil(log2 M) bits each.

A weight of shape (out, in) with groups along ``in`` becomes ``NAME.nm_values`` and ``NAME.nm_indices``, as
:mod:`leanstep.sparsity.inference.matrices` defines them. Other tensors are stored unchanged. The file's metadata has
``layout`` and its checksum, ``layout_crc32``. The layout lists the weights, tied names, and checksums of all tensors
with their dtypes and shapes.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor, nn

from leanstep._checkpoint.files import TensorFile
from leanstep._files import replacing
from leanstep.sparsity.inference.manifest import Kind, Manifest, StoredTensor, checksum, parse, read_name, read_section
from leanstep.sparsity.inference.matrices import Form, compress, smallest_layout
from leanstep.sparsity.inference.reader import SparseFiles, metadata_of
from leanstep.sparsity.patterns import NM, as_pattern
from leanstep.sparsity.squash import check_finished, plain_state_dict
from leanstep.sparsity.training.modules import sparse_layers

FORMAT = "leanstep-nm-1"


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
            for, an unfinished schedule, an unknown name, a tensor with the name of a part of a sparse one, or a pattern
            with M above 256. Nothing is written.
        OSError: if the file cannot be written.

    Notes:
        :func:`load_compressed` restores every tensor bit for bit.
    """
    state, layouts = _state_and_layouts(model, patterns)
    manifest, stored, rows = Manifest(kind=_KIND), dict[str, Tensor](), list[Stored]()
    first_names, addresses = dict[tuple[Any, ...], str](), set[int]()
    for name, tensor in state.items():
        memory = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        # a view of another dtype, or of the conjugate, has other values in the same memory
        identity = (*memory, tensor.dtype, tensor.is_conj(), tensor.is_neg())
        if tensor.numel() and identity in first_names:
            manifest.tied[name] = first_names[identity]
            continue
        first_names[identity] = name
        dense = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        pattern, dim = layouts.get(name, (None, 0))
        if pattern is None:
            # safetensors refuses two tensors of one memory
            address = dense.untyped_storage().data_ptr()
            stored[name] = dense.clone() if address in addresses else dense
            addresses.add(address)
            rows.append(Stored(name, None, dense.nbytes, dense.nbytes))
            continue
        form = manifest.matrices[name] = Form(tuple(dense.shape), "", pattern, dim, is_flat=False)
        try:
            parts = {manifest.part_name(name, part): tensor for part, tensor in compress(dense, form).items()}
        except ValueError as error:
            raise ValueError(f"export_compressed: {name}: {error}") from None
        if clashes := sorted(parts.keys() & state.keys()):
            raise ValueError(f"export_compressed: {clashes[0]} has the name of a part of {name}; rename it")
        stored |= parts
        rows.append(Stored(name, pattern, dense.nbytes, sum(part.nbytes for part in parts.values())))
    with replacing(Path(path)) as partial:
        save_file(stored, partial, metadata=_to_metadata(manifest, stored))
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
    """
    path = Path(path)
    try:
        with SparseFiles([path], _read_manifest) as files:
            manifest = files.manifest
            state = {name: files.tensor(name) for name in (*manifest.matrices, *files.dense_names())}
    except FileNotFoundError:
        raise ValueError(f"load_compressed: {path} is not there") from None
    except ValueError as error:
        raise ValueError(f"load_compressed: {error}") from None
    state |= {name: state[target] for name, target in manifest.tied.items()}
    if model is not None:
        _load_into(model, state, path)
    return state


def is_compressed(path: str | Path) -> bool:
    """Whether the header of a file is that of :func:`export_compressed`."""
    return metadata_of(Path(path)).get("format") == FORMAT


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), checksum(tensor))


_KIND = Kind(".", _checksum)


def _to_metadata(manifest: Manifest, stored: Mapping[str, Tensor]) -> dict[str, str]:
    forms = manifest.matrices.items()
    layout = {
        "tensors": {name: {"pattern": str(f.pattern), "dim": f.dim, "shape": list(f.shape)} for name, f in forms},
        "aliases": manifest.tied,
        "crc32": {name: manifest.kind.checksum(tensor) for name, tensor in stored.items()},
    }
    text = json.dumps(layout)
    return {"format": FORMAT, "layout": text, "layout_crc32": str(zlib.crc32(text.encode()))}


def _read_manifest(file: TensorFile) -> Manifest:
    """The manifest in a file's header. Raises ValueError for anything that :func:`_to_metadata` does not write."""
    if file.metadata.get("format") != FORMAT:
        raise ValueError(
            f"it has the format {file.metadata.get('format')!r}, expected {FORMAT!r}, as export_compressed writes it; "
            "plain safetensors files are read by safetensors.torch.load_file"
        )
    text = file.metadata.get("layout", "")
    if file.metadata.get("layout_crc32") != str(zlib.crc32(text.encode())):
        raise ValueError("its header is damaged: the checksum of its layout is wrong; versions before 0.1.0 wrote none")
    content = parse(text)
    manifest = Manifest(tied=read_section(content, "aliases", read_name), kind=_KIND)
    entries = read_section(content, "tensors", dict)
    checksums = read_section(content, "crc32", _number)
    if differing := sorted(checksums.keys() ^ set(file.names)):
        raise ValueError(f"it is damaged: only its tensors or only its layout has {differing[0]}")
    for name in file.names:
        manifest.tensors[name] = StoredTensor(file.dtype(name), file.shape(name), checksums[name])

    def read_form(name: str) -> Form:
        values = manifest.tensors.get(manifest.part_name(name, "nm_values"))
        stored = {"dtype": "" if values is None else values.dtype, "stored": "nm"}
        return Form.from_json({**entries[name], **stored}, is_flat=False)

    manifest.matrices = read_section({"tensors": {name: name for name in entries}}, "tensors", read_form)
    manifest.check()
    return manifest


def _number(entry: Any) -> int:
    if type(entry) is not int:
        raise ValueError(f"expected a checksum, got {entry!r}")
    return entry


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
