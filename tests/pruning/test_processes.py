"""``leanstep prune --nproc``: the folder that one process writes, also after one of several was killed."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from forked import finish_code, start_code
from pruned_models import make_llama, save_model
from texts import sentences

from leanstep import _processes
from leanstep.cli import main

SMALL = ["--samples", "12", "--batch-size", "4", "--curve-samples", "3", "--held-out", "2", "--seq-len", "24"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_model(make_llama(2), folder / "model", max_shard_size="12KB")
    (folder / "text.txt").write_text(sentences(60))
    return folder


def command(base, out, *more):
    data = ["--data", str(base / "text.txt"), "--sparsity", "0.6", "--curves", "measured", *SMALL]
    return [sys.executable, "-P", "-m", "leanstep", "prune", str(base / "model"), "--out", str(out), *data, *more]


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_process_ends_the_others_in_one_line_and_one_alone_goes_on(base, tmp_path, capfd):
    assert main(command(base, tmp_path / "one")[4:]) == 0
    out, points = tmp_path / "out", tmp_path / "out.curves.jsonl"
    process = subprocess.Popen(
        command(base, out, "--nproc", "2"),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + 300
        while not points.exists() or points.read_bytes().count(b"\n") < 20:
            assert process.poll() is None and time.monotonic() < until, process.communicate()
            time.sleep(0.05)
        os.kill(second_worker_of(process.pid), signal.SIGKILL)
        printed, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 1 and printed == ""
    # packages may say something while they are imported
    said = [line for line in errors.splitlines() if line.startswith(("error:", "Traceback"))]
    assert said == ["error: process 1 was ended by SIGKILL; the same command with --resume continues the run"]
    assert not out.exists() and points.exists()
    assert main(command(base, out, "--nproc", "2")[4:]) == 2
    assert "go on with it (--resume)" in capfd.readouterr().err.splitlines()[-1]
    assert main(command(base, out, "--resume")[4:]) == 0
    assert weights(out) == weights(tmp_path / "one")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "out"}


def second_worker_of(launcher):
    """Number of the worker of rank 1."""
    for path in sorted(os.listdir("/proc")):
        if not path.isdigit():
            continue
        try:
            with open(f"/proc/{path}/status") as status, open(f"/proc/{path}/environ", "rb") as environ:
                is_child = f"PPid:\t{launcher}\n" in status.read()
                if is_child and b"RANK=1" in environ.read().split(b"\0"):
                    return int(path)
        except OSError:
            continue
    raise AssertionError("there is no worker of rank 1")


MAIN = "import sys; from leanstep.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
def test_processes_of_another_number_than_those_that_run_are_refused(base, tmp_path, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    several = finish_code(MAIN, *command(base, tmp_path / "out")[4:])
    monkeypatch.undo()
    assert several.returncode == 2 and "expected the processes of one machine" in several.stdout
    with pytest.raises(SystemExit, match="2"):
        main(command(base, tmp_path / "out", "--nproc", "0")[4:])
    assert list(tmp_path.iterdir()) == []


FAILS_ALONE = """
import os, sys
os.environ["RANK"] = os.environ["LOCAL_RANK"] = sys.argv.pop(1)
from leanstep.cli import main
from leanstep.pruning.measure.measure import Measurement
measure, rank = Measurement.measure, os.environ["RANK"]
def fail_in_one(*given):
    if rank == "1":
        raise ValueError("expected a finite score")
    return measure(*given)
Measurement.measure = fail_in_one
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_an_error_of_the_second_process_alone_is_printed_once(base, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": probe.getsockname()[1], "WORLD_SIZE": 2}
    for name, value in (world | {"LOCAL_WORLD_SIZE": 2}).items():
        monkeypatch.setenv(name, str(value))
    (said := tmp_path / "said").touch()
    arguments = command(base, tmp_path / "out")[4:]
    workers = [start_code(FAILS_ALONE, rank, *arguments, output=str(said)) for rank in range(2)]
    for worker in workers:
        worker.join(120)
    assert all(worker.exitcode for worker in workers) and said.read_text().count("error: ") == 1
    assert "error: expected a finite score\n" in said.read_text()
    assert not (tmp_path / "out").exists()


def test_only_a_lost_connection_is_taken_for_a_process_that_ended():
    with pytest.raises(_processes.ProcessEndedError, match="cannot go on alone"), _processes._connected():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer")
    with pytest.raises(RuntimeError, match="out of memory") as raised, _processes._connected():
        raise RuntimeError("out of memory")
    assert type(raised.value) is RuntimeError
