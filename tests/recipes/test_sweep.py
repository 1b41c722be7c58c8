"""Sweeps: the grid, the ledger that a crash does not lose, the statistics, and the pages."""

import fcntl
import json
import math
import os
import re
import shlex

import pytest
from report_pages import Page
from training import write_recipe

from leanstep._files import remove
from leanstep._pages.charts import Series, chart
from leanstep.cli import main
from leanstep.recipes.config.loader import ConfigError, load
from leanstep.recipes.sweep import runner
from leanstep.recipes.sweep.command import parser
from leanstep.recipes.sweep.grid import make_plan, read_words, split_values
from leanstep.recipes.sweep.ledger import Ledger, LedgerError
from leanstep.recipes.sweep.page import write_pages
from leanstep.recipes.sweep.results import summarize, table
from leanstep.recipes.sweep.runner import describe, is_finished, outcome, run_environment

GRID = ("optimizer.lr=1e-3,2e-3,4e-3", "seed=0,1,2")


@pytest.fixture
def plan(tmp_path):
    def make(*words, recipe=None, out=None):
        source = recipe or write_recipe(tmp_path)
        return make_plan(str(source), words or GRID, out or tmp_path / "sweep")

    return make


def test_a_folder_in_the_home_is_found_by_the_sweep_and_by_its_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    out = parser().parse_args([str(write_recipe(tmp_path)), "--out=~/sweep"]).out
    made = make_plan(str(tmp_path / "tiny.yaml"), ["seed=0,1"], out)
    (tmp_path / "run.yaml").write_text(made.runs[0].recipe)
    assert made.folder == tmp_path / "sweep"
    assert load(str(tmp_path / "run.yaml")).out == str(tmp_path / "sweep" / "runs" / made.runs[0].name)


def ends(plan, losses):
    """End entries by the values of (lr, seed): a loss, "diverged", "failed", or None for a run that did not start."""
    entries = {}
    for run, loss in zip(plan.runs, losses, strict=True):
        if loss is not None:
            facts = {"status": loss} if isinstance(loss, str) else {"status": "done", "val_loss": loss}
            entries[run.name] = {"kind": "end", "run": run.name, **facts}
    return entries


# -- the grid -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-3", ["1e-3"]),
        ("1e-3,2e-3, 4e-3", ["1e-3", "2e-3", "4e-3"]),
        ("[0.9,0.95],[0.9,0.99]", ["[0.9,0.95]", "[0.9,0.99]"]),
        ("{a: [1,2], b: 3},null", ["{a: [1,2], b: 3}", "null"]),
        ("'a,b',\"c,]\"", ["'a,b'", '"c,]"']),
    ],
)
def test_commas_of_a_value_do_not_separate_values(text, values):
    assert split_values(text) == values


def test_a_plan_has_every_combination_and_the_last_key_varies_fastest(plan, tmp_path):
    made = plan("steps=12", *GRID)
    assert [run.values for run in made.runs[:4]] == [
        {"optimizer.lr": "1e-3", "seed": "0"},
        {"optimizer.lr": "1e-3", "seed": "1"},
        {"optimizer.lr": "1e-3", "seed": "2"},
        {"optimizer.lr": "2e-3", "seed": "0"},
    ]
    assert (len(made.runs), made.fixed) == (9, ("steps=12",))
    file = tmp_path / "last.yaml"
    file.write_text(made.runs[-1].recipe)
    config = load(file)
    assert (config.optimizer.lr, config.seed, config.steps) == (4e-3, 2, 12)
    assert config.name == "9-lr=4e-3,seed=2"
    assert config.out == str(tmp_path / "sweep" / "runs" / config.name)


def test_a_sweep_without_validation_is_refused(plan):
    with pytest.raises(ConfigError) as caught:
        plan("data.val_tokens=0", *GRID)
    (problem,) = caught.value.problems
    assert "no validation loss, by which a sweep compares settings" in problem


def test_a_swept_value_reaches_the_keys_that_refer_to_it(plan, tmp_path):
    recipe = write_recipe(tmp_path)
    recipe.write_text(recipe.read_text() + "seed: ${steps}\n")
    seeds = []
    for number, run in enumerate(plan("steps=12,16", recipe=recipe).runs):
        file = tmp_path / f"{number}.yaml"
        file.write_text(run.recipe)
        seeds.append(load(file).seed)
    assert seeds == [12, 16]


