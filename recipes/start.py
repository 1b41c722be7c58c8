"""Where a run begins: at step 0, or at a checkpoint that is whole and was made by the same recipe."""

from pathlib import Path
from typing import Any

from leanstep.recipes.checkpoint import (
    CheckpointError,
    clean_leftovers,
    config_differences,
    find_checkpoints,
    newest,
    read_state,
    set_aside,
    verify,
)
from leanstep.recipes.config import RunConfig
from leanstep.recipes.folder import FolderError, RunFolder

__all__ = ["choose_start"]

# files that a start which failed early leaves behind: no run yet
_TRACES = {".lock", "train.log", "status.json"}


def choose_start(config: RunConfig, folder: RunFolder) -> tuple[Path | None, list[str]]:
    """Claim the output folder and choose the checkpoint to begin from; None means step 0. Returns it and what to say.

    ``checkpoint.resume``: ``auto`` takes the newest checkpoint in ``out`` that is whole, passing over damaged ones with
    a warning, and begins anew in an empty folder; ``never`` wants an empty folder; a path takes that checkpoint, or the
    newest one of that run folder, and nothing else.

    Raises:
        FolderError: ``out`` holds another run, or something that is no run, or another process trains there.
        CheckpointError: The checkpoint asked for is missing or damaged, or its recipe differs from this one.
    """
    folder.claim()
    notes = [f"removed what an interrupted save left: {name}" for name in clean_leftovers(folder.checkpoints)]
    resume = config.checkpoint.resume
    if resume not in ("auto", "never"):
        chosen = _at_path(Path(resume), folder, notes)
    elif _is_empty(folder):
        return None, notes
    elif resume == "never":
        raise FolderError(f"out: {folder.root} already holds a run, and checkpoint.resume is 'never'. {_ways_out()}")
    else:
        chosen = _newest_here(config, folder, notes)
    if chosen is None:
        return None, notes
    state = read_state(chosen)
    _check_recipe(state.config, config, str(chosen), notes)
    notes.append(f"resuming from {chosen}, step {state.step} of {config.steps}")
    return chosen, notes


def _is_empty(folder: RunFolder) -> bool:
    return all(entry.name in _TRACES for entry in folder.root.iterdir())


def _ways_out() -> str:
    return (
        "Either continue it (--resume, with its own recipe) or write elsewhere (out=ANOTHER_FOLDER, or remove this one)"
    )


def _at_path(path: Path, folder: RunFolder, notes: list[str]) -> Path:
    """The checkpoint that was asked for by its path; it must be whole."""
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
        for later in find_checkpoints(folder.checkpoints):
            if read_state(later).step > step:
                notes.append(f"set aside a later checkpoint as {set_aside(later, 'abandoned').name}")
    elif not _is_empty(folder):
        raise FolderError(f"out: {folder.root} already holds another run than that of {path}. {_ways_out()}")
    return path


def _newest_here(config: RunConfig, folder: RunFolder, notes: list[str]) -> Path | None:
    """The newest whole checkpoint of the run in ``out``; None when it never came to save one."""
    chosen, problems = newest(folder.checkpoints)
    if chosen is None and problems:
        raise CheckpointError("no checkpoint in the output folder can be used.\n" + "\n".join(problems.values()))
    for path, problem in problems.items():
        notes.append(f"WARNING: {problem}")
        notes.append(f"WARNING: it is kept as {set_aside(path, 'damaged').name}; going back to an older checkpoint")
    if chosen is None:
        saved = folder.root / "config.yaml"
        if not saved.is_file():
            raise FolderError(f"out: {folder.root} is not empty and holds no run. Choose another with out=FOLDER")
        _check_recipe(_read_yaml(saved), config, str(saved), notes)
        notes.append(f"the run in {folder.root} stopped before its first checkpoint; beginning again at step 0")
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
        listed = "\n".join(f"  {line}" for line in forbidden)
        raise CheckpointError(
            f"{where} was made by another recipe, so this would not be the same run:\n{listed}\n"
            f"Put these keys back to continue it, or write elsewhere with out=ANOTHER_FOLDER (the weights alone can be "
            f"taken over with model.init_from={Path(where) / 'hf'})"
            if "step-" in where
            else f"{where} describes another run:\n{listed}\n{_ways_out()}"
        )
    if rounding:
        notes.append("differs from the checkpoint, same maths but not the same rounding: " + "; ".join(rounding))
