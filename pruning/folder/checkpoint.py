"""Write the files of a checkpoint folder again with pruned weights."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from leanstep._checkpoint.card import CARD, write_card
from leanstep._checkpoint.files import TensorFile, checked_file, copy_other_files
from leanstep._checkpoint.mapped import MappedParameters, ResidentSet, is_mapped, release_pages, tensors_hash
from leanstep._checkpoint.safetensors import tensor_offsets
from leanstep._files import format_bytes, is_disk_full, remove_partials, write_text
from leanstep.pruning.config import PruneConfig
from leanstep.pruning.folder.files import INDEX, Checkpoint, written_name
from leanstep.pruning.folder.loading import stored_names
from leanstep.pruning.result import PruneResult
from leanstep.pruning.score.targets import abbreviate

# not copied: files about the dense weights
SIDECAR, REPORT = "sparsity.json", "report.html"
# entry of the sidecar with the hash of the dense weights; folders of earlier versions have none
SOURCE_WEIGHTS = "source_weights"
# entry with the hash of the held-out data, on which perplexities are
HELD_OUT = "held_out_data"


def write_weights(checkpoint: Checkpoint, values: Mapping[str, Tensor], folder: Path) -> dict[str, float]:
    """Write the checkpoint's files into a folder, with the tensors of ``values`` that differ from the stored ones.

    Files, names, dtypes, metadata and unchanged tensors stay the same. A safetensors file is copied, unless
    :func:`map_weights` did so, then its changed tensors are overwritten, one in memory at a time. A file of
    ``torch.save`` becomes a safetensors file; all its tensors are in memory at once.

    Returns:
        name of each changed tensor -> its fraction of zeros.
    """
    changed: dict[str, float] = {}
    renamed = {file: written_name(file) for file in checkpoint.files}
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
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
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
    if not to.exists():
        shutil.copyfile(checked_file(checkpoint.folder / file), to)
    offsets = tensor_offsets(to)
    with to.open("r+b") as copy:
        for name in checkpoint.files[file]:
            stored, value = checkpoint.tensor(file, name), values.get(name)
            if value is None or value.shape != stored.shape:
                continue
            written = stored
            if value.untyped_storage().filename == str(to):
                # read by a mapping of its own, which ends with the tensor
                with TensorFile(to) as opened:
                    value = written = opened.tensor(name)
            merged = _merge(stored, value.detach().cpu())
            if merged is not stored:
                changed[name] = float((merged == 0).double().mean())
            if not torch.equal(_bytes_of(merged), _bytes_of(written)):
                copy.seek(offsets[name])
                copy.write(_bytes_of(merged).numpy().data)
            if is_mapped(value) and value.is_contiguous():
                release_pages(value.data_ptr(), value.nbytes)
    return changed


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def map_weights(checkpoint: Checkpoint, model: nn.Module, folder: Path, resident: ResidentSet) -> MappedParameters:
    """Copy the safetensors files of a checkpoint into a folder, and map the model's parameters to the copies.

    What is then written to a parameter is written to its copy. Parameters stay in memory that transformers fused or
    converted on loading, and those in files of ``torch.save``; see :func:`unmapped_note`.

    Args:
        model: on the CPU, loaded from them and unchanged.
        folder: where :func:`write_weights` will finish the copies.
        resident: bounds the part of the mapped weights in memory.
    """
    places: dict[str, tuple[Path, int]] = {}
    offsets: dict[str, Mapping[str, int]] = {}
    for parameter, (file, name) in stored_names(checkpoint, model).items():
        value = model.get_parameter(parameter)
        if file not in offsets:
            offsets[file] = {}
            if _has_format(checkpoint.folder / file):
                shutil.copyfile(checked_file(checkpoint.folder / file), folder / file)
                offsets[file] = tensor_offsets(folder / file)
        offset = offsets[file].get(name)
        if offset is None or offset % value.element_size() or not value.is_contiguous():
            continue
        if checkpoint.tensor(file, name).dtype == value.dtype:
            places[parameter] = (folder / file, offset)
    mapped = MappedParameters(model, resident)
    mapped.map(places)
    return mapped


def map_copies(checkpoint: Checkpoint, model: nn.Module, folder: Path, resident: ResidentSet) -> MappedParameters:
    """As :func:`map_weights`, to copies of this process alone: files without a name in the folder's disk."""
    with tempfile.TemporaryDirectory(prefix=".leanstep-copies-", dir=folder) as copies:
        return map_weights(checkpoint, model, Path(copies), resident)


def unmapped_note(mapped: MappedParameters) -> str:
    """What part of a model is in memory although its files are mapped; "" for little."""
    sizes = {name: parameter.nbytes for name, parameter in mapped.model.named_parameters()}
    held = {name: size for name, size in sizes.items() if name not in mapped.names}
    if sum(held.values()) < 0.01 * sum(sizes.values()):
        return ""
    return (
        f"{len(held)} of {len(sizes)} parameters ({format_bytes(sum(held.values()))}) were held in memory, not mapped "
        f"from their files: {abbreviate(list(held), 3)}. transformers fuses or converts them on loading, or their "
        "files are those of torch.save"
    )


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


