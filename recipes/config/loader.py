"""Read a recipe file and command-line overrides into a frozen :class:`~leanstep.recipes.config.schema.RunConfig`.

Reports all errors of a recipe at once, with file, line and the nearest valid key, and does not import torch. PyYAML
gives the lines, :mod:`leanstep.recipes.config.references` resolves ``${...}``, pydantic checks the values.

A recipe with ``base: NAME_OR_FILE`` inherits the values that it does not set, except ``name``, ``description`` and
``expect``. Mappings are merged key by key. A recipe that sets ``optimizer.name`` or ``model.family`` does not inherit
the keys of that class (``optimizer.args``, ``.groups``, ``.embeddings``, ``.split``, ``model.config``). An override
that names another optimizer leaves these keys of the file out, too, and ``notes`` of the configuration says so.
:mod:`leanstep.recipes.config.bases` says which files may be a base.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from leanstep._files import one_line, read_text
from leanstep.recipes.config.bases import find_base
from leanstep.recipes.config.differences import SWITCHES, expectation_breakers
from leanstep.recipes.config.references import References
from leanstep.recipes.config.rules import (
    group_options,
    joint_problems,
    model_keys,
    optimizer_arguments,
    removed_options,
)
from leanstep.recipes.config.schema import MODEL_CONFIGS, NOT_KEYS, OPTIMIZERS, ExpectConfig, RunConfig
from leanstep.recipes.config.values import (
    KeyPath,
    Problem,
    check,
    leaves,
    overlay,
    parse_override,
    read_document,
    recorded,
    remove_at,
    set_at,
    show,
    unknown_key,
)

FOLDER = Path(__file__).parents[1] / "configs"
# a size alone means the SinkGD run of that size
ALIASES = {f"llama-{size}": f"llama-{size}-sinkgd" for size in ("60m", "130m", "350m", "1b")}

Location = tuple[int, int, str]  # file (0, its base 1, ...), line, and both as text
_OVERRIDE = (1 << 30, 0, "override")
_NOT_INHERITED = ("name", "description", "expect")
_LONGEST_LINE = 1000  # characters of a problem
# section -> the key that names a class, and the keys of that class
_CLASS_KEYS = {
    "optimizer": ("name", ("args", "groups", "embeddings", "split", "like_adamw")),
    "model": ("family", ("config",)),
}


class ConfigError(ValueError):
    """An invalid recipe; ``problems`` has one line per error."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def load(
    name_or_path: str | os.PathLike[str], overrides: Sequence[str] = (), *, world_size: int | None = None
) -> RunConfig:
    """Load a shipped recipe by name, or a file, with ``key.path=value`` overrides applied in order.

    An override replaces the whole value at its path: ``optimizer.args={}`` empties it. Values are YAML. A shipped
    recipe hides a file of the same name: write ``./NAME`` for the file. Overrides that affect the result set
    ``expect.val_loss`` to None and explain it in ``expect.source``, unless an override sets ``expect``. Those of model,
    data or ``optimizer.name`` take the place of the description.
    ``world_size`` is the number of processes that share a step; by default the launcher's ``WORLD_SIZE``, or 1.

    Raises ConfigError with every error, in the order of the file.
    """
    path = find_recipe(name_or_path)
    reader = _Reader(path)
    reader.apply(overrides)
    if world_size is None:
        world_size = int(os.environ.get("WORLD_SIZE") or 1)
    config = reader.build(world_size)
    expect = reader.expectation(config)
    about, notes = reader.description(config), tuple(reader.notes(config))
    return replace(config, expect=expect, source_file=str(path), description=about, notes=notes)


def dump(config: RunConfig) -> str:
    """Write the configuration as YAML that :func:`load` reads back to an equal object.

    Resolves references, except those to environment variables, which may be secret.
    """
    return OmegaConf.to_yaml(OmegaConf.create(recorded(config)))


def recipe_names() -> list[str]:
    """Sorted names of the shipped recipes, without aliases."""
    return sorted(_shipped())


def _shipped() -> dict[str, Path]:
    return {path.stem: path for path in FOLDER.glob("*/*.yaml")}


