"""What a compressed checkpoint is written as: one GGUF file, or a dense folder with the values of its formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from leanstep.pruning.folder.files import Checkpoint, most_common_dtype
from leanstep.pruning.result import PruneResult

FORMATS = ("dense", "gguf")
FILE = "model.gguf"


def default_type(checkpoint: Checkpoint) -> str:
    """The format of 16 bits that a matrix without a level has."""
    return "BF16" if most_common_dtype(checkpoint) == "BF16" else "F16"


def check_format(checkpoint: Checkpoint, format: str) -> None:
    """Raise ValueError for an unknown format, or a checkpoint that a GGUF file cannot hold."""
    if format not in FORMATS:
        raise ValueError(f"format must be {' or '.join(FORMATS)}, got {format!r}")
    if format == "gguf":
        from leanstep._gguf.writer import check_writable

        check_writable(checkpoint.folder)


def bytes_without(checkpoint: Checkpoint, menus: Mapping[str, Sequence[tuple[int, str]]], format: str) -> int:
    """Most bytes of the result besides its matrices: what fills up each tensor is that of its least aligned level.

    Args:
        menus: bytes and name of each level of each matrix, by its parameter.
        format: of the result.

    Raises:
        ValueError: for a matrix that the checkpoint has under another name.
    """
    if format == "dense":
        return 0
    from leanstep._gguf.writer import file_bytes, padded

    for name in sorted(set(menus) - checkpoint.names):
        raise ValueError(
            f"{checkpoint.folder}: no file has the model's tensor {name} under that name; open the model with "
            "transformers, save it with save_pretrained, and compress that"
        )
    types = {name: rows[0][1] for name, rows in menus.items()}
    filled = sum(max(padded(size) - size for size, _ in rows) - padded(rows[0][0]) for rows in menus.values())
    return file_bytes(checkpoint.folder, types, default_type(checkpoint)) + filled


def write_compressed(checkpoint: Checkpoint, folder: Path, result: PruneResult) -> None:
    """Write the GGUF file of a result into a folder, in place of the weights in it."""
    from leanstep._gguf.writer import write_gguf

    for file in folder.iterdir():
        file.unlink()
    write_gguf(checkpoint.folder, folder / FILE, result.encoded, default_type(checkpoint))
