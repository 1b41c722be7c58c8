"""Libraries of the ``bench`` extra, and what to type where one is missing."""

from __future__ import annotations

import importlib
from typing import Any


def needed(name: str) -> Any:
    """The module ``name``; ends the program with the command that installs it where it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed; it comes with pip install -e '.[bench]'") from None