def find_recipe(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the file of a shipped recipe or of a path. Raises ConfigError with the nearest names."""
    text = os.fspath(name_or_path)
    shipped = _shipped().get(ALIASES.get(text, text))
    if shipped is not None:
        return shipped
    path = Path(text)
    if path.is_file():
        return path
    if path.is_dir():
        inner = path / "config.yaml"
        hint = f"; its recipe is {inner}" if inner.is_file() else ""
        raise ConfigError([f"{text} is a folder, not a recipe{hint}"])
    raise _no_recipe(text)


def _no_recipe(text: str) -> ConfigError:
    """The error for a name that is neither a recipe nor a file, with the nearest names."""
    path = Path(text)
    near = get_close_matches(path.stem, [*ALIASES, *recipe_names()], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(name) for name in near)}?" if near else "`leanstep recipes list` shows all"
    problem = "no such file" if path.suffix in (".yaml", ".yml") or "/" in text else "no recipe or file of that name"
    return ConfigError([f"{text}: {problem}; {hint}"])


class _Reader:
    """Reads a file, its base and overrides into plain values; records the location of each value and all problems."""

    def __init__(self, path: Path) -> None:
        self.file, self.stem = str(path), path.stem
        self.overridden: set[KeyPath] = set()
        # the optimizer that overrides replace, and the keys for it that were left out
        self.replaced: tuple[str, list[str]] | None = None
        self.problems: list[tuple[Location, str]] = []
        self.broken: set[KeyPath] = set()
        self.locations: dict[KeyPath, Location] = {}
        self.value = self._read(path, ())
        self.written = deepcopy(self.value)

    def _read(self, path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
        """Read a file and merge its values over those of its ``base``. ``above`` are the files derived from it."""
        try:
            text = read_text(path, follow=True)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([f"{path}: cannot be read as a text file: {error}"]) from None
        document, rank = read_document(text), len(above)
        for line, message in document.problems:
            self.problems.append(((rank, line, f"{path}:{line}"), message))
        value = {} if document.value is None else document.value
        if not isinstance(value, dict):
            raise ConfigError([*self._report(), f"{path}:1: not a recipe: expected a mapping, got {show(value)}"])
        if not value and not document.problems:
            example = "`leanstep recipes copy llama-nano-adamw` gives one to start from"
            self.problems.append(((rank, 1, f"{path}:1"), f"the file is empty; {example}"))
        lines = {key: (rank, line, f"{path}:{line}") for key, line in document.lines.items()}
        below = self._read_base(value.pop("base"), lines[("base",)], path, above) if "base" in value else {}
        self.locations |= lines
        return _derive(below, value)

    def _read_base(self, name: Any, location: Location, path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
        try:
            if not isinstance(name, str):
                raise ConfigError([f"expected the name of a recipe or a file, got {show(name)}"])
            shipped = _shipped()
            shipped |= {alias: shipped[target] for alias, target in ALIASES.items()}
            base = find_base(name, path, above, shipped)
            if base is None:
                raise _no_recipe(name)
            values = self._read(base, (*above, path))
        except ValueError as error:
            problems = error.problems if isinstance(error, ConfigError) else [str(error)]
            self.problems += [(location, f"base: {problem}") for problem in problems]
            return {}
        return {key: value for key, value in values.items() if key not in _NOT_INHERITED}

    def apply(self, overrides: Sequence[str]) -> None:
        """Apply overrides ``key.path=value``."""
        self._replace_optimizer(overrides)
        for override in overrides:
            key, equals, text = override.partition("=")
            path = tuple(key.strip().split("."))
            if not equals or not all(path) or not key.isprintable():
                self.problems.append((_OVERRIDE, f"expected key.path=value, got {show(override)}"))
                continue
            try:
                set_at(self.value, path, parse_override(path, text))
            except ValueError as error:
                self.problems.append((_OVERRIDE, f"{show(key)}: {error}" if len(key) > 100 else f"{key}: {error}"))
                continue
            self.overridden.add(path)

    def _replace_optimizer(self, overrides: Sequence[str]) -> None:
        """Where an override names another optimizer, leave out what the file sets for its own.

        This comes before all overrides: what they set is for the new one, whatever their order.
        """
        names = [
            text for key, _, text in (word.partition("=") for word in overrides) if key.strip() == "optimizer.name"
        ]
        section = _get_or_empty(self.value, "optimizer", dict)
        before = section.get("name", "adamw")
        if not names or names[-1].strip(" '\"") == before:
            return
        left_out = []
        # rates of groups are AdamW's, too
        carried = any(
            key.strip() == "optimizer.like_adamw" and text.strip().lower() == "true"
            for key, _, text in (word.partition("=") for word in overrides)
        )
        for key in _CLASS_KEYS["optimizer"][1]:
            if not (carried and key == "groups") and (value := section.pop(key, None)):
                left_out += [f"args.{name}" for name in value] if key == "args" and isinstance(value, dict) else [key]
        self.replaced = str(before), left_out

    def notes(self, config: RunConfig) -> Iterator[str]:
        """Lines about overrides that name another optimizer: keys that were left out, and rates that were not."""
        if self.replaced is None:
            return
        before, left_out = self.replaced
        name = config.optimizer.name
        begin = f"optimizer.name={name}"
        if left_out:
            yield f"{begin}: left out what the recipe sets for {before}: {', '.join(left_out)}"
        rates = [key for key in ("lr", "weight_decay") if ("optimizer", key) not in self.overridden]
        if "lr" in rates and not config.optimizer.like_adamw:
            other = self.stem.replace(before, name)
            has_own = other != self.stem and other in _shipped()
            advice = f"{other} has {_rates(load(other), rates)}" if has_own else "give optimizer.lr"
            yield f"WARNING: {begin}: keeps {_rates(config, rates)}, which the recipe chose for {before}; {advice}"

    def build(self, world_size: int) -> RunConfig:
        """Resolve references, check everything, and turn the values into the dataclasses."""
        # null switches an optional section off
        given = {key: value for key, value in self.value.items() if value is not None or key not in SWITCHES}
        self.value = {"name": self.stem, "out": "runs/${name}", **given}
        references = self._resolve()
        for key in NOT_KEYS:
            if key in self.value:
                self._add((key,), unknown_key((key,), ()))
        for path, message in check(RunConfig, self.value)[1]:
            if path not in self.broken:
                self._add(path, message)
        self._check_class_keys()
        self._check_switches()
        # check rules between keys with defaults for the keys that have problems
        sound = deepcopy(self.value)
        for path in sorted(self.broken, key=len, reverse=True):
            remove_at(sound, path)
        config, problems = check(RunConfig, sound)
        if config is None:
            raise ConfigError(self._report() or [message for _, message in problems])
        for keys, message in joint_problems(config, world_size):
            paths = [tuple(key.split(".")) for key in keys]
            if not self.broken & set(paths):
                self._add(self._written(paths), f"{keys[0]} {message}", joint=True)
        if self.problems:
            raise ConfigError(self._report())
        resume = replace(config.checkpoint, resume=os.path.expanduser(config.checkpoint.resume))
        return replace(config, out=os.path.expanduser(config.out), checkpoint=resume, references=references)

    def expectation(self, config: RunConfig) -> ExpectConfig:
        """Return the expected result: the file's, unless overrides affect it."""
        expect = config.expect
        if expect.val_loss is None or not self.overridden or any(path[0] == "expect" for path in self.overridden):
            return expect
        self.value, changed = self.written, self.value
        self._resolve()
        self.value, recipe = changed, overlay(asdict(RunConfig(name=self.stem)), self.value)
        breaking = expectation_breakers(recipe, config)
        if not breaking:
            return expect
        # as the user wrote them: a section that an override switches on brings its defaults
        written = sorted(".".join(path) for path in self.overridden)
        breaking = [name for name in written if any(f"{key}.".startswith(f"{name}.") for key in breaking)] or breaking
        names = ", ".join(breaking[:4]) + (f" and {len(breaking) - 4} more" if len(breaking) > 4 else "")
        source = f"the recipe expects {expect.val_loss:g} without these changes: {names}"
        return replace(expect, val_loss=None, source=source)

    def description(self, config: RunConfig) -> str:
        """The file's description, unless overrides change what it describes: model, data, optimizer or the time."""
        changed = [".".join(path) for path in sorted(self.overridden - {("data", "cache_dir")})]
        about = [key for key in changed if key.partition(".")[0] in ("model", "data") or key == "optimizer.name"]
        if not about or "description" in changed:
            text, _, time = config.description.rpartition("; ")
            is_other_time = time.endswith("CPU cores") and any(key.startswith(("steps", "batch.")) for key in changed)
            return text if is_other_time else config.description
        return f"{self.stem} with another {', '.join(about)}"

    def _resolve(self) -> dict[KeyPath, str]:
        """Replace every text with ``${...}`` by its value, before the checks; return the texts to record instead."""
        texts = {path: text for path, text in leaves(self.value) if isinstance(text, str)}
        for path in (path for path, text in texts.items() if text == "???"):
            self._add(path, f"{'.'.join(path)} has no value yet ('???'); give it one")
        referring = {path: text for path, text in texts.items() if "${" in text}
        if not referring:
            return {}
        references = References(overlay(asdict(RunConfig(name=self.stem)), self.value))
        texts_to_record = {}
        for path, text in referring.items():
            try:
                value, private = references.resolve(path)
                set_at(self.value, path, value)
            except ValueError as error:
                self._add(path, f"{'.'.join(path)}: {show(text)} cannot be resolved: {error}")
                continue
            if private:
                texts_to_record[path] = text
        return texts_to_record

    def _check_class_keys(self) -> None:
        """Check the keys that a class defines: optimizer arguments and groups, model configuration.

        If the name of the class is wrong, check against the class with the nearest name, if one is near.
        """
        optimizer, model = _get_or_empty(self.value, "optimizer", dict), _get_or_empty(self.value, "model", dict)
        args, groups = _get_or_empty(optimizer, "args", dict), _get_or_empty(optimizer, "groups", list)
        sizes = _get_or_empty(model, "config", dict)
        problems: list[Problem] = []
        if name := self._nearest(("optimizer", "name"), optimizer.get("name", "adamw"), OPTIMIZERS):
            removed = removed_options(name)
            of_class = *check(optimizer_arguments(name), args, ("optimizer", "args"))[1], *_group_problems(name, groups)
            for path, message in of_class:  # a name that left, or one value of an option that stays
                value = f"{path[-1]}={args.get(str(path[-1]))!r:.80}"
                problems.append((path, removed.get(path[-1]) or removed.get(value, message)))
        if family := self._nearest(("model", "family"), model.get("family", "llama"), MODEL_CONFIGS):
            problems += check(model_keys(family), sizes, ("model", "config"))[1]
        for path, message in problems:
            if path not in self.broken:
                self._add(path, message)

    def _check_switches(self) -> None:
        for name, switch in SWITCHES.items():
            section = _get_or_empty(self.value, name, dict)
            if section and switch not in section and not any((name, key) in self.broken for key in section):
                key = next(iter(section))
                self._add(
                    (name, key),
                    f"{name}.{key} has no effect without {name}.{switch}; give that too, or leave {name} out",
                )

    def _nearest(self, path: KeyPath, name: Any, table: Collection[str]) -> str | None:
        return name if path not in self.broken else next(iter(get_close_matches(str(name).lower(), table, n=1)), None)

    def _add(self, path: KeyPath, message: str, joint: bool = False) -> None:
        """Record a problem at the location of its key, or of the nearest key above it."""
        if not joint:
            self.broken.add(path)
        self.problems.append((self._locate(path), message))

    def _locate(self, path: KeyPath) -> Location:
        above = {path[:length] for length in range(1, len(path) + 1)}
        # an override replaces its whole value, so lines of the file below it no longer apply
        if above & self.overridden or any(below[: len(path)] == path for below in self.overridden):
            return _OVERRIDE
        written = [path[:length] for length in range(len(path), 0, -1) if path[:length] in self.locations]
        return self.locations[written[0]] if written else (0, 0, self.file)

    def _written(self, paths: list[KeyPath]) -> KeyPath:
        """Choose one of the keys that break a rule together: an overridden one, else the first in the file."""
        overridden = [path for path in paths if path in self.overridden]
        return next(iter([*overridden, *(path for path in paths if path in self.locations)]), paths[0])

    def _report(self) -> list[str]:
        ordered = sorted(self.problems, key=lambda problem: problem[0][:2])
        lines = (f"{location}: {message}" for (_, _, location), message in ordered)
        printable = (line if line.isprintable() else one_line(line) for line in lines)
        return [line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]} ..." for line in printable]


