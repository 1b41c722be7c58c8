"""Checkpoints: write atomically, verify, remove old ones, and choose the one to resume from.

``checkpoints/step-000100/`` holds

- ``hf/``: model and tokenizer, which ``from_pretrained`` opens;
- ``trainer/``: Accelerate's state (optimizer, schedule, gradient scaler, random generators, averages of ``ema``),
  ``state.json``, the data position, and the decisions of ``lora.attention``;
- ``COMPLETE``: the size of every file, and the checksum of files up to 256 MiB.

A checkpoint is written into ``.writing-step-000100``, flushed to disk and renamed. The next start removes the
``.writing-`` folder of a killed run.
"""

import dataclasses
import json
import os
import pickle
import re
import secrets
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge
from pydantic import TypeAdapter, ValidationError

from leanstep._files import REPLACED, STAGED, one_line, parse_json, publish_folder, read_text, remove
from leanstep.recipes.config.differences import config_differences
from leanstep.recipes.config.schema import RunConfig
from leanstep.recipes.config.values import read_document, recorded
from leanstep.recipes.training.folder import FolderError, RunFolder

if TYPE_CHECKING:
    from leanstep.recipes.data.sequences import LoadedData

MARKER = "COMPLETE"
_REMOVED = ".removed-"
_CHECKSUM_LIMIT = 256 * 1024**2
# suffixes of the files that a resumed run reads
_READ = (".safetensors", ".bin", ".pt", ".pkl", ".json")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: missing, incomplete, damaged, or made by another recipe."""


@dataclass
class SpikeRecord:
    """Loss spikes of a run (``stop.on_spike``).

    ``losses`` are those of the last steps without a spike, at most ``stop.spike_window``. ``skipped`` and ``rollbacks``
    count, and ``steps`` are the newest spikes. ``in_row`` counts the steps skipped since the last update,
    ``rollbacks_here`` the rollbacks to the checkpoint of step ``returned_to``. ``windows_ahead``: windows of data that
    rollbacks left out, so the next step reads window ``step + windows_ahead``, counted from 0.
    """

    losses: list[float] = field(default_factory=list)
    skipped: int = 0
    rollbacks: int = 0
    steps: list[int] = field(default_factory=list)
    in_row: int = 0
    rollbacks_here: int = 0
    returned_to: int = -1
    windows_ahead: Annotated[int, Ge(0)] = 0


@dataclass
class TrainState:
    """Progress of a run: ``tokens`` counts targets, ``elapsed_s`` the seconds of all its starts.

    ``val_loss`` is the newest validation loss, ``val_stderr`` its standard error over the sequences, ``bits_per_byte``
    the loss over the bytes of text, ``ema_loss`` that of the averaged weights (``ema``).
    ``nonfinite`` counts steps skipped for a non-finite loss or gradient. ``data``: identity of tokenizer and text;
    empty in checkpoints of older versions. ``eval_pending``: a signal interrupted the evaluation of this step, which
    the resumed run repeats.
    """

    step: Annotated[int, Ge(0)] = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    val_loss: float | None = None
    val_stderr: float | None = None
    bits_per_byte: float | None = None
    ema_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    eval_pending: bool = False
    nonfinite: int = 0
    spikes: SpikeRecord = field(default_factory=SpikeRecord)
    world_size: int = 1
    data: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors of the block, except out-of-memory, into a CheckpointError of one line about ``path``."""
    try:
        with warnings.catch_warnings():
            # an error follows, which says more
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            yield
    except (CheckpointError, MemoryError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError:
        # torch advises to load such files without its checks
        raise CheckpointError(f"{path} is damaged, or holds more than tensors and plain values") from None
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "weights_only" in str(error):
            reason = "it is damaged, or holds more than tensors and plain values"
        raise CheckpointError(f"{path} cannot be loaded ({type(error).__name__}): {one_line(reason[:300])}") from None


def checkpoint_name(step: int) -> str:
    """``step-000100``."""
    return f"step-{step:06d}"


def find_checkpoints(folder: Path) -> list[Path]:
    """List the folders with a COMPLETE marker, oldest first. :func:`verify` finds damaged ones."""
    if not folder.is_dir():
        return []
    complete = [
        path
        for path in folder.iterdir()
        if re.fullmatch(r"step-\d+", path.name) and not path.is_symlink() and (path / MARKER).is_file()
    ]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def staging(folder: Path, step: int) -> Path:
    """Create an empty folder to fill for :func:`commit`."""
    path = folder / f"{STAGED}{checkpoint_name(step)}"
    remove(path)
    folder.mkdir(exist_ok=True)
    # fails where a link could not be removed
    path.mkdir()
    (path / "hf").mkdir()
    (path / "trainer").mkdir()
    return path


def commit(staged: Path) -> Path:
    """Mark a filled staging folder complete, flush it and rename it, replacing a checkpoint of the same step."""
    inventory: dict[str, dict[str, int]] = {}
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        inventory[str(path.relative_to(staged))] = _fingerprint(path)
    (staged / MARKER).write_text(json.dumps({"files": inventory}, indent=1), encoding="utf-8")
    target = staged.with_name(staged.name.removeprefix(STAGED))
    publish_folder(staged, target)
    return target


def clean_leftovers(folder: Path) -> list[str]:
    """Remove what a killed run half wrote or half removed; return the names. The caller must hold the run's lock."""
    if not folder.is_dir():
        return []
    left = [path for path in folder.iterdir() if path.name.startswith((STAGED, REPLACED, _REMOVED))]
    for path in left:
        original = folder / path.name.removeprefix(REPLACED)
        if path.name.startswith(REPLACED) and not original.exists():
            # killed between the two renames of commit: restore the older checkpoint
            os.replace(path, original)
        else:
            remove(path)
    return sorted(path.name for path in left)


def verify(path: Path) -> None:
    """Check a checkpoint against its COMPLETE marker. Raises CheckpointError naming the first file that is wrong."""
    try:
        files = parse_json(read_text(path / MARKER))["files"]
        sizes = {str(name): expected["size"] for name, expected in files.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no complete checkpoint: it has no {MARKER} file") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MARKER} cannot be read ({error}): the checkpoint is damaged") from None
    try:
        _check_files(path, files, sizes)
        _check_others(path, sizes)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({one_line(error)}): the checkpoint is damaged") from None


def _check_files(path: Path, files: dict[str, Any], sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} is damaged: {name} is missing")
        if Path(name).is_absolute() or file.resolve() != path.resolve() / name:
            raise CheckpointError(f"{path} cannot be used: {name} lies outside of it, or behind a symbolic link")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{path} is damaged: {name} has {file.stat().st_size} bytes, expected {size} (a full disk "
                "or an interrupted copy truncates files)"
            )
        if "crc32" in files[name] and _fingerprint(file) != files[name]:
            raise CheckpointError(f"{path} is damaged: {name} does not match its checksum")


def _check_others(path: Path, listed: Iterable[str]) -> None:
    """Refuse what a run would read or wait for though the marker does not list it."""
    for file in path.rglob("*"):
        name = str(file.relative_to(path))
        if file.is_symlink() or not (file.is_file() or file.is_dir()):
            kind = "a symbolic link" if file.is_symlink() else "no regular file"
            raise CheckpointError(f"{path} cannot be used: {one_line(name)} is {kind}; remove it")
        if file.is_file() and file.suffix in _READ and name not in listed and name != MARKER:
            raise CheckpointError(f"{path} cannot be used: its {MARKER} does not list {one_line(name)}; remove it")


def newest(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest checkpoint that passes :func:`verify`, and the problem of each newer one."""
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
        # a half-removed folder is not taken for a checkpoint, and the next start removes the rest
        renamed = path.with_name(f"{_REMOVED}{path.name}")
        remove(renamed)
        os.replace(path, renamed)
        remove(renamed)
    return removed


def replace_symlink(link: Path, target: Path) -> None:
    """Create or atomically replace the relative symbolic link ``link`` to ``target``."""
    temporary = link.with_name(f".{link.name}.{secrets.token_hex(8)}.tmp")
    temporary.symlink_to(os.path.relpath(target, link.parent))
    os.replace(temporary, link)


def write_state(staged: Path, state: TrainState) -> None:
    """Write ``trainer/state.json``."""
    (staged / "trainer" / "state.json").write_text(json.dumps(dataclasses.asdict(state), indent=1), encoding="utf-8")


def read_state(path: Path) -> TrainState:
    """Read ``trainer/state.json`` of a checkpoint. Raises CheckpointError."""
    try:
        content = parse_json(read_text(path / "trainer" / "state.json"))
        known = {item.name for item in dataclasses.fields(TrainState)}
        return TypeAdapter(TrainState).validate_python({key: content[key] for key in content.keys() & known})
    except ValidationError as error:
        wrong = error.errors()[0]
        reason = f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"
        raise CheckpointError(f"{path / 'trainer' / 'state.json'} is damaged: {reason}") from None
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


@dataclass
class Start:
    """Where a run begins: at ``checkpoint``, or at step 0 if that is None. ``notes`` are lines to print.

    ``aside``: newer checkpoints that the run skips -> the word that :func:`rename_skipped` puts before their names.
    """

    checkpoint: Path | None = None
    notes: list[str] = field(default_factory=list)
    aside: dict[Path, str] = field(default_factory=dict)


def choose_start(config: RunConfig, folder: RunFolder, *, claim: bool = True) -> Start:
    """Claim the output folder and choose the checkpoint to begin from. Renames no checkpoint.

    ``checkpoint.resume``: ``auto`` takes the newest undamaged checkpoint in ``out``, with a warning for each damaged
    one, and begins at step 0 in an empty folder. ``never`` needs an empty folder. A path takes that checkpoint, or the
    newest one of that run folder. Where ``out`` has a run that began from the same path elsewhere, its newest
    checkpoint is taken. Without ``claim`` the folder is only read.

    Raises:
        FolderError: ``out`` holds another run or other files, or another process trains there.
        CheckpointError: the requested checkpoint is missing or damaged, or its recipe differs from this one.
    """
    start = Start()
    if claim and folder.claim():
        left = clean_leftovers(folder.checkpoints)
        start.notes += [f"removed the leftover of an interrupted save: {name}" for name in left]
    resume = config.checkpoint.resume
    if resume not in ("auto", "never"):
        start.checkpoint = _at_path(Path(resume), config, folder, start)
    elif folder.is_empty(config.data.cache_dir):
        return start
    elif resume == "never":
        raise FolderError(f"out: {folder.root} already holds a run, and checkpoint.resume is 'never'. {_ways_out()}")
    else:
        start.checkpoint = _newest_here(config, folder, start)
    if start.checkpoint is None:
        return start
    state = read_state(start.checkpoint)
    _check_recipe(state.config, config, str(start.checkpoint), start.notes)
    if state.step > config.steps:
        raise CheckpointError(f"{start.checkpoint} says step {state.step:,}, the run has {config.steps:,} steps")
    start.notes.append(f"resuming from {start.checkpoint}, step {state.step} of {config.steps}")
    return start


def rename_skipped(start: Start) -> list[str]:
    """Rename ``step-000100`` that ``start`` skips to ``WORD-step-000100``; return lines to print.

    Call it after loading the checkpoint to begin from.
    """
    lines = []
    for path, word in start.aside.items():
        target = path.with_name(f"{word}-{path.name}")
        remove(target)
        os.replace(path, target)
        lines.append(f"renamed a skipped checkpoint to {target.name}")
    return lines


def _ways_out() -> str:
    return (
        "Either continue it (--resume, with its own recipe) or write elsewhere (out=ANOTHER_FOLDER, or remove this one)"
    )


def _at_path(path: Path, config: RunConfig, folder: RunFolder, start: Start) -> Path:
    """Return the requested checkpoint, verified, or the newest of the run in ``out`` that began there.

    Checkpoints after the requested one in the same run go to ``start.aside``.
    """
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
        # the run repeats the steps after it, so their checkpoints must not be taken for newer ones
        step = read_state(path).step
        checkpoints = find_checkpoints(folder.checkpoints)
        start.aside.update(
            {later: "abandoned" for later in checkpoints if int(later.name.removeprefix("step-")) > step}
        )
    elif not folder.is_empty(config.data.cache_dir):
        if _resumed_by(folder) != recorded(config)["checkpoint"]["resume"]:
            raise FolderError(f"out: {folder.root} already holds a run other than that of {path}. {_ways_out()}")
        if find_checkpoints(folder.checkpoints):
            return _newest_here(config, folder, start) or path
    return path


def _resumed_by(folder: RunFolder) -> Any:
    """``checkpoint.resume`` of the last start in ``out``; None if it cannot be told."""
    try:
        return read_document(read_text(folder.root / "config.yaml")).value["checkpoint"]["resume"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def how_to_continue(config: RunConfig, run: str = "it") -> str:
    """Name the command that continues a run from its newest checkpoint."""
    resume = config.checkpoint.resume
    in_out = resume not in ("auto", "never") and Path(resume).resolve().is_relative_to(Path(config.out).resolve())
    resumes = " with --resume auto" if resume == "never" or in_out else ""
    return f"the same command{resumes} continues {run}"


def check_data(state: TrainState, data: "LoadedData", checkpoint: Path) -> None:
    """Raise CheckpointError if the tokenizer or the text is not that of the run that wrote ``checkpoint``."""
    changed = [name for name, identity in data.identity.items() if state.data.get(name, identity) != identity]
    if not changed:
        return
    then, now = state.data.get("text"), data.identity.get("text")
    counts = f" (the text was {then}, is {now} now)" if "text" in changed else ""
    raise CheckpointError(
        f"the {' and the '.join(changed)} changed since {checkpoint} was written, so this would not be the same "
        f"run{counts}. Restore what was there to continue it, or write elsewhere with out=ANOTHER_FOLDER (the weights "
        f"alone can be taken over with model.init_from={checkpoint / 'hf'})"
    )


def _newest_here(config: RunConfig, folder: RunFolder, start: Start) -> Path | None:
    """Return the newest undamaged checkpoint of the run in ``out``; None if it saved none."""
    checkpoint, problems = newest(folder.checkpoints)
    if checkpoint is None and problems:
        raise CheckpointError("no checkpoint in the output folder can be used.\n" + "\n".join(problems.values()))
    for path, problem in problems.items():
        start.notes.append(f"WARNING: {problem}; going back to an older checkpoint")
        start.aside[path] = "damaged"
    if checkpoint is None:
        saved = folder.root / "config.yaml"
        if not saved.is_file():
            raise FolderError(f"out: {folder.root} is not empty and holds no run. Choose another with out=FOLDER")
        document = read_document(read_text(saved, errors="replace"))
        if document.problems or not isinstance(document.value, dict):
            _, problem = document.problems[0] if document.problems else (1, "expected a mapping")
            raise FolderError(f"out: {saved} is damaged ({problem}). Choose another folder with out=FOLDER")
        _check_recipe(document.value, config, str(saved), start.notes)
        start.notes.append(f"the run in {folder.root} stopped before its first checkpoint; beginning again at step 0")
    return checkpoint


def _check_recipe(saved: dict[str, Any], config: RunConfig, where: str, notes: list[str]) -> None:
    """Raise CheckpointError if ``config`` would be another run; note differences that change only rounding."""
    try:
        forbidden, rounding = config_differences(saved, config)
    except (AttributeError, LookupError, TypeError) as error:  # a list where a recipe has a mapping, say
        raise CheckpointError(
            f"{where} cannot be compared with the recipe ({one_line(error)}): it is damaged"
        ) from None
    if forbidden:
        keys = "1 key" if len(forbidden) == 1 else f"{len(forbidden)} keys"
        listed = "\n".join(f"  {line}" for line in forbidden)
        weights = Path(where) / "hf"
        # by default the folder follows from the name, which reports show
        elsewhere = "name=ANOTHER_NAME" if config.out == f"runs/{config.name}" else "out=ANOTHER_FOLDER"
        also = f" (the weights alone can be taken over with model.init_from={weights})" if weights.is_dir() else ""
        raise CheckpointError(
            f"{keys} of the recipe changed since {where} was written, so this would not be the same run:\n{listed}\n"
            f"Undo the changes to continue it, or write elsewhere with {elsewhere}{also}"
        )
    if rounding:
        notes.append("differs from the checkpoint, same maths but not the same rounding: " + "; ".join(rounding))
