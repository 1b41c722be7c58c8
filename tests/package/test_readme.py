"""The README does what it says: its commands parse, its code runs, its paths exist."""

import argparse
import importlib
import importlib.util
import re
import shlex
import warnings
from pathlib import Path

import pytest

from leanstep import cli
from leanstep.recipes import evaluate
from leanstep.recipes.config import loader

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = FENCE.findall(README)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines()]
TWO_COMMANDS = [
    "pip install -e '.[demo]' && leanstep train llama-nano-sinkgd",
    "pip install -e '.[dev]' && pytest",
]


def leanstep_arguments(line: str) -> list[str] | None:
    """The arguments of the leanstep command in a shell line, if there is one."""
    last = line.split(" && ")[-1].split(" | ")[0]
    words = shlex.split(last, comments=True)
    return words[1:] if words and words[0] == "leanstep" else None


LEANSTEP = [arguments for line in COMMANDS if (arguments := leanstep_arguments(line)) is not None]


def test_the_first_block_is_the_two_commands():
    assert BLOCKS[0] == ("bash", "\n".join(TWO_COMMANDS) + "\n")
    assert [line for line in COMMANDS if "pip install" in line and "[bench]" not in line] == TWO_COMMANDS


def test_the_ci_script_runs_the_second_command_as_it_stands():
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert """test_command=$(grep -m1 -F "pip install -e '.[dev]' && " README.md)""" in script
    assert '\neval "$test_command"\n' in script
    matching = [line for line in README.splitlines() if "pip install -e '.[dev]' && " in line]
    assert matching[0] == TWO_COMMANDS[1]


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_there_are_examples():
    assert len(PYTHON) >= 4
    assert {"train", "recipes", "check", "eval", "info", "audit"} <= {arguments[0] for arguments in LEANSTEP}


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse as the command does: what the parser leaves over are the recipe's key=value words."""
    options, rest = cli._parser().parse_known_args(arguments)
    return options, [*getattr(options, "overrides", []), *rest]


@pytest.mark.parametrize("arguments", LEANSTEP, ids=" ".join)
def test_leanstep_commands_parse(arguments):
    _, overrides = parse(arguments)
    if arguments[0] != "eval":  # has a parser of its own, below
        assert all("=" in word and not word.startswith("-") for word in overrides), overrides


def test_a_command_that_does_not_exist_does_not_parse(capsys):
    with pytest.raises(SystemExit):
        parse(["trian", "llama-nano-sinkgd"])
    assert "did you mean 'train'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [a for a in LEANSTEP if a[0] == "eval"], ids=" ".join)
def test_eval_commands_parse(arguments):
    evaluate._parser().parse_args(arguments[1:])


@pytest.mark.parametrize("arguments", [a for a in LEANSTEP if a[0] in {"train", "check"}], ids=" ".join)
def test_recipes_and_overrides_are_valid(arguments):
    options, overrides = parse(arguments)
    loader.load(options.recipe, overrides, world_size=options.nproc)


def test_modules_and_recipes_of_other_launchers_exist():
    launched = [re.search(r" -m (leanstep[.\w]*) ([\w-]+)$", line) for line in COMMANDS if " -m leanstep" in line]
    assert len(launched) == 2
    for match in launched:
        assert importlib.util.find_spec(match[1]) is not None
        loader.load(match[2], [])


def test_scripts_exist():
    scripts = [word for line in COMMANDS for word in line.split() if word.endswith((".py", ".sh"))]
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


def test_paths_in_code_spans_exist():
    spans = re.findall(r"`([\w./-]+)`", README)
    paths = [span for span in spans if "/" in span and span.split("/")[0] in {p.name for p in ROOT.iterdir()}]
    assert "kernels/audit.py" in paths
    assert [path for path in paths if not (ROOT / path).exists() and not path.startswith("runs/")] == []


def test_links_to_files_exist():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/gpu.md", "docs/measured.md", "docs/reliability.md"]
)
def test_no_path_of_one_machine(name):
    text = (ROOT / name).read_text("utf-8")
    assert not re.search(r"(?<![\w.:/`])/(home|root|work|tmp|Users|opt|mnt)/", text)


@pytest.mark.parametrize("page", ["README.md", "docs/gpu.md", "docs/measured.md", "docs/reliability.md"])
def test_tables_are_filled_from_benchmarks(page):
    """A table marker has a partner, and what is between them names the command that prints it."""
    page = (ROOT / page).read_text("utf-8")
    opened = re.findall(r"<!-- table:([\w-]+) -->", page)
    assert opened == re.findall(r"<!-- /table:([\w-]+) -->", page)
    assert opened and len(set(opened)) == len(opened)
    for name in opened:
        text = page.split(f"<!-- table:{name} -->")[1].split(f"<!-- /table:{name} -->")[0].strip()
        assert re.search(r"python benchmarks (\w+/)?\w+|leanstep \w+", text), f"table {name} names no command"


def test_every_available_method_is_exported():
    rows = [line for line in README.splitlines() if line.startswith("| ") and line.endswith("| available |")]
    named = [name for row in rows for name in re.findall(r"`leanstep\.([\w.]+)`", row)]
    assert len(rows) >= 4 and len(named) >= len(rows)
    for name in named:
        package, _, attribute = f"leanstep.{name}".rpartition(".")
        assert attribute in importlib.import_module(package).__all__, name
