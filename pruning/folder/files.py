"""The weight files of a Hugging Face folder: found, checked and read without transformers.

They are complete and hold plain weights; otherwise a ValueError of one line says what is wrong.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanstep._checkpoint.configuration import check_folder
from leanstep._checkpoint.files import TensorFile, load_pickled, read_json, shards
from leanstep._files import GGUF_ONLY, RUN_WITHOUT_MODEL, local_folder

INDEX = "model.safetensors.index.json"
_BIN_INDEX = "pytorch_model.bin.index.json"
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_QUANTISED_DTYPES = ("I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")
# names of floating dtypes in safetensors files
DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# of experts that transformers joins: those of the model, the dense ones, and those that are split again to be written
EXPERT_COPIES = 3
_EXPERT = re.compile(r"\.experts\.\d+\.")
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "README.md")


@dataclass(frozen=True)
class Checkpoint:
    """A checked folder: its weight files are complete and not quantised.

    Attributes:
        files: weight file -> names of its tensors, in the order of the index or the file.
        config: content of config.json.
        index: content of the index, None for a single file.
    """

    folder: Path
    files: dict[str, tuple[str, ...]]
    config: dict[str, Any]
    index: dict[str, Any] | None

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return {name for names in self.files.values() for name in names}

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum((self.folder / file).stat().st_size for file in self.files)

    def read(self, file: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """All tensors of one weight file, on the CPU, and the file's metadata."""
        path = self.folder / file
        if path.suffix == ".bin":
            return _load_bin(path), {}
        with TensorFile(path) as opened:
            return {name: opened.tensor(name) for name in self.files[file]}, opened.metadata

    def tensor(self, file: str, name: str) -> Tensor:
        """One tensor of a safetensors file, memory-mapped."""
        with TensorFile(self.folder / file) as opened:
            return opened.tensor(name)


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Find and check a checkpoint: a Hugging Face folder, or the name of a model on the hub. Nothing is loaded.

    Raises:
        ValueError: for no checkpoint, a missing or damaged file, an index that disagrees with the files, names or links
            that lead out of the folder, or quantised weights; the message names the file. For a name that the hub
            refuses: the hub's answer.
    """
    folder = local_folder(source) or _from_hub(str(source))
    check_folder(folder)
    try:
        config = read_json(folder / "config.json")
    except FileNotFoundError:
        raise ValueError(_other_content(folder) or f"{folder} is no checkpoint: it has no config.json") from None
    if config.get("quantization_config"):
        quantisation = config["quantization_config"]
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        method = method or "quantization_config in config.json"
        raise ValueError(
            f"{folder} is quantised ({method}): expected plain weights of fp32, bf16 or fp16. Prune the model it was "
            "made from, and quantise the result"
        )
    index, name = None, _index_name(folder)
    if name is not None:
        index = read_json(folder / name)
        files = _indexed_files(folder, name)
    else:
        single = next((name for name in _SINGLE if (folder / name).is_file()), None)
        if single is None:
            raise ValueError(_no_weights(folder))
        files = {single: _tensor_names(folder / single)}
    return Checkpoint(folder, files, config, index)


def _index_name(folder: Path) -> str | None:
    """Name of the index that transformers reads; None for a single file or no weights."""
    if (folder / _SINGLE[0]).is_file():
        return None
    return next((name for name in (INDEX, _BIN_INDEX) if (folder / name).is_file()), None)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*_HUB_FILES, "*.bin"]))
    except Exception as error:  # no network, no such model, no access: many types, each with its message
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"there is no folder {name!r} here, and the hub did not give such a model: {reason}"
        ) from error
    return folder


def _other_content(folder: Path) -> str:
    """What a folder has in place of a model, and what to do; "" for nothing known."""
    if (folder / "adapter_config.json").is_file():
        return (
            f"{folder} holds a PEFT adapter, not a model: merge it first (merge_and_unload() of PEFT, then "
            "save_pretrained), and prune that folder"
        )
    if (folder / "status.json").is_file():
        return f"{folder}{RUN_WITHOUT_MODEL}"
    return f"{folder}{GGUF_ONLY}" if any(folder.glob("*.gguf")) else ""


def _no_weights(folder: Path) -> str:
    if other := _other_content(folder):
        return other
    shards = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    if shards:
        return f"{folder} has weights ({', '.join(shards[:3])}, ...) but neither {INDEX} nor {_SINGLE[0]}"
    return f"{folder} is no checkpoint: it has a config.json but no weights ({_SINGLE[0]}, {INDEX} or {_SINGLE[1]})"


def _indexed_files(folder: Path, index_name: str) -> dict[str, tuple[str, ...]]:
    wanted = shards(folder / index_name)
    for file, names in wanted.items():
        present = set(_tensor_names(folder / file))
        absent = [name for name in names if name not in present]
        if absent or present - set(names):
            odd = absent[0] if absent else sorted(present - set(names))[0]
            raise ValueError(f"{folder / file} and {index_name} do not belong together: {odd} is in one of them only")
    if len(set(map(written_name, wanted))) < len(wanted):
        raise ValueError(f"{folder / index_name} lists a shard as *.bin and as *.safetensors; expected one of them")
    return {file: tuple(names) for file, names in wanted.items()}


def written_name(file: str) -> str:
    """Name of the safetensors file that a weight file becomes."""
    if file.endswith(".safetensors"):
        return file
    return f"{file.removesuffix('.bin').replace('pytorch_model', 'model')}.safetensors"


def _tensor_names(path: Path) -> tuple[str, ...]:
    """Check that a file is complete and not quantised; returns the names of its tensors."""
    if path.suffix == ".bin":
        return tuple(_load_bin(path))
    with TensorFile(path) as file:
        for name in file.names:
            if file.dtype(name) in _QUANTISED_DTYPES and len(file.shape(name)) > 1:
                raise ValueError(f"{path} is quantised: {name} is of dtype {file.dtype(name)}; expected plain weights")
        return file.names


def _load_bin(path: Path) -> dict[str, Tensor]:
    content = load_pickled(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds no state dict but {type(content).__name__}")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def stored_tensors(folder: Path) -> Iterator[tuple[Path, str, str, tuple[int, ...]]]:
    """File, name, dtype and shape of every tensor in the weight files of a folder."""
    index = _index_name(folder)
    single = [name for name in _SINGLE if (folder / name).is_file()][:1]
    for file in (folder / name for name in (shards(folder / index) if index else single)):
        if file.suffix == ".bin":
            for name, tensor in _load_bin(file).items():
                yield file, name, DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)
            continue
        with TensorFile(file) as opened:
            yield from ((file, name, opened.dtype(name), opened.shape(name)) for name in opened.names)


def most_common_dtype(checkpoint: Checkpoint) -> str:
    """The dtype of most tensors, by its name in safetensors files. Raises ValueError for no floating one."""
    counts = Counter(dtype for _, _, dtype, _ in stored_tensors(checkpoint.folder) if dtype in DTYPES)
    if not counts:
        raise ValueError(f"{checkpoint.folder}: expected weights of {', '.join(DTYPES)}, its files have none")
    return counts.most_common(1)[0][0]


def fused_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the experts that are stored one by one, which transformers joins on loading."""
    return sum(
        math.prod(shape) * DTYPES.get(dtype, torch.float32).itemsize
        for _, name, dtype, shape in stored_tensors(checkpoint.folder)
        if _EXPERT.search(name) and len(shape) == 2
    )


def written_bytes(checkpoint: Checkpoint, process_count: int, recovery_bytes: int) -> dict[str, int]:
    """Bytes on the disk by use, but for activations: the output, and what is gone when the run ends."""
    uses = {"output": checkpoint.size}
    if experts := EXPERT_COPIES * fused_bytes(checkpoint) * process_count:
        uses["experts, fused"] = experts
    copies = checkpoint.size * (process_count - 1)
    if largest := max(copies, recovery_bytes):  # the copies are gone when recovery begins
        uses["recovery" if recovery_bytes == largest else "copies of the other processes"] = largest
    return uses