def write_report(content: Mapping[str, Any], folder: Path, replaces: Path | None = None) -> None:
    """Write ``sparsity.json``, its page ``report.html`` and the model's card into a folder that is else complete.

    ``replaces``: the folder that it will replace.
    """
    from leanstep.pruning.folder.report import card_facts, report_page

    write_text(folder / SIDECAR, json.dumps(content, indent=1))
    write_text(folder / REPORT, report_page(content))
    title, facts = card_facts(content)
    kind = "quantized" if "bits" in content["layers"][0] else "finetune"
    tags = ["compressed" if kind == "quantized" else "pruned"]
    write_card(folder, title, facts, base=content["source"], relation=kind, tags=tags, replaces=replaces)


def has_zeros(checkpoint: Checkpoint, names: Iterable[str]) -> bool:
    """Whether a hundredth of a parameter among some names is zero. Reads the files up to the first; they are mapped."""
    names = list(names)
    return any(_is_sparse(stored, value, names) for stored, value in _stored(checkpoint))


def hash_and_zeros(checkpoint: Checkpoint, names: Iterable[str]) -> tuple[str, bool]:
    """:func:`stored_hash` and :func:`has_zeros` by reading every file once."""
    names, sparse = list(names), list[bool]()

    def watched() -> Iterator[tuple[str, Tensor]]:
        for stored, value in _stored(checkpoint):
            if not any(sparse):
                sparse.append(_is_sparse(stored, value, names))
            yield stored, value

    return tensors_hash(watched()), any(sparse)


def _is_sparse(stored: str, value: Tensor, names: Iterable[str]) -> bool:
    """Whether a stored tensor is among some parameters, and a hundredth of it is zero."""
    # transformers joins experts, and adds or drops a prefix of the model
    among = ".experts." in stored or any(stored.endswith(name) or name.endswith(stored) for name in names)
    return among and int(value.count_nonzero()) < 0.99 * value.numel()


def stored_hash(checkpoint: Checkpoint) -> str:
    """Hash of the values in all weight files, by which a changed checkpoint is noticed.

    It is the same however the tensors are spread over files. Reads every file once; all are memory-mapped.
    """
    return tensors_hash(_stored(checkpoint))


def _stored(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    files = {name: file for file, names in checkpoint.files.items() for name in names}
    pickled = {file: checkpoint.read(file)[0] for file in checkpoint.files if file.endswith(".bin")}
    for name in sorted(files):
        file = files[name]
        yield name, pickled[file][name] if file in pickled else checkpoint.tensor(file, name)


@contextmanager
def suggest_resume(*files: Path) -> Iterator[None]:
    """Context manager: the error of a full disk also says how to go on, if there is one of the files to go on with."""
    try:
        yield
    except OSError as error:
        there = [file.name for file in files if file.exists()]
        if not there or not is_disk_full(error):
            raise
        text = f"{error.strerror or error}. The same command with --resume goes on with {' and '.join(there)}"
        raise OSError(errno.ENOSPC, text, error.filename) from error


def state_file(folder: Path) -> Path:
    """The file of an unfinished recovery of a folder, beside it."""
    return folder.with_name(f"{folder.name}.recovery.pt")


def search_files(folder: Path) -> tuple[Path, Path]:
    """The files beside a folder of an unfinished run: its curves, and its search."""
    return folder.with_name(f"{folder.name}.curves.jsonl"), folder.with_name(f"{folder.name}.refine.json")


def remove_search_files(folder: Path) -> None:
    """Remove :func:`search_files` of a folder that is complete, and what killed processes half wrote of them."""
    for file in search_files(folder):
        file.unlink(missing_ok=True)
        remove_partials(file)


def copy_others(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy everything but the weights and the model card into a folder: configuration, tokenizer, code."""
    copy_other_files(checkpoint.folder, folder, without=(SIDECAR, REPORT, CARD))


def tensor_rows(changed: Mapping[str, float], result: PruneResult) -> dict[str, dict[str, Any]]:
    """Sparsity and pattern of each changed tensor, under the keys that ``leanstep verify`` reads."""
    rows: dict[str, dict[str, Any]] = {name: {"sparsity": zeros} for name, zeros in changed.items()}
    for group in result.groups:
        pattern = result.allocation.patterns.get(group.name)
        for target in group.targets:
            if pattern and target.expert is None and target.parameter in rows:
                rows[target.parameter] |= {"pattern": pattern, "dim": int(target.layout != "in_out")}
    return rows


def bytes_in_files(model: nn.Module, mapped: MappedParameters) -> int:
    """Bytes of parameters that are pages of files: of the folder, and of experts that transformers joins."""
    return sum(p.nbytes for name, p in model.named_parameters() if name in mapped.names or is_mapped(p))


def check_files(out: Path, resume: bool, config: PruneConfig) -> None:
    """Raise ValueError for files of an interrupted run that is not to be resumed, or that the run would not read."""
    partial, search = search_files(out)
    measures = config.method == "dp" and config.given_curves is None
    unread = [] if measures else [(partial, "curves", "allocation='dp'")]
    unread += [] if config.refine is not None else [(search, "a search", "refine")]
    for file, content_of, setting in unread:
        if resume and file.exists():
            raise ValueError(
                f"{file} holds {content_of} of an interrupted run with {setting}, which this run would not read: go on "
                "with the settings of that run, or remove the file"
            )
    for file, content_of in (
        (partial, "curves that an interrupted run measured"),
        (search, "an interrupted search"),
        (state_file(out), "an interrupted recovery"),
    ):
        if file.exists() and not resume:
            raise ValueError(f"{file} holds {content_of}: go on with it (--resume), or remove it to begin again")
