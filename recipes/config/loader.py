"""Read a recipe file and command-line overrides into a frozen :class:`~leanstep.recipes.config.schema.RunConfig`.

Everything wrong with a recipe is reported at once, with its line and the nearest valid key, and torch is not imported
to find it. OmegaConf resolves ``${...}`` references and builds the dataclasses; the walk before it is ours, because a
typed merge stops at the first error and knows no lines.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_type_hints

from leanstep.recipes.config.catalog import ALIASES, recipe_names, recipe_path
from leanstep.recipes.config.differences import SWITCHES, expectation_breakers
from leanstep.recipes.config.joint import joint_problems
from leanstep.recipes.config.rules import (
    group_problems,
    model_problems,
    optimizer_problems,
    pattern_problems,
    text_problem,
    unknown_key,
)
from leanstep.recipes.config.schema import ExpectConfig, RunConfig, range_problem
from leanstep.recipes.config.signatures import MODEL_CONFIGS, OPTIMIZERS, Accepts

__all__ = ["ConfigError", "dump", "load"]

Path_ = tuple[str, ...]
_HIDDEN = ("source_file",)  # fields of RunConfig that are not keys of a file


class ConfigError(ValueError):
    """A recipe that cannot be run; ``problems`` holds one line for each thing wrong with it."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def load(
    name_or_path: str | os.PathLike[str], overrides: Sequence[str] = (), *, world_size: int | None = None
) -> RunConfig:
    """Load a shipped recipe by name, or a file, with ``key.path=value`` overrides applied in order.

    An override sets the value at its path, whole: ``optimizer.args={}`` empties it. Values are read as YAML. The name
    of a shipped recipe means that recipe, also where a file has the same name: write ``./NAME`` for the file.
    The result that a recipe expects is its own: when overrides change what decides it, ``expect.val_loss`` becomes None
    and ``expect.source`` says why, unless an override gives another expectation.
    ``world_size`` is the number of processes that share a step; by default the launcher's ``WORLD_SIZE``, or 1.

    Raises ConfigError with every problem found, in the order of the file; ImportError names the missing extra.
    """
    path = find_recipe(name_or_path)
    reader = _Reader(path)
    reader.apply(overrides)
    if world_size is None:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = reader.build(world_size)
    expect = reader.expectation(config)
    return replace(config, expect=expect, source_file=str(path))


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML that :func:`load` reads back to an equal object."""
    from omegaconf import OmegaConf

    content = asdict(config)
    for name in _HIDDEN:
        del content[name]
    return OmegaConf.to_yaml(OmegaConf.create(content))


def find_recipe(name_or_path: str | os.PathLike[str]) -> Path:
    """The file of a shipped recipe or of a path. Raises ConfigError that names the nearest recipes."""
    text = os.fspath(name_or_path)
    if text in ALIASES or text in recipe_names():
        return recipe_path(text)
    path = Path(text)
    if path.is_file():
        return path
    if path.is_dir():
        inner = path / "config.yaml"
        hint = f"; its recipe is {inner}" if inner.is_file() else ""
        raise ConfigError([f"{text} is a folder, not a recipe{hint}"])
    near = get_close_matches(path.stem, [*ALIASES, *recipe_names()], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(name) for name in near)}?" if near else "`leanstep recipes list` shows all"
    what = "no such file" if path.suffix in (".yaml", ".yml") or "/" in text else "no recipe or file of that name"
    raise ConfigError([f"{text}: {what}; {hint}"])


class _Reader:
    """One file with its overrides: the merged plain values, where each came from, and the problems so far."""

    def __init__(self, path: Path) -> None:
        from leanstep.recipes.config.yaml_lines import read_document

        self.file = str(path)
        self.stem = path.stem
        self.overridden: set[Path_] = set()
        self.problems: list[tuple[int, int, str]] = []  # (line, order of finding, text); overrides sort last
        self.broken: set[str] = set()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([f"{path}: cannot be read as a text file: {error}"]) from None
        document = read_document(text)
        self.lines = document.lines
        for line, message in document.problems:
            self._add_line(line, message)
        self.value = document.value if document.value is not None else {}
        self.written = deepcopy(self.value)
        if not isinstance(self.value, dict):
            self._add_line(1, f"not a recipe: {Accepts.of(dict).problem(self.value)}")
            raise ConfigError(self._report())
        if not self.value and not document.problems:
            self._add_line(1, "the file is empty; `leanstep recipes copy llama-nano-adamw` gives one to start from")

    def apply(self, overrides: Sequence[str]) -> None:
        """Set the value of each ``key.path=value`` in place."""
        from leanstep.recipes.config.yaml_lines import parse_scalar

        for override in overrides:
            key, equals, text = override.partition("=")
            path = tuple(key.strip().split("."))
            if not equals or not all(path):
                self._add_override(f"expected key.path=value, got {override!r}")
                continue
            try:
                _set(self.value, path, parse_scalar(text))
            except ValueError as error:
                self._add_override(f"{key}: {error}")
                continue
            self.overridden.add(path)

    def build(self, world_size: int) -> RunConfig:
        """Resolve references, check everything, and turn the values into the dataclasses."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        # null is a way to write that a section that may be off is off
        self.value = {key: value for key, value in self.value.items() if value is not None or key not in SWITCHES}
        self._resolve()
        for path, message in self._walk(RunConfig, self.value, ()):
            self._add(path, message)
        self._check_open_parts()
        self._check_switches()
        schema = OmegaConf.structured(RunConfig(name=self.stem))
        try:
            config = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.create(self._without_broken())))
        except (OmegaConfBaseException, ValueError) as error:
            # keys that the walk found wrong but that have no path to remove them by, such as one with a dot in it
            raise ConfigError(self._report() or [f"{self.file}: {error}"]) from None
        assert isinstance(config, RunConfig)
        joint = [(keys, message) for keys, message in joint_problems(config, world_size) if not self.broken & set(keys)]
        for keys, message in joint:
            self._add(self._written(keys), f"{keys[0]} {message}")
        if self.problems:
            raise ConfigError(self._report())
        return config

    def expectation(self, config: RunConfig) -> ExpectConfig:
        """What is expected of ``config``, built here: what the file says of itself, if the overrides leave it so."""
        expect = config.expect
        if expect.val_loss is None or not self.overridden or any(path[0] == "expect" for path in self.overridden):
            return expect
        self.value, changed = self.written, self.value
        self._resolve()
        self.value, recipe = changed, _overlay(_defaults(self.stem), self.value)
        breaking = expectation_breakers(recipe, config)
        if not breaking:
            return expect
        names = ", ".join(breaking[:4]) + (f" and {len(breaking) - 4} more" if len(breaking) > 4 else "")
        source = f"the recipe expects {expect.val_loss:g} without these changes: {names}"
        return replace(expect, val_loss=None, source=source)

    def _resolve(self) -> None:
        """Replace every text with ``${...}`` by what it refers to, so that the checks see values."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        texts = [(path, text) for path, text in _leaves(self.value) if isinstance(text, str)]
        referring = any("${" in text for _, text in texts)
        whole = OmegaConf.create(_overlay(_defaults(self.stem), self.value)) if referring else None
        for path, text in texts:
            if text == "???":
                self._add(path, f"{'.'.join(path)} has no value yet ('???'); give it one")
            elif "${" in text:
                try:
                    node: Any = whole
                    for step in path:
                        node = node[int(step) if OmegaConf.is_list(node) else step]
                    resolved = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
                    _set(self.value, path, resolved)
                except OmegaConfBaseException as error:
                    reason = str(error).splitlines()[0]
                    self._add(path, f"{'.'.join(path)}: {text!r} cannot be resolved: {reason}")

    def _walk(self, schema: type, values: dict[str, Any], path: Path_) -> Iterator[tuple[Path_, str]]:
        """Unknown keys, wrong types and out-of-range values of one section and those below it."""
        hints = get_type_hints(schema)
        known = {item.name: item for item in fields(schema) if item.name not in _HIDDEN}
        for key, value in values.items():
            here, full = (*path, key), ".".join((*path, key))
            if full in self.broken:
                continue
            if key not in known:
                yield here, unknown_key(here, known, _all_keys(RunConfig))
            elif is_dataclass(hints[key]):
                if isinstance(value, dict):
                    yield from self._walk(hints[key], value, here)
                else:
                    yield here, f"{full}: {Accepts.of(dict).problem(value)}; its keys go below it"
            elif problem := Accepts.of(hints[key]).problem(value):
                choices = [choice for choice in get_args(hints[key]) if isinstance(choice, str)]
                near = get_close_matches(str(value), choices, n=1)
                yield here, f"{full}: {problem}" + (f"; did you mean {near[0]!r}?" if near else "")
            elif problem := range_problem(known[key].metadata, value) or text_problem(full, value):
                yield here, f"{full} {problem}"

    def _check_open_parts(self) -> None:
        """The sections whose keys are another class's.

        Where the name of that class is wrong, they are checked against the one nearest to it, and where none is near,
        what is wrong for all of them is told.
        """
        optimizer, model = self._section("optimizer"), self._section("model")
        args, groups = self._part(optimizer, "args", dict), self._part(optimizer, "groups", list)
        sizes = self._part(model, "config", dict)
        found = _wrong_for_all(
            [*optimizer_problems(name, args), *group_problems(name, groups)]
            for name in self._candidates("optimizer.name", optimizer.get("name", "adamw"), OPTIMIZERS)
        ) + _wrong_for_all(
            list(model_problems(family, sizes))
            for family in self._candidates("model.family", model.get("family", "llama"), MODEL_CONFIGS)
        )
        patterns = self._part(self._section("sparsity"), "patterns", dict)
        for path, message in [*found, *pattern_problems(patterns)]:
            self._add(path, message)

    def _check_switches(self) -> None:
        """Sections with settings and without the key that turns them on, which would change nothing in silence."""
        for name, switch in SWITCHES.items():
            section = self._section(name)
            if section and switch not in section and not any(f"{name}.{key}" in self.broken for key in section):
                key = next(iter(section))
                self._add(
                    (name, key),
                    f"{name}.{key} has no effect without {name}.{switch}; give that too, or leave {name} out",
                )

    def _candidates(self, key: str, name: Any, table: Collection[str]) -> list[str]:
        """The classes that ``name`` may mean: itself, else the nearest one, else all."""
        if key not in self.broken:
            return [name]
        return get_close_matches(str(name).lower(), table, n=1) or list(table)

    def _section(self, name: str) -> dict[str, Any]:
        section = self.value.get(name)
        return section if isinstance(section, dict) else {}

    @staticmethod
    def _part(section: dict[str, Any], key: str, kind: type) -> Any:
        part = section.get(key)
        return part if isinstance(part, kind) else kind()

    def _without_broken(self) -> dict[str, Any]:
        """The values without those that a problem names, from which the joint rules are checked."""
        result = deepcopy(self.value)
        for full in sorted(self.broken, key=len, reverse=True):
            _remove(result, tuple(full.split(".")))
        return result

    def _add(self, path: Path_, message: str) -> None:
        """Record a problem at the place where its key, or the nearest key above it, was written."""
        self.broken.add(".".join(path))
        above = {path[:length] for length in range(1, len(path) + 1)}
        # an override sets its value whole, so that the file's lines for what is below it say nothing any more
        if above & self.overridden or any(below[: len(path)] == path for below in self.overridden):
            return self._add_override(message)
        for length in range(len(path), -1, -1):
            if path[:length] in self.lines:
                return self._add_line(self.lines[path[:length]], message)
        return self._add_line(0, message)

    def _written(self, keys: tuple[str, ...]) -> Path_:
        """Of keys that break a rule together, the one to point at: an overridden one, else the first in the file."""
        paths = [tuple(key.split(".")) for key in keys]
        overridden = [path for path in paths if path in self.overridden]
        return next(iter([*overridden, *(path for path in paths if path in self.lines)]), paths[0])

    def _add_line(self, line: int, message: str) -> None:
        place = f"{self.file}:{line}" if line else self.file
        self.problems.append((line, len(self.problems), f"{place}: {message}"))

    def _add_override(self, message: str) -> None:
        self.problems.append((1 << 60, len(self.problems), f"override: {message}"))

    def _report(self) -> list[str]:
        return [text for _, _, text in sorted(self.problems)]


def _wrong_for_all(problems: Iterable[list[tuple[Path_, str]]]) -> list[tuple[Path_, str]]:
    """The first list, without the problems at keys where another list has none."""
    first, *others = problems
    paths = [{path for path, _ in other} for other in others]
    return [(path, message) for path, message in first if all(path in other for other in paths)]


def _defaults(stem: str) -> dict[str, Any]:
    return asdict(RunConfig(name=stem))


def _overlay(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """``top`` over ``base``, section by section; where one of the two is not a mapping, ``top`` wins."""
    result = dict(base)
    for key, value in top.items():
        below = result.get(key)
        result[key] = _overlay(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def _leaves(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every scalar under ``value`` with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, str(index)))
    else:
        yield path, value


def _set(tree: Any, path: Path_, value: Any) -> None:
    """Set ``value`` at ``path``, making mappings on the way. Raises ValueError where a scalar is in the way."""
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


def _remove(tree: Any, path: Path_) -> None:
    """Delete what is at ``path``, if it is there; elements of a list are removed with the whole list."""
    for step in path[:-1]:
        if not isinstance(tree, dict) or step not in tree:
            return
        if isinstance(tree[step], list):
            del tree[step]
            return
        tree = tree[step]
    if isinstance(tree, dict):
        tree.pop(path[-1], None)


def _all_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Every key path of the schema."""
    for name, hint in get_type_hints(schema).items():
        if name not in _HIDDEN:
            yield prefix + name
            if is_dataclass(hint):
                yield from _all_keys(hint, f"{prefix}{name}.")
