"""The suite's own machinery (conftest.py), tried on a small suite in a folder of its own."""

import os
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
from covering import covering
from scheduling import longest_files_first

# each starts pytest anew
pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]

SMALL_SUITE = """
import os, socket
import pytest, torch

@pytest.mark.interpret
@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["a", "b c"])
def test_runs_in_the_interpreter_on_dirty_memory(name):
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert torch.empty(3).isnan().all()

@pytest.mark.interpret
def test_interpreted_failure():
    assert "left" == "right"

@pytest.mark.interpret
def test_interpreted_skip():
    pytest.skip("said why")

@pytest.mark.interpret
def test_interpreted_crash():
    os._exit(3)

@pytest.mark.interpret
def test_after_the_crash():
    pass

def test_runs_here():
    assert "TRITON_INTERPRET" not in os.environ

def test_asks_for_the_network():
    try:
        socket.create_connection(("192.0.2.1", 80))
    except OSError:
        pass

def test_dirty_memory(dirty_memory):
    assert torch.empty_like(torch.ones(2)).isnan().all()
    assert torch.empty(2, dtype=torch.int32).tolist() == [2**31 - 1] * 2

def test_dirty_memory_is_over():
    assert not torch.are_deterministic_algorithms_enabled()

def test_caches_belong_to_the_run():
    folder = os.environ["LEANSTEP_TEST_CACHE"]
    for name in ("LEANSTEP_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "HF_HOME"):
        assert os.environ[name].startswith(folder)
"""


def run_suite(root: Path, text: str, *arguments: str) -> dict[str, str]:
    """Run a suite of one file; return what pytest said of each test, and everything it said."""
    (root / "tests").mkdir(parents=True)
    shutil.copy(TESTS.parent / "pyproject.toml", root)
    shutil.copy(TESTS / "conftest.py", root / "tests")
    shutil.copytree(TESTS / "helpers", root / "tests" / "helpers")
    (root / "tests" / "test_small.py").write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-rA", *arguments]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    said = {}
    for line in run.stdout.splitlines():
        word, _, rest = line.partition(" ")
        if word in {"PASSED", "FAILED", "ERROR", "SKIPPED"} and "::" in rest:
            said[rest.split("::")[1].split(" - ")[0]] = word
    return said | {"output": run.stdout + run.stderr}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> dict[str, str]:
    return run_suite(tmp_path_factory.mktemp("small suite"), SMALL_SUITE)


def test_interpreter_tests_are_reported_one_by_one(outcome):
    for name in ("a", "b c"):
        assert outcome[f"test_runs_in_the_interpreter_on_dirty_memory[{name}]"] == "PASSED"
    assert outcome["test_interpreted_failure"] == "FAILED"
    assert "assert 'left' == 'right'" in outcome["output"]
    assert "said why" in outcome["output"]
    assert outcome["test_runs_here"] == "PASSED"


def test_a_dead_interpreter_fails_every_test_it_still_owed(outcome):
    assert outcome["test_interpreted_crash"] == "FAILED"
    assert outcome["test_after_the_crash"] == "FAILED"
    assert "exit code 3" in outcome["output"]


def test_the_network_is_refused_even_if_the_error_is_caught(outcome):
    assert outcome["test_asks_for_the_network"] == "ERROR"
    assert "reached for the network: 192.0.2.1" in outcome["output"]


def test_uninitialised_memory_and_caches(outcome):
    for name in ("test_dirty_memory", "test_dirty_memory_is_over", "test_caches_belong_to_the_run"):
        assert outcome[name] == "PASSED", outcome["output"]


SAMPLED_SUITE = """
import pytest

@pytest.mark.parametrize("case", range(30))
def test_cases(case):
    pass

@pytest.mark.sample(7)
@pytest.mark.parametrize("case", range(30))
def test_sampled(case):
    pass

@pytest.mark.slow
def test_slow():
    pass

def test_plain():
    pass
"""


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        ([], (1, 7, 0, 1)),
        (["-n", "0", "-m", "slow or not slow"], (30, 30, 1, 1)),
        (["tests/test_small.py"], (30, 30, 1, 1)),
        (["-n", "0", "-k", "cases"], (30, 0, 0, 0)),
    ],
    ids=["nothing named", "everything", "a file", "a keyword"],
)
def test_a_run_of_nothing_named_takes_a_sample_of_every_test(tmp_path, arguments, counts):
    outcomes = run_suite(tmp_path, SAMPLED_SUITE, *arguments)
    names = [name.split("[")[0] for name in outcomes if name.startswith("test_")]
    assert tuple(names.count(f"test_{name}") for name in ("cases", "sampled", "slow", "plain")) == counts
    if not arguments:  # the same sample again, of one worker
        assert run_suite(tmp_path / "again", SAMPLED_SUITE, "-n", "1").keys() == outcomes.keys()


def test_files_that_take_long_are_handed_out_first():
    def item(file, name, slow):
        return SimpleNamespace(nodeid=f"tests/{file}.py::{name}", get_closest_marker=lambda mark: slow or None)

    items = [item("short", "test_a", False), *(item("many", f"test_{i}", False) for i in range(10))]
    items += [item("slow", "test_b", True), item("short", "test_in_the_interpreter", True)]
    longest_files_first(items, ["tests/short.py::test_in_the_interpreter"])
    assert [test.nodeid.split("::")[0] for test in items] == [
        f"tests/{name}.py" for name in ("short", "slow", *["many"] * 10, "short")
    ]


@pytest.mark.parametrize("together", [1, 2])
def test_chosen_cases_have_every_combination_that_any_case_has(together):
    rows = [{"a": a, "b": b, "c": a * b % 3, "d": d} for a in range(4) for b in range(3) for d in "xy"]
    chosen = [rows[i] for i in covering(rows, together)]
    all_seen, seen = ({c for row in some for c in combinations(row.items(), together)} for some in (rows, chosen))
    assert seen == all_seen and len(chosen) < len(rows) / 1.5
