"""The README is short, its numbers are measured, and its two commands are those that the checks run."""

import importlib
import re

import pytest
from documentation import ROOT, blocks, command_lines

README = (ROOT / "README.md").read_text("utf-8")
TWO_COMMANDS = ["pip install -e '.[demo]' && leanstep train llama-nano-sinkgd", "pip install -e '.[dev]' && pytest"]


def test_the_first_block_is_the_two_commands():
    assert blocks("README.md")[0] == ("bash", "\n".join(TWO_COMMANDS) + "\n")
    assert [line for line in command_lines("README.md") if "pip install" in line] == TWO_COMMANDS


def test_the_ci_script_runs_the_second_command_as_it_stands():
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert """test_command=$(grep -m1 -F "pip install -e '.[dev]' && " README.md)""" in script
    assert '\neval "$test_command"\n' in script
    matching = [line for line in README.splitlines() if "pip install -e '.[dev]' && " in line]
    assert matching[0] == TWO_COMMANDS[1]


def test_it_has_at_most_700_words():
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    assert len(re.findall(r"[\w'.,%-]*\w[\w'.,%-]*", re.sub(r"\]\([^)]*\)", "]", text))) <= 700


def test_every_method_is_exported():
    table = README.partition("\n## Methods\n")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| [")]
    named = [name for row in rows for name in re.findall(r"`leanstep\.([\w.]+)`", row)]
    assert len(rows) == len(named) == 7
    for name in named:
        package, _, attribute = f"leanstep.{name}".rpartition(".")
        assert attribute in importlib.import_module(package).__all__, name


READINGS = {"lower loss": "ahead", "no difference seen": "level", "higher loss": "behind"}
ROWS = {"SinkGD": "SinkGD, AdamW on the rest", "LANTON, no noise": "LANTON, plain", "Muon": "Muon, AdamW on the rest"}


@pytest.mark.parametrize(
    ("model", "table"), [("LLaMA, 1.1M", "llama-nano"), ("GPT-2, 1.1M", "gpt-nano"), ("LLaMA, 6M", "llama-micro")]
)
def test_the_table_of_optimizers_says_what_was_measured(model, table):
    """Its cells are the readings of the tuned method and of its defaults in docs/measured/losses.md."""
    lines = README.splitlines()
    head = next(line for line in lines if line.startswith("| model | SinkGD"))
    cells = dict(zip(_cells(head), _cells(next(x for x in lines if x.startswith(f"| {model} |"))), strict=True))
    losses = (ROOT / "docs" / "measured" / "losses.md").read_text("utf-8")
    measured = losses.split(f"<!-- table:compare-{table} -->")[1].split(f"<!-- /table:compare-{table} -->")[0]
    tuned, defaults = measured.split("With the defaults of the class")
    for method, cell in cells.items():
        if method != "model":
            start = f"| {ROWS.get(method, method)} | "
            rows = [x for part in (tuned, defaults) for x in part.splitlines() if x.startswith(start)]
            assert cell == " / ".join(READINGS[_cells(row)[3]] for row in rows), f"{model}, {method}"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")]
