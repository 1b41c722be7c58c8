"""Run folders from elsewhere: links, pipes and git configurations in them, and the modes of what a run writes."""

import io
import json
import os
import pickle
import shutil
import stat
import subprocess
import zlib
from functools import partial

import faults
import pytest
import torch
from training import run, write_recipe

from leanstep.recipes.report.report import write_report
from leanstep.recipes.training.checkpoint import CheckpointError, choose_start, commit, read_state, staging, verify
from leanstep.recipes.training.folder import FolderError, RunFolder, environment

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of six steps with two checkpoints, made under the umask 027."""
    folder = tmp_path_factory.mktemp("run")
    recipe = write_recipe(folder)
    training = run(recipe, ["steps=6"], folder / "run", prepare=partial(os.umask, 0o027))
    assert training.codes == [0], training.text()
    return recipe, folder / "run"


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


def test_every_file_has_the_mode_of_the_umask(finished):
    _, out = finished
    modes = {stat.S_IMODE(path.lstat().st_mode) for path in out.rglob("*") if path.is_file() and not path.is_symlink()}
    assert modes == {0o640} and (out / "final" / "model.safetensors").is_file()
    folders = {stat.S_IMODE(path.lstat().st_mode) for path in out.rglob("*") if path.is_dir() and not path.is_symlink()}
    assert folders == {0o750}


def test_a_dumped_batch_has_the_mode_of_the_umask(tmp_path):
    recipe = write_recipe(tmp_path)
    training = run(recipe, ["steps=3"], tmp_path / "run", prepare=faults.nan_at_step_3)
    assert training.codes == [3], training.text()
    assert (tmp_path / "run" / "nan_dump" / "batch.safetensors").stat().st_mode == recipe.stat().st_mode


@pytest.mark.parametrize("name", [".lock", "train.log", "log.jsonl", "checkpoints", "final", "nan_dump", "leanstep"])
def test_a_run_refuses_links_where_it_writes(name, victim, tmp_path):
    root = tmp_path / "run"
    root.mkdir()
    (root / name).symlink_to(victim if "." in name else tmp_path)
    with pytest.raises(FolderError, match=f"{name}.*is a symbolic link"):
        RunFolder(root).claim()
    assert victim.read_text() == "precious"


def test_a_run_refuses_links_under_all_names_that_a_run_writes(finished, victim, tmp_path):
    _, out = finished
    names = [path.relative_to(out) for path in (*out.iterdir(), *(out / "checkpoints").iterdir())]
    assert {"config.yaml", "last", "checkpoints/step-000003"} <= set(map(str, names))
    for name in names:
        root = tmp_path / f"run {name.name}"
        (root / name).parent.mkdir(parents=True)
        (root / name).symlink_to(victim)
        if str(name) in ("last", "best"):  # exchanged as a whole
            RunFolder(root).claim()
        else:
            with pytest.raises(FolderError, match=f"{name.name}.*is a symbolic link"):
                RunFolder(root).claim()
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", [".lock", "train.log", "log.jsonl"])
def test_a_run_refuses_pipes_where_it_writes(name, tmp_path):
    root = tmp_path / "run"
    root.mkdir()
    os.mkfifo(root / name)
    with pytest.raises(FolderError, match=f"{name}.*no.* regular file"):
        RunFolder(root).claim()


def test_links_under_the_names_of_temporary_files_are_never_followed(victim, tmp_path):
    root = tmp_path / "run"
    root.mkdir()
    for name in (".config.yaml.tmp", ".status.json.tmp", ".last.tmp"):
        (root / name).symlink_to(victim)
    folder = RunFolder(root)
    folder.claim()
    folder.describe("name: run\n", {})
    folder.status("running")
    folder.release()
    assert victim.read_text() == "precious"


def test_a_planted_staging_folder_is_removed_and_not_written_through(tmp_path):
    outside, checkpoints = tmp_path / "outside", tmp_path / "run" / "checkpoints"
    outside.mkdir()
    checkpoints.mkdir(parents=True)
    (checkpoints / ".writing-step-000003").symlink_to(outside)
    (checkpoints / ".replaced-step-000003").symlink_to(outside)
    staged = staging(checkpoints, 3)
    assert not staged.is_symlink()
    (staged / "trainer" / "file").write_text("x")
    assert (commit(staged) / "trainer" / "file").is_file() and list(outside.iterdir()) == []


def test_resuming_with_a_planted_log_touches_nothing(finished, victim, tmp_path):
    recipe, out = finished
    copy = shutil.copytree(out, tmp_path / "run", symlinks=True)
    (copy / "train.log").unlink()
    (copy / "train.log").symlink_to(victim)
    training = run(recipe, ["steps=6"], copy)
    assert training.codes == [2] and "is a symbolic link" in training.text() and "Traceback" not in training.text()
    assert victim.read_text() == "precious"


def test_links_inside_a_checkpoint_are_refused(finished, tmp_path):
    _, out = finished
    checkpoint = shutil.copytree(out / "checkpoints" / "step-000006", tmp_path / "step-000006")
    verify(checkpoint)
    (checkpoint / "hf").rename(tmp_path / "hf")
    (checkpoint / "hf").symlink_to(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="symbolic link"):
        verify(checkpoint)


@pytest.mark.parametrize("entry", ["file", "link", "pipe"])
def test_a_checkpoint_has_only_what_its_marker_lists(entry, finished, victim, tmp_path):
    _, out = finished
    checkpoint = shutil.copytree(out / "checkpoints" / "step-000006", tmp_path / "step-000006")
    (checkpoint / "hf" / "notes.txt").write_text("no run reads this")
    verify(checkpoint)
    planted = checkpoint / "trainer" / "random_states_1.pkl"
    if entry == "link":
        planted.symlink_to(victim)
    else:
        os.mkfifo(planted) if entry == "pipe" else planted.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="random_states_1.pkl.*remove it"):
        verify(checkpoint)


def test_a_checkpoint_beyond_the_last_step_is_refused(finished, tmp_path):
    recipe, out = finished
    copy = shutil.copytree(out, tmp_path / "run", symlinks=True)
    shutil.rmtree(copy / "checkpoints" / "step-000003")
    checkpoint = copy / "checkpoints" / "step-000006"
    state = json.loads((checkpoint / "trainer" / "state.json").read_text())
    with_contents(checkpoint, "state.json", json.dumps({**state, "step": 10**30}).encode())
    training = run(recipe, ["steps=6"], copy)
    assert training.codes == [2] and "the run has 6 steps" in training.text(), training.text()


@pytest.mark.parametrize("optimizer", ["adamw", 3, [1], {"groups": ["x"]}, {"args": 3, "groups": 5}])
def test_a_checkpoint_with_another_kind_of_recipe_is_refused(optimizer, finished, tmp_path):
    _, out = finished
    copy = shutil.copytree(out, tmp_path / "run", symlinks=True)
    checkpoint = copy / "checkpoints" / "step-000006"
    state = json.loads((checkpoint / "trainer" / "state.json").read_text())
    state["config"]["optimizer"] = optimizer
    with_contents(checkpoint, "state.json", json.dumps(state).encode())
    with pytest.raises(CheckpointError):
        choose_start(_config(copy), RunFolder(copy))


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_the_marker_names_no_files_outside(name, finished, tmp_path):
    _, out = finished
    checkpoint = shutil.copytree(out / "checkpoints" / "step-000006", tmp_path / "step-000006")
    (tmp_path / "outside").write_text("x")
    target = checkpoint / name
    marker = json.loads((checkpoint / "COMPLETE").read_text())
    marker["files"][name] = {"size": target.stat().st_size, "crc32": zlib.crc32(target.read_bytes())}
    (checkpoint / "COMPLETE").write_text(json.dumps(marker))
    with pytest.raises(CheckpointError, match="outside"):
        verify(checkpoint)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"files": 3}', '{"files": {"a": 3}}', '{"files": {"a": {"size": "1"}}}', "3", "\ud800"]
)
def test_a_damaged_marker_is_a_damaged_checkpoint(content, tmp_path):
    (tmp_path / "COMPLETE").write_text(content, errors="surrogatepass")
    with pytest.raises(CheckpointError):
        verify(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"step": "many"}', '{"step": -1}', '{"step": [3]}', '{"config": 3}', "[]", '{"step": 1e400}'],
)
def test_a_damaged_state_is_told_in_one_line(content, tmp_path):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "state.json").write_text(content)
    with pytest.raises(CheckpointError) as refused:
        read_state(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name", ["log.jsonl", "status.json", "train.log", "config.yaml", "sparsity_report.json", ".lock"]
)
def test_a_report_waits_for_no_pipe_and_writes_nothing_else(name, finished, tmp_path):
    _, out = finished
    copy = shutil.copytree(out, tmp_path / "run", symlinks=True)
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    before = sorted(copy.rglob("*"))
    write_report([copy], tmp_path / "page.html")
    assert sorted(copy.rglob("*")) == before


def test_a_report_shows_nothing_that_a_link_names(finished, victim, tmp_path):
    _, out = finished
    copy = shutil.copytree(out, tmp_path / "run", symlinks=True)
    for name in ("config.yaml", "command.txt", "log.jsonl", "status.json"):
        (copy / name).unlink()
        (copy / name).symlink_to(victim)
    (copy / "env.json").write_text("{}")
    page = write_report([copy], tmp_path / "page.html").read_text()
    assert "precious" not in page and "cannot be read" in page


def repository(folder, head, **files):
    git = folder / ".git"
    for name, content in {"HEAD": head, **files}.items():
        (git / name).parent.mkdir(parents=True, exist_ok=True)
        (git / name).write_text(content)
    return folder


@pytest.mark.parametrize(
    ("head", "files", "expected"),
    [
        (COMMIT + "\n", {}, COMMIT),
        ("ref: refs/heads/main\n", {"refs/heads/main": COMMIT + "\n"}, COMMIT),
        ("ref: refs/heads/a/b.c\n", {"packed-refs": f"# pack-refs with: peeled\n{COMMIT} refs/heads/a/b.c\n"}, COMMIT),
        ("ref: refs/heads/none\n", {"packed-refs": f"{COMMIT} refs/heads/nones\n"}, None),
        ("ref: refs/heads/../../secret\n", {"secret": COMMIT}, None),
        ("ref: /etc/hostname\n", {}, None),
        ("nonsense\n", {}, None),
        ("x" * 10_000, {}, None),
    ],
)
def test_the_commit_is_read_from_files(head, files, expected, tmp_path, monkeypatch):
    below = repository(tmp_path / "repo", head, **files) / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert environment()["git_commit"] == expected


def test_the_commit_of_a_worktree(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com"]
    subprocess.run(["git", "init", "-q", "-b", "main", "main"], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "a"], cwd=tmp_path / "main", check=True)
    subprocess.run(["git", "worktree", "add", "-q", "../tree"], cwd=tmp_path / "main", check=True, capture_output=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "b"], cwd=tmp_path / "tree", check=True)
    for _ in range(2):
        for name in ("main", "tree"):
            monkeypatch.chdir(tmp_path / name)
            head = subprocess.run(
                ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
            ).stdout.strip()
            assert environment()["git_commit"] == head
        subprocess.run(["git", "pack-refs", "--all"], check=True)


def test_no_command_of_the_working_folder_runs(tmp_path, monkeypatch):
    folder = tmp_path / "unpacked"
    subprocess.run(["git", "init", "-q", folder], check=True)
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path / 'executed'}\n")
    hook.chmod(0o755)
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "a"],
        cwd=folder,
        check=True,
    )
    subprocess.run(["git", "config", "core.fsmonitor", hook], cwd=folder, check=True)
    monkeypatch.chdir(folder)
    assert environment()["git_commit"] is not None
    assert not (tmp_path / "executed").exists()


def test_leftovers_stay_where_no_lock_tells_that_their_run_has_ended(tmp_path, monkeypatch):
    left = tmp_path / "checkpoints" / ".writing-step-000009"
    left.mkdir(parents=True)
    for has_locks in (False, True):
        monkeypatch.setattr("leanstep.recipes.training.folder.lock_file", lambda _, has_locks=has_locks: has_locks)
        folder = RunFolder(tmp_path)
        with pytest.raises(ValueError, match="holds no run"):
            choose_start(_config(tmp_path), folder)
        folder.release()
        assert left.exists() != has_locks


def test_a_folder_of_the_run_that_appears_as_a_link_is_refused_at_resume(finished, tmp_path):
    _, out = finished
    copy = shutil.copytree(out, tmp_path / "run", symlinks=True)
    (copy / "checkpoints" / "step-000006").rename(tmp_path / "elsewhere")
    (copy / "checkpoints" / "step-000006").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FolderError, match="step-000006 is a symbolic link"):
        choose_start(_config(copy), RunFolder(copy))


def _config(out):
    from leanstep.recipes.config.schema import RunConfig

    return RunConfig(out=str(out))


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def with_contents(checkpoint, name, content):
    """Replace a file of a checkpoint and its entry in the marker, as whoever hands out a checkpoint can."""
    path = checkpoint / "trainer" / name
    path.write_bytes(content)
    marker = json.loads((checkpoint / "COMPLETE").read_text())
    marker["files"][f"trainer/{name}"] = {"size": len(content), "crc32": zlib.crc32(content)}
    (checkpoint / "COMPLETE").write_text(json.dumps(marker))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("payload", name) for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl")),
        *(("other", name) for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl")),
        *(("noise", "optimizer.bin"), ("empty", "scheduler.bin"), ("cut", "random_states_0.pkl")),
    ],
)
def test_hostile_state_is_told_in_one_line_and_runs_nothing(kind, name, finished, tmp_path):
    recipe, out = finished
    copy = shutil.copytree(out, tmp_path / "run", symlinks=True)
    (copy / "status.json").write_text('{"status": "interrupted"}')
    checkpoint = copy / "checkpoints" / "step-000003"
    shutil.rmtree(copy / "checkpoints" / "step-000006")
    other = io.BytesIO()
    torch.save({"step": torch.ones(3)}, other)
    contents = {"payload": pickle.dumps(Payload(tmp_path / "executed")), "noise": os.urandom(1000), "empty": b""}
    contents |= {"other": other.getvalue(), "cut": (checkpoint / "trainer" / name).read_bytes()[:-50]}
    with_contents(checkpoint, name, contents[kind])
    training = run(recipe, ["steps=6"], copy)
    assert training.codes == [2], training.text()
    assert not (tmp_path / "executed").exists()
    assert "Traceback" not in training.text() and "weights_only" not in training.text()
    assert training.text().count("error: ") == 1 and "trainer" in training.text()


def _without_an_entry(state):
    del state["exp_avg"]


def _of_other_numbers(state):
    state["exp_avg"] = state["exp_avg"].to(torch.complex64)


def _of_another_shape(state):
    state["exp_avg"] = state["exp_avg"][:1]


LION = ["steps=6", "optimizer.name=lion", "optimizer.args={rounding: stochastic}", "precision=bf16-pure"]


@pytest.fixture(scope="module")
def finished_by_lion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lion")
    recipe = write_recipe(folder)
    training = run(recipe, LION, folder / "run")
    assert training.codes == [0], training.text()
    shutil.rmtree(folder / "run" / "checkpoints" / "step-000006")
    (folder / "run" / "status.json").write_text('{"status": "interrupted"}')
    return recipe, folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("damage", [_without_an_entry, _of_other_numbers, _of_another_shape])
def test_an_optimizer_state_that_no_step_can_use_is_told_in_one_line(damage, finished_by_lion, tmp_path):
    recipe, out = finished_by_lion
    copy = shutil.copytree(out, tmp_path / "run", symlinks=True)
    checkpoint = copy / "checkpoints" / "step-000003"
    saved = torch.load(checkpoint / "trainer" / "optimizer.bin", weights_only=True)
    damage(saved["state"][1])
    file = io.BytesIO()
    torch.save(saved, file)
    with_contents(checkpoint, "optimizer.bin", file.getvalue())
    training = run(recipe, LION, copy)
    assert training.codes == [2], training.text()
    assert "Traceback" not in training.text() and training.text().count("error: ") == 1, training.text()
    assert "trainer cannot be loaded (ValueError): Lion: " in training.text()
    assert "exp_avg" in training.text() and "nothing was changed" in training.text()
