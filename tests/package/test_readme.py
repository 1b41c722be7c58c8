"""The README is short, and its two commands are those that the checks run. test_pages.py runs its code."""

import importlib
import re

from documentation import ROOT, blocks, command_lines

README = (ROOT / "README.md").read_text("utf-8")
TWO_COMMANDS = [
    "pip install -e '.[demo]' && leanstep train llama-nano-sinkgd",
    "pip install -e '.[dev]' && pytest",
]


def test_the_first_block_is_the_two_commands():
    assert blocks("README.md")[0] == ("bash", "\n".join(TWO_COMMANDS) + "\n")
    assert [line for line in command_lines("README.md") if "pip install" in line] == TWO_COMMANDS


def test_the_ci_script_runs_the_second_command_as_it_stands():
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert """test_command=$(grep -m1 -F "pip install -e '.[dev]' && " README.md)""" in script
    assert '\neval "$test_command"\n' in script
    matching = [line for line in README.splitlines() if "pip install -e '.[dev]' && " in line]
    assert matching[0] == TWO_COMMANDS[1]


def test_it_takes_two_minutes_to_read():
    assert len(README.splitlines()) < 130


def test_every_available_method_is_exported():
    rows = [line for line in README.splitlines() if line.startswith("| ") and line.endswith("| available |")]
    named = [name for row in rows for name in re.findall(r"`leanstep\.([\w.]+)`", row)]
    assert len(rows) >= 4 and len(named) >= len(rows)
    for name in named:
        package, _, attribute = f"leanstep.{name}".rpartition(".")
        assert attribute in importlib.import_module(package).__all__, name
