"""A run that was killed and continued is the run that was never stopped, to the last bit."""

import errno
import json
import math
import os
import random
import re
import shutil
import sys
from functools import partial

import pytest
import torch
from faults import (
    die_before_the_checkpoints,
    die_before_the_marker,
    die_before_the_rename,
    die_while_linking,
    die_while_removing_a_checkpoint,
    explode_after_step_6,
    held_at,
    on_backend,
    refuse_to_load,
)
from safetensors.torch import load_file
from training import Training, numbers, read_log, run, status, write_recipe

from leanstep.recipes.config.schema import CheckpointConfig
from leanstep.recipes.training.checkpoint import MARKER, TrainState, checkpoint_name, find_checkpoints
from leanstep.recipes.training.folder import RunFolder
from leanstep.recipes.training.saver import Saver

# dropout in every place GPT-2 has it
MODEL = "n_embd: 32, n_layer: 2, n_head: 2, n_positions: 32, resid_pdrop: 0.1, attn_pdrop: 0.1, embd_pdrop: 0.1"
OPTIMIZERS = {
    "adamw": ["optimizer={name: adamw, lr: 1e-3, weight_decay: 0.1}"],
    "sinkgd-momentum": ["optimizer={name: sinkgd, lr: 1e-2, args: {momentum: 0.9}}"],
    "lion-bf16-stochastic": ["optimizer={name: lion, lr: 3e-4, args: {rounding: stochastic}}", "precision=bf16-pure"],
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def settings(optimizer: str, world: int) -> list[str]:
    # 8 sequences a step: accumulation 2 on either number of processes
    return [f"model.config={{{MODEL}}}", f"batch.micro_batch_size={4 // world}", *OPTIMIZERS[optimizer]]


def weights(out) -> dict[str, torch.Tensor]:
    return load_file(out / "final" / "model.safetensors")


# a rule of matrices with state on two processes
CASES = [(name, 2 if name == "sinkgd-momentum" else 1) for name in OPTIMIZERS]


def sequences(training: Training) -> int:
    """Training sequences in an epoch, as the run itself reports them."""
    return int(re.search(r"training +(\d+) sequences", training.text())[1])


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "world"), CASES)
def test_kill_9_at_a_random_step_changes_nothing(recipe, tmp_path, optimizer, world):
    options = settings(optimizer, world)
    # the definition makes the same updates as the C++ code, and starts without a compiler
    backend = partial(on_backend, "reference")
    whole = run(recipe, options, tmp_path / "whole", world=world, prepare=backend)
    assert whole.codes == [0] * world, whole.text()
    epoch = sequences(whole) / 8
    chance = random.SystemRandom()
    step, victim = chance.randrange(math.ceil(epoch) + 1, 17), chance.randrange(world)

    broken = Training(recipe, options, tmp_path / "broken", world=world, prepare=partial(held_at, 18, backend))
    broken.wait_for(lambda training: training.last_step() >= step)
    broken.kill(victim)
    codes = broken.wait()
    assert codes[victim] == -9 and 0 not in codes
    left = broken.last_step()
    assert epoch < left < 2 * epoch, "it was to be killed inside the second epoch"

    again = run(recipe, options, tmp_path / "broken", world=world, prepare=backend)
    assert again.codes == [0] * world, again.text()
    saved = int(again.text().rsplit("resuming from", 1)[1].split("step-")[1][:6])
    assert left - 6 <= saved <= left, "it was to continue from its newest checkpoint"
    found, expected = numbers(tmp_path / "broken"), numbers(tmp_path / "whole")
    assert found == expected, f"killed process {victim} at step {left}, continued from {saved}"
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "broken")[name]), name


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """A run of 12 steps that nothing disturbed: checkpoints at 9 and 12."""
    out = tmp_path_factory.mktemp("whole") / "run"
    training = run(recipe, ["steps=12"], out)
    assert training.codes == [0], training.text()
    return out


@pytest.fixture
def unfinished(whole, tmp_path):
    """The same run as it was just after step 9: its last checkpoint and what follows are gone."""
    out = tmp_path / "run"
    shutil.copytree(whole, out, symlinks=True)
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints" / "step-000012")
    (out / "status.json").write_text('{"status": "running", "step": 9}')
    return out


