"""From what pydantic refuses to lines that say what was expected, what came, and which key was meant."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from typing_extensions import is_typeddict

__all__ = ["KeyPath", "Problem", "all_keys", "check", "show", "unknown_key"]

KeyPath = tuple[str, ...]  # ("optimizer", "groups", "0", "lr"): positions in lists are decimal text
Problem = tuple[KeyPath, str]

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
_BOUNDS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
_RANGE_ERRORS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")


def check(schema: Any, value: Any, path: KeyPath = ()) -> tuple[Any, list[Problem]]:
    """Validate ``value``, as YAML gave it, against a dataclass or a TypedDict.

    Returns:
        (the validated value or None, one problem for each key that is wrong). ``path`` is where the value stands in
        the recipe.
    """
    try:
        # strict JSON is what a recipe may hold: no text for a number, no number for a flag, lists for tuples
        return _adapter(schema).validate_json(json.dumps(value), strict=True), []
    except ValidationError as error:
        return None, list(_translate(schema, error, value, path))


@lru_cache
def _adapter(schema: Any) -> TypeAdapter:
    return TypeAdapter(schema)


def _translate(schema: Any, error: ValidationError, whole: Any, above: KeyPath) -> Iterator[Problem]:
    """One problem for each place; where the members of a union each say something, the range of a number wins."""
    by_place: dict[tuple[Any, ...], list[Any]] = {}
    for part in error.errors(include_url=False):
        by_place.setdefault(_place(schema, part["loc"], whole), []).append(part)
    for place, parts in by_place.items():
        in_range = [part for part in parts if part["type"] in _RANGE_ERRORS and _is_number(part["input"])]
        yield _problem(schema, place, (in_range or parts)[0], whole, above)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _place(schema: Any, location: tuple[int | str, ...], value: Any) -> tuple[int | str, ...]:
    """The part of pydantic's location that is in the recipe; the rest names members of a union."""
    place: list[int | str] = []
    for step in location:
        if isinstance(value, dict) and step in value:
            value = value[str(step)]
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            break
        place.append(step)
    return tuple(place)


def _problem(schema: Any, place: tuple[int | str, ...], part: Any, whole: Any, above: KeyPath) -> Problem:
    annotation, limits, path, rest, value = schema, [], [], [], whole
    for step in place:
        value = value[step]
        fields = _fields(annotation)
        if fields is None:
            rest.append(step)
            annotation, limits = _element(annotation), limits
        elif step in fields:
            path.append(str(step))
            annotation, limits = fields[str(step)]
        else:
            return (*above, *map(str, place)), unknown_key((*above, *map(str, place)), fields, all_keys(schema))
    here = (*above, *path)
    full = ".".join(here)
    detail = f"{full}: element {rest[0]}: " if rest and isinstance(rest[0], int) else f"{full}: "
    if part["type"] == "value_error":
        name = f"{full}: {rest[0]!r}" if rest else full
        return here, f"{name} {part['ctx']['error']}"
    if part["type"] in _RANGE_ERRORS:
        return here, f"{full} must be {_range(annotation, limits)}, got {value!r}"
    section = "; its keys go below it" if is_dataclass(annotation) else ""
    return here, f"{detail}{_expected(annotation, value)}{section}"


def _fields(annotation: Any) -> dict[str, tuple[Any, list[Any]]] | None:
    """Name -> (type, limits) of the keys of a section, or None for a type that is no section."""
    if is_dataclass(annotation):
        infos: dict[str, FieldInfo] = annotation.__pydantic_fields__  # type: ignore[attr-defined]
        return {name: (info.annotation, info.metadata) for name, info in infos.items() if not info.exclude}
    if is_typeddict(annotation):
        return {name: (hint, []) for name, hint in get_type_hints(annotation, include_extras=True).items()}
    return None


def _element(annotation: Any) -> Any:
    """The type of the elements of a list, a tuple or a mapping; of a union, of the member that has elements."""
    for member in _members(annotation):
        arguments = get_args(member)
        if get_origin(member) in (list, tuple, dict) and arguments:
            return arguments[-1]
    return Any


def _members(annotation: Any) -> list[Any]:
    """The members of a union, those of nested unions included, with their annotations."""
    plain = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    if get_origin(plain) is Union or type(plain).__name__ == "UnionType":
        return [member for inner in get_args(plain) for member in _members(inner)]
    return [annotation]


def _range(annotation: Any, limits: Iterable[Any]) -> str:
    """``at least 0 and less than 1``, from the limits of a field or of the number in its type."""
    metadata = list(limits)
    for member in [*_members(annotation), *_members(_element(annotation))]:
        metadata += getattr(member, "__metadata__", ())
    bounds = {name: getattr(item, name) for name in _BOUNDS for item in metadata if hasattr(item, name)}
    return " and ".join(f"{_BOUNDS[name]} {bound:g}" for name, bound in bounds.items())


def _expected(annotation: Any, value: Any) -> str:
    """``expected a whole number, got 'x'``, with what was probably meant."""
    words: list[str] = []
    choices: list[Any] = []
    for member in _members(annotation):
        plain = get_args(member)[0] if get_origin(member) is Annotated else member
        origin = get_origin(plain) or plain
        if origin is Literal:
            choices += get_args(plain)
        elif origin is tuple and isinstance(value, list):
            return f"expected a list of {len(get_args(plain))}, got {len(value)}: {value!r}"
        elif origin is dict or is_dataclass(origin):
            words.append("a mapping")
        else:
            words.append("a list" if origin in (list, tuple) else _WORDS.get(origin, str(origin)))
    if choices:
        words.insert(0, ("one of " if len(choices) > 1 else "") + ", ".join(map(repr, choices)))
    if "a number" in words and "a whole number" in words:
        words.remove("a whole number")
    near = get_close_matches(str(value), [choice for choice in choices if isinstance(choice, str)], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if isinstance(value, float) and "a whole number" in words and value.is_integer():
        hint = f"; write {value:.0f}"
    elif "text" in words and isinstance(value, (bool, int, float)):
        hint = "; put it in quotes"
    return f"expected {' or '.join(words)}, got {show(value)}{hint}"


def show(value: Any) -> str:
    """A value as it appears in an error: YAML's words for null, true and false, text in quotes, long ones cut."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}"
    text = repr(value)
    kind = {dict: "a mapping ", list: "a list "}.get(type(value), "")
    return kind + (text if len(text) <= 60 else f"{text[:57]}...")


def unknown_key(path: KeyPath, known: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """The message for a key that does not exist, with the nearest one of its section or of the whole schema."""
    parent, key = path[:-1], path[-1]
    # the same name in another section is nearer than a like one in this
    near = [full for full in elsewhere if full.rpartition(".")[2] == key]
    near = near or [".".join((*parent, match)) for match in get_close_matches(key, sorted(known), n=1, cutoff=0.6)]
    hint = f"; did you mean {' or '.join(repr(name) for name in near[:3])}?" if near else ""
    if not hint and len(set(known)) <= 24:
        section = f" in {'.'.join(parent)}" if parent else ""
        hint = f"; the keys{section} are {', '.join(sorted(known))}"
    return f"unknown key '{'.'.join(path)}'{hint}"


def all_keys(schema: Any, prefix: str = "") -> Iterator[str]:
    """Every key path of a schema."""
    for name, (annotation, _) in (_fields(schema) or {}).items():
        yield prefix + name
        yield from all_keys(annotation, f"{prefix}{name}.")
