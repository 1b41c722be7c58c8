"""Where a run begins: at step 0, or at a checkpoint that is whole and was made by the same recipe."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leanstep._files import free_bytes
from leanstep.recipes.check.memory import MemoryEstimate
from leanstep.recipes.check.room import disk_need
from leanstep.recipes.config.differences import config_differences
from leanstep.recipes.config.schema import RunConfig
from leanstep.recipes.training.checkpoint import (
    CheckpointError,
    clean_leftovers,
    find_checkpoints,
    newest,
    point,
    read_state,
    set_aside,
    verify,
)
from leanstep.recipes.training.failures import format_bytes
from leanstep.recipes.training.folder import FolderError, RunFolder

__all__ = ["Start", "check_room", "choose_start", "pass_over"]


@dataclass
class Start:
    """Where a run begins: at ``checkpoint``, or at step 0 when it is None; ``notes`` is what to say about it.

    ``aside`` holds the newer checkpoints of the same folder that are passed over, and the word each is to be renamed
    with. Nothing is renamed before the start can no longer be refused: see :func:`pass_over`.
    """

    checkpoint: Path | None = None
    notes: list[str] = field(default_factory=list)
    aside: dict[Path, str] = field(default_factory=dict)


def choose_start(config: RunConfig, folder: RunFolder) -> Start:
    """Claim the output folder and choose the checkpoint to begin from. Every checkpoint keeps its name.

    ``checkpoint.resume``: ``auto`` takes the newest checkpoint in ``out`` that is whole, passing over damaged ones with
    a warning, and begins anew in an empty folder; ``never`` wants an empty folder; a path takes that checkpoint, or the
    newest one of that run folder, and nothing else.

    Raises:
        FolderError: ``out`` holds another run, or something that is no run, or another process trains there.
        CheckpointError: The checkpoint asked for is missing or damaged, or its recipe differs from this one.
    """
    folder.claim()
    start = Start(
        notes=[f"removed what an interrupted save left: {name}" for name in clean_leftovers(folder.checkpoints)]
    )
    resume = config.checkpoint.resume
    if resume not in ("auto", "never"):
        start.checkpoint = _at_path(Path(resume), folder, start.aside)
    elif folder.is_empty():
        return start
    elif resume == "never":
        raise FolderError(f"out: {folder.root} already holds a run, and checkpoint.resume is 'never'. {_ways_out()}")
    else:
        start.checkpoint = _newest_here(config, folder, start)
    if start.checkpoint is None:
        return start
    state = read_state(start.checkpoint)
    _check_recipe(state.config, config, str(start.checkpoint), start.notes)
    start.notes.append(f"resuming from {start.checkpoint}, step {state.step} of {config.steps}")
    return start


def pass_over(start: Start, folder: RunFolder) -> list[str]:
    """Rename the checkpoints that ``start`` passes over, so that none is taken for the newest later; returns the news.

    Call it once the checkpoint to begin from is loaded. ``last`` then leads to that checkpoint.
    """
    names = [set_aside(path, word).name for path, word in start.aside.items()]
    last = folder.root / "last"
    if names and start.checkpoint is not None and last.is_symlink():
        point(last, start.checkpoint)
    return [f"a checkpoint that was passed over is kept as {name}" for name in names]


def check_room(config: RunConfig, folder: RunFolder, memory: MemoryEstimate | None, world_size: int = 1) -> str | None:
    """Compare the free disk with what the run will write there; returns a warning when not all of it will fit.

    ``memory`` is that of one process; with None, nothing is known and nothing is said. Checkpoints that are there
    already give way to new ones and count as room.

    Raises:
        FolderError: Not even one checkpoint fits, so that nothing of the run could be kept.
    """
    if memory is None:
        return None
    one, need = disk_need(config, memory, world_size)
    free = free_bytes(folder.root)
    if one > free:
        raise FolderError(
            f"out: one checkpoint needs {format_bytes(one)}, the disk of {folder.root} has {format_bytes(free)} free; "
            "make room, or choose another disk with out=ANOTHER_FOLDER"
        )
    present = [*find_checkpoints(folder.checkpoints), folder.final]
    room = free + sum(file.stat().st_size for path in present for file in path.rglob("*") if file.is_file())
    if need <= room:
        return None
    return (
        f"WARNING: the run needs {format_bytes(need)} on the disk of {folder.root}, there is room for "
        f"{format_bytes(room)}: saving will fail on the way. Make room, lower checkpoint.keep_last "
        f"({config.checkpoint.keep_last}) or choose another disk with out=ANOTHER_FOLDER"
    )


def _ways_out() -> str:
    return (
        "Either continue it (--resume, with its own recipe) or write elsewhere (out=ANOTHER_FOLDER, or remove this one)"
    )


def _at_path(path: Path, folder: RunFolder, aside: dict[Path, str]) -> Path:
    """The checkpoint that was asked for by its path, which must be whole; later ones, whole or not, go to ``aside``."""
    if not path.exists():
        raise CheckpointError(f"checkpoint.resume: {path} does not exist")
    path = path.resolve()
    if (path / "checkpoints").is_dir():
        inside = find_checkpoints(path / "checkpoints")
        if not inside:
            raise CheckpointError(f"checkpoint.resume: the run in {path} has no complete checkpoint")
        path = inside[-1]
    verify(path)
    if path.parent == folder.checkpoints.resolve():
        # the steps after it are computed again: what they left must not be taken for the newest state later
        step = read_state(path).step
        found = find_checkpoints(folder.checkpoints)
        aside.update({later: "abandoned" for later in found if int(later.name.removeprefix("step-")) > step})
    elif not folder.is_empty():
        raise FolderError(f"out: {folder.root} already holds another run than that of {path}. {_ways_out()}")
    return path


def _newest_here(config: RunConfig, folder: RunFolder, start: Start) -> Path | None:
    """The newest whole checkpoint of the run in ``out``; None when it never came to save one."""
    chosen, problems = newest(folder.checkpoints)
    if chosen is None and problems:
        raise CheckpointError("no checkpoint in the output folder can be used.\n" + "\n".join(problems.values()))
    for path, problem in problems.items():
        start.notes.append(f"WARNING: {problem}; going back to an older checkpoint")
        start.aside[path] = "damaged"
    if chosen is None:
        saved = folder.root / "config.yaml"
        if not saved.is_file():
            raise FolderError(f"out: {folder.root} is not empty and holds no run. Choose another with out=FOLDER")
        _check_recipe(_read_yaml(saved), config, str(saved), start.notes)
        start.notes.append(f"the run in {folder.root} stopped before its first checkpoint; beginning again at step 0")
    return chosen


def _read_yaml(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    content = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _check_recipe(saved: dict[str, Any], config: RunConfig, where: str, notes: list[str]) -> None:
    """Refuse to continue with another recipe; what changes rounding only is said."""
    forbidden, rounding = config_differences(saved, config)
    if forbidden:
        keys = "1 key" if len(forbidden) == 1 else f"{len(forbidden)} keys"
        listed = "\n".join(f"  {line}" for line in forbidden)
        weights = Path(where) / "hf"
        also = f" (the weights alone can be taken over with model.init_from={weights})" if weights.is_dir() else ""
        raise CheckpointError(
            f"{keys} of the recipe changed since {where} was written, so this would not be the same run:\n{listed}\n"
            f"Put back what changed to continue it, or write elsewhere with out=ANOTHER_FOLDER{also}"
        )
    if rounding:
        notes.append("differs from the checkpoint, same maths but not the same rounding: " + "; ".join(rounding))
