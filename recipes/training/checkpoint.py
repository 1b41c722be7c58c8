"""Checkpoints that are whole or not there: written aside, verified on reading, pruned, and matched to the recipe.

``checkpoints/step-000100/`` holds ``hf/`` (what ``from_pretrained`` opens, tokenizer included), ``trainer/`` (what
Accelerate saves: optimizer, schedule, gradient scaler and each process's random generators; ``state.json``; the data
position; what the gate of ``lora.attention`` decided) and ``COMPLETE``. A checkpoint is written into
``.writing-step-000100``, flushed to disk, given ``COMPLETE`` (the size of every file and the checksum of those up to
256 MiB) and only then renamed. A run killed at any moment leaves either the whole folder or a ``.writing-`` one, which
nobody reads and the next start removes.
"""

import dataclasses
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanstep._files import REPLACED, STAGED, publish_folder

__all__ = [
    "CheckpointError",
    "TrainState",
    "checkpoint_name",
    "clean_leftovers",
    "commit",
    "discard",
    "find_checkpoints",
    "newest",
    "point",
    "prune",
    "read_state",
    "set_aside",
    "staging",
    "verify",
    "write_state",
]

MARKER = "COMPLETE"
_CHECKSUM_LIMIT = 256 * 1024**2


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: missing, incomplete, damaged, or made by another recipe."""


@dataclass
class TrainState:
    """What a run knows besides tensors: ``tokens`` counts predicted ones, ``elapsed_s`` training over all starts.

    ``nonfinite`` counts steps left out because of a non-finite loss or gradient. ``eval_pending`` marks a checkpoint
    written because a signal came during the evaluation of its step.
    """

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    val_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    eval_pending: bool = False
    nonfinite: int = 0
    world_size: int = 1
    config: dict[str, Any] = dataclasses.field(default_factory=dict)


def checkpoint_name(step: int) -> str:
    """``step-000100``."""
    return f"step-{step:06d}"


def find_checkpoints(folder: Path) -> list[Path]:
    """The folders with a COMPLETE marker, oldest first. They may still be damaged: see :func:`verify`."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d+", path.name) and (path / MARKER).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def staging(folder: Path, step: int) -> Path:
    """An empty folder beside the checkpoints, to be filled and given to :func:`commit`."""
    path = folder / f"{STAGED}{checkpoint_name(step)}"
    shutil.rmtree(path, ignore_errors=True)
    (path / "hf").mkdir(parents=True)
    (path / "trainer").mkdir()
    return path


def commit(staged: Path) -> Path:
    """Flush a filled staging folder to disk, mark it complete and rename it. Returns the checkpoint folder.

    A checkpoint of the same step that is already there is replaced.
    """
    inventory: dict[str, dict[str, int]] = {}
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        inventory[str(path.relative_to(staged))] = _fingerprint(path)
    (staged / MARKER).write_text(json.dumps({"files": inventory}, indent=1), encoding="utf-8")
    target = staged.with_name(staged.name.removeprefix(STAGED))
    publish_folder(staged, target)
    return target


def discard(staged: Path) -> None:
    """Remove a staging folder whose writing failed."""
    shutil.rmtree(staged, ignore_errors=True)


def clean_leftovers(folder: Path) -> list[str]:
    """Remove what an interrupted run left behind and return the names. Call it only while holding the run's lock."""
    if not folder.is_dir():
        return []
    left = [path for path in folder.iterdir() if path.name.startswith((STAGED, REPLACED))]
    for path in left:
        original = folder / path.name.removeprefix(REPLACED)
        if path.name.startswith(REPLACED) and not original.exists():
            # killed between the two renames of commit: the older checkpoint is whole, put it back
            os.replace(path, original)
        else:
            shutil.rmtree(path, ignore_errors=True)
    return sorted(path.name for path in left)


def verify(path: Path) -> None:
    """Check a checkpoint against its COMPLETE marker. Raises CheckpointError naming the first file that is wrong."""
    try:
        files = json.loads((path / MARKER).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no complete checkpoint: it has no {MARKER} file") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MARKER} cannot be read ({error}): the checkpoint is damaged") from None
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} is damaged: {name} is missing")
        if file.stat().st_size != expected["size"]:
            raise CheckpointError(
                f"{path} is damaged: {name} has {file.stat().st_size} bytes, expected {expected['size']} (a full disk "
                "or an interrupted copy truncates files)"
            )
        if "crc32" in expected and _fingerprint(file) != expected:
            raise CheckpointError(f"{path} is damaged: the content of {name} is not what was written")


def newest(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that passes :func:`verify`, and what is wrong with each newer one."""
    problems: dict[Path, str] = {}
    for path in reversed(find_checkpoints(folder)):
        try:
            verify(path)
        except CheckpointError as error:
            problems[path] = str(error)
            continue
        return path, problems
    return None, problems


def prune(folder: Path, keep_last: int, keep: Iterable[Path] = ()) -> list[Path]:
    """Remove all but the newest ``keep_last`` checkpoints and those in ``keep``; returns the removed ones."""
    spared = {path.resolve() for path in keep}
    removed = [path for path in find_checkpoints(folder)[:-keep_last] if path.resolve() not in spared]
    for path in removed:
        # without its marker a half-removed folder is no checkpoint any more
        (path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    return removed


def set_aside(path: Path, word: str) -> Path:
    """Rename ``step-000100`` to ``WORD-step-000100``, so that it is kept but no longer counted as a checkpoint."""
    target = path.with_name(f"{word}-{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(path, target)
    return target


def point(link: Path, target: Path) -> None:
    """Make ``link`` a relative symbolic link to ``target``, replacing an older one in one step."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    os.replace(temporary, link)


def write_state(staged: Path, state: TrainState) -> None:
    """Write ``trainer/state.json``."""
    (staged / "trainer" / "state.json").write_text(json.dumps(dataclasses.asdict(state), indent=1), encoding="utf-8")


def read_state(path: Path) -> TrainState:
    """Read ``trainer/state.json`` of a checkpoint. Raises CheckpointError."""
    try:
        content = json.loads((path / "trainer" / "state.json").read_text(encoding="utf-8"))
        known = {item.name for item in dataclasses.fields(TrainState)}
        return TrainState(**{key: value for key, value in content.items() if key in known})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / 'trainer' / 'state.json'} cannot be read: {error}") from None


def _fingerprint(path: Path) -> dict[str, int]:
    size = path.stat().st_size
    if size > _CHECKSUM_LIMIT:
        return {"size": size}
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return {"size": size, "crc32": checksum}
