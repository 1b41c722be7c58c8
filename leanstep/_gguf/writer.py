"""Write a Hugging Face folder as a GGUF file: metadata, tokenizer and all tensors, each in a type of its own."""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leanstep._checkpoint.configuration import check_folder
from leanstep._checkpoint.files import TensorFile, check_space, read_json, shards
from leanstep._files import one_line, replacing
from leanstep._gguf.architectures import Architecture, architecture_of, metadata, permute_rows, rope_tensor, transform
from leanstep._gguf.ggml import TYPES, bytes_of, legal_or_larger, quantize
from leanstep._gguf.vocabulary import Vocabulary, engine, read_vocabulary

# vocabulary imports it first, and says what to install where it is missing
from gguf import (  # isort: skip
    GGUF_DEFAULT_ALIGNMENT,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    PoolingType,
    get_tensor_name_map,
)

# beginnings of the names of matrices that llama.cpp adds to activations
_ADDED = ("position_embd.", "token_types.")


@dataclass(frozen=True)
class _Stored:
    """A tensor of the folder: its name in the file to write, its shape there, and the file it is in."""

    name: str
    shape: tuple[int, ...]
    file: Path

    @property
    def must_be_float(self) -> bool:
        """Whether llama.cpp wants it in F32."""
        return len(self.shape) == 1 or self.name.startswith(_ADDED)


@dataclass
class _Plan:
    """What a file will hold."""

    folder: Path
    config: dict[str, Any]
    row: Architecture
    tensors: dict[str, _Stored]
    vocabulary: Vocabulary
    computed: dict[str, Tensor] = field(default_factory=dict)

    def type_of(self, name: str, types: Mapping[str, str], default: str) -> str:
        """The type of a tensor: what ``types`` says, else the default, or the next larger that its shape can have."""
        stored = self.tensors[name]
        if stored.must_be_float:
            if types.get(name, "F32") != "F32":
                raise ValueError(f"{name} is written in F32, which engines need; got {types[name]}")
            return "F32"
        if name not in types:
            return legal_or_larger(default, stored.shape[-1]).name
        bytes_of(types[name], 1, stored.shape[-1])
        return types[name]

    def writer(self, types: Mapping[str, str], default: str) -> GGUFWriter:
        """A writer that knows all keys and tensors."""
        unknown = sorted(set(types) - set(self.tensors))
        if unknown:
            raise ValueError(f"{self.folder} has no tensor {unknown[0]!r} to write in {types[unknown[0]]}")
        if default not in TYPES or TYPES[default].needs_importance:
            fit = ", ".join(name for name, type in TYPES.items() if not type.needs_importance)
            raise ValueError(f"expected a type for the matrices that are given no other of {fit}; got {default!r}")
        writer = _header(self.row, self.config, self.folder, default)
        self.vocabulary.add_to(writer)
        for name, stored in self.tensors.items():
            _add_info(writer, stored.name, stored.shape, self.type_of(name, types, default))
        for name, tensor in self.computed.items():
            _add_info(writer, name, tuple(tensor.shape), "F32")
        return writer


def check_writable(folder: str | Path) -> None:
    """Check that a folder can be written as GGUF; reads no weights.

    Raises:
        ValueError: the architecture, a setting of it, a tensor or the tokenizer cannot be written; says what can.
        ImportError: a package is not installed.
    """
    _check_engine(_plan(Path(folder)))


def tensor_names(folder: str | Path) -> dict[str, str]:
    """Names in GGUF of the folder's tensors that are written; a tied head is not. Raises as :func:`check_writable`."""
    return {name: stored.name for name, stored in _plan(Path(folder)).tensors.items()}


def file_bytes(folder: str | Path, types: Mapping[str, str], default: str = "F16") -> int:
    """Bytes of the file that :func:`write_gguf` writes where the matrices have these types. Raises as that."""
    return _size(_plan(Path(folder)).writer(types, default))


