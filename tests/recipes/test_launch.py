"""Every way to start a run gives the same run, and a start that would go wrong says so instead."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from training import numbers, read_log, run, status, write_recipe

from leanstep.cli import main
from leanstep.recipes import launch
from leanstep.recipes.training.build import asked_world_size, check_world

OPTIONS = ["steps=12", "batch.micro_batch_size=2", "checkpoint.every=0"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def expected(recipe, tmp_path_factory):
    """What two connected processes compute."""
    out = tmp_path_factory.mktemp("expected") / "run"
    assert run(recipe, OPTIONS, out, world=2).codes == [0, 0]
    return numbers(out)


def start(*command, cwd=None, **environment) -> subprocess.Popen:
    # without what another launcher may have left
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE", "LEANSTEP_NPROC"))}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=clean | environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_signal_to_the_launcher_then_torchrun_continues(recipe, tmp_path, expected):
    out = tmp_path / "run"
    options = [f"out={out}", *OPTIONS]
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    for name in ("accelerate", "torch", "leanstep", "yaml"):
        (unpacked / f"{name}.py").write_text("raise SystemExit('a module of the working folder was imported')")
    # -P: as the installed command starts
    first = start("-P", "-m", "leanstep", "train", recipe, *options, "--nproc", 2, cwd=unpacked)
    deadline = time.monotonic() + 90
    while not read_log(out) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    first.send_signal(signal.SIGUSR1)
    said = first.communicate(timeout=120)[0]
    assert first.returncode == 143, said
    # packages may say something while they are imported
    lines = [line for line in said.splitlines() if line.startswith("leanstep ")]
    assert "world size 2, backend gloo, device cpu" in lines[0] and "wrapping DDP" in lines[0]
    stopped = status(out)["step"]
    assert status(out)["status"] == "interrupted" and 1 <= stopped < 12

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    second = start(*torchrun, "-m", "leanstep.recipes.training.train", recipe, *options)
    said = second.communicate(timeout=120)[0]
    assert second.returncode == 0, said
    assert f"step {stopped} of 12" in said and said.count("world size 2") == 1
    assert numbers(out) == expected


@pytest.mark.slow
def test_accelerate_launch_connects_its_processes_on_a_cpu(recipe, tmp_path, expected):
    # by itself Accelerate starts two processes here that do not know of each other
    out = tmp_path / "run"
    command = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1]
    process = start(*command, "-m", "leanstep.recipes.training.train", recipe, f"out={out}", *OPTIONS)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert said.count("world size 2, backend gloo") == 1
    assert numbers(out) == expected


@pytest.mark.slow
def test_accelerate_launch_that_starts_too_few_is_stopped(recipe, tmp_path):
    out = tmp_path / "run"
    command = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2, "--num_machines", 1]
    process = start(*command, "-m", "leanstep.recipes.training.train", recipe, f"out={out}", *OPTIONS)
    said = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "asks for 2 processes, but Accelerate connected 1" in said and "leanstep train ... --nproc 2" in said
    assert not (out / "log.jsonl").exists()


def test_world_size_that_nobody_connected_is_stopped():
    check_world(2, {"WORLD_SIZE": 2, "--nproc": 2})
    for asked in ({"WORLD_SIZE": 2}, {"--nproc": 2}, {"WORLD_SIZE": 1, "accelerate launch --num_processes": 4}):
        with pytest.raises(ValueError, match=r"asks for [24] processes, but Accelerate connected 1"):
            check_world(1, asked)


@pytest.mark.parametrize(
    ("parent", "number"),
    [
        ("python3 /venv/bin/accelerate launch --cpu --num_processes 2 -m leanstep.recipes.training.train x.yaml", 2),
        ("python /venv/bin/accelerate launch --num_processes=8 train.py", 8),
        ("python -m accelerate.commands.launch --cpu --num-processes 3 train.py", 3),
        ("accelerate launch train.py", None),
        ("bash -c train --num_processes 4", None),
    ],
)
def test_reading_the_parents_command_line(parent, number):
    expected = {} if number is None else {"accelerate launch --num_processes": number}
    assert asked_world_size({}, parent) == expected


def test_asked_world_size_reads_the_environment():
    assert asked_world_size({"WORLD_SIZE": "4", "LEANSTEP_NPROC": "2"}, "") == {"WORLD_SIZE": 4, "--nproc": 2}


def dry_run(recipe, *words):
    """`leanstep train RECIPE WORDS --dry-run`; its exit code."""
    return main(["train", str(recipe), *words, "--dry-run"])


def test_dry_run_prints_the_plan_and_trains_nothing(recipe, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["steps=12", "optimizer.lr=5e-4", "--nproc", "2", "--resume", "never"]
    assert dry_run(recipe, f"out={out}", *options) == 0 and not out.exists()
    printed = capsys.readouterr().out
    assert "lr: 0.0005" in printed and "resume: never" in printed
    assert "8 sequences of 32 = 2 processes x 1 passes x 4 sequences" in printed
    tail = shlex.join([str(recipe), f"out={out}", "steps=12", "optimizer.lr=5e-4", "checkpoint.resume=never"])
    assert f"torchrun --standalone --nproc_per_node 2 -m leanstep.recipes.training.train {tail}" in printed
    assert f"accelerate launch --multi_gpu --num_processes 2 -m leanstep.recipes.training.train {tail}" in printed
    text = recipe.parent / "text.txt"
    assert f"# data.path: {text}, 1 file, {text.stat().st_size:,} bytes" in printed
    assert "all tokens of a sequence but its first: 31 of 32" in printed
    # the plan is a recipe: it can be saved and run
    plan = tmp_path / "plan.yaml"
    plan.write_text(printed)
    assert dry_run(plan) == 0


TEXTS = {
    "missing": (None, "text", "error: data.path: '{path}' does not exist"),
    "empty": (b"", "text", "error: data.path: {path} is empty"),
    "binary": (bytes(range(256)) * 10, "text", "error: '{path}' is not a text file"),
    "latin": (b"caf\xe9 " * 20_000, "text", "error: '{path}' is not UTF-8 text: byte 3 is 0xe9"),
    "no column": (b'{"body": "text"}\n', "json", "error: '{path}' has no column 'text', it has: body"),
    "a column of control characters": (
        b'{"a\\nb": "text"}\n',
        "json",
        "error: '{path}' has no column 'text', it has: a b",
    ),
    "no rows": (b"not json at all", "json", "error: could not read '{path}' as json"),
}


@pytest.mark.parametrize(("content", "source", "message"), TEXTS.values(), ids=TEXTS.keys())
def test_dry_run_looks_whether_the_text_is_there(recipe, tmp_path, capsys, content, source, message):
    path = tmp_path / "corpus.jsonl"
    if content is not None:
        path.write_bytes(content)
    code = dry_run(recipe, f"data.path={path}", f"data.source={source}")
    printed, error = capsys.readouterr()
    assert code == 2 and message.format(path=path) in error
    assert "# the same by hand:" in printed, "the plan is printed all the same"


def test_dry_run_reads_no_more_than_the_beginning(recipe, tmp_path, capsys, monkeypatch):
    # a character of two bytes lies across the end of what is read
    path = tmp_path / "long.txt"
    path.write_bytes(b"x" + "\u00e9".encode() * 200_000)
    monkeypatch.setattr(
        "leanstep.recipes.data.sources.Path.read_bytes", lambda path: pytest.fail("it reads the whole file")
    )
    assert dry_run(recipe, f"data.path={path}", f"data.val_path={path}") == 0
    printed = capsys.readouterr().out
    assert f"# data.path: {path}, 1 file, 400,001 bytes" in printed and f"# data.val_path: {path}" in printed
    assert dry_run("llama-60m") == 0
    assert "# data.name: allenai/c4 on the hub, not checked" in capsys.readouterr().out


def test_bad_recipes_and_numbers_are_exit_code_2(recipe, capsys):
    assert dry_run(recipe, "stepz=3") == 2
    assert "stepz" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        dry_run(recipe, "--nproc", "0")
    assert "--nproc" in capsys.readouterr().err
    # 256 tokens a step do not divide by 3 processes
    assert dry_run(recipe, "--nproc", "3") == 2
    assert re.search(r"tokens_per_step.*does not divide", capsys.readouterr().err, re.S)


def test_one_process_that_cannot_start_leaves_exit_code_2(recipe, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert launch._worst([-15, 3]) == 3 and launch._worst([-9, -15]) == 1 and launch._worst([2, 2]) == 2
    refused = run(recipe, OPTIONS, tmp_path / "out", world=2)
    assert refused.codes == [2, 2] and "is a file, expected a folder" in refused.text()
    assert refused.text().count("is a file") == 1


@pytest.mark.parametrize("world", ["1", "2"])
def test_a_process_ends_with_its_code_after_its_threads_and_its_last_words(world):
    program = (
        "import atexit, threading, time; from leanstep.recipes.launch import exit_worker; "
        "atexit.register(print, 'last words'); "
        "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start(); exit_worker(3)"
    )
    ended = start("-c", program, WORLD_SIZE=world)
    assert ended.communicate(timeout=120)[0].splitlines()[-2:] == ["thread", "last words"]
    assert ended.returncode == 3
