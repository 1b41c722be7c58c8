"""A sweep of real runs, killed by SIGKILL: what is finished is not repeated, and what is not continues."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from training import read_log, write_recipe

from leanstep.cli import main
from leanstep.recipes.training.folder import is_held

STEPS = 60


def start(folder, *words):
    command = [sys.executable, "-P", "-m", "leanstep", "sweep", "tiny.yaml", "seed=0,1", f"steps={STEPS}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(condition, process, timeout=600):
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def entries(sweep):
    return [json.loads(line) for line in (sweep / "ledger.jsonl").read_text().splitlines()]


def starts(sweep):
    return [entry["run"] for entry in entries(sweep) if entry["kind"] == "start"]


@pytest.mark.slow
def test_a_killed_sweep_and_a_killed_run_continue(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path)
    # slow enough to be killed in the middle
    recipe.write_text(recipe.read_text().replace("checkpoint: {every: 3}", "checkpoint: {every: 1, keep_last: 1}"))
    sweep = tmp_path / "runs" / "tiny-sweep"
    first, second = sweep / "runs" / "1-seed=0", sweep / "runs" / "2-seed=1"

    def step_of(run):
        return max((entry["step"] for entry in read_log(run)), default=0)

    # the sweep is killed in its second run, which saves and ends
    process = start(tmp_path)
    wait_for(lambda: step_of(second) >= 3, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 120
    while is_held(second):
        assert time.monotonic() < deadline, "the run outlived its sweep"
        time.sleep(0.01)
    saved = step_of(second)
    assert 3 <= saved < STEPS
    assert json.loads((second / "status.json").read_text())["status"] == "interrupted"
    assert starts(sweep) == ["1-seed=0", "2-seed=1"]
    untouched = (first / "log.jsonl").stat().st_mtime_ns

    # the second run is killed
    process = start(tmp_path)
    wait_for(lambda: step_of(second) >= saved + 3, process)
    (child,) = psutil.Process(process.pid).children()
    child.kill()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "seed=1: failed at step" in output and "killed by SIGKILL" in output
    assert "1 of 2 runs have no result" in output and "The same command tries them again" in output
    assert entries(sweep)[-1]["status"] == "failed"

    # another grid is refused, and the same one finishes
    assert main(["sweep", "tiny.yaml", "seed=0,1", f"steps={STEPS}", "optimizer.lr=1e-3,2e-3"]) == 2
    assert "holds a sweep of another grid" in capsys.readouterr().err
    process = start(tmp_path)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert starts(sweep) == ["1-seed=0", "2-seed=1", "2-seed=1", "2-seed=1"]
    assert (first / "log.jsonl").stat().st_mtime_ns == untouched, "a finished run was repeated"
    steps = [entry["step"] for entry in read_log(second) if entry["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))
    content = json.loads((sweep / "sweep.json").read_text())
    assert [run["status"] for run in content["runs"]] == ["done", "done"]
    losses = [json.loads((run / "status.json").read_text())["val_loss"] for run in (first, second)]
    assert content["settings"][0]["losses"] == losses and content["settings"][0]["mean"] == sum(losses) / 2