def test_the_run_folder_holds_what_it_should(whole):
    present = {path.name for path in whole.iterdir()} - {".lock", "report.html"}
    names = "config.yaml command.txt env.json status.json log.jsonl train.log checkpoints last final"
    assert present == set(names.split())
    assert [path.name for path in find_checkpoints(whole / "checkpoints")] == ["step-000009", "step-000012"]
    assert (whole / "last").resolve() == whole / "checkpoints" / "step-000012"
    assert {path.name for path in (whole / "last").iterdir()} == {"hf", "trainer", "COMPLETE"}
    facts = json.loads((whole / "env.json").read_text())
    assert facts["seed"] == 0 and facts["world_size"] == 1 and facts["versions"]["torch"]
    assert status(whole)["status"] == "done" and status(whole)["step"] == 12
    kinds = [entry["kind"] for entry in read_log(whole)]
    assert kinds.count("train") == 12 and kinds.count("eval") == 2 and kinds[-1] == "sample"


def test_a_finished_run_is_left_as_it_is(recipe, whole):
    before = numbers(whole)
    again = run(recipe, ["steps=12"], whole)
    assert again.codes == [0] and "this run is done" in again.text()
    assert numbers(whole) == before


def test_a_run_killed_before_its_report_writes_it(recipe, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out, symlinks=True)
    (out / "report.html").unlink()
    again = run(recipe, ["steps=12"], out)
    assert again.codes == [0] and "this run is done" in again.text()
    assert (out / "report.html").read_text().startswith("<!") and numbers(out) == numbers(whole)


def test_a_run_killed_before_it_wrote_final_only_writes_that(recipe, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out, symlinks=True)
    shutil.rmtree(out / "final")
    (out / "status.json").write_text('{"status": "running", "step": 12}')
    again = run(recipe, ["steps=12"], out)
    assert again.codes == [0], again.text()
    assert numbers(out) == numbers(whole) and status(out)["status"] == "done"
    assert status(out)["val_loss"] == status(whole)["val_loss"]


def test_another_recipe_is_refused_with_the_keys_that_differ(recipe, unfinished):
    before = numbers(unfinished)
    other = run(recipe, ["steps=12", "optimizer.lr=2e-3", "data.seq_len=16", "log.every=2"], unfinished)
    assert other.codes == [2]
    assert "error: 2 keys of the recipe changed since" in other.text()
    assert "optimizer.lr: was 0.001, is 0.002 now" in other.text()
    assert "data.seq_len: was 32, is 16 now" in other.text()
    assert "log.every" not in other.text(), "how often it logs is free to differ"
    assert "out=ANOTHER_FOLDER" in other.text()
    assert numbers(unfinished) == before and status(unfinished)["step"] == 9


def test_more_steps_alone_are_told_as_such(recipe, unfinished):
    refused = run(recipe, ["steps=24"], unfinished)
    assert refused.codes == [2]
    assert "error: 1 key of the recipe changed since" in refused.text() and "step-000009" in refused.text()
    assert "steps: was 12, is 24 now" in refused.text() and "another recipe" not in refused.text()
    assert f"model.init_from={unfinished}/checkpoints/step-000009/hf" in refused.text()


def test_what_only_rounds_differently_may_change(recipe, unfinished, whole):
    again = run(recipe, ["steps=12", "batch.micro_batch_size=2", "eval.every=3"], unfinished)
    assert again.codes == [0], again.text()
    assert "same maths but not the same rounding: batch.micro_batch_size" in again.text()
    assert [entry["step"] for entry in read_log(unfinished) if entry["kind"] == "eval"] == [6, 12]
    losses = [entry["loss"] for entry in read_log(unfinished) if entry["kind"] == "train"]
    expected = [entry["loss"] for entry in read_log(whole) if entry["kind"] == "train"]
    assert losses == pytest.approx(expected, rel=1e-5) and losses != expected


def test_another_number_of_processes_continues_and_says_so(recipe, unfinished, whole):
    again = run(recipe, ["steps=12"], unfinished, world=2)
    assert again.codes == [0, 0], again.text()
    assert "2 processes go on where 1 stopped" in again.text()
    losses = [entry["loss"] for entry in read_log(unfinished) if entry["kind"] == "train"]
    # no dropout here, so that only the order of additions differs
    expected = [entry["loss"] for entry in read_log(whole) if entry["kind"] == "train"]
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_more_steps_are_possible_when_the_rate_does_not_depend_on_them(recipe, tmp_path):
    schedule = "schedule={name: constant, warmup_steps: 2}"
    assert run(recipe, ["steps=6", schedule], tmp_path / "run").codes == [0]
    longer = run(recipe, ["steps=9", schedule], tmp_path / "run")
    assert longer.codes == [0], longer.text()
    straight = run(recipe, ["steps=9", schedule], tmp_path / "straight")
    assert straight.codes == [0]
    losses, expected = (
        [e["loss"] for e in read_log(tmp_path / name) if e["kind"] == "train"] for name in ("run", "straight")
    )
    assert losses == expected
    cosine = run(recipe, ["steps=12"], tmp_path / "run")
    assert cosine.codes == [2] and "schedule.name" in cosine.text()
    assert "steps: was 9, is 12 now (schedule.name cosine plans the rate over all steps)" in cosine.text()


