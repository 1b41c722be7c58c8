"""What goes wrong ends in a message, an exit code and a checkpoint, or does not end the run at all."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
from functools import partial

import faults
import pytest
import torch
from safetensors.torch import load_file
from training import Training, numbers, read_log, run, status, write_recipe

from leanstep._process import lacks_memory
from leanstep.recipes.check.costs import MemoryEstimate, check_room
from leanstep.recipes.config.differences import config_differences
from leanstep.recipes.config.rules import optimizer_arguments
from leanstep.recipes.config.schema import BatchConfig, CheckpointConfig, DistributedConfig, OptimizerConfig, RunConfig
from leanstep.recipes.config.values import check, recorded
from leanstep.recipes.training.checkpoint import find_checkpoints
from leanstep.recipes.training.failures import disk_trouble, lighter_state, memory_message
from leanstep.recipes.training.folder import FolderError, RunFolder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    training = run(recipe, ["steps=8", "checkpoint.every=2"], out)
    assert training.codes == [0], training.text()
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "world"), [(faults.nan_at_step_3, 1), (faults.infinite_gradient_at_step_3, 2)])
def test_a_non_finite_step_stops_before_the_update(recipe, tmp_path, fault, world):
    out = tmp_path / "run"
    options = ["steps=8", "checkpoint={every: 2}", f"batch.micro_batch_size={4 // world}"]
    failed = run(recipe, options, out, world=world, prepare=fault)
    assert failed.codes == [3] * world, failed.text()
    assert status(out)["status"] == "failed:nan" and status(out)["step"] == 2
    text = failed.text()
    assert "step 3: " in text and ("loss is nan" in text or "gradient norm is inf" in text)
    assert text.count("last good checkpoint") == 1, "one process speaks"
    for hint in ("step-000002", "optimizer.lr=0.0005", "schedule.warmup_fraction=0.1", "max_grad_norm=1.0"):
        assert hint in text
    report = json.loads((out / "nan_dump" / "report.json").read_text())
    assert report["step"] == 3 and report["sequences"] == [16, 23] and report["lr"]
    layers = report["layers"]
    assert "transformer.h.1.mlp.c_fc.weight" in layers and all(row["gradient"] is not None for row in layers.values())
    batch = load_file(out / "nan_dump" / "batch.safetensors")
    assert batch["input_ids.0"].shape == (4 // world, 32)
    assert [entry["step"] for entry in read_log(out)] == [1, 2], "the bad step is not logged as a step"


@pytest.mark.slow
def test_the_run_goes_on_from_the_last_good_checkpoint(recipe, whole, tmp_path):
    out = tmp_path / "run"
    assert run(recipe, ["steps=8", "checkpoint.every=2"], out, prepare=faults.nan_at_step_3).codes == [3]
    again = run(recipe, ["steps=8", "checkpoint.every=2"], out)
    assert again.codes == [0], again.text()
    assert numbers(out) == numbers(whole)


@pytest.mark.slow
def test_stop_nan_off_leaves_the_step_out_and_counts_it(recipe, tmp_path):
    out = tmp_path / "run"
    options = ["steps=6", "stop.nan=false", "checkpoint.every=0"]
    training = run(recipe, options, out, prepare=faults.infinite_gradient_at_step_3)
    assert training.codes == [0], training.text()
    entries = [entry for entry in read_log(out) if entry["kind"] == "train"]
    assert [entry["nonfinite"] for entry in entries] == [0, 0, 1, 1, 1, 1]
    assert all(map(torch.isfinite, map(torch.tensor, [entry["loss"] for entry in entries])))


def test_a_loss_above_the_limit_stops(recipe, tmp_path):
    failed = run(recipe, ["stop.loss_above=5.0"], tmp_path / "run")
    assert failed.codes == [3] and "is above stop.loss_above 5" in failed.text()
    assert status(tmp_path / "run")["status"] == "failed:loss_above"


def test_max_hours_saves_and_stops(recipe, tmp_path):
    stopped = run(recipe, ["stop.max_hours=1e-9", "steps=4"], tmp_path / "run")
    assert stopped.codes == [143], stopped.text()
    assert "stop.max_hours" in stopped.text() and status(tmp_path / "run")["status"] == "interrupted"
    assert [path.name for path in find_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000001"]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_out_of_memory_names_what_to_change(recipe, tmp_path, world):
    out = tmp_path / "run"
    prepare = partial(faults.in_process, world - 1, faults.out_of_memory_at_step_3)
    failed = run(recipe, ["checkpoint.every=2"], out, world=world, prepare=prepare)
    assert failed.codes == ([4] if world == 1 else [1, 4]), failed.text()
    assert status(out)["status"] == "failed:out of memory", "also where another process then lost this one"
    text = failed.text()
    assert text.count("out of memory (") == 1 and ("process 1: step 3: " in text) == (world == 2)
    hints = ["batch.micro_batch_size=2", "activation_checkpointing=true", "precision=bf16", "optimizer.name=lion"]
    places = [text.index(hint) for hint in hints]
    assert places == sorted(places), "the cheapest first"
    assert all(line[37] == " " != line[38] for line in text[places[0] - 4 :].splitlines()[:4]), "in columns"
    assert "step-000002" in text and "GiB" in text
    # the table of `leanstep check`, between what happened and what to do
    names = ("out of memory (", "weights  ", "optimizer state ", "activations ", "peak, with")
    rows = [text.index(name) for name in names]
    assert rows == sorted(rows) and rows[-1] < places[0]
    if world == 2:
        return
    # and the first of them continues the run
    again = run(recipe, ["checkpoint.every=2", "batch.micro_batch_size=2", "steps=24"], out)
    assert again.codes == [0], again.text()


def test_a_lack_of_memory_before_training_is_a_message(recipe, tmp_path):
    failed = run(recipe, [], tmp_path / "run", prepare=faults.out_of_memory_while_reading)
    assert failed.codes == [4], failed.text()
    assert "before the first step: out of memory (" in failed.text() and "Traceback" not in failed.text()


def test_ctrl_c_after_the_final_model_cuts_the_samples_alone(recipe, tmp_path):
    out = tmp_path / "run"
    training = run(recipe, [], out, prepare=faults.interrupted_in_its_samples)
    assert training.codes == [0], training.text()
    told = training.text()
    assert told.index("model and tokenizer: ") < told.index("interrupted: the other samples are left out, the model is")
    assert told.index("interrupted: ") < told.index("report: ") and (out / "report.html").is_file()
    assert status(out)["status"] == "done"


def test_memory_hints_leave_out_what_is_already_done():
    from pathlib import Path

    small = RunConfig(
        batch=BatchConfig(micro_batch_size=1),
        activation_checkpointing=True,
        precision="bf16-pure",
        optimizer=OptimizerConfig(name="sinkgd"),
    )
    text = memory_message(small, Path("nowhere"), 1)
    assert "micro_batch_size" not in text and "activation_checkpointing" not in text and "precision" not in text


@pytest.mark.parametrize(
    ("name", "args", "hints"),
    [
        ("adamw", {}, ["optimizer.name=lion or sinkgd"]),
        ("sinkgd", {}, []),
        ("lanton", {}, ["optimizer.args.noise_dtype=bfloat16"]),
        ("lanton", {"noise_adaptive": False}, []),
        (
            "mfac",
            {"window": 64},
            ["optimizer.args.storage=bf16", "optimizer.args.compression=topk", "optimizer.args.window=32"],
        ),
        ("mfac", {"compression": "topk", "window": 1}, []),
    ],
)
def test_every_optimizer_has_its_own_way_to_keep_less(name, args, hints):
    config = RunConfig(optimizer=OptimizerConfig(name=name, args=args))
    assert [setting for setting, _ in lighter_state(config)] == hints
    for hint in hints[1:]:
        key, _, value = hint.partition("=")
        setting = {key.rpartition(".")[2]: int(value) if value.isdigit() else value}
        assert check(optimizer_arguments(name), setting)[1] == []


def test_which_errors_are_out_of_memory():
    assert lacks_memory(torch.OutOfMemoryError("CUDA out of memory")) and lacks_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert lacks_memory(caught.value)
    assert lacks_memory(ImportError("libtorch_cpu.so: failed to map segment from shared object"))
    assert lacks_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert lacks_memory(RuntimeError("can't start new thread")), "which needs room for a stack"
    with pytest.raises(ValueError, match="could not open") as caught:
        try:
            raise MemoryError
        except MemoryError:
            raise ValueError("transformers could not open the model") from None
    assert lacks_memory(caught.value)
    assert not lacks_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_full_disk_costs_a_checkpoint_not_the_run(recipe, whole, tmp_path):
    out = tmp_path / "run"
    fault = faults.disk_fills_up_at_the_second_checkpoint
    training = run(recipe, ["steps=8", "checkpoint={every: 2, keep_last: 3}"], out, prepare=fault)
    assert training.codes == [0], training.text()
    text = training.text()
    assert "WARNING: checkpoint at step 4 failed: disk full" in text
    assert "newest complete checkpoint: step-000002" in text
    lines = {line.split()[1]: line for line in text.splitlines() if line.startswith("step ") and "gnorm" in line}
    assert "[checkpoint at step 4 failed" in lines["5/8"] and "[checkpoint at step 4 failed" in lines["6/8"]
    assert "failed" not in lines["4/8"] and "failed" not in lines["7/8"], "until the next one succeeds"
    names = [path.name for path in find_checkpoints(out / "checkpoints")]
    assert names == ["step-000002", "step-000006", "step-000008"]
    assert not list((out / "checkpoints").glob(".*"))
    assert numbers(out) == numbers(whole)


@pytest.mark.slow
def test_a_folder_that_vanishes_and_comes_back(recipe, whole, tmp_path):
    out, away = tmp_path / "run", tmp_path / "away"
    options = ["steps=8", "checkpoint.every=2", "log.trackers=[tensorboard]"]
    training = Training(recipe, options, out, prepare=partial(faults.held_at, 5))
    training.wait_for(lambda seen: seen.last_step() >= 4)
    training.wait_for(lambda seen: len(find_checkpoints(out / "checkpoints")) == 2)
    out.rename(away)
    assert training.wait() == [1], training.text()
    text = training.text()
    assert text.count("No such file or directory") >= 3 and "Traceback" not in text
    assert "checkpoint at step 6 failed: cannot write" in text and f"{out}/final could not be written" in text
    assert text.count("WARNING: tracker tensorboard: ") == 1
    assert not out.exists(), "nothing makes it anew"
    away.rename(out)
    again = run(recipe, options, out)
    assert again.codes == [0], again.text()
    assert "step-000004, step 4 of 8" in again.text() and numbers(out) == numbers(whole)


def test_a_disk_without_room_for_one_checkpoint_is_refused_before_the_start(recipe, tmp_path):
    out = tmp_path / "run"
    refused = run(recipe, ["steps=8"], out, prepare=partial(faults.disk_of, 1000))
    assert refused.codes == [2], refused.text()
    assert "one checkpoint needs" in refused.text() and "out=ANOTHER_FOLDER" in refused.text()
    assert not out.exists()
    out.mkdir()
    (out / "train.log").write_text("of another program\n")
    assert run(recipe, ["steps=8"], out, prepare=partial(faults.disk_of, 1000)).codes == [2]
    assert (out / "train.log").read_text().startswith("of another program\n"), "only a folder made here is removed"


def test_a_disk_too_small_for_all_checkpoints_is_said_before_the_start(recipe, tmp_path):
    out = tmp_path / "run"
    training = run(
        recipe, ["steps=2", "checkpoint={every: 0, keep_last: 3}"], out, prepare=partial(faults.disk_of, 10**6)
    )
    assert training.codes == [0], training.text()
    warning, first_step = training.text().index("WARNING: the run needs"), training.text().index("step 1/2")
    assert warning < first_step and "checkpoint.keep_last" in training.text()


def test_room_counts_what_the_run_will_replace(tmp_path, monkeypatch):
    memory = MemoryEstimate(weights=100, gradients=0, optimizer_state=200, activations=0, logits=0)
    folder, config = RunFolder(tmp_path), RunConfig(checkpoint=CheckpointConfig(keep_last=2))
    # two checkpoints kept and one being written, 300 bytes each, and the final model: 1000 bytes
    monkeypatch.setattr("leanstep.recipes.check.costs.free_bytes", lambda path: 600)
    assert "needs 1.0 KiB" in check_room(config, folder, memory)
    for name, size in (("checkpoints/step-000001/COMPLETE", 300), ("final/model.safetensors", 100)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x" * size)
    assert check_room(config, folder, memory) is None
    sharded = dataclasses.replace(config, distributed=DistributedConfig(strategy="fsdp2"))
    assert "needs 2.0 KiB" in check_room(sharded, folder, memory, world_size=2)
    monkeypatch.setattr("leanstep.recipes.check.costs.free_bytes", lambda path: 299)
    with pytest.raises(FolderError, match="one checkpoint needs 0.3 KiB.*out=ANOTHER_FOLDER"):
        check_room(config, folder, memory)
    assert check_room(config, folder, None) is None


def test_a_checkpoint_without_links_is_a_checkpoint(recipe, tmp_path):
    out = tmp_path / "run"
    training = run(recipe, ["steps=4", "checkpoint.every=2"], out, prepare=faults.refuse_links_and_removal)
    assert training.codes == [0], training.text()
    text = training.text()
    assert "failed" not in text and "step 2/4  checkpoint saved" in text and "step 4/4  checkpoint saved" in text
    assert text.count("WARNING: the link") == 2 and text.count("WARNING: older checkpoints could not be removed") == 2
    assert [path.name for path in find_checkpoints(out / "checkpoints")] == ["step-000002", "step-000004"]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("key", ["out", "data.cache_dir"])
def test_a_folder_that_cannot_be_written_is_a_message(recipe, tmp_path, key, world):
    (tmp_path / "file").write_text("no folder")
    place = tmp_path / "file" / "sub"
    options = [f"{key}={place}", f"batch.micro_batch_size={4 // world}"]
    failed = run(recipe, options, tmp_path / "run", world=world)
    assert failed.codes == [2] * world, failed.text()
    text = failed.text()
    assert "Traceback" not in text and str(place) in text and key in text
    assert text.count("error: ") == 1, "one process speaks"


@pytest.mark.slow
def test_an_error_of_one_process_alone_is_told_by_that_process(recipe, tmp_path):
    options, prepare = ["batch.micro_batch_size=2"], partial(faults.in_process, 1, faults.refuse_the_data)
    failed = run(recipe, options, tmp_path / "run", world=2, prepare=prepare)
    assert failed.codes == [1, 2], failed.text()
    told = [line for line in failed.text().splitlines() if line.startswith("error: ")]
    assert sorted(told)[1] == "error: process 1: data.path: 'text.txt' does not exist", failed.text()
    assert len(told) == 2 and "another process ended" in sorted(told)[0]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 640 KiB, mounted for real; where mounting is not allowed, what needs it is skipped."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_small_disk_for_real(recipe, small_disk):
    # one checkpoint of this model is about 0.5 MB: neither a second one nor the final model fits beside it
    out = small_disk / "run"
    training = run(recipe, ["steps=8", "checkpoint={every: 2, keep_last: 3}"], out)
    text = training.text()
    assert training.codes == [1], text
    assert "failed: disk full" in text and "KiB free" in text and "Make room and start the same command" in text
    assert status(out)["status"] == "failed:disk" and status(out)["step"] == 8
    assert [path.name for path in find_checkpoints(out / "checkpoints")] == ["step-000002"]
    assert [entry["step"] for entry in read_log(out) if entry["kind"] == "train"] == list(range(1, 9))
    # with room, the same command goes on from the checkpoint that was kept
    shutil.move(out, small_disk.parent / "run")
    again = run(recipe, ["steps=8", "checkpoint.every=2"], small_disk.parent / "run")
    assert again.codes == [0] and "step-000002, step 2 of 8" in again.text()


def test_which_errors_are_the_disk(tmp_path):
    enough = 0
    assert "disk full" in disk_trouble(OSError(28, "No space left on device"), tmp_path, enough)
    # the disk itself has room
    assert "quota is used up" in disk_trouble(OSError(122, "Disk quota exceeded"), tmp_path, enough)
    assert disk_trouble(OSError(5, "Input/output error", "quota/run"), tmp_path, enough).startswith("cannot write")
    # what safetensors says
    assert "disk full" in disk_trouble(Exception("I/O error: No space left on device (os error 28)"), tmp_path, enough)
    # torch.save's message does not say so; the free space does
    unsaid = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 576 vs 534")
    assert "disk full" in disk_trouble(unsaid, tmp_path, needed=2**62)
    assert disk_trouble(unsaid, tmp_path, enough) is None
    assert "cannot write" in disk_trouble(PermissionError(13, "Permission denied"), tmp_path, enough)


CODES = [
    (signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGUSR1, 143), (signal.SIGUSR2, 143), (signal.SIGINT, 130),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_in_a_step_finishes_it_and_saves(recipe, whole, tmp_path, number, code):
    out = tmp_path / "run"
    options = ["steps=8", "checkpoint.every=0"]
    stopped = run(recipe, options, out, prepare=partial(faults.signal_in_step_4, number))
    assert stopped.codes == [code], stopped.text()
    assert status(out)["status"] == "interrupted" and status(out)["step"] == 4
    assert [path.name for path in find_checkpoints(out / "checkpoints")] == ["step-000004"]
    assert "the same command continues it" in stopped.text()
    again = run(recipe, options, out)
    assert again.codes == [0], again.text()
    assert numbers(out) == numbers(whole)


@pytest.mark.slow
def test_a_signal_in_the_evaluation_saves_and_evaluates_again(recipe, tmp_path):
    options = ["steps=8", "checkpoint.every=0", "eval.every=3", "batch.micro_batch_size=2"]
    straight = run(recipe, options, tmp_path / "straight")
    assert straight.codes == [0]
    out = tmp_path / "run"
    stopped = run(recipe, options, out, prepare=partial(faults.signal_in_evaluation, signal.SIGTERM))
    assert stopped.codes == [143], stopped.text()
    assert status(out)["step"] == 3 and not [entry for entry in read_log(out) if entry["kind"] == "eval"]
    again = run(recipe, options, out)
    assert again.codes == [0], again.text()
    assert numbers(out) == numbers(tmp_path / "straight")


def test_a_signal_in_the_last_evaluation_ends_no_run_without_it(recipe, tmp_path):
    options, out = ["steps=3", "checkpoint.every=0", "eval.every=0", "batch.micro_batch_size=2"], tmp_path / "run"
    assert run(recipe, options, tmp_path / "straight").codes == [0]
    stopped = run(recipe, options, out, prepare=partial(faults.signal_in_evaluation, signal.SIGTERM))
    assert stopped.codes == [143], stopped.text()
    assert status(out)["status"] == "interrupted" and status(out)["step"] == 3
    again = run(recipe, options, out)
    assert again.codes == [0], again.text()
    assert numbers(out) == numbers(tmp_path / "straight")
    assert status(out)["val_loss"] == status(tmp_path / "straight")["val_loss"] is not None


def test_a_model_that_continues_no_text_ends_its_run_all_the_same(recipe, tmp_path):
    training = run(recipe, ["steps=2", "checkpoint.every=0"], tmp_path / "run", prepare=faults.samples_fail)
    assert training.codes == [0], training.text()
    assert "WARNING: no samples of the final model: probability tensor contains either" in training.text()
    assert status(tmp_path / "run")["status"] == "done" and (tmp_path / "run" / "report.html").exists()


def test_a_signal_to_one_process_stops_both_at_the_same_step(recipe, tmp_path):
    options = ["steps=100000", "checkpoint.every=0", "eval.every=0", "batch.micro_batch_size=2"]
    training = Training(recipe, options, tmp_path / "run", world=2)
    training.wait_for(lambda seen: seen.last_step() >= 3)
    os.kill(training.processes[1].pid, signal.SIGTERM)
    assert training.wait() == [143, 143], training.text()
    saved = find_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in saved] == [f"step-{status(tmp_path / 'run')['step']:06d}"]
    assert sorted(path.name for path in saved[0].glob("trainer/random*")) == [
        "random_states_0.pkl",
        "random_states_1.pkl",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_ends_the_run_after_the_timeout(recipe, tmp_path, victim):
    options = ["steps=100000", "checkpoint.every=2", "eval.every=0", "batch.micro_batch_size=2"]
    training = Training(recipe, [*options, "distributed.timeout_minutes=0.05"], tmp_path / "run", world=2)
    training.wait_for(lambda seen: seen.last_step() >= 3)
    os.kill(training.processes[victim].pid, signal.SIGSTOP)
    # the processes stop waiting after 3 s; by default they would wait half an hour
    training.processes[1 - victim].join(60)
    training.kill(victim)
    assert training.processes[1 - victim].exitcode == 1, training.text()
    told = [line for line in training.text().splitlines() if "another process did not answer after step" in line]
    assert len(told) == 1 and "the same command continues the run" in told[0]
    assert "Traceback" not in training.text()
    assert status(tmp_path / "run")["status"] == "failed:another process did not answer"


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["start", "reached"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_killed_before_all_are_connected_ends_the_other(recipe, tmp_path, victim, moment):
    options = ["steps=8", "batch.micro_batch_size=2", "distributed.connect_minutes=0.03"]
    prepare = partial(faults.die_while_connecting, victim, moment)
    lost = run(recipe, options, tmp_path / "run", world=2, prepare=prepare)
    assert lost.codes[victim] == -signal.SIGKILL and lost.codes[1 - victim] == 1, lost.text()
    told = [line for line in lost.text().splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and told[0].startswith(f"error: process {1 - victim}: the processes did not connect (")
    assert "within distributed.connect_minutes (0.03)" in told[0] and "Traceback" not in lost.text()
    assert not (tmp_path / "run").exists()


def test_an_address_that_is_taken_is_one_line(recipe, tmp_path, monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        monkeypatch.setattr("training.free_port", lambda: other.getsockname()[1])
        lost = Training(recipe, ["batch.micro_batch_size=2"], tmp_path / "run", world=2)
        lost.processes[0].join(60)
        lost.kill(1)
    assert lost.wait() == [1, -signal.SIGKILL]
    told = [line for line in lost.text().splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "did not connect" in told[0] and "address already in use" in told[0], lost.text()
    assert "Traceback" not in lost.text()


def test_the_timeouts_may_differ_in_a_resumed_run():
    config = RunConfig(distributed=DistributedConfig(connect_minutes=2.0, timeout_minutes=1.0))
    assert config_differences(recorded(config), RunConfig()) == ([], [])


def test_a_second_interrupt_leaves_at_once(recipe, tmp_path):
    training = Training(recipe, ["steps=8", "checkpoint.every=0"], tmp_path / "run", prepare=faults.hang_in_step_4)
    training.wait_for(lambda seen: "hanging" in seen.text())
    os.kill(training.processes[0].pid, signal.SIGINT)
    training.wait_for(lambda seen: "noted" in seen.text())
    os.kill(training.processes[0].pid, signal.SIGINT)
    assert training.wait() == [130]
    assert "left at once" in training.text()
    assert status(tmp_path / "run")["status"] == "interrupted" and status(tmp_path / "run")["step"] == 3
    assert not find_checkpoints(tmp_path / "run" / "checkpoints")


def test_without_on_signal_the_process_ends_as_usual(recipe, tmp_path):
    options = ["steps=8", "checkpoint={every: 0, on_signal: false}"]
    stopped = run(recipe, options, tmp_path / "run", prepare=partial(faults.signal_in_step_4, signal.SIGTERM))
    assert stopped.codes == [-signal.SIGTERM]


def test_old_handlers_come_back():
    from leanstep._process import StopFlag

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    with StopFlag() as flag:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert flag.received == signal.SIGUSR1
        assert all(signal.getsignal(number) != handler for number, handler in before.items())
    assert {number: signal.getsignal(number) for number in before} == before
