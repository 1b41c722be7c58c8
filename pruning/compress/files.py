"""What a compressed checkpoint is written as: a GGUF file, sparse files, or a dense folder with the same values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from leanstep.pruning.compress.sparse import DENSE
from leanstep.pruning.folder.files import Checkpoint, most_common_dtype, stored_tensors
from leanstep.pruning.result import PruneResult
from leanstep.sparsity.inference.export import make_sparse, most_header_bytes
from leanstep.sparsity.inference.matrices import DTYPES

#: of the files -> the menus whose levels they hold
FORMATS = {"dense": ("ggml", "sparse"), "gguf": ("ggml",), "sparse": ("sparse",)}
FILE = "model.gguf"


def default_type(checkpoint: Checkpoint) -> str:
    """The format of 16 bits that a matrix without a level has."""
    return "BF16" if most_common_dtype(checkpoint) == "BF16" else "F16"


def check_format(format: str, menu: str) -> None:
    """Raise ValueError for an unknown format, or one without the levels of ``menu``, the pattern of the settings."""
    if format not in FORMATS:
        raise ValueError(f"format must be {', '.join(FORMATS)}; got {format!r}")
    if format != "dense" and menu not in FORMATS[format]:
        raise ValueError(
            f"format {format} has the levels of pattern {', '.join(FORMATS[format])}; got pattern {menu} "
            "(compress_checkpoint takes the right one by itself)"
        )


def check_writable(checkpoint: Checkpoint, format: str) -> None:
    """Raise ValueError for a checkpoint that a GGUF file cannot hold."""
    if format == "gguf":
        from leanstep._gguf import writer

        writer.check_writable(checkpoint.folder)


def bytes_without(checkpoint: Checkpoint, menus: Mapping[str, Sequence[tuple[int, str]]], format: str) -> int:
    """Most bytes of the result besides its matrices: what fills up each tensor is that of its least aligned level.

    Args:
        menus: bytes and name of each level of each matrix, by its parameter.

    Raises:
        ValueError: for a matrix that the checkpoint has under another name.
    """
    if format == "dense":
        return 0
    for name in sorted(set(menus) - checkpoint.names):
        raise ValueError(
            f"{checkpoint.folder}: no file has the model's tensor {name} under that name; open the model with "
            "transformers, save it with save_pretrained, and compress that"
        )
    if format == "sparse":
        return _bytes_of_files(checkpoint, menus)
    from leanstep._gguf.writer import file_bytes, padded

    types = {name: rows[0][1] for name, rows in menus.items()}
    filled = sum(max(padded(size) - size for size, _ in rows) - padded(rows[0][0]) for rows in menus.values())
    return file_bytes(checkpoint.folder, types, default_type(checkpoint)) + filled


def _bytes_of_files(checkpoint: Checkpoint, menus: Mapping[str, Sequence[tuple[int, str]]]) -> int:
    """Most bytes of sparse weight files besides the matrices."""
    tensors = {name: (dtype, shape) for _, name, dtype, shape in stored_tensors(checkpoint.folder)}
    others = sum(math.prod(s) * DTYPES[dtype].itemsize for name, (dtype, s) in tensors.items() if name not in menus)
    files = [{name: tensors[name] for name in names} for names in checkpoint.files.values()]
    return others + sum(most_header_bytes(file, menus) for file in files)


def write_compressed(checkpoint: Checkpoint, folder: Path, result: PruneResult, format: str) -> None:
    """Write the files of a result in a format into a folder, in place of the weights in it."""
    if format == "sparse":
        parameters = {target.name: target.parameter for group in result.groups for target in group.targets}
        coded = {
            parameters[name]: (level.split()[0], scales)
            for name, (level, scales) in result.encoded.items()
            if level != DENSE
        }
        make_sparse(folder, coded)
        return
    from leanstep._gguf.writer import write_gguf

    for file in folder.iterdir():
        file.unlink()
    write_gguf(checkpoint.folder, folder / FILE, result.encoded, default_type(checkpoint))
