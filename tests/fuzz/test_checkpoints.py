"""Training checkpoints: a resumed run ends with the same weights, goes back to an older checkpoint, or says why not."""

import json
import shutil
import zlib

import pytest
from fuzzing import (
    CACHE,
    ENTRIES,
    command_line,
    damaged,
    edits,
    fuzz,
    json_files,
    plant,
    safetensors_files,
    told,
    write,
)
from hypothesis import example, given
from hypothesis import strategies as st
from training import read_log, write_recipe

SETTINGS = (
    *("steps=3", "checkpoint.every=1", "checkpoint.keep_last=3", "eval.every=0", "data.val_tokens=100"),
    *("batch.tokens_per_step=64", "batch.micro_batch_size=2", "data.tokenizer=train:280"),
    *("model.config.n_layer=1", "model.config.n_embd=8", "model.config.n_head=1"),
)
NEWEST = "checkpoints/step-000002"
STATE = f"{NEWEST}/trainer/state.json"
# the training itself may end with a non-finite loss
CODES = (2, 3)


class Interrupted:
    """A run of three steps that was interrupted after two, and what it comes to."""

    def __init__(self, root):
        self.root, self.run = root, root / "run"
        self.command = ("train", write_recipe(root), *SETTINGS, f"out={self.run}")
        code, _, error = command_line(*map(str, self.command))
        assert code == 0, error
        self.expected = self.result()
        shutil.rmtree(self.run / "checkpoints" / "step-000003")
        shutil.rmtree(self.run / "final")
        self.run.rename(root / "interrupted")
        (root / "interrupted" / "status.json").write_text('{"status": "interrupted"}')
        (root / "outside").mkdir()

    def restore(self, *, older=True):
        """Put the run back as it was interrupted, with or without its older checkpoint."""
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.root / "interrupted", self.run, symlinks=True)
        if not older:
            shutil.rmtree(self.run / "checkpoints" / "step-000001")

    def result(self):
        """The final weights and the losses of the last step."""
        losses = [entry["loss"] for entry in read_log(self.run) if entry["kind"] == "train" and entry["step"] == 3]
        return (self.run / "final" / "model.safetensors").read_bytes(), losses

    def resume(self, right):
        """Resume the run; returns whether it went on."""
        folders, outside = (self.run, CACHE), self.root / "outside"
        return told("checkpoints", *self.command, right=right, folders=folders, outside=outside, failures=CODES)

    def ends_the_same(self, out):
        assert self.result() == self.expected
        return True

    def ends(self, out):
        """Whoever writes right checksums may write another state."""
        return (self.run / "final" / "model.safetensors").is_file() and self.result() == self.expected


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    return Interrupted(tmp_path_factory.mktemp("checkpoints"))


def files(interrupted):
    folder = interrupted.root / "interrupted" / NEWEST
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@given(data=st.data())
@fuzz(8)
def test_damage_costs_a_checkpoint_and_changes_nothing(interrupted, data):
    """The older checkpoint leads to the same weights; without one the run does not begin."""
    older = data.draw(st.booleans())
    interrupted.restore(older=older)
    path = interrupted.run / NEWEST / data.draw(st.sampled_from(files(interrupted)))
    write(path, data.draw(damaged(path.read_bytes())))
    went_on = interrupted.resume(interrupted.ends_the_same)
    assert went_on or not older


def rewrite(interrupted, name, content):
    """Replace a file of the newest checkpoint and its entry in the marker, as whoever hands out a checkpoint can."""
    write(interrupted.run / NEWEST / name, content)
    marker = interrupted.run / NEWEST / "COMPLETE"
    facts = json.loads(marker.read_text())
    facts["files"][name] = {"size": len(content), "crc32": zlib.crc32(content)}
    marker.write_text(json.dumps(facts))


@pytest.mark.slow
@given(data=st.data())
@fuzz(8)
def test_damage_with_right_checksums_is_told_or_makes_another_run(interrupted, data):
    interrupted.restore(older=False)
    name = data.draw(st.sampled_from([name for name in files(interrupted) if name != "COMPLETE"]))
    content = (interrupted.run / NEWEST / name).read_bytes()
    changed = data.draw(
        json_files(content)
        if name.endswith(".json")
        else safetensors_files(content)
        if name.endswith(".safetensors")
        else damaged(content)
    )
    rewrite(interrupted, name, changed)
    interrupted.resume(interrupted.ends)


def with_state(interrupted, **changes):
    content = json.loads((interrupted.root / "interrupted" / STATE).read_text())
    rewrite(interrupted, "trainer/state.json", json.dumps({**content, **changes}).encode())


PROGRESS = {
    "step": 2, "tokens": 124, "elapsed_s": 0.5, "val_loss": None, "best_loss": 1.5, "best_step": 1,
    "eval_pending": False, "nonfinite": 0, "world_size": 1,
    "spikes": {"losses": [1.5], "skipped": 0, "rollbacks": 0, "steps": [1], "in_row": 0, "rollbacks_here": 0,
               "returned_to": -1, "windows_ahead": 0},
}  # fmt: skip


@pytest.mark.slow
@given(changes=edits(PROGRESS))
@example(changes={"elapsed_s": float("inf")})
@example(changes={"elapsed_s": float("nan"), "tokens": -5})
@example(changes={"step": 10**30})
@example(changes={"spikes": {"windows_ahead": 2**70}})
@example(changes={"best_step": 10**400, "best_loss": float("nan")})
@fuzz(8)
def test_other_progress_with_right_checksums(interrupted, changes):
    interrupted.restore(older=False)
    with_state(interrupted, **{key: value for key, value in changes.items() if key != "config"})
    interrupted.resume(interrupted.ends)


@given(data=st.data())
@fuzz(4)
def test_another_recipe_with_right_checksums(interrupted, data):
    """A checkpoint of another recipe is refused."""
    interrupted.restore(older=False)
    config = json.loads((interrupted.root / "interrupted" / STATE).read_text())["config"]
    with_state(interrupted, config=data.draw(edits(config)))
    interrupted.resume(interrupted.ends_the_same)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["COMPLETE", "trainer/random_states_0.pkl"])
def test_nothing_but_a_file_is_read(interrupted, tmp_path, name, entry):
    """Also where the marker does not list it."""
    interrupted.restore(older=False)
    plant(interrupted.run / NEWEST / name, entry, tmp_path / "copy")
    if name != "COMPLETE":
        marker = interrupted.run / NEWEST / "COMPLETE"
        facts = json.loads(marker.read_text())
        del facts["files"][name]
        marker.write_text(json.dumps(facts))
    # a folder without a marker is no checkpoint, so that the run begins again
    began = interrupted.resume(interrupted.ends_the_same)
    assert not began or name == "COMPLETE"


@pytest.mark.parametrize("name", ["hf/model-2.safetensors", "trainer/stream_0.pt", "trainer/sparsity.safetensors"])
def test_files_that_the_marker_does_not_list_are_not_read(interrupted, name):
    interrupted.restore(older=False)
    shutil.copyfile(interrupted.run / NEWEST / "hf" / "model.safetensors", interrupted.run / NEWEST / name)
    assert not interrupted.resume(interrupted.ends)