def write_gguf(
    folder: str | Path,
    out: str | Path,
    encoded: Mapping[str, tuple[str, Tensor]] | None = None,
    default: str = "F16",
) -> dict[str, str]:
    """Write a Hugging Face folder as a file that llama.cpp opens. One tensor at a time is in memory.

    Args:
        folder: with config.json, safetensors weights and tokenizer.json.
        out: the file to create.
        encoded: matrices by their names in the folder: type, and bytes, uint8 (out, bytes of a row).
        default: type of the other matrices; where a shape cannot have it, the next larger one. Vectors, and what is
            added to activations, are in F32.

    Returns:
        The type of each tensor, by its name in the folder.

    Raises:
        ValueError: as :func:`check_writable`; ``out`` exists; a name, shape or type does not fit; NaN or infinity.
        OSError: the file could not be written; there is none then.
    """
    plan, out = _plan(Path(folder)), Path(out)
    encoded = encoded or {}
    types = {name: type for name, (type, _) in encoded.items()}
    for name, (type, data) in encoded.items():
        _check_encoded(plan, name, type, data)
    needed = _size(plan.writer(types, default))
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists already, and nothing is overwritten; name another file, or remove it")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out} cannot be made: {out.absolute().parent} is no folder; make it, or name another")
    check_space(out, needed)
    _check_engine(plan)
    writer, types = plan.writer(types, default), {name: plan.type_of(name, types, default) for name in plan.tensors}
    with replacing(out) as path:
        try:
            _write_header(writer, path)
            for name, type in types.items():
                data = encoded[name][1] if name in encoded else _encode(plan, name, type)
                writer.write_tensor_data(permute_rows(plan.row, plan.config, name, data).contiguous().cpu().numpy())
            for tensor in plan.computed.values():
                writer.write_tensor_data(tensor.numpy())
        finally:
            writer.close()
    return types


def _plan(folder: Path) -> _Plan:
    check_folder(folder, tokenizer=True)
    config = _read_config(folder)
    row = architecture_of(config, folder)
    tensors = _tensors(folder, config, row)
    rope = rope_tensor(config) if row.name == "llama" else None
    vocabulary = _vocabulary(folder, *_state(folder))
    return _Plan(folder, config, row, tensors, vocabulary, {} if rope is None else {"rope_freqs.weight": rope})


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / "config.json")
    except FileNotFoundError:
        raise ValueError(f"{folder} is no checkpoint: it has no config.json") from None
    if (quantised := config.get("quantization_config")) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        advice = (
            "write it back by leanstep export --format dense" if method == "leanstep" else "take what it was made of"
        )
        raise ValueError(f"{folder} is compressed already ({method}): expected plain weights; {advice}")
    return {**config, "pooling": _pooling(folder)}


def _pooling(folder: Path) -> PoolingType:
    """How sentence-transformers makes one vector of a text's."""
    try:
        pooling = read_json(folder / "1_Pooling" / "config.json")
    except (FileNotFoundError, NotADirectoryError):
        return PoolingType.NONE
    if pooling.get("pooling_mode_mean_tokens") or pooling.get("pooling_mode") == "mean":
        return PoolingType.MEAN
    return PoolingType.CLS if pooling.get("pooling_mode_cls_token") else PoolingType.NONE


