"""The benchmarks import, print their help, and understand every command that the documentation names."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import documentation
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
FILES = [path for path in FOLDER.glob("*/*.py") if not (path.parent / "__init__.py").exists()]
FILES += [FOLDER / "faults.py", FOLDER / "gpu.py", FOLDER / "house.py"]
SCRIPTS = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FILES)
NAMES = [*SCRIPTS, *(path.stem for path in FOLDER.glob("[!_]*.py") if path.stem not in SCRIPTS)]
PAGES = ["CONTRIBUTING.md", *documentation.PAGES]


def commands(text: str) -> list[str]:
    """What follows ``python benchmarks `` in fenced blocks, up to the end of the line, and in inline code."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    inline = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [command for block in fenced for command in re.findall(r"python benchmarks ([^\n#&]+)", block)]
    return lines + re.findall(r"`python benchmarks ([^`]+)`", inline)


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        imported = {name: name.replace("/", ".") for name in NAMES}
        for name in {*imported.values(), *(name.split("/")[0] for name in SCRIPTS)}:
            patch.delitem(sys.modules, name, raising=False)
        yield {name: importlib.import_module(module) for name, module in imported.items()}
        for name in {*imported.values(), *(name.split("/")[0] for name in SCRIPTS)}:
            del sys.modules[name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(modules, name, capsys):
    with pytest.raises(SystemExit) as end:
        modules[name].PARSER.parse_args(["--help"])
    assert end.value.code == 0
    assert modules[name].__doc__.splitlines()[0] in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_documented_commands_parse(modules, page):
    text = (ROOT / page).read_text("utf-8")
    named = commands(text)
    assert len(named) == text.count("python benchmarks "), f"{page}: a command is neither inline code nor in a block"
    for command in named:
        script, *arguments = shlex.split(command)
        modules[script].PARSER.parse_args(arguments)


def test_usage_lines_name_options_that_exist(modules):
    for name in SCRIPTS:
        usage = re.findall(rf"(?m)^    python benchmarks {name}(.*(?:\n {{8}}.*)*)", modules[name].__doc__)
        assert usage, f"{name}: its docstring names no command"
        for option in re.findall(r"--[\w-]+", " ".join(usage)):
            assert option in modules[name].PARSER.format_help(), f"{name} has no {option}"


def test_command_line_takes_types_from_defaults(modules):
    parser = modules["common"].command_line("Text.", rounds=5, rates=[0.5], slow=(False, "all"), cpu_time=False)
    options = parser.parse_args(["--rates", "1", "2", "--slow", "--rounds", "3"])
    assert vars(options) == {"rounds": 3, "rates": [1.0, 2.0], "slow": True, "cpu_time": False}


def test_interleaved_warms_up_in_order_and_gives_every_run_its_turn(modules):
    calls = []
    runs = {name: lambda name=name: calls.append(name) or len(calls) for name in "abc"}
    results = modules["common"].interleaved(runs, rounds=4, warmup=2)
    assert calls[:6] == [*"abcabc"]
    assert all(sorted(calls[i : i + 3]) == [*"abc"] for i in range(6, 18, 3)) and len(calls) == 18
    assert {name: [calls[number - 1] for number in numbers] for name, numbers in results.items()} == {
        name: [name] * 4 for name in "abc"
    }


@pytest.mark.parametrize(
    ("losses", "cells"),
    [([5.0], ["+0.500", "one seed"]), ([5.0, 5.1], ["+0.550 [-0.085, +1.185]", "no difference seen"])],
)
def test_an_option_is_compared_on_one_seed_without_an_interval(modules, losses, cells):
    module = modules["optimizers/option_losses"]
    option = module.Variant("option", "recipe", (), "plain")
    curves = {"plain": module.Curves({10: [4.5, 4.5][: len(losses)]}, []), "option": module.Curves({10: losses}, [])}
    text = " ".join(f"{loss:.3f}" for loss in losses)
    assert module.row_of(option, curves, with_logits=False) == ["option", text, *cells]


def test_print_table(modules, capsys):
    modules["common"].print_table(["name", "ms"], [["a", "1.5"], ["b", None]])
    assert capsys.readouterr().out == "| name | ms |\n| --- | ---: |\n| a | 1.5 |\n| b |  |\n"


def test_the_line_of_a_machine_counts_its_threads(modules, monkeypatch):
    for threads, text in ((1, ", 1 thread, torch "), (2, ", 2 threads, torch ")):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        assert text in modules["common"].machine_line()


def test_the_command_lists_every_script():
    listed = subprocess.run([sys.executable, FOLDER], capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in listed.splitlines()] == SCRIPTS


@pytest.mark.slow
def test_killed_runs_lose_nothing_and_finished_trials_are_not_repeated(tmp_path):
    command = [sys.executable, FOLDER / "faults.py", "--kills", "2", "--only", "lion", "--out", tmp_path]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    results = (tmp_path / "results.jsonl").read_text()
    rows = [json.loads(line) for line in results.splitlines()]
    assert [(row["kind"], row["trial"]) for row in rows] == [("lion", 0), ("lion", 1)]
    assert all(row["moments"] for row in rows), "a trial without a kill proves nothing"
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"kind": "soak", "minutes": 1.0, "seed": 0, "samples": [[1.0, 7], [1.0, 7], [1.0, 7]]}\n')
    subprocess.run(command, check=True)
    assert (tmp_path / "results.jsonl").read_text().startswith(results)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3


def test_a_digest_tells_what_differs(modules):
    differences = modules["forks"].differences
    whole = {"final weights": "a", "log": [1, 2], "files": ["last", "log.jsonl"]}
    assert differences(whole, dict(whole)) == ""
    changed = {"final weights": "b", "log": [1, 2], "files": ["last", "log.jsonl", ".status.1.json.tmp"]}
    assert differences(whole, changed) == "files (extra .status.1.json.tmp), final weights"


def test_the_slope_of_the_soak_is_robust(modules):
    slope = modules["mishaps"].slope
    assert slope([5.0, 5.0, 900.0, 5.0, 5.0, 5.0]) == 0.0
    assert slope([float(3 * index) for index in range(9)]) == 3.0
