"""Open, check and load a Hugging Face folder, and write it again with pruned weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from leanstep._checkpoint import (
    TEMPLATES,
    TensorFile,
    check_folder,
    checked_file,
    files_in,
    index_files,
    load_pickled,
    read_json,
)
from leanstep.pruning.folder.loading import open_model

_INDEX = "model.safetensors.index.json"
_BIN_INDEX = "pytorch_model.bin.index.json"
_SINGLE = ("model.safetensors", "pytorch_model.bin")
# not copied: weights in any format, and files about the dense weights
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_REPORT_FILES = ("sparsity.json", "report.html")
_QUANTISED_DTYPES = ("I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")


@dataclass(frozen=True)
class Checkpoint:
    """A checked folder: its weight files are complete and not quantised.

    Attributes:
        folder: its path.
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
    folder = _find_folder(source)
    check_folder(folder)
    try:
        config = read_json(folder / "config.json")
    except FileNotFoundError:
        raise ValueError(f"{folder} is no checkpoint: it has no config.json") from None
    if config.get("quantization_config"):
        quantisation = config["quantization_config"]
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        method = method or "quantization_config in config.json"
        raise ValueError(
            f"{folder} is quantised ({method}): expected plain weights of fp32, bf16 or fp16. Prune the model it was "
            "made from, and quantise the result"
        )
    index = None
    for name in (_INDEX, _BIN_INDEX):
        if (folder / name).is_file() and not (folder / _SINGLE[0]).is_file():
            index = read_json(folder / name)
            break
    if index is not None:
        files = _indexed_files(folder, name)
    else:
        single = next((name for name in _SINGLE if (folder / name).is_file()), None)
        if single is None:
            raise ValueError(_no_weights(folder))
        files = {single: _tensor_names(folder / single)}
    return Checkpoint(folder, files, config, index)