def _state(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """What tells one version of the files of a tokenizer from another."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    files = [path.stat() if (path := folder / name).exists() else None for name in names]
    return tuple((name, one.st_mtime_ns, one.st_size) for name, one in zip(names, files, strict=True) if one)


# comparing a large vocabulary takes seconds
@functools.lru_cache(maxsize=8)
def _vocabulary(folder: Path, *_state: tuple[str, int, int]) -> Vocabulary:
    config = _read_config(folder)
    row = architecture_of(config, folder)
    return read_vocabulary(folder, config["vocab_size"], lambda: _header(row, config, folder, "F16"))


def _tensors(folder: Path, config: dict[str, Any], row: Architecture) -> dict[str, _Stored]:
    """The tensors to write by their names in the folder."""
    architecture = next(one for one, name in MODEL_ARCH_NAMES.items() if name == row.name)
    names = get_tensor_name_map(MODEL_ARCH(architecture), metadata(row, config)["block_count"])
    tied = bool(config.get("tie_word_embeddings", row.name not in ("llama", "qwen2", "qwen3")))
    tensors: dict[str, _Stored] = {}
    for path in _weight_files(folder):
        with TensorFile(path) as file:
            for name in file.names:
                if name.endswith(row.dropped) or (tied and name == "lm_head.weight"):
                    continue
                gguf_name = names.get_name(name.removeprefix(row.prefix), try_suffixes=(".weight", ".bias"))
                shape = file.shape(name)
                if gguf_name is None or gguf_name.startswith("cls.") or not 1 <= len(shape) <= 2:
                    raise ValueError(
                        f"{folder}: {name} {shape} cannot be written: llama.cpp's {row.name} has none such"
                    )
                if name.endswith(row.transposed):
                    shape = shape[::-1]
                tensors[name] = _Stored(gguf_name, shape, path)
    embedding = next((one.shape for one in tensors.values() if one.name == "token_embd.weight"), None)
    if embedding is None or embedding[0] != config["vocab_size"]:
        raise ValueError(f"{folder}: expected an embedding of {config['vocab_size']} tokens, got {embedding}")
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not (folder / "model.safetensors").is_file() and index.is_file():
        return [folder / name for name in shards(index)]
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder}: expected weights in model.safetensors; save the model by save_pretrained")
    return [folder / "model.safetensors"]


def _size(writer: GGUFWriter) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        return _write_empty(writer, Path(temporary) / "head.gguf")


def _check_engine(plan: _Plan) -> None:
    """Ask llama.cpp itself, with a file of these names and shapes and no weights in it."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "empty.gguf"
        os.truncate(path, _write_empty(plan.writer({}, "F16"), path))
        with engine(path, no_alloc=True) as (ffi, _, model, errors):
            if model == ffi.NULL:
                reason = one_line(errors[0]).rpartition("error loading model: ")[2] if errors else "it says not why"
                raise ValueError(f"{plan.folder}: llama.cpp refuses these tensors as {plan.row.name}: {reason}")


def _write_empty(writer: GGUFWriter, path: Path) -> int:
    """Write the head of a file; returns the bytes of the whole."""
    sizes = [info.nbytes for info in writer.tensors[0].values()]
    _write_header(writer, path)
    writer.close()
    return sum(map(padded, [path.stat().st_size, *sizes]))


def _header(row: Architecture, config: dict[str, Any], folder: Path, default: str) -> GGUFWriter:
    writer = GGUFWriter(None, row.name)
    writer.add_type("model")
    writer.add_name(folder.resolve().name)
    writer.add_quantization_version(2)
    names = (f"ALL_{default}", f"MOSTLY_{default}", f"MOSTLY_{default}_S")
    if (kind := next((LlamaFileType[name] for name in names if name in LlamaFileType.__members__), None)) is not None:
        writer.add_file_type(kind)
    for name, value in metadata(row, config).items():
        getattr(writer, f"add_{name}")(value)
    return writer


def _write_header(writer: GGUFWriter, path: Path) -> None:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.flush()


def _add_info(writer: GGUFWriter, name: str, shape: tuple[int, ...], type: str) -> None:
    row = bytes_of(type, 1, shape[-1])
    kind = GGMLQuantizationType[type]
    size = row * math.prod(shape[:-1])
    writer.add_tensor_info(name, (*shape[:-1], row), np.dtype(np.uint8), size, raw_dtype=kind)


def padded(size: int) -> int:
    """Bytes that a tensor of so many takes in a file."""
    return -(-size // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


def _check_encoded(plan: _Plan, name: str, type: str, data: Tensor) -> None:
    if name in plan.tensors and len(shape := plan.tensors[name].shape) == 2:
        expected = (shape[0], bytes_of(type, 1, shape[1]))
        if tuple(data.shape) != expected or data.dtype != torch.uint8:
            came = f"{data.dtype} of {tuple(data.shape)}"
            raise ValueError(f"{name} as {type} is uint8 of shape {expected}, got {came}")


def _encode(plan: _Plan, name: str, type: str) -> Tensor:
    """Bytes of a tensor of the folder."""
    with TensorFile(plan.tensors[name].file) as file:
        tensor = transform(plan.row, name, file.tensor(name))
        try:
            data = quantize(tensor if tensor.dim() == 2 else tensor[None], type)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return data if tensor.dim() == 2 else data.reshape(len(tensor), -1)
