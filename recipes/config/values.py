"""Values of a recipe: read YAML with line numbers, get and set values by path, validate with hints.

Numbers follow YAML 1.2, unlike PyYAML's: ``1e-4`` is a number. Dates, ``1:30`` and whole numbers with a leading zero
stay text, so a key that takes a number refuses them. Text that would take long to read or much memory to hold (long,
deeply nested, multiplied by aliases) is refused.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from functools import lru_cache
from itertools import islice
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError
from typing_extensions import is_typeddict

from leanstep.recipes.config.schema import NOT_KEYS, RunConfig

KeyPath = tuple[str, ...]  # ("optimizer", "groups", "0", "lr"); positions in lists are decimal text


# limits of a document: characters, nesting, values and characters with aliases expanded, characters of a number
_MOST_TEXT, _MOST_DEPTH, _MOST_VALUES, _MOST_EXPANDED, _MOST_DIGITS = 1 << 16, 50, 5000, 1 << 18, 100
_YAML = "tag:yaml.org,2002:"
_MOST_PROBLEMS = 50  # in one check
_MOST_TYPED = 4096  # characters of a text on the command line, as of a path
_SHORTEST_HIDDEN = 4  # characters; shorter values would be replaced in other words


class _Loader(yaml.SafeLoader):
    """SafeLoader with the numbers of YAML 1.2, without dates and with limited nesting."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        self._nodes += 1
        if self._depth > _MOST_DEPTH or self._nodes > 2 * _MOST_VALUES:
            problem = "too many values" if self._depth <= _MOST_DEPTH else f"nested more than {_MOST_DEPTH} deep"
            raise yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":timestamp", ":int", ":float", ":merge"))]
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
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)


@dataclass
class Document:
    """A parsed file: its value, the line of each key path, and ``(line, message)`` for each syntax error.

    ``values`` and ``characters`` count its size with aliases expanded.
    """

    value: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)
    values: int = 0
    characters: int = 0


class _TooLarge(Exception):
    """The values of a document are too many, or too long together."""


def read_document(text: str) -> Document:
    """Parse ``text``.

    Syntax errors, duplicate keys, self-references, unknown tags and sizes beyond the limits become ``problems``, never
    exceptions.
    """
    document = Document()
    if len(text) > _MOST_TEXT:
        document.problems.append((1, f"expected at most {_MOST_TEXT:,} characters, got {len(text):,}"))
        return document
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
    except (ValueError, OverflowError) as error:  # PyYAML lets impossible escapes and versions through
        document.problems.append((1, f"not valid YAML: {error}"))
    except _TooLarge as error:
        document.value = None
        document.problems.append((1, str(error)))
    return document


def parse_scalar(text: str) -> Any:
    """Parse ``text`` as the value of a key. Raises ValueError if it is not YAML."""
    document = read_document(text)
    if document.problems:
        raise ValueError(document.problems[0][1])
    return document.value


def parse_override(path: KeyPath, text: str) -> Any:
    """Parse ``text`` as the value of a key on the command line: YAML, but the text itself where the key takes text.

    ``*.txt`` and ``notes #1.txt`` need no quotes, up to 4,096 characters. ``null``, numbers and quotes are YAML for
    all keys.

    Raises:
        ValueError: not YAML, where the key takes no text.
    """
    raw = text.strip()
    if not _takes_text(path) or raw[:1] in ("'", '"') or not raw.isprintable() or len(raw) > _MOST_TYPED:
        return parse_scalar(text)
    try:
        value = parse_scalar(text)
    except ValueError:
        return raw
    return raw if isinstance(value, str | dict) else value


def _takes_text(path: KeyPath) -> bool:
    """Whether the schema has text, or text or null, at ``path``."""
    kind: Any = RunConfig
    for step in path:
        kind = _fields(kind).get(step)
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return kind is str or set(get_args(kind)) == {str, NoneType}


def _convert(node: yaml.Node, path: KeyPath, document: Document, parents: tuple[int, ...]) -> Any:
    """Turn a composed node into dicts, lists and scalars; record lines and duplicate keys."""
    line = node.start_mark.line + 1
    if id(node) in parents:
        document.problems.append((line, f"{_join(path)} contains itself through an alias"))
        return None
    document.values += 1
    if document.values > _MOST_VALUES or document.characters > _MOST_EXPANDED:
        raise _TooLarge(
            f"expected at most {_MOST_VALUES:,} values and {_MOST_EXPANDED:,} characters with all aliases replaced by "
            "their values; got more"
        )
    kind = node.tag.removeprefix(_YAML)
    if not isinstance(node, yaml.ScalarNode) and kind not in ("map", "seq"):
        document.problems.append((line, f"{_join(path)}: not valid YAML here: the tag {_cut(kind)}"))
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
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.removeprefix(_YAML) not in _PLAIN:
            document.problems.append(
                (key_line, f"keys must be plain words, got {_cut(key_node.tag.removeprefix(_YAML))}")
            )
            continue
        key = key_node.value
        here = (*path, key)
        document.characters += len(key)
        if not key.isprintable():
            document.problems.append((key_line, f"keys must be plain words, got {_cut(ascii(key))}"))
            continue
        if key in result:
            first = document.lines[here]
            document.problems.append((key_line, f"duplicate key '{_join(here)}'; it is first on line {first}"))
            continue
        document.lines[here] = key_line
        result[key] = _convert(value_node, here, document, below)
    return result


