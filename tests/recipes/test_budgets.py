"""Runs compared at equal tokens, time, memory and loss."""

import json
import re

import pytest
from report_pages import Page
from run_folders import write_run

from leanstep.cli import main
from leanstep.recipes.report import report as report_module
from leanstep.recipes.report.budgets import compare, peak_memory, rows, validations
from leanstep.recipes.report.report import comparison_lines, write_report
from leanstep.recipes.report.runlog import read_run
from leanstep.recipes.training.folder import RunFolder


def run_of(folder, evaluations, *, tokens_per_step=100, seconds_per_step=1.0, memory=None, key="memory_gib"):
    """A run with an evaluation (step, loss) each, and training lines at every tenth step."""
    write_run(folder, folder.name, made=0, sample=None)
    entries = []
    for step in range(0, max((step for step, _ in evaluations), default=0) + 1, 10):
        entry = {"step": step, "kind": "train", "loss": 5.0, "tokens": step * tokens_per_step}
        entries.append({**entry, "elapsed_s": step * seconds_per_step, **({key: memory} if memory else {})})
    entries += [{"step": step, "kind": "eval", "loss": loss} for step, loss in evaluations]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def test_losses_at_the_budgets_that_all_runs_reach(tmp_path):
    short = run_of(tmp_path / "short", [(10, 5.0), (20, 4.0)], memory=1.5)
    long = run_of(tmp_path / "long", [(10, 6.0), (30, 3.0), (40, 2.0)], seconds_per_step=2.0)
    made = compare([read_run(short), read_run(long)])
    assert (made.tokens, made.seconds, made.loss) == (2000, 20.0, 4.0)
    assert made.at_tokens == [4.0, 4.5]
    # the long run has made 10 steps in 20 seconds
    assert made.at_seconds == [4.0, 6.0]
    assert made.tokens_to_loss == pytest.approx([2000, 1000 + 2000 * 2 / 3])
    assert made.seconds_to_loss == pytest.approx([20, 20 + 40 * 2 / 3])
    assert made.memory == [1.5, None]
    header, lines = rows(made, ["short", "long"])
    assert header[1:3] == ["Loss at 2000 tokens", "Loss at 20.0 s"] and header[-1] == "Peak device memory (GiB)"
    assert lines[1][:3] == ["long", "4.5000", "6.0000"] and lines[1][-1] == "-"


def test_evaluations_between_training_lines_have_a_cost_between_theirs(tmp_path):
    run = read_run(run_of(tmp_path / "run", [(5, 5.0), (30, 4.0)]))
    assert validations(run, "tokens") == [(500, 5.0), (3000, 4.0)]


def test_a_loss_that_rises_is_reached_where_it_first_falls(tmp_path):
    wave = read_run(run_of(tmp_path / "wave", [(10, 5.0), (20, 3.0), (30, 6.0), (40, 2.0)]))
    flat = read_run(run_of(tmp_path / "flat", [(10, 4.0), (40, 4.0)]))
    assert compare([wave, flat]).tokens_to_loss == [1500, 1000]


def test_runs_without_evaluations_or_with_broken_ones_have_no_numbers(tmp_path):
    sound = read_run(run_of(tmp_path / "sound", [(10, 5.0), (20, 4.0)]))
    none = read_run(run_of(tmp_path / "none", []))
    made = compare([sound, none])
    assert (made.tokens, made.loss) == (None, None)
    assert made.at_tokens == [None, None] and made.tokens_to_loss == [None, None]
    assert rows(made, ["sound", "none"]) == ([], [])
    broken = read_run(run_of(tmp_path / "broken", [(10, float("nan")), (20, float("inf")), (30, 4.5)]))
    assert validations(broken, "tokens") == [(3000, 4.5)]
    # one evaluation, beyond the tokens of the other run
    made = compare([sound, broken])
    assert (made.tokens, made.at_tokens, made.tokens_to_loss) == (2000, [4.0, None], [1500, 3000])
    assert comparison_lines([tmp_path / "sound", tmp_path / "broken"])[-1].endswith("or the time of the shortest run")


def test_the_comparison_shows_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first = run_of(tmp_path / "first", [(10, 5.0), (20, 4.0)], memory=1.5)
    second = run_of(tmp_path / "second", [(10, 6.0), (30, 3.0)], memory=2.5)
    assert main(["compare", "first", "second"]) == 0
    html = (tmp_path / "comparison.html").read_text()
    page = Page(html)
    assert "At equal tokens, time and loss" in page.text and "Loss at 2000 tokens" in page.text
    for title in ("Validation loss over tokens", "Validation loss over time", "Validation loss against memory"):
        figure = re.search(rf"<h3>{title}</h3>.*?</figure>", html, re.DOTALL)[0]
        assert figure.count("<path") == 2 and "first" in figure and "second" in figure, title
    # runs of before the peak was logged
    write_report([run_of(first, [(10, 5.0)]), run_of(second, [(10, 5.0)])], tmp_path / "out.html")
    assert "against memory" not in (tmp_path / "out.html").read_text()
    assert main(["compare", "first"]) == 2
    assert "expected at least two runs to compare" in capsys.readouterr().err


def test_memory_of_a_device_and_of_a_process_are_not_compared(tmp_path):
    gpu = read_run(run_of(tmp_path / "gpu", [(10, 5.0)], memory=1.5))
    cpu, other = (read_run(run_of(tmp_path / n, [(10, 5.0)], memory=2.5, key="process_gib")) for n in ("a", "b"))
    assert peak_memory([gpu, cpu]) == ("device", [1.5, None])
    assert peak_memory([cpu, other]) == ("process", [2.5, 2.5])
    write_report([cpu.folder, other.folder], tmp_path / "out.html")
    text = (tmp_path / "out.html").read_text()
    assert "Peak process memory (GiB)" in text and "Validation loss against memory" in text


def test_a_watched_run_is_reported_until_its_end(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", made=200, status="running")
    folder = RunFolder(run)
    folder.claim()
    pages = []

    def sleep(seconds):
        """The run ends while the report waits for the third time."""
        pages.append((run / "report.html").read_text())
        if len(pages) == 3:
            write_run(run)

    monkeypatch.setattr(report_module.time, "sleep", sleep)
    assert main(["report", str(run), "--watch", "7"]) == 0
    folder.release()
    assert len(pages) == 3
    assert all('<meta http-equiv="refresh" content="7">' in page and "running" in page for page in pages)
    last = (run / "report.html").read_text()
    assert 'http-equiv="refresh"' not in last and "The run is not done" not in last
    assert "is written every 7 s while a run is running" in capsys.readouterr().out


def test_ctrl_c_ends_the_watching_with_a_page_that_does_not_refresh(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", made=200, status="running")
    folder = RunFolder(run)
    folder.claim()

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(report_module.time, "sleep", interrupt)
    assert main(["report", str(run), "--watch"]) == 130
    folder.release()
    assert "refresh" not in (run / "report.html").read_text()