def test_resume_never_names_the_two_ways_out(recipe, unfinished):
    refused = run(recipe, ["steps=12", "checkpoint.resume=never"], unfinished)
    assert refused.codes == [2]
    assert "already holds a run" in refused.text()
    assert "--resume" in refused.text() and "out=ANOTHER_FOLDER" in refused.text()


def test_a_folder_with_other_things_in_it_is_refused(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    refused = run(recipe, [], tmp_path / "run")
    assert refused.codes == [2] and "holds no run" in refused.text()
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"thesis.tex", ".lock"}


def test_a_cache_inside_the_run_folder_is_no_run(tmp_path, monkeypatch):
    monkeypatch.setenv("LEANSTEP_CACHE", str(tmp_path / "run" / "made" / "here"))
    for name in ("made/here", "cache"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / ".lock").touch()
    folder = RunFolder(tmp_path / "run")
    assert folder.is_empty(str(tmp_path / "run" / "cache")) and not folder.is_empty()
    (tmp_path / "run" / "thesis.tex").touch()
    assert not folder.is_empty(str(tmp_path / "run" / "cache"))


def test_a_second_process_in_the_same_folder_is_refused(recipe, tmp_path):
    first = Training(recipe, ["steps=100000"], tmp_path / "run")
    first.wait_for(lambda training: training.last_step() >= 1)
    second = run(recipe, ["steps=100000"], tmp_path / "run")
    assert second.codes == [2] and "another process is training" in second.text()
    if sys.platform == "linux":
        assert f"run (process {first.processes[0].pid}); wait for it" in second.text()
    first.kill()
    assert first.wait() == [-9]


def truncate(path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "file"), [(truncate, "hf/model.safetensors"), (flip, "trainer/optimizer.bin")], ids=("cut", "flipped")
)
def test_a_damaged_checkpoint_is_passed_over(recipe, whole, tmp_path, file, damage):
    out = tmp_path / "run"
    shutil.copytree(whole, out, symlinks=True)
    (out / "status.json").write_text('{"status": "running", "step": 12}')
    damage(out / "checkpoints" / "step-000012" / file)
    asked = run(recipe, ["steps=12", f"checkpoint.resume={out}/checkpoints/step-000012"], out)
    assert asked.codes == [2] and "damaged: " in asked.text() and file in asked.text()
    again = run(recipe, ["steps=12"], out)
    assert again.codes == [0], again.text()
    assert "WARNING" in again.text() and "damaged-step-000012" in again.text()
    assert "step-000009, step 9 of 12" in again.text()
    assert numbers(out) == numbers(whole)


def test_no_usable_checkpoint_is_an_error_not_a_new_beginning(recipe, unfinished):
    truncate(unfinished / "checkpoints" / "step-000009" / "hf" / "model.safetensors")
    refused = run(recipe, ["steps=12"], unfinished)
    assert refused.codes == [2], refused.text()
    assert "no checkpoint in the output folder can be used" in refused.text()


def test_a_path_takes_that_checkpoint_and_sets_later_ones_aside(recipe, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out, symlinks=True)
    (out / "status.json").write_text('{"status": "running", "step": 12}')
    again = run(recipe, ["steps=12", f"checkpoint.resume={out}/checkpoints/step-000009"], out)
    assert again.codes == [0], again.text()
    assert (out / "checkpoints" / "abandoned-step-000012").is_dir()
    assert numbers(out) == numbers(whole)
    # into a folder of its own, from a run folder: the newest there
    elsewhere = run(recipe, ["steps=12", f"checkpoint.resume={whole}"], tmp_path / "elsewhere")
    assert elsewhere.codes == [0] and "step 12 of 12" in elsewhere.text()
    missing = run(recipe, ["checkpoint.resume=/nowhere/step-000001"], tmp_path / "third")
    assert missing.codes == [2] and "/nowhere/step-000001 does not exist" in missing.text()


