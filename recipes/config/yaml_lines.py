"""YAML text to plain values that remember the line they were written on. Imports PyYAML only.

Numbers follow YAML 1.2 where PyYAML alone does not: ``1e-4`` is a number, not text. Dates stay text.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

__all__ = ["Document", "Path", "parse_scalar", "read_document"]

Path = tuple[str, ...]  # ("optimizer", "groups", "0", "lr"); list positions are decimal text


class _Loader(yaml.SafeLoader):
    """SafeLoader with floats as in YAML 1.2 and without dates, so that a value means the same in every position."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":timestamp", ":float", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
             |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
             |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
             |[-+]?\.(?:inf|Inf|INF)
             |\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


@dataclass
class Document:
    """A parsed file: its value, the line of each key path, and ``(line, message)`` for what is wrong with its form."""

    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)


def read_document(text: str) -> Document:
    """Parse ``text``. Syntax errors, duplicate keys and self-references become ``problems``, never exceptions."""
    document = Document()
    try:
        root = yaml.compose(text, Loader=_Loader)
        if root is not None:
            document.value = _convert(root, (), document, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        document.problems.append((mark.line + 1 if mark else 1, f"not valid YAML: {what}"))
    except yaml.YAMLError as error:  # characters that YAML forbids carry no mark
        document.problems.append((1, f"not valid YAML: {' '.join(str(error).split())}"))
    return document


def parse_scalar(text: str) -> Any:
    """The value of ``text`` as a recipe file would read it after ``key:``; raises ValueError where it is not YAML."""
    document = read_document(text)
    if document.problems:
        raise ValueError(document.problems[0][1])
    return document.value


def _convert(node: yaml.Node, path: Path, document: Document, parents: tuple[int, ...]) -> Any:
    """Turn a composed node into dicts, lists and scalars, noting lines and duplicate keys on the way."""
    line = node.start_mark.line + 1
    if id(node) in parents:
        document.problems.append((line, f"{'.'.join(path)} contains itself through an alias"))
        return None
    below = (*parents, id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            document.lines[(*path, str(index))] = item.start_mark.line + 1
        return [_convert(item, (*path, str(index)), document, below) for index, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(node, path, document)
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key_line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            document.problems.append((key_line, f"keys must be plain words, got {key_node.tag.rpartition(':')[2]}"))
            continue
        key = key_node.value
        here = (*path, key)
        if key in result:
            first = document.lines[here]
            document.problems.append((key_line, f"duplicate key '{'.'.join(here)}'; it is first on line {first}"))
            continue
        document.lines[here] = key_line
        result[key] = _convert(value_node, here, document, below)
    return result


def _scalar(node: yaml.Node, path: Path, document: Document) -> Any:
    """Construct one scalar; an unknown ``!tag`` or an impossible number is a problem on its line."""
    constructor = _Loader("")
    try:
        return constructor.construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        reason = getattr(error, "problem", None) or error
        document.problems.append((node.start_mark.line + 1, f"{'.'.join(path)}: not valid YAML: {reason}"))
        return None
    finally:
        constructor.dispose()