def test_problems_of_all_runs_are_told_at_once(plan):
    with pytest.raises(ConfigError) as caught:
        plan("optimizer.lr=1e-3,-1", "batch.micro_batch_size=4,3")
    text = str(caught.value)
    assert "optimizer.lr must be at least 0, got -1" in text and "micro_batch_size" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["steps=3"], "nothing to sweep: give a key several values"),
        (["seed=0,1,0"], "seed: 0 is 0 again"),
        (["optimizer.lr=1e-3,0.001"], "optimizer.lr: 0.001 is 1e-3 again"),
        (["seed=0,,1"], "seed: an empty value in '0,,1'"),
        (["seed=0,1", "seed=2,3"], "seed is given twice"),
        (["seed=0,1", "out=x"], "out: a sweep sets it for each run; write --out DIR"),
        (["seed=0,1", "checkpoint.resume=never"], "checkpoint.resume: a sweep sets it"),
        (["seed"], "expected key.path=value or key.path=value,value, got 'seed'"),
        (["seed=" + ",".join(map(str, range(200))), "steps=" + ",".join(map(str, range(1, 200)))], "39,800 runs"),
    ],
)
def test_mistakes_in_the_words(plan, words, message):
    with pytest.raises(ConfigError) as caught:
        plan(*words)
    assert message in str(caught.value)


def test_a_dry_run_lists_the_runs_and_writes_nothing(tmp_path, monkeypatch, capsys):
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["sweep", "tiny.yaml", "seed=0,1", "--dry-run", "optimizer.lr=1e-3,2e-3"]) == 0
    out = capsys.readouterr().out
    assert "runs/tiny-sweep/runs/1-seed=0,lr=1e-3: seed=0 optimizer.lr=1e-3" in out and "4 runs of tiny" in out
    assert sorted(tmp_path.iterdir()) == before
    assert main(["sweep", "tiny.yaml", "stepz=0,1"]) == 2
    assert "unknown key 'stepz'; did you mean 'steps'?" in capsys.readouterr().err
    assert main(["sweep", "tiny.yaml", "seed=0,1", "--job"]) == 2
    assert "unknown option --job;" in capsys.readouterr().err
    options = parser().parse_args(["tiny.yaml", "seed=0,1", "--jobs", "3", "--out", "x"])
    assert (options.jobs, str(options.out)) == (3, "x")


def test_texts_that_train_takes_need_no_quotes():
    assert read_words(["data.path=*.txt,*.md"])[1] == {"data.path": ["*.txt", "*.md"]}
    assert read_words(["data.path=a #1.txt,b.txt"])[1] == {"data.path": ["a #1.txt", "b.txt"]}


# -- the ledger -----------------------------------------------------------------------------------------------------


def test_a_ledger_is_read_again(plan):
    made = plan()
    ledger = Ledger(made)
    ledger.start(made.runs[0])
    ledger.end(made.runs[0], {"status": "done", "val_loss": 3.5})
    ledger.start(made.runs[1])
    ledger.close()
    again = Ledger(plan())
    assert list(again.ends) == [made.runs[0].name] and again.ends[made.runs[0].name]["val_loss"] == 3.5
    assert again.attempts == {made.runs[0].name: 1, made.runs[1].name: 1}
    again.close()


def test_a_line_that_a_crash_cut_is_removed(plan):
    made = plan()
    ledger = Ledger(made)
    ledger.end(made.runs[0], {"status": "done", "val_loss": 3.5})
    ledger.close()
    whole = ledger.path.read_bytes()
    for cut in (1, 10, len(whole) - whole.rindex(b"\n", 0, -1) - 2):
        ledger.path.write_bytes(whole[:-cut])
        again = Ledger(made)
        assert again.ends == {}
        again.end(made.runs[0], {"status": "done", "val_loss": 3.5})
        again.close()
        assert ledger.path.read_bytes() == whole


