"""Griffe's extension for the API pages: docstrings as :mod:`text` rewrites them."""

import re
import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))
from text import key_line, readable_docstring

PAGES = Path(__file__).parents[1] / "api"


def public_addresses() -> dict[str, str]:
    """Return short, dotted and full names of all objects on the API pages -> the names that the pages have.

    A page has ``leanstep.lora.merge.merge`` for ``leanstep.lora.merge``, which is also a module.
    """
    names = [name for page in sorted(PAGES.glob("*.md")) for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)]
    addresses = {name.rpartition(".")[2]: name for name in reversed(names)}
    for name in names:
        area, last = ".".join(name.split(".")[:2]), name.rpartition(".")[2]
        addresses[f"{area}.{last}"] = addresses[name] = name
    return addresses


class Docstrings(griffe.Extension):
    """Rewrites every docstring when its object is loaded, and lists the keys of a recipe's sections."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses = public_addresses()

    def on_instance(self, *, obj: griffe.Object, **more: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = readable_docstring(obj.docstring.value, self.addresses)

    def on_class_members(self, *, cls: griffe.Class, **more: Any) -> None:
        """Add its keys to the docstring of a section of a recipe."""
        if cls.docstring and cls.module.path == "leanstep.recipes.config.schema":
            keys = [
                key_line(name, str(key.annotation), None if key.value is None else str(key.value))
                for name, key in cls.attributes.items()
                if key.annotation
            ]
            cls.docstring.value += "\n\nKeys:\n\n" + "\n".join(f"    {line}" for line in keys)
