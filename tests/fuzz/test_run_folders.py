"""Run folders: `report` makes a page without scripts, `eval` an answer, and a resumed run starts or says why not."""

import json
import os
import re
import shutil
import zlib

import pytest
from fuzzing import ENTRIES, WORDS, damaged, edits, fuzz, json_files, judged, plant, replaced, told, write
from hypothesis import given
from hypothesis import strategies as st
from run_folders import write_run

from leanstep.recipes.evaluate import read_training
from leanstep.recipes.report.report import MOST_BYTES, write_report
from leanstep.recipes.report.runlog import read_run
from leanstep.recipes.training.folder import RunFolder

ROWS = {
    "optimizer_report.json": [{"group": "hidden", "norm": 1.5, "why": "x"}],
    "attention_report.json": [{"layer": 0, "head": 1, "rho": 0.5, "status": "fine", "drift": 0.1}],
    "gate_report.json": [{"layer": 0, "low_rank": True, "calls": 3, "reason": "cheap"}],
    "sparsity_report.json": {"layers": [{"name": "a", "density": 0.5}], "operations": {"dense": 1e9, "hardware": 5e8}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    run = write_run(root / "run", steps=60, every=5)
    for name, rows in ROWS.items():
        (run / name).write_text(json.dumps(rows))
    (run / "train.log").write_text("step 1\nWARNING: the disk is nearly full\n")
    for name in ("outside", "pages"):
        (root / name).mkdir()
    (root / "outside" / "file").write_text("precious")
    write_report([run], root / "pages" / "whole.html")
    return root


def page_of(folder, run):
    out = folder / "pages" / "page.html"
    write_report([run, run], out)
    write_report([run], out)
    return out.read_text()


def right_page(folder):
    """A page of a changed file shows what that says, or a line about it."""
    expected = (folder / "pages" / "whole.html").read_text()

    def right(page):
        assert len(page.encode()) < MOST_BYTES and "precious" not in page
        assert not re.search(r"<script|javascript:|<[^>]*\son\w+=|src=|http-equiv=.refresh", page, re.IGNORECASE)
        return page == expected

    return right


def check_page(folder, run):
    read = lambda: page_of(folder, run)  # noqa: E731
    judged("run folders, report", read, right_page(folder), folder / "pages", outside=folder / "outside")


NAMES = ("config.yaml", "log.jsonl", "status.json", "env.json", "command.txt", "train.log", *ROWS)
HOSTILE = (*WORDS, "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7*7 }}", "javascript:alert(1)")


@pytest.mark.slow
@given(data=st.data())
@fuzz(25)
def test_damaged_files_of_a_run(folder, data):
    name = data.draw(st.sampled_from(NAMES))
    path = folder / "run" / name
    whole = path.read_bytes()
    with replaced(path, data.draw(json_files(whole) if name.endswith(".json") else damaged(whole))):
        check_page(folder, folder / "run")


@pytest.mark.slow
@given(data=st.data())
@fuzz(15)
def test_other_lines_of_a_log(folder, data):
    path = folder / "run" / "log.jsonl"
    whole = path.read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    changed = data.draw(edits(lines, st.sampled_from(HOSTILE) | st.floats() | st.integers() | st.text(max_size=5)))
    with replaced(path, "".join(json.dumps(line) + "\n" for line in changed).encode()):
        check_page(folder, folder / "run")


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["config.yaml", "log.jsonl", "train.log", "sparsity_report.json"])
def test_nothing_but_a_file_is_shown(folder, tmp_path, name, entry):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    plant(run / name, entry, tmp_path / "copy")
    (tmp_path / "copy").write_text("precious")
    check_page(folder, run)


@given(data=st.data())
@fuzz(5)
def test_the_command_answers_by_a_page_or_in_one_line(folder, data):
    name = data.draw(st.sampled_from(NAMES))
    path, out = folder / "run" / name, folder / "pages" / "page.html"
    whole = path.read_bytes()

    def right(printed):
        assert printed == f"{out} written\n"
        return right_page(folder)(out.read_text())

    with replaced(path, data.draw(json_files(whole) if name.endswith(".json") else damaged(whole))):
        told("run folders, report", "report", folder / "run", "--out", out, right=right, folders=(folder / "pages",))


@given(data=st.data())
@fuzz(60)
def test_a_damaged_recipe_tells_eval_nothing_or_one_line(folder, data):
    """What a model was trained on is told as its config.yaml says it, or not known."""
    path = folder / "run" / "config.yaml"
    whole = path.read_bytes()

    def read():
        training = read_training(folder / "run" / "final")
        if training is None:
            return ()
        return training.held_out(), training.about_sotu(1000), training.about_file("text.txt")

    def right(answers):
        assert all(str(answer).isprintable() for answer in answers)
        return answers == expected

    expected = read()
    assert expected
    with replaced(path, data.draw(damaged(whole))):
        judged("run folders, eval", read, right, outside=folder / "outside")


@given(data=st.data())
@fuzz(50)
def test_a_damaged_log_is_rewound(folder, data):
    """What is left are whole lines of steps up to the checkpoint's."""
    run = folder / "rewound"
    run.mkdir(exist_ok=True)
    whole = (folder / "run" / "log.jsonl").read_bytes()
    expected = [line for line in whole.splitlines() if b'"sample"' not in line and json.loads(line)["step"] <= 30]
    write(run / "log.jsonl", data.draw(damaged(whole)))

    def read():
        root = RunFolder(run)
        root.rewind_log(30)
        return (run / "log.jsonl").read_bytes().splitlines()

    def right(lines):
        steps = [json.loads(line).get("step", 0) for line in lines]
        assert all(isinstance(step, (int, float)) and step <= 30 for step in steps)
        read_run(run)
        return lines == expected

    judged("run folders, resume", read, right, run)


def test_a_log_that_is_no_file_is_not_rewound(folder, tmp_path):
    for entry in ENTRIES:
        run = shutil.copytree(folder / "run", tmp_path / entry)
        plant(run / "log.jsonl", entry, tmp_path / "copy")
        before = os.path.lexists(run / "log.jsonl")
        judged("run folders, resume", lambda run=run: RunFolder(run).rewind_log(30), lambda _: True, run)
        assert os.path.lexists(run / "log.jsonl") == before
        assert zlib.crc32((tmp_path / "copy").read_bytes()) == zlib.crc32((folder / "run" / "log.jsonl").read_bytes())