def test_a_run_that_began_at_a_path_elsewhere_continues_by_the_same_command(recipe, whole, tmp_path):
    out, origin = tmp_path / "run", whole / "checkpoints" / "step-000009"
    command = ["steps=12", "checkpoint.every=1", f"checkpoint.resume={origin}"]
    stopped = run(recipe, [*command, "stop.max_hours=1e-9"], out)
    assert stopped.codes == [143], stopped.text()
    assert "saved; the same command continues it" in stopped.text()
    again = run(recipe, command, out)
    assert again.codes == [0], again.text()
    assert f"resuming from {out}/checkpoints/step-000010" in again.text()
    assert (out / "final" / "model.safetensors").read_bytes() == (whole / "final" / "model.safetensors").read_bytes()
    another = run(recipe, ["steps=12", f"checkpoint.resume={whole}"], out)
    assert another.codes == [2] and "already holds a run other than that of" in another.text()


def test_what_continues_a_run_is_told_where_the_same_command_does_not(recipe, tmp_path):
    stopped = run(recipe, ["checkpoint.resume=never", "stop.max_hours=1e-9"], tmp_path / "run")
    assert "saved; the same command with --resume auto continues it" in stopped.text()


def test_another_text_or_tokenizer_is_refused(tmp_path):
    own, text, out = write_recipe(tmp_path), tmp_path / "text.txt", tmp_path / "run"
    stopped = run(own, ["steps=4", "stop.max_hours=1e-9"], out)
    assert stopped.codes == [143], stopped.text()
    before = text.read_text()
    text.write_text(before + " A sentence that was not there.")
    refused = run(own, ["steps=4"], out)
    assert refused.codes == [2], refused.text()
    assert "text changed since" in refused.text() and "CRC-32" in refused.text()
    text.write_text(before)
    assert run(own, ["steps=4"], out).codes == [0]


def checkpoint_names(out) -> set[str]:
    return {path.name for path in (out / "checkpoints").iterdir()}


@pytest.mark.parametrize("refusal", ["optimizer.lr=2e-3", "data.path=/nowhere.txt", "load"])
def test_a_refused_start_renames_no_checkpoint(recipe, whole, tmp_path, refusal):
    out = tmp_path / "run"
    shutil.copytree(whole, out, symlinks=True)
    before = checkpoint_names(out)
    asked = ["steps=12", f"checkpoint.resume={out}/checkpoints/step-000009"]
    if refusal == "load":
        refused = run(recipe, asked, out, prepare=refuse_to_load)
        assert "the checkpoint could not be loaded" in refused.text()
    else:
        refused = run(recipe, [*asked, refusal], out)
    assert refused.codes == [2], refused.text()
    assert checkpoint_names(out) == before
    assert (out / "last").resolve().name == "step-000012"
    # passing over a damaged one renames nothing either until the older one is taken
    truncate(out / "checkpoints" / "step-000012" / "trainer" / "optimizer.bin")
    (out / "status.json").write_text('{"status": "running", "step": 12}')
    assert run(recipe, ["steps=12", "optimizer.lr=2e-3"], out).codes == [2]
    assert checkpoint_names(out) == before


def test_a_path_is_taken_although_a_later_checkpoint_is_unreadable(recipe, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out, symlinks=True)
    (out / "status.json").write_text('{"status": "running", "step": 12}')
    truncate(out / "checkpoints" / "step-000012" / "trainer" / "state.json")
    options = ["steps=12", "checkpoint.every=0", f"checkpoint.resume={out}/checkpoints/step-000009"]
    held = Training(recipe, options, out, prepare=partial(held_at, 1))
    held.wait_for(lambda training: "resuming from" in training.text() and "abandoned" in training.text())
    # before anything new is saved, the link leads to the checkpoint this run came from
    held.wait_for(lambda training: (out / "last").resolve().name == "step-000009")
    held.kill()
    held.wait()
    assert checkpoint_names(out) == {"step-000009", "abandoned-step-000012"}


@pytest.mark.slow
@pytest.mark.parametrize("die", [die_before_the_marker, die_before_the_rename])
def test_killed_while_saving_leaves_the_older_checkpoint(recipe, whole, tmp_path, die):
    broken = run(recipe, ["steps=12"], tmp_path / "run", prepare=die)
    assert broken.codes == [-9]
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {"step-000003", ".writing-step-000006"}
    again = run(recipe, ["steps=12"], tmp_path / "run")
    assert again.codes == [0], again.text()
    assert "removed the leftover of an interrupted save: .writing-step-000006" in again.text()
    assert "step-000003, step 3 of 12" in again.text()
    assert numbers(tmp_path / "run") == numbers(whole)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("die", [die_while_removing_a_checkpoint, die_while_linking])
