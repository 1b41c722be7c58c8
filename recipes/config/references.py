"""References in a recipe: ``${key.path}`` is another value of it, ``${oc.env:NAME}`` an environment variable.

``${oc.env:NAME,DEFAULT}`` has a default, ``${oc.decode:TEXT}`` reads a text as YAML, ``${.key}`` names a key beside
this one, and ``\\${`` is the text ``${``. A reference alone has any value; inside a text it becomes text.

Environment variables may be secret: files of a run have the reference, not the value
(:func:`leanstep.recipes.config.values.recorded`).
"""

import os
import re
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from leanstep.recipes.config.values import KeyPath, check_depth, leaves, parse_scalar, set_at

# limits: references that lead on to references or lie inside them, characters of a resolved text, values that
# references copy
_MOST_STEPS, _MOST_TEXT, _MOST_VALUES = 20, 10_000, 5000
_ENVIRONMENT, _DECODE = "oc.env:", "oc.decode:"


class References:
    """Resolves the references between the values of ``tree``."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self._tree = tree
        self._values: dict[KeyPath, tuple[Any, bool]] = {}
        self._open: list[KeyPath] = []
        self._copied = 0

    def resolve(self, path: KeyPath) -> tuple[Any, bool]:
        """Return the value at ``path``, and whether files record its text instead (environment variables, escapes).

        Raises ValueError for a missing key or variable, a reference to itself, and values beyond the limits.
        """
        if path in self._values:
            return self._values[path]
        if path in self._open:
            raise ValueError(f"{'.'.join(path)} refers to itself")
        if len(self._open) == _MOST_STEPS:
            raise ValueError(f"more than {_MOST_STEPS} references lead on to references")
        self._open.append(path)
        try:
            value = self._node(path)
            result = self._expand(value, path) if isinstance(value, str) else self._copy(value, path)
        finally:
            self._open.pop()
        check_depth(len(path) + max((len(below) for below, _ in leaves(result[0])), default=0))
        self._values[path] = result
        return result

    def _node(self, path: KeyPath) -> Any:
        node: Any = self._tree
        for step in path:
            try:
                node = node[int(step)] if isinstance(node, list) else node[step]
            except (KeyError, ValueError, IndexError, TypeError):
                raise ValueError(f"Interpolation key {'.'.join(path)!r} not found") from None
        return node

    def _copy(self, value: Any, path: KeyPath) -> tuple[Any, bool]:
        result, private = deepcopy(value), False
        for below, leaf in leaves(value):
            self._count(1)
            if below and isinstance(leaf, str) and "${" in leaf:
                resolved, secret = self.resolve((*path, *below))
                self._count(sum(1 for _ in leaves(resolved)))
                set_at(result, below, resolved)
                private |= secret
        return result, private

    def _count(self, copied: int) -> None:
        self._copied += copied
        if self._copied > _MOST_VALUES:
            raise ValueError(f"references copy more than {_MOST_VALUES:,} values")

    def _expand(self, text: str, path: KeyPath) -> tuple[Any, bool]:
        if text == "???" and len(self._open) > 1:
            raise ValueError(f"{'.'.join(path)} has no value yet")
        parts: list[Any] = []
        private = "\\${" in text
        for is_reference, part in _split(text):
            value, secret = self._look_up(part, path) if is_reference else (part, False)
            parts.append(value)
            private |= secret
            if sum(len(part) for part in parts if isinstance(part, str)) > _MOST_TEXT:
                raise ValueError(f"it becomes a text of more than {_MOST_TEXT:,} characters")
        if len(parts) == 1:
            return parts[0], private
        if any(isinstance(part, (dict, list)) for part in parts):
            raise ValueError("a reference inside a text must name a text or number, got a list or mapping")
        return "".join(map(str, parts)), private

    def _look_up(self, reference: str, path: KeyPath) -> tuple[Any, bool]:
        private = False
        if "${" in reference:
            inner, private = self._expand(reference, path)
            reference = str(inner)
        name = reference.strip()
        if name.startswith(_DECODE):
            value = parse_scalar(name.removeprefix(_DECODE))
            # numbers are no secrets, and a changed one must be noticed
            return value, private and not isinstance(value, (int, float))
        if name.startswith(_ENVIRONMENT):
            variable, comma, default = name.removeprefix(_ENVIRONMENT).partition(",")
            value = os.environ.get(variable.strip())
            if value is None and not comma:
                raise ValueError(f"Environment variable '{variable.strip()}' not found")
            if value is not None and value != value.encode(errors="ignore").decode():
                raise ValueError(f"environment variable '{variable.strip()}' is not UTF-8 text")
            if value is None:
                value = None if default.strip() == "null" else default.strip().strip("'\"")
            return value, True
        if ":" in name:
            raise ValueError(f"expected ${{key.path}} or ${{oc.env:NAME}}, got '{name[:100]}'")
        dots = len(name) - len(name.lstrip("."))
        above = path[: len(path) - dots] if dots else ()
        keys = re.sub(r"\[([^\[\]]*)\]", r".\1", name.lstrip(".")).lstrip(".").split(".")
        value, secret = self.resolve((*above, *keys))
        self._count(sum(1 for _ in leaves(value)))
        return deepcopy(value), private or secret


def _split(text: str) -> Iterator[tuple[bool, str]]:
    """Yield (False, plain text) and (True, inside of a reference) in order. Raises ValueError if a brace is open."""
    plain, position = "", 0
    while position < len(text):
        if text.startswith("\\${", position):
            plain, position = plain + "${", position + 3
        elif text.startswith("${", position):
            if plain:
                yield False, plain
            plain, end = "", _closing(text, position)
            yield True, text[position + 2 : end]
            position = end + 1
        else:
            plain, position = plain + text[position], position + 1
    if plain:
        yield False, plain


def _closing(text: str, start: int) -> int:
    depth = 0
    for position in range(start, len(text)):
        depth += text.startswith("${", position) - (text[position] == "}")
        if depth > _MOST_STEPS:
            raise ValueError(f"more than {_MOST_STEPS} references lie inside each other")
        if depth == 0 and position > start:
            return position
    raise ValueError("expected a closing brace after '${'")