def _scalar(node: yaml.Node, path: KeyPath, document: Document) -> Any:
    """Construct one scalar. Records unknown tags, impossible numbers and half characters as problems."""
    constructor = _Loader("")
    kind, text = node.tag.removeprefix(_YAML), node.value
    document.characters += len(text)
    try:
        if kind in ("int", "float") and len(text) > _MOST_DIGITS:
            raise ValueError(f"a number of {len(text):,} characters, expected at most {_MOST_DIGITS}")
        if kind not in _PLAIN:
            raise ValueError(f"{_cut(kind)} is no text, number, true, false or null")
        try:
            value = constructor.construct_object(node)
        except (KeyError, AttributeError, IndexError, TypeError, OverflowError, ValueError):
            raise ValueError(f"{_cut(ascii(text))} is no {kind}") from None
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**64:
            raise ValueError("a whole number of more than 64 bits")
        if isinstance(value, str):
            # JSON writes one character as two escapes
            value = value.encode("utf-16", "surrogatepass").decode("utf-16")
            if "\0" in value:
                raise ValueError("the text has a NUL character")
        return value
    except (yaml.YAMLError, ValueError) as error:
        reason = "half a character (a lone surrogate)" if isinstance(error, UnicodeError) else error
        reason = getattr(error, "problem", None) or reason
        document.problems.append(
            (node.start_mark.line + 1, f"{_join(path)}: not valid YAML: {reason}".removeprefix(": "))
        )
        return None
    finally:
        constructor.dispose()


_PLAIN = ("str", "int", "float", "bool", "null")


def _join(path: KeyPath) -> str:
    return _cut(".".join(path))


def _cut(text: str, most: int = 120) -> str:
    return text if len(text) <= most else f"{text[: most - 40]}...{text[-30:]}"


Problem = tuple[KeyPath, str]

# pydantic's words -> those of a recipe
_SYNONYMS = {"int4": "nf4", "4bit": "nf4", "fp4": "nf4", "8bit": "int8"}  # what others call a value
_WORDS = {
    "Input should be ": "",
    "List should have ": "a list of ",
    " after validation": "",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "a valid boolean": "true or false",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid array": "a list",
    "an object": "a mapping",
}
_RANGE_ERRORS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")


def check(schema: Any, value: Any, path: KeyPath = ()) -> tuple[Any, list[Problem]]:
    """Validate a value read from YAML, at ``path`` of the recipe, against a dataclass or a TypedDict.

    Returns:
        (the validated value or None, one problem for each wrong key).
    """
    try:
        # strict JSON mode takes lists for tuples, but no text for a number and no number for a flag
        return _adapter(schema).validate_json(json.dumps(value), strict=True), []
    except ValidationError as failure:
        by_key: dict[tuple[int | str, ...], list[Any]] = {}
        for error in failure.errors(include_url=False):
            by_key.setdefault(_steps(error["loc"], value), []).append(error)
        keys = islice(by_key.items(), _MOST_PROBLEMS)
        return None, [_problem(schema, steps, errors, value, path) for steps, errors in keys]


@lru_cache
def _adapter(schema: Any) -> TypeAdapter:
    return TypeAdapter(schema)


def _steps(location: tuple[int | str, ...], value: Any) -> tuple[int | str, ...]:
    """Cut pydantic's location to the steps that exist in the recipe; the others name types of a union."""
    for depth, step in enumerate(location):
        if isinstance(value, dict) and step in value:
            value = value[str(step)]
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            return location[:depth]
    return location


