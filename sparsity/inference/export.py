"""Convert a checkpoint folder between dense weights with zeros and sparse files without them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from leanstep._checkpoint.card import CARD, write_card
from leanstep._checkpoint.files import TensorFile, check_apart, check_output, copy_other_files, new_folder, read_json
from leanstep._files import format_bytes, model_name, one_line
from leanstep.kernels.sparse.linear import why_slower
from leanstep.sparsity.inference.manifest import Manifest, StoredTensor, checksum
from leanstep.sparsity.inference.matrices import CODES, Form, compress, part_name, smallest_form
from leanstep.sparsity.inference.reader import INDEX, SparseFiles, has_manifest, read_config, weight_files

QUANT_METHOD = "leanstep"
FORMATS = ("sparse", "dense")


@dataclass(frozen=True)
class Export:
    """What :func:`export_folder` wrote.

    Attributes:
        out: the folder.
        forms: weight -> how it is stored, of those without zeros. Empty for a dense folder.
        bytes_before, bytes_after: of the weight files.
    """

    out: Path
    forms: dict[str, Form]
    bytes_before: int
    bytes_after: int

    def as_dict(self) -> dict[str, Any]:
        """The result as plain values, for JSON."""
        forms = {name: form.to_json() for name, form in self.forms.items()}
        sizes = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        return {"out": str(self.out), **sizes, "matrices": forms}

    def why_slow(self) -> str | None:
        """Why one token takes longer with these weights than with dense ones on this CPU; None if it does not."""
        bits = {code: row[2] for code, row in CODES.items()}
        return why_slower([(*f.matrix, bits[f.codes] if f.codes else int(f.dtype[-2:])) for f in self.forms.values()])

    def __str__(self) -> str:
        masks = {None: "by bit masks"} | {code: f"by bit masks with {code} values" for code in CODES}
        forms = self.forms.values()
        kinds = [masks[form.codes] if form.pattern is None else f"as {form.pattern}" for form in forms]
        stored = ", ".join(f"{kinds.count(kind)} matrices {kind}" for kind in dict.fromkeys(kinds))
        share = f"{self.bytes_after / max(self.bytes_before, 1):.3f} of before"
        size = f"{format_bytes(self.bytes_after)} of weights, {share}"
        return f"{self.out}: {size}" + (f"; {stored}" if self.forms else "; all dense")


def export_folder(source: str | Path, out: str | Path, *, format: str = "sparse", values: str | None = None) -> Export:
    """Write a checkpoint folder again with its zeros left out, or back with them.

    To sparse: every weight takes the form of fewest bytes: dense, N:M values with positions, or values with a bit mask
    (:mod:`leanstep.sparsity.inference.matrices` has the layout). Tensors of other dtypes, of one dimension, or with few
    zeros stay as they are. To dense: every tensor comes back bit for bit, negative zeros included, unless its values
    were quantised.

    Args:
        source: a Hugging Face folder with safetensors weights, of one file or several; it is not changed.
        out: the folder to create. It appears when all files are written. Weight files keep their names.
        format: "sparse" or "dense".
        values: "int8": store the nonzeros of every weight that has a sparse form as int8, symmetric, rounded to
            nearest, with one fp32 scale per row: ``max |row| / 127``. "int4": with one bf16 scale per 64 columns of a
            row, ``max |values| / 7``. None: as they are.

    Returns:
        :class:`Export`; print it for one line.

    Raises:
        ValueError: for a folder that cannot be read, is quantised, or is of that format already; a damaged file; an
            ``out`` that exists or lies in ``source``, or whose disk has too little space; NaN or infinity in
            values to quantise.
        OSError: if the disk becomes full. ``out`` does not exist then.

    Notes:
        Memory: one weight file of the result at a time, and one dense weight.
    """
    if format not in FORMATS:
        raise ValueError(f"export: format should be {' or '.join(FORMATS)}, got {format!r}")
    if values is not None and (values not in CODES or format == "dense"):
        raise ValueError(f"export: values should be {' or '.join(CODES)}, of the format sparse, got {values!r}")
    source, out = Path(source).expanduser(), Path(out).expanduser()
    paths, config = _opened(source, format)
    size = sum(path.stat().st_size for path in paths)
    check_output(out, _dense_bytes(paths) if format == "dense" else size)
    check_apart(out, source)
    with new_folder(out) as folder:
        if format == "sparse":
            config["quantization_config"] = {"quant_method": QUANT_METHOD}
            forms, weight_map = _write_sparse(paths, folder, codes=values, tied_rows=_tied_rows(config))
        else:
            config.pop("quantization_config", None)
            forms, weight_map = {}, _write_dense(paths, folder)
        copy_other_files(source, folder, without=(CARD,))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if len(paths) > 1 or paths[0].name != "model.safetensors":
            _write_index(source, folder, weight_map)
        written = sum((folder / path.name).stat().st_size for path in paths)
        facts = {"Weights": f"{format_bytes(written)}, stored {format}{f' in {values}' if values else ''}"}
        title, relation = f"{model_name(source)} {format}", "quantized" if values else "finetune"
        write_card(folder, title, facts, base=str(source), relation=relation)
    return Export(out, forms, size, written)


def _opened(source: Path, format: str) -> tuple[list[Path], dict[str, Any]]:
    """Weight files and configuration of a folder that can be converted to ``format``."""
    paths = weight_files(source)
    config = read_config(source)
    unfit = [path.name for path in paths if path.suffix != ".safetensors"]
    if unfit:
        raise ValueError(f"{source}: expected safetensors weights, got {unfit[0]}; save the model by save_pretrained")
    sparse = [has_manifest(path) for path in paths]
    if format == "dense" and not all(sparse):
        raise ValueError(f"{source} has dense weights already, in {paths[sparse.index(False)].name}")
    if format == "sparse" and any(sparse):
        raise ValueError(f"{source} has sparse files already")
    if format == "sparse" and config.get("quantization_config"):
        raise ValueError(
            f"{source} is quantised (quantization_config in config.json): expected plain weights of fp32, bf16 or fp16"
        )
    return paths, config


def _tied_rows(config: Mapping[str, Any]) -> set[int]:
    """Rows of the embedding, if config.json says that the output head is the embedding; otherwise empty."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    if not any(part.get("tie_word_embeddings") is True for part in parts):
        return set()
    return {part["vocab_size"] for part in parts if type(part.get("vocab_size")) is int}