@pytest.mark.parametrize(
    "line",
    [
        *("no json", "[1]", '{"kind": "sweep"}', '{"kind": "end", "run": "1", "status": "won"}'),
        *('{"kind": "end", "run": "1", "status": "done", "val_loss": "low"}', '{"kind": "start", "run": 1}'),
    ],
)
def test_a_damaged_line_is_refused_and_nothing_is_changed(plan, line):
    made = plan()
    ledger = Ledger(made)
    ledger.end(made.runs[0], {"status": "done", "val_loss": 3.5})
    ledger.close()
    header, end = ledger.path.read_text().splitlines()
    text = f"{header}\n{line}\n{end}\n"
    ledger.path.write_text(text)
    with pytest.raises(LedgerError, match=r"ledger.jsonl:2 is no line of a sweep's ledger"):
        Ledger(made)
    assert ledger.path.read_text() == text


def test_another_grid_is_refused(plan):
    Ledger(plan()).close()
    for words in (("optimizer.lr=1e-3,2e-3", "seed=0,1,2"), (GRID[1], GRID[0])):
        with pytest.raises(LedgerError, match=r"another grid: was optimizer.lr=1e-3,2e-3,4e-3 seed=0,1,2, is .* now"):
            Ledger(plan(*words))


def test_another_recipe_is_refused_and_the_key_is_named(plan, tmp_path):
    Ledger(plan()).close()
    with pytest.raises(LedgerError, match="another recipe: steps was 24, is 12 now; choose another --out"):
        Ledger(plan("steps=12", *GRID))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("weight_decay: 0.1", "weight_decay: 0.2"))
    with pytest.raises(LedgerError, match=r"optimizer.weight_decay was 0.1, is 0.2 now"):
        Ledger(plan(recipe=recipe))


def test_a_recipe_file_of_a_run_that_was_changed_is_refused(plan):
    made = plan()
    ledger = Ledger(made)
    ledger.close()
    file = ledger.recipe_file(made.runs[3])
    file.write_text(file.read_text().replace("steps: 24", "steps: 25"))
    with pytest.raises(LedgerError, match=r"4-lr=2e-3,seed=0.yaml is missing or was changed"):
        Ledger(made)
    file.unlink()
    with pytest.raises(LedgerError, match="is missing or was changed"):
        Ledger(made)


def test_a_start_that_was_killed_before_its_first_line_begins_again(plan):
    made = plan()
    ledger = Ledger(made)
    ledger.close()
    ledger.path.unlink()
    Ledger(made).close()
    assert ledger.path.read_text().count("\n") == 1


def test_folders_that_hold_something_else_are_refused(plan, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(LedgerError, match="is a file, expected a folder"):
        Ledger(plan(out=tmp_path / "file"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(LedgerError, match=r"holds something else than a sweep \(thesis.txt\)"):
        Ledger(plan(out=tmp_path / "other"))
    assert os.listdir(tmp_path / "other") == ["thesis.txt"]
    (tmp_path / "run").mkdir()
    for name in (".lock", "config.yaml", "log.jsonl"):  # of a training run
        (tmp_path / "run" / name).touch()
    with pytest.raises(LedgerError, match=r"holds something else than a sweep \(config.yaml\)"):
        Ledger(plan(out=tmp_path / "run"))


@pytest.mark.parametrize("name", ["runs", "logs", "runs/{run}", "logs/{run}.txt", "recipes/{run}.yaml", "sweep.json"])
def test_a_sweep_refuses_links_where_it_writes(name, plan, tmp_path):
    planned = plan(out=tmp_path / "linked")
    Ledger(planned).close()
    path = planned.folder / name.format(run=planned.runs[0].name)
    remove(path)
    path.symlink_to(tmp_path)
    with pytest.raises(LedgerError, match=f"{re.escape(path.name)} is a symbolic link"):
        Ledger(planned)


def test_two_sweeps_do_not_share_a_folder(plan):
    ledger = Ledger(plan())
    with pytest.raises(LedgerError, match="another process sweeps in"):
        Ledger(plan())
    ledger.close()
    Ledger(plan()).close()


def test_every_line_is_on_disk_before_the_next_action(plan, monkeypatch):
    made = plan()
    ledger = Ledger(made)
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append(ledger.path.read_text().count("\n")))
    ledger.start(made.runs[0])
    ledger.end(made.runs[0], {"status": "done"})
    ledger.close()
    assert flushed == [2, 3]


# -- how runs end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ({"status": "done", "val_loss": 3.5}, 0, "done"),
        ({"status": "done", "val_loss": None}, 0, "done"),
        ({"status": "done", "val_loss": math.nan}, 0, "diverged"),
        ({"status": "done", "val_loss": math.inf}, 0, "diverged"),
        ({"status": "done", "val_loss": "low", "step": [1]}, 0, "done"),
        ({"status": "done", "val_loss": 3.5}, 1, "failed"),
        ({"status": "failed:nan", "step": 3}, 3, "diverged"),
        ({"status": "failed:loss_above", "step": 3}, None, "diverged"),
        ({"status": "failed:out of memory"}, 4, "failed"),
        ({"status": "running", "val_loss": 4.0}, -9, "failed"),
        ({"status": "interrupted"}, 143, "stopped"),
        (None, 2, "failed"),
        (None, None, "failed"),
    ],
)
def test_how_a_run_ended(tmp_path, status, code, expected):
    if status is not None:
        (tmp_path / "status.json").write_text(json.dumps(status))
    facts = outcome(tmp_path, code)
    assert facts["status"] == expected
    assert is_finished(facts) == (expected in ("done", "diverged"))
    assert describe(facts)