def _problem(schema: Any, steps: tuple[int | str, ...], errors: list[Any], value: Any, above: KeyPath) -> Problem:
    """Describe pydantic's errors at one key, several for a union of types; ``above`` is the path of ``value``."""
    path = (*above, *map(str, steps))
    key, first = _join(path), errors[0]
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        section = schema
        for step in steps[:-1]:
            section = _fields(section)[str(step)]
        return path, unknown_key(path, _fields(section), all_keys(RunConfig))
    if first["type"] == "value_error":
        return path, _cut(f"{key} {first['ctx']['error']}", 400)
    for step in steps:
        value = value[step]
    # of the errors of a union, report the range alone if there is one; exact types, since True is an int
    of_range = [error for error in errors if error["type"] in _RANGE_ERRORS and type(value) in (int, float)]
    expected = " or ".join(dict.fromkeys(error["msg"] for error in of_range[:1] or errors))
    for word, ours in _WORDS.items():
        expected = expected.replace(word, ours)
    near = get_close_matches(_SYNONYMS.get(str(value), str(value)), re.findall("'(.*?)'", expected), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if isinstance(value, float) and "a whole number" in expected and value.is_integer():
        hint = f"; write {value:.0f}"
    elif isinstance(value, (bool, int, float)) and "text" in expected:
        hint = "; put it in quotes"
    return path, f"{key} must be {expected}, got {show(value)}{hint}"


def _fields(section: Any) -> dict[str, Any]:
    """Name -> type of the keys of a section; empty for a type without keys."""
    if is_dataclass(section):
        return {item.name: item.type for item in fields(section) if item.name not in NOT_KEYS}
    return dict(section.__annotations__) if is_typeddict(section) else {}


def show(value: Any) -> str:
    """Format a value for an error: YAML's words for null, true and false, text in quotes, long values cut."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}"
    text = repr(value)
    kind = "a mapping " if isinstance(value, dict) else "a list " if isinstance(value, list) else ""
    return kind + (text if len(text) <= 60 else f"{text[:57]}...")


def unknown_key(path: KeyPath, known: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """Message for an unknown key, with the nearest key of its section or of the schema."""
    parent, key = path[:-1], path[-1]
    # suggest the same name in another section before a similar name in this section
    near = [full for full in elsewhere if full.rpartition(".")[2] == key]
    near = near or [".".join((*parent, match)) for match in get_close_matches(key, sorted(known), n=1, cutoff=0.6)]
    hint = f"; did you mean {' or '.join(repr(name) for name in near[:3])}?" if near else ""
    if not hint and len(set(known)) <= 24:
        section = f" in {'.'.join(parent)}" if parent else ""
        hint = f"; the keys{section} are {', '.join(sorted(known))}"
    return f"unknown key '{_join(path)}'{hint}"


def unknown_option(word: str, options: Iterable[str], command: str) -> str:
    """Message for an option that a command lacks, with the nearest of its options or the key that has the name."""
    flag = word.partition("=")[0]
    if near := get_close_matches(flag, options, n=1, cutoff=0.8):
        return f"unknown option {flag}; did you mean {near[0]}?"
    name = flag.strip("-").replace("-", "_")
    full = {key.rpartition(".")[2]: key for key in reversed(list(all_keys(RunConfig)))}
    if near := get_close_matches(name, full, n=1):
        return f"unknown option {flag}; did you mean the recipe's {full[near[0]]}=VALUE, without dashes?"
    return f"unknown option {flag}; settings are written key=value, as in optimizer.lr=1e-3; see `{command} --help`"


def all_keys(schema: Any, prefix: str = "") -> Iterator[str]:
    """Yield the path of every key of a schema."""
    for name, annotation in _fields(schema).items():
        yield prefix + name
        yield from all_keys(annotation, f"{prefix}{name}.")


def overlay(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Merge ``top`` over ``base`` recursively. Where either value is not a mapping, ``top`` wins."""
    result = dict(base)
    for key, value in top.items():
        below = result.get(key)
        result[key] = overlay(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def recorded(config: RunConfig) -> dict[str, Any]:
    """The settings of ``config`` for files: references to environment variables instead of their values."""
    settings = resolved(config)
    for path, text in config.references.items():
        set_at(settings, path, text)
    return settings


def resolved(config: RunConfig) -> dict[str, Any]:
    """The settings of ``config`` with the values of all references."""
    return {key: value for key, value in asdict(config).items() if key not in NOT_KEYS}


def hidden_texts(config: RunConfig) -> dict[str, str]:
    """Value -> reference of the texts that a run's files must not show."""
    return {
        value: text
        for path, text in config.references.items()
        for key, value in leaves(resolved(config))
        if key[: len(path)] == path and isinstance(value, str) and len(value) >= _SHORTEST_HIDDEN
    }


def leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield every scalar under ``value`` with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, str(index)))
    else:
        yield path, value


def check_depth(depth: int) -> None:
    """Raise ValueError if values would be nested deeper than in a file."""
    if depth > _MOST_DEPTH:
        raise ValueError(f"nested more than {_MOST_DEPTH} deep")


def set_at(tree: Any, path: KeyPath, value: Any) -> None:
    """Set ``value`` at ``path``, creating mappings. Raises ValueError for a path too long or blocked by a scalar."""
    check_depth(len(path))
    for depth, step in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(tree, list):
            if not step.isdecimal() or int(step) >= len(tree):
                raise ValueError(f"{'.'.join(path[:depth])} is a list of {len(tree)}, which has no position {step!r}")
            key: Any = int(step)
        elif isinstance(tree, dict):
            key = step
            if not last and tree.get(key) is None:
                tree[key] = {}
        else:
            raise ValueError(f"{'.'.join(path[:depth])} is {tree!r}, which has no keys below it")
        if last:
            tree[key] = value
        else:
            tree = tree[key]


def remove_at(tree: Any, path: KeyPath) -> None:
    """Delete the value at ``path`` if it exists; for an element of a list, the whole list."""
    for step in path[:-1]:
        if not isinstance(tree, dict) or step not in tree:
            return
        if isinstance(tree[step], list):
            del tree[step]
            return
        tree = tree[step]
    if isinstance(tree, dict):
        tree.pop(path[-1], None)