def make_sparse(folder: Path, coded: Mapping[str, tuple[str, Tensor]]) -> None:
    """Write the dense weight files of a folder again, in place, as sparse ones.

    Args:
        folder: that nobody else reads yet.
        coded: weight -> "int8" or "int4", and the scales by which its values are ``code * scale``, as the file has
            them. The others take the form of fewest bytes, without codes.
    """
    paths, config = _opened(folder, "sparse")
    config["quantization_config"] = {"quant_method": QUANT_METHOD}
    with TemporaryDirectory(dir=folder) as made:
        _, weight_map = _write_sparse(paths, Path(made), codes=None, tied_rows=_tied_rows(config), coded=coded)
        for path in paths:
            (Path(made) / path.name).replace(path)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (folder / INDEX).exists():
        _write_index(folder, folder, weight_map)


def most_header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]], coded: Collection[str]) -> int:
    """At most so many bytes has the header of a sparse file with some matrices ``coded``, whatever their values are.

    Args:
        tensors: name -> dtype, as safetensors names it, and shape of the dense tensors.
        coded: names of some of them.
    """
    manifest = Manifest()
    for name, (dtype, shape) in tensors.items():
        parts = {name: (dtype, shape)}
        if name in coded:
            manifest.matrices[name] = form = Form(shape, dtype, codes="int4")
            parts = {part_name(name, part): row for part, row in form.part_shapes(2 * math.prod(shape)).items()}
        manifest.tensors |= {part: StoredTensor(*row, 2**32 - 1) for part, row in parts.items()}
    most = 10 * sum(math.prod(row.shape) for row in manifest.tensors.values())
    entries = {
        name: {"dtype": row.dtype, "shape": row.shape, "data_offsets": [most, most]}
        for name, row in manifest.tensors.items()
    }
    header = {"__metadata__": {"format": "pt", **manifest.to_metadata()}, **entries}
    return 16 + len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())