def _find_folder(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(
            f"{path} is a file: expected a Hugging Face folder, with config.json and model.safetensors in it"
        )
    text = str(source)
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise ValueError(
            f"{path} does not exist: expected a Hugging Face folder, or a name on the hub such as 'org/model'"
        )
    return _from_hub(text)


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


def _no_weights(folder: Path) -> str:
    shards = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    if shards:
        return f"{folder} has weights ({', '.join(shards[:3])}, ...) but neither {_INDEX} nor {_SINGLE[0]}"
    if any(folder.glob("*.gguf")):
        return f"{folder} has weights in GGUF only, which are quantised; expected {_SINGLE[0]} or shards with an index"
    return f"{folder} is no checkpoint: it has a config.json but no weights ({_SINGLE[0]}, {_INDEX} or {_SINGLE[1]})"


def _indexed_files(folder: Path, index_name: str) -> dict[str, tuple[str, ...]]:
    wanted: dict[str, list[str]] = {}
    for name, file in index_files(folder / index_name).items():
        wanted.setdefault(file, []).append(name)
    missing = [file for file in sorted(wanted) if not (folder / file).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is incomplete: of the {len(wanted)} shards in {index_name}, {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing; copy or download again"
        )
    for file, names in wanted.items():
        present = set(_tensor_names(folder / file))
        absent = [name for name in names if name not in present]
        if absent or present - set(names):
            odd = absent[0] if absent else sorted(present - set(names))[0]
            raise ValueError(f"{folder / file} and {index_name} do not belong together: {odd} is in one of them only")
    if len(set(map(_written_name, wanted))) < len(wanted):
        raise ValueError(f"{folder / index_name} lists a shard as *.bin and as *.safetensors; expected one of them")
    return {file: tuple(names) for file, names in sorted(wanted.items())}


def _written_name(file: str) -> str:
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


def load_model(checkpoint: Checkpoint, device: str | torch.device = "cpu") -> nn.Module:
    """Load the model of a checkpoint with transformers, in the dtype of its weights and in eval mode.

    Raises:
        ValueError: if transformers cannot open it, if it needs code of its own, if the weights do not fit its
            config.json, or if one holds NaN or infinity.
    """
    model = open_model(checkpoint.folder, _model_class(checkpoint.config.get("architectures")))
    checkpoint_values(checkpoint, model)
    return model.eval().to(device)


def _model_class(architectures: Any) -> Any:
    """The first class of transformers among the names in a config.json; None if there is none."""
    import transformers

    names = architectures if isinstance(architectures, list) else []
    classes = [getattr(transformers, name, None) for name in names if isinstance(name, str)]
    models = (cls for cls in classes if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel))
    return next(models, None)


def checkpoint_values(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors under the checkpoint's names and in its shapes.

    Undoes the renaming and fusing that transformers does on loading, for instance of a mixture's experts.

    Raises:
        ValueError: if the checkpoint has neither a tensor of the model nor one tied to it.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    values = dict(revert_weight_conversion(model, state)) if hasattr(model, "config") else state
    names = checkpoint.names
    written = {tensor.data_ptr() for name, tensor in values.items() if name in names}
    absent = [n for n, t in values.items() if n not in names and t.numel() and t.data_ptr() not in written]
    if absent:
        raise ValueError(
            f"{checkpoint.folder}: no file has the model's tensor {absent[0]}, so that it cannot be written; open the "
            "model with transformers, save it with save_pretrained, and prune that"
        )
    return {name: tensor for name, tensor in values.items() if name in names}


def stored_parameters(checkpoint: Checkpoint, model: nn.Module) -> Callable[[str], Tensor | None]:
    """Make a function from a parameter's name to its values in the checkpoint's safetensors files.

    The function returns None for parameters that transformers fused, and for those in files of ``torch.save``.
    """
    files = {name: file for file, names in checkpoint.files.items() for name in names}
    # the shape tells the first expert from the fused parameter, which begins at the same address
    named = {(tensor.data_ptr(), tensor.shape): name for name, tensor in checkpoint_values(checkpoint, model).items()}
    stored_names = {name: named.get((value.data_ptr(), value.shape)) for name, value in model.named_parameters()}

    def stored(parameter: str) -> Tensor | None:
        name = stored_names.get(parameter)
        if name is None or not files[name].endswith(".safetensors"):
            return None
        return checkpoint.tensor(files[name], name)

    return stored


def write_weights(checkpoint: Checkpoint, values: Mapping[str, Tensor], folder: Path) -> dict[str, float]:
    """Write the checkpoint's files into a folder, with the tensors of ``values`` that differ from the stored ones.

    Files, names, dtypes, metadata and unchanged tensors stay the same. A safetensors file is copied, then its changed
    tensors are overwritten, one in memory at a time. A file of ``torch.save`` becomes a safetensors file; all its
    tensors are in memory at once.

    Returns:
        name of each changed tensor -> its fraction of zeros.
    """
    changed: dict[str, float] = {}
    renamed = {file: _written_name(file) for file in checkpoint.files}
    aliases: set[str] = set()
    for file in checkpoint.files:
        if _has_format(checkpoint.folder / file):
            changed |= _copy_changed(checkpoint, file, values, folder / file)
            continue
        tensors, metadata = checkpoint.read(file)
        for name, stored in tensors.items():
            value = values.get(name)
            if value is None or value.shape != stored.shape:
                continue
            merged = _merge(stored, value.detach().cpu())
            if merged is not stored:
                tensors[name] = merged
                changed[name] = float((merged == 0).double().mean())
        if file.endswith(".bin"):
            aliases |= _drop_aliases(tensors, values)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / renamed[file], metadata={"format": "pt", **metadata})
        del tensors, contiguous
    if checkpoint.index is not None:
        content = dict(checkpoint.index)
        old = content["weight_map"]
        content["weight_map"] = {name: renamed[file] for name, file in old.items() if name not in aliases}
        (folder / _INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return changed


def _has_format(path: Path) -> bool:
    """Whether a file is a safetensors file with the metadata ``format: pt``, which transformers requires."""
    if path.suffix != ".safetensors":
        return False
    with TensorFile(path) as opened:
        return opened.metadata.get("format") == "pt"


def _copy_changed(checkpoint: Checkpoint, file: str, values: Mapping[str, Tensor], to: Path) -> dict[str, float]:
    """Copy a safetensors file and overwrite its changed tensors; returns as :func:`write_weights`."""
    changed: dict[str, float] = {}
    shutil.copyfile(checked_file(checkpoint.folder / file), to)
    with to.open("r+b") as copy:
        length = int.from_bytes(copy.read(8), "little")
        header = json.loads(copy.read(length))
        for name in checkpoint.files[file]:
            stored, value = checkpoint.tensor(file, name), values.get(name)
            if value is None or value.shape != stored.shape:
                continue
            merged = _merge(stored, value.detach().cpu())
            if merged is not stored:
                copy.seek(8 + length + header[name]["data_offsets"][0])
                copy.write(merged.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                changed[name] = float((merged == 0).double().mean())
    return changed


def _merge(stored: Tensor, value: Tensor) -> Tensor:
    """The stored values where the model has not changed them, else the model's; ``stored`` itself if none changed."""
    same = stored.to(value.dtype) == value
    if bool(same.all()):
        return stored
    return torch.where(same, stored, value.to(stored.dtype))


def _drop_aliases(tensors: dict[str, Tensor], values: Mapping[str, Tensor]) -> set[str]:
    """Drop all names of a tied weight but one, and return them; transformers ties them again on loading."""
    owners: dict[int, str] = {}
    dropped = set()
    for name, tensor in list(tensors.items()):
        owner = owners.setdefault(tensor.untyped_storage().data_ptr(), name)
        if owner == name:
            continue
        tied = name in values and owner in values and values[name].data_ptr() == values[owner].data_ptr()
        if tied:
            del tensors[name]
            dropped.add(name)
        else:
            tensors[name] = tensor.clone()
    return dropped


def copy_others(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy everything but the weights into a folder: configuration, tokenizer, model card, code."""
    for path in files_in(checkpoint.folder):
        if not (path.name.startswith(".") or path.name.endswith(_WEIGHTS) or path.name in _REPORT_FILES):
            shutil.copyfile(path, folder / path.name)
    templates = checkpoint.folder / TEMPLATES
    if templates.is_dir() and not templates.is_symlink():
        (folder / TEMPLATES).mkdir()
        for path in files_in(templates):
            shutil.copyfile(path, folder / TEMPLATES / path.name)
