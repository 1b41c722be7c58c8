"""docs/walks.md is what the code does, and no walk visits more files than it may."""

import re

import pytest
from walk_cases import CASES
from walks import ROOT, files

from leanstep.kernels.cpp_impl._build import why_not_cpp

PAGE = (ROOT / "docs" / "walks.md").read_text("utf-8")
SECTIONS = {title: text for title, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)}
STEP = re.compile(r"^\d+\. `([\w/.]+\.py):([\w.]+)`", re.MULTILINE)


def test_every_walk_has_a_section():
    assert list(SECTIONS) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_the_page_is_what_the_code_does(name, tmp_path, capsys):
    if why_not_cpp() is not None and "step" in name.split(".")[-1]:
        pytest.skip(f"the page follows the C++ backend: {why_not_cpp()}")
    case, listed = CASES[name], STEP.findall(SECTIONS[name])
    entered = case.run(tmp_path)
    assert listed
    missing = [step for step in listed if step not in entered]
    assert not missing, f"never entered: {missing}"
    order = [entered.index(step) for step in listed]
    assert order == sorted(order), [listed[i] for i in range(1, len(order)) if order[i] < order[i - 1]]
    visited = [file for file in files(entered) if file.startswith(case.counted)]
    assert len(visited) <= case.visited, visited
    on_page = dict.fromkeys(file for file, _ in listed)
    assert len(on_page) <= case.listed
    if case.visited == case.listed:  # every file that counts is on the page
        assert set(visited) <= set(on_page), set(visited) - set(on_page)
    for number in {case.visited, case.listed}:
        assert re.search(rf"\b{number}\b", SECTIONS[name].split("1. ")[0]), f"the page does not say {number}"


def test_a_walk_that_is_not_true_is_noticed(tmp_path):
    entered = CASES["Lion.step"].run(tmp_path)
    assert ("optimizers/lion.py", "Lion._group_steps") in entered
    assert ("optimizers/sinkgd/rule.py", "normalize") not in entered