def _write_sparse(
    paths: list[Path],
    folder: Path,
    *,
    codes: str | None,
    tied_rows: set[int],
    coded: Mapping[str, tuple[str, Tensor]] | None = None,
) -> tuple[dict[str, Form], dict[str, str]]:
    forms: dict[str, Form] = {}
    weight_map: dict[str, str] = {}
    stored_matrices: dict[tuple[Any, ...], tuple[str, Path]] = {}
    owners = _owners(paths)
    for path in paths:
        manifest, stored = Manifest(), dict[str, Tensor]()
        with TensorFile(path) as file:
            for name in file.names:
                weight = file.tensor(name)
                # other equal matrices, such as those without a nonzero, are not tied; those of layers have a number
                may_be_tied = weight.dim() == 2 and weight.shape[0] in tied_rows and not re.search(r"\.\d+\.", name)
                twin = _twin(name, weight, path, stored_matrices) if may_be_tied else None
                # the index does not name a file without tensors, so a file keeps its last one
                if twin is not None and (stored or name != file.names[-1]):
                    manifest.tied[name] = twin
                    continue
                own, scales = (coded or {}).get(name, (codes, None))
                form = smallest_form(weight, codes=own) if scales is None else Form.coded(weight, own)
                if form is None:
                    stored[name] = weight
                    continue
                manifest.matrices[name] = form
                parts = {
                    part_name(name, part): tensor
                    for part, tensor in _compressed(path, name, weight, form, scales).items()
                }
                clashes = sorted(parts.keys() & owners.keys())
                if clashes:
                    raise ValueError(
                        f"{owners[clashes[0]]}: {one_line(clashes[0])} has the name of a part of the sparse weight "
                        f"{one_line(name)} in {path.name}"
                    )
                stored |= parts
            try:
                manifest.add(stored)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            metadata = {"format": "pt", **file.metadata, **manifest.to_metadata()}
            save_file(stored, folder / path.name, metadata=metadata)
        forms |= manifest.matrices
        weight_map |= dict.fromkeys(stored, path.name)
    return forms, weight_map


def _owners(paths: list[Path]) -> dict[str, Path]:
    """The file of each tensor. Raises ValueError for a tensor in two files."""
    owners: dict[str, Path] = {}
    for path in paths:
        with TensorFile(path) as file:
            for name in file.names:
                if owners.setdefault(name, path) != path:
                    raise ValueError(f"{path}: {one_line(name)} is in {owners[name].name} as well")
    return owners


def _compressed(path: Path, name: str, weight: Tensor, form: Form, scales: Tensor | None) -> dict[str, Tensor]:
    if form.codes and not bool(weight.isfinite().all()):
        raise ValueError(
            f"{path}: {one_line(name)} holds NaN or infinity; expected finite weights for {form.codes} values"
        )
    return compress(weight, form, scales)


def _twin(name: str, weight: Tensor, path: Path, stored: dict[tuple[Any, ...], tuple[str, Path]]) -> str | None:
    """The name under which the same matrix is stored already; otherwise remembers this one."""
    key = (weight.dtype, tuple(weight.shape), checksum(weight))
    twin, where = stored.setdefault(key, (name, path))
    if twin == name:
        return None
    with TensorFile(where) as file:
        same = torch.equal(weight.contiguous().view(torch.uint8), file.tensor(twin).contiguous().view(torch.uint8))
    return twin if same else None


def _dense_bytes(paths: list[Path]) -> int:
    with SparseFiles(paths) as files:
        return files.manifest.dense_bytes()


def _write_dense(paths: list[Path], folder: Path) -> dict[str, str]:
    weight_map: dict[str, str] = {}
    with SparseFiles(paths) as files:
        for path in paths:
            tensors = dict(files.stored(path))
            save_file(tensors, folder / path.name, metadata=files.metadata(path))
            weight_map |= dict.fromkeys(tensors, path.name)
    return weight_map


def _write_index(source: Path, folder: Path, weight_map: dict[str, str]) -> None:
    index = read_json(source / INDEX)
    metadata = index.get("metadata")
    size = sum(_bytes(folder / file) for file in sorted(set(weight_map.values())))
    content = {
        "metadata": {**(metadata if isinstance(metadata, dict) else {}), "total_size": size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _bytes(path: Path) -> int:
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
