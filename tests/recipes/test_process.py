"""Runs in real processes: closed streams, signals, and what happens when one of several processes ends."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
from pruned_models import make_llama
from sparse_folders import save_sparse
from training import Training, read_log, run, status, write_recipe

from leanstep._process import InterruptibleStart, collector_paused, ended_by_signals

ENDLESS = ["eval.every=0", "checkpoint.every=0", "log.every=1"]
SHORT = ["steps=3", "checkpoint.every=0", "eval.every=0"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def shell(line, cwd, **environment):
    """Run a line of bash that may use ``leanstep``; returns its result."""
    line = f'set -o pipefail\nleanstep() {{ {sys.executable} -m leanstep "$@"; }}\n{line}'
    environment = os.environ | {"TERM": "dumb"} | environment
    return subprocess.run(
        ["bash", "-c", line], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "streams", ["2> /dev/full | head -n 1", ">&- 2>&- <&-"], ids=["a broken pipe and a full disk", "closed streams"]
)
def test_output_that_cannot_be_written_ends_no_run(streams, recipe, tmp_path):
    ended = shell(f"leanstep train {recipe} out=run {' '.join(SHORT)} {streams}", tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert status(tmp_path / "run")["status"] == "done" and "Traceback" not in ended.stderr
    log = (tmp_path / "run" / "train.log").read_text()
    assert "step 3/3" in log and "report: " in log and (tmp_path / "run" / "report.html").is_file()
    assert log.startswith("leanstep ") and (tmp_path / "run" / ".lock").read_bytes() == b""


@pytest.mark.slow
def test_a_failed_run_whose_output_is_closed_fails(recipe, tmp_path):
    ended = shell(f"leanstep train {recipe} out=run {' '.join(SHORT)} optimizer.lr=1e30 2>&1 | head -n 1", tmp_path)
    assert ended.returncode == 3, ended.stderr
    assert status(tmp_path / "run")["status"] == "failed:nan"


def test_lost_output_of_other_commands(recipe, tmp_path):
    assert shell("leanstep recipes list | head -n 1", tmp_path).returncode == 0
    full = shell("leanstep recipes list > /dev/full", tmp_path)
    assert full.returncode == 1 and full.stderr == "the output could not be written: No space left on device\n"
    closed = shell(f"leanstep check {recipe} stepz=3 >&- 2>&-", tmp_path)
    assert closed.returncode == 2


@pytest.mark.slow
def test_characters_that_the_terminal_lacks_are_escaped(recipe, tmp_path):
    (tmp_path / "ünï.yaml").write_text(recipe.read_text())
    ended = shell("leanstep train ünï.yaml --dry-run 'description=\u00b1'", tmp_path, PYTHONIOENCODING="ascii")
    assert ended.returncode == 0 and "\\xb1" in ended.stdout, ended.stderr


def test_a_deleted_working_folder_is_told_in_a_line(tmp_path):
    (tmp_path / "gone").mkdir()
    ended = shell("cd gone && rmdir ../gone && leanstep recipes list", tmp_path)
    assert ended.returncode == 2 and ended.stderr.splitlines()[-1].startswith("the working folder cannot be used")
    assert "Traceback" not in ended.stderr


def test_nohup_is_obeyed(recipe, tmp_path):
    training = run(recipe, ["steps=5", "checkpoint.every=0"], tmp_path / "run", prepare=faults.hangup_under_nohup)
    assert training.codes == [0] and status(tmp_path / "run")["status"] == "done", training.text()


def test_an_interrupt_that_is_swallowed_counts():
    with pytest.raises(KeyboardInterrupt), InterruptibleStart():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except BaseException:
            pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_collector_pauses_and_is_afterwards_as_before():
    with pytest.raises(ImportError), collector_paused():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    with collector_paused():
        pass
    assert not gc.isenabled()
    gc.enable()


# `leanstep export` that stops in the middle of its files
EXPORT = """
import sys, time
from leanstep.cli import main
from leanstep.sparsity.inference import export
export.copy_other_files = lambda *_, **__: (print("writing", flush=True), time.sleep(600))
sys.exit(main(sys.argv[1:]))
"""


def test_a_terminated_export_leaves_nothing(tmp_path):
    folder = save_sparse(tmp_path / "dense", make_llama())
    command = [sys.executable, "-P", "-c", EXPORT, "export", str(folder), "--format", "sparse", "--out"]
    with subprocess.Popen([*command, str(tmp_path / "sparse")], stdout=subprocess.PIPE, text=True) as export:
        assert export.stdout.readline() == "writing\n"
        assert any(name.startswith(".sparse.writing-") for name in os.listdir(tmp_path))
        export.terminate()
    assert export.returncode == 143 and os.listdir(tmp_path) == ["dense"]


def test_signals_end_a_block_and_are_put_back(monkeypatch):
    with pytest.raises(SystemExit) as ended, ended_by_signals():
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(10)
    assert ended.value.code == 143
    assert {signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)} == {signal.SIG_DFL}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, "nohup"
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with ended_by_signals():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "a worker"


# what torchao and torch log when torchao is imported without a GPU
WARNINGS = """
import logging, sys
from leanstep.cli import main
main(["recipes", "list"])
import torch
torchao, pytree = logging.getLogger("torchao"), logging.getLogger("torch.utils._pytree")
torch.cuda.is_available = lambda: sys.argv[1] == "gpu"
torchao.warning("Failed to load /x/torchao/_C_mxfp8.so: Could not load this library: /x/torchao/_C_mxfp8.so")
torchao.warning("something else")
pytree.warning("%s is an Enum subclass and is now natively supported by torch.compile as an opaque", "<enum 'A'>")
pytree.warning("%s cannot be registered", "A")
"""


@pytest.mark.parametrize(("device", "shown"), [("cpu", False), ("gpu", True)])
@pytest.mark.sample(2)
def test_a_command_says_nothing_of_what_torchao_cannot_load_without_a_gpu(device, shown):
    command = [sys.executable, "-P", "-c", WARNINGS, device]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert ("Failed to load" in said) == shown and "Enum" not in said
    assert "something else" in said and "A cannot be registered" in said


def test_ctrl_c_while_starting_ends_the_run(recipe, tmp_path):
    training = run(recipe, SHORT, tmp_path / "run", prepare=faults.swallowed_interrupt_while_starting)
    assert training.codes == [130] and "Traceback" not in training.text()
    assert read_log(tmp_path / "run") == []


def processes_of(out):
    """Ids of the processes whose command line names ``out``; an ended one has none."""
    ids = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and str(out).encode() in Path(f"/proc/{entry}/cmdline").read_bytes():
                ids.append(int(entry))
        except OSError:
            continue
    return ids


def wait_until(condition, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition(), process


def launched(recipe, out):
    """Start two workers that train until they are stopped; their output is in ``out.console``."""
    command = [sys.executable, "-m", "leanstep", "train", str(recipe), f"out={out}", "steps=100000", "--nproc", "2"]
    with out.with_suffix(".console").open("w") as console:
        return subprocess.Popen([*command, *ENDLESS], stdout=console, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_workers_end_with_their_launcher(recipe, tmp_path):
    out = tmp_path / "run"
    launcher = launched(recipe, out)
    wait_until(lambda: read_log(out), launcher)
    assert len(processes_of(out)) == 3
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not processes_of(out), launcher)
    # each worker saved like after any SIGTERM
    assert status(out)["status"] == "interrupted" and (out / "last").is_symlink()


@pytest.mark.slow
def test_a_dead_process_ends_the_others(recipe, tmp_path):
    out = tmp_path / "run"
    launcher = launched(recipe, out)
    wait_until(lambda: read_log(out), launcher)
    workers = sorted(pid for pid in processes_of(out) if pid != launcher.pid)
    os.kill(workers[1], signal.SIGKILL)  # not the first, whose end would be waited for anyway
    launcher.wait(timeout=120)
    said = out.with_suffix(".console").read_text()
    assert launcher.returncode == 1 and "was ended by SIGKILL; the same command continues the run" in said
    assert "Traceback" not in said, said
    assert processes_of(out) == []


def test_ranks_that_lose_another_end_with_one_line(recipe, tmp_path):
    training = Training(recipe, ["steps=100000", "checkpoint.every=0", "eval.every=0"], tmp_path / "run", world=2)
    training.wait_for(lambda training: training.last_step() >= 2)
    training.kill(1)
    assert training.wait() == [1, -9]
    assert "another process ended" in training.text() and "Traceback" not in training.text()
    assert status(tmp_path / "run")["status"] == "failed:another process ended"
