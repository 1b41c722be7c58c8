"""Which files and functions of the package a call goes through, in the order in which they are entered."""

import importlib
import sys
import tomllib
from collections.abc import Callable, Collection
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDERS = ("kernels", "leanstep", "lora", "optimizers", "pruning", "recipes", "sparsity")


class StopWalk(BaseException):
    """Raised in the traced call where the walk ends; no handler of the package catches it."""


def walk(call: Callable[[], Any], until: str | None = None, closed: Collection[str] = ()) -> list[tuple[str, str]]:
    """(file, function) of every function of the package that ``call`` enters, each once, in order.

    Args:
        call: what to run, in this thread.
        until: "file:function" at whose entry the call is abandoned; None: run it to its end.
        closed: "file:function" of functions that count and whose own calls do not: a walk of their own.
    """
    import_all()
    entered: dict[tuple[str, str], None] = {}
    inside: list[FrameType] = []  # the closed function that runs, if one does

    def profile(frame: FrameType, event: str, _: object) -> None:
        if inside and event == "return" and frame is inside[0]:
            inside.clear()
        if event != "call" or (inside and until is None):
            return
        path = Path(frame.f_code.co_filename)
        if not path.is_relative_to(ROOT):
            return
        file = path.relative_to(ROOT)
        if file.parts[0] not in FOLDERS:
            return
        step = (file.as_posix(), frame.f_code.co_qualname.replace("<locals>.", ""))
        name = f"{step[0]}:{step[1]}"
        if not inside:
            entered.setdefault(step)
        if name == until:
            entered.setdefault(step)
            raise StopWalk
        if name in closed and not inside:
            inside.append(frame)

    previous = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    except StopWalk:
        pass
    finally:
        sys.setprofile(previous)
    return list(entered)


def import_all() -> None:
    """Import every module of the package, so that a walk sees calls and no class bodies."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    for package in packages:
        for path in (ROOT / package.removeprefix("leanstep.").replace(".", "/")).glob("*.py"):
            # _wheel belongs to the build, and imports what only setuptools may find
            if path.stem not in ("__init__", "__main__", "_wheel"):
                importlib.import_module(f"{package}.{path.stem}")


def files(steps: list[tuple[str, str]]) -> list[str]:
    """The distinct files of a walk, in the order in which they are entered, without those that load public names."""
    return list(dict.fromkeys(file for file, _ in steps if not file.endswith("__init__.py")))
