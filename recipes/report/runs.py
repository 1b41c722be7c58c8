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
from leanstep.recipes.report.runlog import Run, duration, flat, number, read_files

# how the runs are ordered; those without the value come last
_ORDERS = {
    "age": lambda facts: facts["age_s"],
    "loss": lambda facts: facts["val_loss"],
    "name": lambda facts: facts["name"],
    "size": lambda facts: -facts["bytes"],
    "state": lambda facts: facts["state"],
}
ORDERS = tuple(_ORDERS)
_FILES = {"config.yaml", "status.json"}  # of every run


def list_runs(root: Path, conditions: Sequence[str] = (), order: str = "age") -> list[dict[str, Any]]:
    """Return the facts of every run in and below a folder.

    Args:
        root: the folder; links to folders are not followed.
        conditions: ``KEY=TEXT``, where KEY is a fact or a key of the recipe, such as ``optimizer.name``, and TEXT may
            have wildcards. A run must meet all.
        order: one of :data:`ORDERS`; age means the newest first, size the largest.

    Returns:
        dicts with ``name`` (the path below ``root``), ``state``, ``step``, ``steps``, ``val_loss`` (None where it is
        not finite), ``optimizer``, ``lr``, ``age_s`` (seconds since the run last wrote its state), ``bytes`` (of all
        its files), ``updated`` and ``settings`` (key -> text).

    Raises:
        ValueError: the folder is none, a condition is not ``KEY=TEXT``, or no run has its key.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; expected one that holds runs, such as runs/")
    pairs = [condition.partition("=") for condition in conditions]
    for key, equals, _ in pairs:
        if not key or not equals:
            raise ValueError(f"--where: expected KEY=TEXT, such as optimizer.name=lion or state=done, got {key!r}")
    runs = [_facts(read_files(folder), root) for folder in _folders(root)]
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
        loss, rate = (number(run[key]) for key in ("val_loss", "lr"))
        step = f"{run['step']}/{run['steps']}" if run["steps"] is not None else "-"
        shown = ("-" if loss is None else f"{loss:.4f}", run["optimizer"] or "-", "-" if rate is None else f"{rate:g}")
        rows.append((run["name"], run["state"], step, *shown, _age(run["age_s"]), format_bytes(run["bytes"])))
    return table_lines(rows)


def _folders(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        if set(files) >= _FILES:
            names.clear()  # checkpoints are no runs
            yield Path(folder)
        names.sort()


def _facts(run: Run, root: Path) -> dict[str, Any]:
    status, updated = run.status, str(run.status.get("updated"))
    loss = number(status.get("val_loss"))
    try:
        age = max(0.0, time.time() - datetime.strptime(updated, "%Y-%m-%dT%H:%M:%S%z").timestamp())
    except ValueError:
        age = None
    files = (Path(folder) / name for folder, _, names in os.walk(run.folder) for name in names)
    return {
        "name": one_line(os.path.relpath(run.folder, root) if run.folder != root else run.name),
        "state": one_line(run.state),
        "step": status.get("step"),
        "steps": status.get("steps"),
        "val_loss": loss if loss is not None and math.isfinite(loss) else None,
        "optimizer": one_line(run.setting("optimizer.name") or ""),
        "lr": number(run.setting("optimizer.lr")),
        "age_s": age,
        "bytes": sum(file.lstat().st_size for file in files if os.path.lexists(file)),
        "updated": updated if age is not None else None,
        "settings": flat(run.config),
    }


def _meets(run: dict[str, Any], key: str, text: str) -> bool:
    value = run[key] if key in run else run["settings"].get(key)
    if value is None:
        return False
    wanted = number(text)
    return fnmatch.fnmatchcase(str(value), text) or (wanted is not None and number(value) == wanted)


def _age(seconds: float | None) -> str:
    if seconds is None or seconds < 2 * 86400:
        return duration(seconds)
    return f"{seconds / 86400:.0f} days"
