"""The grid of a sweep: which runs a recipe and lists of values make. Imports no torch."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from leanstep.recipes.config.loader import ConfigError, dump, find_recipe, load
from leanstep.recipes.config.values import parse_override

SEED = "seed"  # runs that differ only in it repeat one setting
TOKENIZER = "data.tokenizer"
_MOST_RUNS = 10_000
_MOST_NAME = 80  # characters of a run's name
_CLOSING = {"[": "]", "{": "}", "(": ")"}
# keys that a sweep sets itself
_SET_HERE = {
    "out": "write --out DIR",
    "name": "a run is named by its number and its values",
    "checkpoint.resume": "every run continues from its newest checkpoint",
}


@dataclass(frozen=True)
class PlannedRun:
    """One run of a grid.

    Attributes:
        name: its number and its values, as a file name.
        values: the text of each swept key.
        recipe: the resolved recipe as YAML.
    """

    name: str
    values: dict[str, str]
    recipe: str

    @property
    def setting(self) -> tuple[tuple[str, str], ...]:
        """The swept values without the seed: runs of equal settings are averaged."""
        return tuple((key, text) for key, text in self.values.items() if key != SEED)

    def __str__(self) -> str:
        return " ".join(f"{key}={text}" for key, text in self.values.items())


@dataclass(frozen=True)
class Plan:
    """All runs of a sweep, in order; the last key varies fastest.

    Attributes:
        recipe: the recipe as it was named.
        title: the recipe's own name.
        fixed: overrides of all runs.
        grid: swept key -> the texts of its values.
        folder: where the sweep writes.
        notes: lines about overrides (``RunConfig.notes``).
    """

    recipe: str
    title: str
    fixed: tuple[str, ...]
    grid: dict[str, list[str]]
    folder: Path
    runs: list[PlannedRun]
    notes: tuple[str, ...] = ()


def make_plan(recipe: str, words: Sequence[str], out: Path | None, *, processes: int = 1) -> Plan:
    """Read ``key=value`` and ``key=value,value`` words, and load the recipe of every run.

    Args:
        recipe: name of a built-in recipe, or a file.
        words: overrides. A key with several values is swept. Commas in brackets, braces and quotes belong to a value.
        out: the folder of the sweep; by default ``runs/NAME-sweep``.
        processes: of each run.

    Raises:
        ConfigError: a word is no override, nothing is swept, a value occurs twice, or the recipe of a run is invalid or
            has no validation data; it lists all problems.
    """
    find_recipe(recipe)
    fixed, grid = read_words(words)
    if not grid:
        raise ConfigError(["nothing to sweep: give a key several values, as in optimizer.lr=1e-3,2e-3 or seed=0,1,2"])
    if _size(grid) > _MOST_RUNS:
        raise ConfigError([f"{_size(grid):,} runs are more than the {_MOST_RUNS:,} of a sweep; give fewer values"])
    base = load(recipe, [*fixed, *(f"{key}={texts[0]}" for key, texts in grid.items())], world_size=processes)
    folder = out if out is not None else Path("runs") / f"{base.name}-sweep"
    settings = [dict(zip(grid, texts, strict=True)) for texts in product(*grid.values())]
    changes = [[f"{key}={text}" for key, text in values.items()] for values in settings]
    return plan_runs(Plan(str(recipe), base.name, tuple(fixed), grid, folder, []), settings, changes, processes)


def plan_runs(
    plan: Plan, settings: Sequence[dict[str, str]], changes: Sequence[Sequence[str]], processes: int = 1
) -> Plan:
    """Load the recipe of every run of a plan: ``settings`` name it, ``changes`` are its overrides.

    Raises ConfigError as :func:`make_plan` does.
    """
    digits = len(str(len(settings)))
    runs: list[PlannedRun] = []
    problems: list[str] = []
    notes: dict[str, None] = {}
    for number, (values, words) in enumerate(zip(settings, changes, strict=True), start=1):
        name = _name(f"{number:0{digits}}", values)
        managed = {"name": name, "out": str(plan.folder / "runs" / name), "checkpoint.resume": "auto"}
        try:
            config = load(
                plan.recipe,
                # quoted, since a path may look like something else to YAML
                [*plan.fixed, *words, *(f"{key}={json.dumps(text)}" for key, text in managed.items())],
                world_size=processes,
            )
        except ConfigError as error:
            problems += error.problems
            continue
        if not config.data.val_tokens and not config.data.val_path:
            problems.append(
                "data.val_tokens: 0 leaves no validation loss, by which a sweep compares settings; hold out some "
                "tokens, or give data.val_path"
            )
        if TOKENIZER in plan.grid and config.data.source == "chat":
            problems.append(
                f"{TOKENIZER}: conversations have no bits per byte, by which runs of different tokenizers compare; "
                "sweep it on text"
            )
        if TOKENIZER in plan.grid and config.eval.batches is not None:
            problems.append(
                f"eval.batches: a part of the validation text has no bits per byte, by which runs of different "
                f"{TOKENIZER} compare; leave it out"
            )
        notes |= dict.fromkeys(config.notes)
        runs.append(PlannedRun(name, values, dump(config)))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return replace(plan, runs=runs, notes=tuple(notes))


def read_words(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Separate overrides with one value from those with several: ``(fixed, grid)``. Raises ConfigError."""
    fixed: list[str] = []
    grid: dict[str, list[str]] = {}
    problems: list[str] = []
    keys: set[str] = set()
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            problems.append(f"expected key.path=value or key.path=value,value, got {word!r}")
            continue
        if key in _SET_HERE:
            problems.append(f"{key}: a sweep sets it for each run; {_SET_HERE[key]}")
        if key in keys:
            problems.append(f"{key} is given twice; write all its values in one word")
        keys.add(key)
        texts = split_values(text)
        if len(texts) == 1:
            fixed.append(word)
            continue
        problems += [f"{key}: {problem}" for problem in _wrong_values(key, texts)]
        grid[key] = texts
    if problems:
        raise ConfigError(problems)
    return fixed, grid


def split_values(text: str) -> list[str]:
    """Split at the commas outside brackets, braces and quotes."""
    parts, quote = [""], ""
    open_brackets: list[str] = []
    for letter in text:
        if letter == "," and not open_brackets and not quote:
            parts.append("")
            continue
        parts[-1] += letter
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in _CLOSING:
            open_brackets.append(_CLOSING[letter])
        elif open_brackets and letter == open_brackets[-1]:
            open_brackets.pop()
    return [part.strip() for part in parts]


def _wrong_values(key: str, texts: list[str]) -> Iterator[str]:
    """Problems of the values of one key: empty ones, and values that occur twice."""
    seen: dict[str, str] = {}
    path = tuple(key.split("."))
    for text in texts:
        if not text:
            yield f"an empty value in {','.join(texts)!r}; write one value before and after each comma"
            continue
        try:
            value = json.dumps(parse_override(path, text), sort_keys=True, default=str)
        except ValueError as error:
            yield str(error)
            continue
        if value in seen:
            yield f"{text} is {seen[value]} again; give each value once"
        seen.setdefault(value, text)


def _size(grid: dict[str, list[str]]) -> int:
    size = 1
    for texts in grid.values():
        size *= len(texts)
    return size


def _name(number: str, values: dict[str, str]) -> str:
    """``07-lr=2e-3,seed=1``: the name of a run and its folder."""
    words = ",".join(f"{key.rpartition('.')[2]}={text}" for key, text in values.items())
    return f"{number}-{re.sub(r'[^A-Za-z0-9_.,=+-]', '_', words)}"[:_MOST_NAME]