def _group_problems(name: str, groups: list[Any]) -> Iterator[Problem]:
    """Problems in ``optimizer.groups``: each entry needs one selector and at least one option of the class."""
    for index, entry in enumerate(groups):
        if not isinstance(entry, dict):
            continue  # a problem of the section's own type
        path = ("optimizer", "groups", str(index))
        where = ".".join(path)
        selectors = [key for key in ("match", "role") if key in entry]
        if len(selectors) != 1:
            given = "both" if selectors else "neither"
            yield path, f"{where} must select parameters by 'match' (a pattern) or 'role', got {given}"
        elif len(entry) == 1:
            yield path, f"{where} selects parameters but sets nothing; add lr, weight_decay or another option"
        yield from check(group_options(name), entry, path)[1]


def _get_or_empty(section: dict[str, Any], key: str, kind: type) -> Any:
    value = section.get(key)
    return value if isinstance(value, kind) else kind()


def _rates(config: RunConfig, keys: Sequence[str]) -> str:
    return " and ".join(f"{key}={getattr(config.optimizer, key):g}" for key in keys)


def _derive(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Merge ``top`` over ``base``. If ``top`` names another class, the class's own keys are not inherited."""
    for section, (name, class_keys) in _CLASS_KEYS.items():
        if name in _get_or_empty(top, section, dict) and section in base:
            base = {**base, section: {key: value for key, value in base[section].items() if key not in class_keys}}
    return overlay(base, top)