def test_killed_while_tidying_leaves_nothing_behind(recipe, whole, tmp_path, die):
    out = tmp_path / "run"
    assert run(recipe, ["steps=12"], out, prepare=die).codes == [-9]
    again = run(recipe, ["steps=12"], out)
    assert again.codes == [0], again.text()
    assert numbers(out) == numbers(whole)
    left, expected = (sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (out, whole))
    assert left == expected


@pytest.mark.slow
def test_killed_before_the_links_of_the_last_checkpoint_sets_them_and_removes_old_ones(recipe, tmp_path):
    out, straight = tmp_path / "run", tmp_path / "straight"
    options = ["steps=6", "checkpoint={every: 3, keep_last: 1}"]
    assert run(recipe, options, straight).codes == [0]
    assert run(recipe, options, out, prepare=partial(die_while_linking, "step-000006")).codes == [-9]
    assert os.readlink(out / "last") == "checkpoints/step-000003"
    again = run(recipe, options, out)
    assert again.codes == [0] and "step 6 of 6" in again.text(), again.text()
    left, expected = (sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (out, straight))
    assert os.readlink(out / "last") == "checkpoints/step-000006" and left == expected


@pytest.mark.slow
def test_killed_while_describing_the_run_begins_again(recipe, whole, tmp_path):
    out = tmp_path / "run"
    assert run(recipe, ["steps=12"], out, prepare=die_before_the_checkpoints).codes == [-9]
    again = run(recipe, ["steps=12"], out)
    assert again.codes == [0], again.text()
    assert "beginning again at step 0" in again.text() and numbers(out) == numbers(whole)


def test_killed_before_the_first_checkpoint_begins_again(recipe, whole, tmp_path):
    broken = Training(recipe, ["steps=12", "checkpoint.every=0"], tmp_path / "run", prepare=partial(held_at, 6))
    broken.wait_for(lambda training: training.last_step() >= 2)
    broken.kill()
    assert broken.wait() == [-9]
    again = run(recipe, ["steps=12"], tmp_path / "run")
    assert again.codes == [0], again.text()
    assert "beginning again at step 0" in again.text()
    assert numbers(tmp_path / "run") == numbers(whole)


def test_the_best_of_before_is_kept_where_the_new_best_could_not_be_saved(tmp_path):
    folder = RunFolder(tmp_path / "run")
    saver = Saver.__new__(Saver)
    saver._folder, saver._config = folder, CheckpointConfig(keep_last=1, keep_best=True)
    for step, best in ((3, 3), (9, 6)):  # step 6 was the best, and the disk was full
        path = folder.checkpoints / checkpoint_name(step)
        path.mkdir(parents=True)
        (path / MARKER).touch()
        saver.update_links(path, TrainState(step=step, best_step=best))
    assert (folder.root / "best").resolve().name == "step-000003"
    assert {path.name for path in folder.checkpoints.iterdir()} == {"step-000003", "step-000009"}


def test_the_best_is_kept_where_links_cannot_be_made(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("leanstep.recipes.training.saver.replace_symlink", refuse)
    folder, said = RunFolder(tmp_path / "run"), []
    saver = Saver.__new__(Saver)
    saver._folder, saver._config, saver._say = folder, CheckpointConfig(keep_last=1, keep_best=True), said.append
    for step in (3, 6, 9):
        path = folder.checkpoints / checkpoint_name(step)
        path.mkdir(parents=True)
        (path / MARKER).touch()
        saver.update_links(path, TrainState(step=step, best_step=3))
    assert {path.name for path in folder.checkpoints.iterdir()} == {"step-000003", "step-000009"}
    assert all(line.startswith("WARNING: the link") for line in said)


def test_the_best_checkpoint_is_kept(recipe, tmp_path):
    # the rate explodes after step 6: the validation loss is best there and never again
    options = ["steps=15", "eval.every=3", "checkpoint={every: 3, keep_last: 1, keep_best: true}"]
    kept = run(recipe, options, tmp_path / "run", prepare=explode_after_step_6)
    assert kept.codes == [0], kept.text()
    assert status(tmp_path / "run")["best_step"] == 6
    assert (tmp_path / "run" / "best").resolve().name == "step-000006"
    assert [path.name for path in find_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000006", "step-000015"]