def test_runs_at_once_share_the_processors_and_the_gpus(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    alone = run_environment(0, jobs=1, processes=1)
    assert "OMP_NUM_THREADS" not in alone and "CUDA_VISIBLE_DEVICES" not in alone
    assert run_environment(0, jobs=2, processes=2)["OMP_NUM_THREADS"] == "2"
    assert run_environment(0, jobs=16, processes=1)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    devices = [run_environment(slot, jobs=3, processes=1)["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert devices == ["3", "5", "3"]
    assert run_environment(1, jobs=3, processes=2)["CUDA_VISIBLE_DEVICES"] == "3,5"
    assert run_environment(0, jobs=2, processes=3)["CUDA_VISIBLE_DEVICES"] == "3, 5"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    devices = [run_environment(slot, jobs=3, processes=2)["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert devices == ["0,1", "2,3", "4,0"]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run_environment(0, jobs=2, processes=1)["OMP_NUM_THREADS"] == "7"


def test_a_run_that_a_killed_sweep_left_unrecorded_is_recorded_and_not_repeated(plan, monkeypatch):
    made = plan("seed=0,1")
    for run, status in zip(made.runs, ({"status": "done", "val_loss": 3.0}, {"status": "failed:nan"}), strict=True):
        folder = made.folder / "runs" / run.name
        folder.mkdir(parents=True)
        (folder / "status.json").write_text(json.dumps(status))
    (made.folder / ".lock").touch()
    monkeypatch.setattr(runner.subprocess, "Popen", lambda *a, **k: pytest.fail("a finished run was started"))
    ledger = Ledger(made)
    lines = []
    assert runner.Runner(made, ledger, jobs=2, processes=1, say=lines.append).go() == 0
    assert [entry["status"] for entry in ledger.ends.values()] == ["done", "diverged"]
    assert lines == ["[1/2] seed=0: validation loss 3.0000", "[2/2] seed=1: diverged: nan"]
    ledger.close()


def test_a_sweep_waits_for_the_process_of_a_killed_one(plan, monkeypatch):
    made = plan("seed=0,1")
    folder = made.folder / "runs" / made.runs[0].name
    folder.mkdir(parents=True)
    (made.folder / ".lock").touch()
    (made.folder / "runs" / made.runs[1].name).mkdir()
    (made.folder / "runs" / made.runs[1].name / "status.json").write_text('{"status": "done", "val_loss": 2.0}')
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)

    def sleep(seconds):
        """The process ends while the sweep waits, and has saved."""
        (folder / "status.json").write_text('{"status": "done", "val_loss": 3.0}')
        fcntl.flock(lock, fcntl.LOCK_UN)

    monkeypatch.setattr(runner.time, "sleep", sleep)
    ledger = Ledger(made)
    lines = []
    assert runner.Runner(made, ledger, jobs=2, processes=1, say=lines.append).go() == 0
    assert "waiting for its end" in lines[0]
    assert {name: entry["val_loss"] for name, entry in ledger.ends.items()} == {
        made.runs[0].name: 3.0,
        made.runs[1].name: 2.0,
    }
    ledger.close()
    os.close(lock)


# -- results and pages ----------------------------------------------------------------------------------------------


def test_mean_and_standard_error_of_each_setting(plan):
    made = plan()
    results = summarize(made, ends(made, [5.0, 5.2, 5.4, 3.0, 3.1, 3.2, 4.0, 4.1, 4.5]))
    assert [row.mean for row in results.rows] == pytest.approx([5.2, 3.1, 4.2])
    # the sample standard deviation of 5.0, 5.2, 5.4 is 0.2
    assert results.rows[0].standard_error == pytest.approx(0.2 / math.sqrt(3))
    assert results.best is results.rows[1] and results.edges == [] and results.level == []
    assert [line[0] for line in table(results)] == ["optimizer.lr", "2e-3", "4e-3", "1e-3"]


def test_the_best_on_an_edge_is_told(plan):
    made = plan()
    low, high = [2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 4.0, 4.0, 4.0], [4.0, 4.0, 4.0, 3.0, 3.0, 3.0, 2.0, 2.0, 2.0]
    assert summarize(made, ends(made, low)).edges == [
        "optimizer.lr=1e-3 is the smallest value of the grid: the best one may be smaller"
    ]
    assert "4e-3 is the largest value" in summarize(made, ends(made, high)).edges[0]
    named = plan("optimizer.name=adamw,lion")
    assert summarize(named, ends(named, [1.0, 2.0])).edges == []


def test_a_setting_of_which_a_run_diverged_is_not_best(plan):
    made = plan()
    results = summarize(made, ends(made, [5.0, 5.0, 5.0, 3.0, 3.0, 3.0, 1.0, "diverged", 1.0]))
    assert results.best is results.rows[1]
    assert (results.rows[2].mean, results.rows[2].diverged, results.rows[2].standard_error) == (None, 1, None)
    assert table(results)[-1] == ["4e-3", "-", "-", "3", "1 diverged"]
    # 4e-3 was tried, so 2e-3 is no edge
    assert results.edges == []


def test_runs_without_a_result_are_missing(plan):
    made = plan()
    results = summarize(made, ends(made, [5.0, 5.1, None, 6.0, 6.0, 6.0, "failed", 1.0, 1.0]))
    assert results.best is results.rows[1]
    assert [row.missing for row in results.rows] == [1, 0, 1]
    assert summarize(made, {}).best is None


def test_settings_that_noise_does_not_tell_apart_are_level(plan):
    made = plan()
    results = summarize(made, ends(made, [3.0, 3.2, 3.4, 3.1, 3.3, 3.5, 4.0, 4.1, 4.2]))
    assert results.best is results.rows[0] and results.level == [results.rows[1]]


def test_decays_of_the_average_are_judged_by_the_averaged_weights(plan):
    """Training does not depend on the decay, nor does the loss of the trained weights."""
    made = plan("ema.decay=0.9,0.99,0.999")
    done = {
        run.name: {"status": "done", "val_loss": 3.5, "ema_loss": loss}
        for run, loss in zip(made.runs, [3.49, 3.4, 3.9], strict=True)
    }
    results = summarize(made, done)
    assert [row.mean for row in results.rows] == [3.49, 3.4, 3.9]
    assert results.best is results.rows[1] and results.edges == []
    other = plan("optimizer.lr=1e-3,2e-3", "ema.decay=0.9")
    done = {run.name: {"status": "done", "val_loss": 3.5, "ema_loss": 3.0} for run in other.runs}
    results = summarize(other, done)
    assert [row.mean for row in results.rows] == [3.5, 3.5]
    assert results.level == [results.rows[1]] and results.edges == [], "equal losses have no best on an edge"


def test_tokenizers_are_compared_by_bits_per_byte(plan):
    """A small vocabulary has a lower loss per token, and more tokens."""
    made = plan("data.tokenizer=train:300,train:4096")
    entries = [{"val_loss": 4.0, "bits_per_byte": 3.0}, {"val_loss": 6.0, "bits_per_byte": 2.0}]
    done = {run.name: {"status": "done", **entry} for run, entry in zip(made.runs, entries, strict=True)}
    results = summarize(made, done)
    assert [row.mean for row in results.rows] == [3.0, 2.0] and results.best is results.rows[1]
    assert table(results)[0][1] == "mean bits per byte"
    made.folder.mkdir()
    assert "Best bits per byte" in write_pages(made, results, done).read_text()
    averaged = plan("data.tokenizer=train:300,train:4096", "ema.decay=0.9,0.99")
    done = {run.name: {"status": "done", "ema_loss": 3.0, **entries[0]} for run in averaged.runs}
    assert {row.mean for row in summarize(averaged, done).rows} == {2.25}
    # of a run that does not count them, as on a part of the validation text, no result is known
    done = {run.name: {"status": "done", "val_loss": 4.0} for run in made.runs}
    assert [row.missing for row in summarize(made, done).rows] == [1, 1]


def test_the_pages_of_a_sweep(plan):
    made = plan("optimizer.lr=1e-3,2e-3,4e-3", "optimizer.weight_decay=0,0.1", "seed=0,1")
    losses = [5.0, 5.2, 4.0, 4.2, 3.0, 3.1, 3.2, 3.4, "diverged", 4.0, "diverged", "diverged"]
    entries = ends(made, losses)
    made.folder.mkdir()
    page = write_pages(made, summarize(made, entries), entries)
    html = page.read_text()
    parsed = Page(html)
    assert "script" not in parsed.tags
    for text in (
        "Validation loss against optimizer.lr",
        "Validation loss against optimizer.weight_decay",
        "best: optimizer.lr=2e-3 optimizer.weight_decay=0, 3.0500",
        "optimizer.lr=4e-3: 3 diverged",
        "optimizer.weight_decay=0 is the smallest value of the grid",
        "2e-3",
    ):
        assert text in parsed.text, text
    assert html.count('class="c0 bar"') == 4, "a bar in each of two pictures, for wide pages and for phones"
    content = json.loads((made.folder / "sweep.json").read_text(), parse_constant=pytest.fail)
    assert content["best"] == {"optimizer.lr": "2e-3", "optimizer.weight_decay": "0"}
    assert content["settings"][2]["mean"] == pytest.approx(3.05) and content["settings"][4]["mean"] is None
    assert [run["status"] for run in content["runs"]].count("diverged") == 3


def test_pages_of_seeds_alone_and_of_a_sweep_that_has_not_begun(plan):
    made = plan("seed=0,1,2")
    made.folder.mkdir()
    entries = ends(made, [1.0, math.nan, None])
    entries[made.runs[1].name]["status"] = "diverged"
    for given in (entries, {}):
        Page(write_pages(made, summarize(made, given), given).read_text())
        json.loads((made.folder / "sweep.json").read_text(), parse_constant=pytest.fail)


def test_many_lines_become_one(plan):
    made = plan("optimizer.lr=1e-3,2e-3", "optimizer.weight_decay=" + ",".join(map(str, range(9))))
    entries = ends(made, [float(index) for index in range(18)])
    made.folder.mkdir()
    parsed = Page(write_pages(made, summarize(made, entries), entries).read_text())
    assert "best of the other settings" in parsed.text


def test_bars_and_ticks_of_a_chart():
    line = Series("mean", [0.0, 1.0, 2.0], [1.0, 2.0, None], dots=True, spread=[0.5, None, 0.1])
    figure = chart([line], title="A", x_label="x", x_ticks=[(0.0, "one"), (1.0, "two"), (2.0, "three")])
    assert figure.count("V") == 1, "the second point has no spread, the third no value"
    assert ">three</text>" in figure and "mean, two: 2" in figure
    heights = [float(text) for text in figure.split('bar" d="M')[1].split('"')[0].replace("V", " ").split()[1:]]
    plain = chart([Series("mean", [0.0, 1.0], [0.5, 2.0])], title="A", x_label="x")
    assert heights[0] > heights[1] and plain.count("bar") == 0


@pytest.mark.parametrize(("code", "name"), [(-9, "SIGKILL"), (-40, "signal 40")])
def test_a_run_that_a_signal_killed_says_which(tmp_path, code, name):
    assert runner._reason(code, tmp_path / "none.txt") == f"killed by {name}"


# -- learning rates -------------------------------------------------------------------------------------------------


@pytest.fixture
def rounds(tmp_path, monkeypatch):
    """``leanstep lr`` over runs that end at once: the loss is least at four times the first rate, half the other."""
    started = []

    def go(self):
        for run in self.plan.runs:
            if not is_finished(self.ledger.ends.get(run.name)):
                started.append(run)
                of_matrices, of_rest = (float(text) for text in run.values.values())
                loss = 5 + math.log2(of_matrices / 4e-3) ** 2 + math.log2(of_rest / 5e-4) ** 2
                facts = {"status": "done", "val_loss": loss} if of_matrices < 1e-2 else {"status": "diverged"}
                self.ledger.end(run, facts)
        return 0

    monkeypatch.setattr(runner.Runner, "go", go)
    recipe = str(write_recipe(tmp_path))

    def search(*words):
        started.clear()
        return main(["lr", recipe, "--out", str(tmp_path / "rates"), *words]), started

    return search


def test_learning_rates_are_found_by_rounds_of_sweeps(rounds, tmp_path, capsys):
    code, started = rounds("--steps", "6", "batch.tokens_per_step=512")
    assert code == 0 and len(started) == 12
    recipes = [load(str(path)) for path in sorted((tmp_path / "rates" / "runs").glob("round-*/recipes/*.yaml"))]
    assert {recipe.steps for recipe in recipes} == {6} and {recipe.checkpoint.every for recipe in recipes} == {0}
    said = capsys.readouterr().out
    *_, best = said.strip().splitlines()
    command = re.fullmatch(r"best, loss 5\.0000: (.*)", best)[1]
    words = shlex.split(command)
    assert words[:4] == ["leanstep", "train", str(tmp_path / "tiny.yaml"), "batch.tokens_per_step=512"]
    section = load(words[2], words[3:]).optimizer
    assert section.lr == 4e-3 and {entry["lr"] for entry in section.groups} == {5e-4}
    assert {entry["role"] for entry in section.groups} == {"embedding", "position", "norm", "bias"}
    page = (tmp_path / "rates" / "sweep.html").read_text()
    assert "lr of matrices" in page and 'href="runs/round-1' not in page  # these runs have no reports
    assert json.loads((tmp_path / "rates" / "sweep.json").read_text())["best"] == {
        "lr of matrices": "0.004", "lr of the rest": "0.0005",
    }  # fmt: skip
    assert rounds("--steps", "6", "batch.tokens_per_step=512") == (0, [])


def test_a_search_with_too_few_runs_says_so_and_goes_on_with_more(rounds, capsys):
    code, started = rounds("--runs", "6")
    assert code == 1 and len(started) <= 6 and "--runs" in capsys.readouterr().err
    already = len(started)
    code, started = rounds()
    assert code == 0 and len(started) == 12 - already


def test_rates_of_groups_keep_their_ratio(rounds, tmp_path):
    rounds("optimizer.groups=[{role: embedding, lr: 3e-3}, {match: ln_f, lr: 1e-5}]")
    for path in (tmp_path / "rates" / "runs").glob("round-*/recipes/*.yaml"):
        section = load(str(path)).optimizer
        of_roles = {entry.get("role"): entry["lr"] for entry in section.groups}
        assert of_roles["embedding"] == pytest.approx(3 * of_roles["bias"]) and of_roles[None] == 1e-5


@pytest.mark.parametrize(
    ("words", "message"), [(["optimizer.lr=1e-3,2e-3"], "optimizer.lr: give one value"), (["--stepz", "3"], "--steps")]
)
def test_what_leanstep_lr_refuses(rounds, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    code, started = rounds(*words)
    error = capsys.readouterr().err
    assert code == 2 and not started and message in error and error.count("\n") == 1


@pytest.mark.slow
def test_learning_rates_of_real_runs_leave_no_weights(tmp_path, capsys):
    code = main(["lr", str(write_recipe(tmp_path)), "--out", str(tmp_path / "rates"), "--steps", "2", "--runs", "1"])
    folder = next((tmp_path / "rates" / "runs" / "round-1" / "runs").iterdir())
    assert code == 1 and "best, loss" in capsys.readouterr().out
    assert (folder / "report.html").is_file() and not list(folder.rglob("*.safetensors"))
