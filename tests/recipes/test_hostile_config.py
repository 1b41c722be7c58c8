"""Recipes and overrides that would take long to read, or that name what no recipe may hold, are refused in lines."""

import pytest

from leanstep.recipes.config.loader import ConfigError, load
from leanstep.recipes.config.values import parse_scalar


def problems_of(path, overrides=()):
    with pytest.raises(ConfigError) as refused:
        load(path, overrides)
    return refused.value.problems


MANY = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
HOSTILE = {
    "aliases": (MANY, "expected at most 5,000 values"),
    "a long text many times": (f"a: &a {'x' * 30_000}\nb: [{'*a, ' * 4000}]", "expected at most 5,000 values"),
    "brackets": ("[" * 5000, "nested more than 50 deep"),
    "dashes": ("- " * 5000, "nested more than 50 deep"),
    "mappings": ("{a: " * 5000, "nested more than 50 deep"),
    "a long list": ("[" + "1, " * 20_000 + "]", "too many values"),
    "a long file": ("#" * 70_000, "expected at most 65,536 characters, got 70,000"),
    "digits": ("steps: " + "9" * 400, "a number of 400 characters"),
    "bits": ("steps: 36893488147419103232", "more than 64 bits"),
    "half a character": ('name: "\\ud800"', "half a character"),
    "NUL": ('name: "a\\0b"', "NUL character"),
    "an impossible character": ('name: "\\U99999999"', "not valid YAML"),
    "a bool": ("compile: !!bool maybe", "'maybe' is no bool"),
    "an int": ("steps: !!int ''", "'' is no int"),
    "a date": ("name: !!timestamp nonsense", "timestamp is no text"),
    "a call": ("name: !!python/object/apply:os.system ['true']", "the tag python/object/apply:os.system"),
    "a name": ("name: !!python/name:os.system", "python/name:os.system is no text"),
    "a set": ("name: !!set {x}", "the tag set"),
    "a list as text": ("name: !!str [x]", "the tag str"),
    "a key": ("? !!binary aa\n: 1", "keys must be plain words"),
    "a key to print": ('"a\\x1b[31m": 1', "keys must be plain words"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_text_is_told_in_lines(case, tmp_path):
    text, message = HOSTILE[case]
    (tmp_path / "mine.yaml").write_text(text)
    problems = problems_of(tmp_path / "mine.yaml")
    assert any(message in problem for problem in problems)
    assert len(problems) <= 50 and all(
        len(problem) < 400 + len(str(tmp_path)) and problem.isprintable() for problem in problems
    )


def test_a_reference_of_any_length_is_told_in_short():
    problems = problems_of("llama-nano-adamw", ["name=${" + "x" * 3000 + "}"])
    assert problems and all(len(problem) < 1100 for problem in problems)


@pytest.mark.parametrize("key", ["a\x1b[31m", "\ud7fc", "a\u2028b", "optimizer.\x7f"])
def test_keys_of_overrides_are_told_in_printable_lines(key):
    problems = problems_of("llama-nano-adamw", [f"{key}=1"])
    assert problems and all(problem.isprintable() for problem in problems)


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_overrides_are_told_in_lines(case):
    text, message = HOSTILE[case]
    problems = problems_of("llama-nano-adamw", [f"steps={text}"])
    assert problems and all(len(problem) < 400 and problem.isprintable() for problem in problems)


@pytest.mark.parametrize("text", ["*.txt\n", "a\0b", "a: \x1b[31m", "[" * 5000])
def test_text_of_an_override_is_printable_and_short(text):
    problems = problems_of("llama-nano-adamw", [f"data.subset=*{text}*"])
    assert problems and all(len(problem) < 400 and problem.isprintable() for problem in problems)


def test_a_key_of_any_depth_is_told():
    assert any("nested more than 50 deep" in p for p in problems_of("llama-nano-adamw", ["model" + ".b" * 3000 + "=1"]))


def test_characters_in_two_escapes_are_read():
    assert parse_scalar('"\\ud83d\\ude00"') == "\U0001f600"
