"""The runs below a folder in one table: state, loss, optimizer, age and size, without reading their logs."""

import fnmatch
import math
import os
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from leanstep._files import format_bytes, one_line, table_lines
from leanstep.recipes.config import differences
from leanstep.recipes.report.runlog import Run, duration, flat, number, read_files

# how the runs are ordered; those without the value come last
_ORDERS = {
    "age": lambda facts: facts["age_s"],
    "loss": lambda facts: facts["val_loss"],
    "name": lambda facts: facts["name"],
    "size": lambda facts: -facts["bytes"],
    "state": lambda facts: facts["state"],
}
_STYLES = {"val_loss": ".4f", "lr": "g"}
_FILES = {"config.yaml", "status.json"}  # of every run


def list_runs(root: Path, conditions: Sequence[str] = (), order: str = "age") -> list[dict[str, Any]]:
    """Return the facts of every run in and below a folder.

    Args:
        root: the folder; links to folders are not followed.
        conditions: ``KEY=TEXT``, where KEY is a fact or a key of the recipe, such as ``optimizer.name``, and TEXT may
            have wildcards. A run must meet all.
        order: "age", "loss", "name", "size" or "state"; age means the newest first, size the largest.

    Returns:
        dicts with ``name`` (the path below ``root``), ``state``, ``step``, ``steps``, ``val_loss`` (None where it is
        not finite), ``optimizer``, ``lr``, ``age_s`` (seconds since the run last wrote its state), ``bytes`` (of all
        its files), ``updated`` and ``settings`` (key -> value).

    Raises:
        ValueError: the folder is none, a condition is not ``KEY=TEXT``, or no run has its key.
    """
    pairs = [condition.partition("=") for condition in conditions]
    for key, equals, _ in pairs:
        if not key or not equals:
            raise ValueError(f"--where: expected KEY=TEXT, such as optimizer.name=lion or state=done, got {key!r}")
    runs = [facts_of(read_files(folder), root) for folder in run_folders(root)]
    for key, _, _ in pairs:
        if runs and not any(key in run or key in run["settings"] for run in runs):
            raise ValueError(f"--where: no run has {key!r}; expected a key of recipes, or one of {', '.join(runs[0])}")
    met = [run for run in runs if all(_meets(run, key, text) for key, _, text in pairs)]
    value = _ORDERS[order]
    return sorted(met, key=lambda run: (value(run) is None, value(run)))


def table(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of the table of :func:`list_runs`."""
    rows = [("RUN", "STATE", "STEP", "LOSS", "OPTIMIZER", "LR", "AGE", "SIZE")]
    for run in runs:
        known = run["step"] is not None and run["steps"] is not None
        step = f"{run['step']:.0f}/{run['steps']:.0f}" if known else "-"
        loss, rate = (format(run[key], style) if run[key] is not None else "-" for key, style in _STYLES.items())
        facts = step, loss, run["optimizer"] or "-", rate, _age(run["age_s"]), format_bytes(run["bytes"])
        rows.append((run["name"], run["state"], *facts))
    return table_lines(rows)


def run_folders(root: Path) -> Iterator[Path]:
    """Yield the folders of runs in and below a folder, by name. Raises ValueError where it is none."""
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; expected one that holds runs, such as runs/")
    for folder, names, files in os.walk(root):
        if set(files) >= _FILES:
            names.clear()  # checkpoints are no runs
            yield Path(folder)
        names.sort()


def facts_of(run: Run, root: Path) -> dict[str, Any]:
    """What :func:`list_runs` returns of one run."""
    status, updated = run.status, str(run.status.get("updated"))
    try:
        age = max(0.0, time.time() - datetime.strptime(updated, "%Y-%m-%dT%H:%M:%S%z").timestamp())
    except ValueError:
        age = None
    files = (os.path.join(folder, name) for folder, _, names in os.walk(run.folder) for name in names)
    return {
        "name": one_line(os.path.relpath(run.folder, root) if run.folder != root else run.name),
        "state": one_line(run.state),
        "step": _finite(status.get("step")),
        "steps": _finite(status.get("steps")),
        "val_loss": _finite(status.get("val_loss")),
        "optimizer": one_line(run.setting("optimizer.name") or ""),
        "lr": _finite(run.setting("optimizer.lr")),
        "age_s": age,
        "bytes": sum(map(_size, files)),
        "updated": updated if age is not None else None,
        "settings": dict(differences.flat(run.config)),
    }


def _finite(value: Any) -> float | None:
    value = number(value)
    return value if value is not None and math.isfinite(value) else None


def _size(file: str) -> int:
    try:
        return os.lstat(file).st_size
    except OSError:  # of a run that is being written
        return 0


def _meets(run: dict[str, Any], key: str, text: str) -> bool:
    if key not in run and key not in run["settings"]:
        return False
    value = run[key] if key in run else run["settings"][key]
    wanted = number(text)  # 1e-3 finds 0.001, too
    return fnmatch.fnmatchcase(flat(value)[""], text) or (wanted is not None and number(value) == wanted)


def _age(seconds: float | None) -> str:
    if seconds is None or seconds < 2 * 86400:
        return duration(seconds)
    return f"{seconds / 86400:.0f} days"
