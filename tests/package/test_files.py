"""Files and folders that appear whole or not at all."""

import errno
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from leanstep import _files
from leanstep._files import (
    _process_space,
    exclusive_lock,
    is_disk_full,
    open_locked,
    publish_folder,
    remove,
    remove_leftovers,
    replacing,
    staged_folder,
    write_text,
)


def test_reading_takes_no_more_memory_than_the_file(tmp_path):
    file = tmp_path / "small.json"
    file.write_bytes(b"x" * 3_000_000)
    tracemalloc.start()
    try:
        assert len(_files.read_bytes(file)) == 3_000_000
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    with pytest.raises(OSError, match="has more than 2.0 MiB"):
        _files.read_bytes(file, 1 << 21)


def test_a_file_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and set(os.listdir(tmp_path)) == {"a.json", partial.parent.name}
        assert partial.parent.suffix == ".tmp" and partial.parent.name.startswith(".")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_the_mode_is_that_of_new_files_and_the_file_is_alone(tmp_path):
    path, plain = tmp_path / "a.json", tmp_path / "plain"
    plain.write_text("")
    with replacing(path) as partial:
        assert os.listdir(partial.parent) == [path.name]
        # as safetensors does: write a private file and rename it
        private = partial.with_name(".tmp123456")
        private.write_text("new")
        private.chmod(0o600)
        private.replace(partial)
    assert path.read_text() == "new" and path.stat().st_mode == plain.stat().st_mode


def test_a_file_whose_writing_fails_stays_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as partial:
        partial.write_text("half of the n")
        raise ZeroDivisionError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_what_is_written_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    events = []
    sync, replace = _files.sync, os.replace
    monkeypatch.setattr(_files, "sync", lambda path: (events.append(f"sync {path.name}"), sync(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"rename to {Path(b).name}"), replace(a, b)))
    with staged_folder(tmp_path / "out") as staged:
        (staged / "deep").mkdir()
        (staged / "deep" / "file").write_text("x")
    assert events.index("sync file") < events.index("rename to out") < events.index(f"sync {tmp_path.name}")
    assert "sync deep" in events[: events.index("rename to out")]


def test_a_folder_appears_when_it_is_whole(tmp_path):
    out = tmp_path / "out"
    with staged_folder(out) as staged:
        (staged / "file").write_text("x")
        assert not out.exists()
    assert (out / "file").read_text() == "x" and os.listdir(tmp_path) == ["out"]
    with pytest.raises(FileExistsError), staged_folder(out):
        pass
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "other"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_replaces_an_older_one(tmp_path):
    for content in ("old", "new"):
        staged = tmp_path / "staged"
        staged.mkdir()
        (staged / content).write_text(content)
        publish_folder(staged, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["new"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_error_between_the_renames_puts_the_older_folder_back(tmp_path, monkeypatch, error):
    out, replace = tmp_path / "out", os.replace
    with staged_folder(out) as staged:
        (staged / "old").write_text("x")

    def stopped(source, target):
        if ".writing-" in str(source):
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(error), staged_folder(out, replace=True) as staged:
        (staged / "new").write_text("x")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == ["old"]


def test_what_a_killed_process_left_is_removed_and_a_running_ones_is_not(tmp_path):
    out = tmp_path / "out"
    code = (
        "import os, signal, sys; from pathlib import Path; from leanstep._files import staged_folder\n"
        "with staged_folder(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-P", "-c", code, str(out)], check=False)
    assert killed.returncode == -signal.SIGKILL and len(os.listdir(tmp_path)) == 1
    # the name in which a process of another machine writes, whose number no process has here
    other = tmp_path / ".out.writing-0123abcd-deadbeef-999999999"
    other.mkdir()
    with staged_folder(out) as staged:
        remove_leftovers(out)
        assert set(os.listdir(tmp_path)) == {staged.name, other.name}
    assert set(os.listdir(tmp_path)) == {"out", other.name}


def test_leftovers_of_a_name_with_brackets_are_removed(tmp_path):
    (tmp_path / f".out[0.5].writing-1234-{_process_space()}-999999999").mkdir()
    remove_leftovers(tmp_path / "out[0.5]")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [".run.yaml.tmp", f".out.writing-1234-{_process_space()}-999999999"])
def test_a_pipe_is_removed_and_not_waited_for(name, tmp_path):
    pipe = tmp_path / name
    os.mkfifo(pipe)
    # with a writer, so that opening it does not hang this test
    writer = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    remove(pipe) if name.endswith("tmp") else remove_leftovers(tmp_path / "out")
    os.close(writer)
    assert list(tmp_path.iterdir()) == []


def test_the_next_writer_removes_the_files_of_a_killed_one_only(tmp_path):
    path, other = tmp_path / "a.json", tmp_path / ".a.0000-elsewhere-999999999.json.tmp"
    code = (
        "import os, signal, sys; from pathlib import Path; from leanstep._files import replacing\n"
        "with replacing(Path(sys.argv[1])) as partial:\n"
        "    partial.with_name('.tmp123456').write_text('a file of the writer')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-P", "-c", code, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL and len(os.listdir(tmp_path)) == 1
    other.write_text("a process of another machine writes here")
    with replacing(path) as partial:
        write_text(path, "by another thread")
        assert set(os.listdir(tmp_path)) == {"a.json", partial.parent.name, other.name}
        partial.write_text("new")
    assert set(os.listdir(tmp_path)) == {"a.json", other.name} and path.read_text() == "new"


def test_one_process_at_a_time_writes_a_folder(tmp_path):
    out, lock = tmp_path / "out", tmp_path / ".out.lock"
    hold = "import sys; from pathlib import Path; from leanstep._files import exclusive_lock\n"
    hold += "with exclusive_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-P", "-c", hold, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"another run writes {out}: wait for it"), exclusive_lock(out):
            pass
        other.kill()  # what it leaves locks nothing
    assert lock.exists()
    with exclusive_lock(out), pytest.raises(ValueError, match="another run writes"), exclusive_lock(out):
        pass
    assert not lock.exists()


def test_a_lock_on_a_file_that_was_removed_is_none(tmp_path, monkeypatch):
    """The process that held it removes the file after this one has opened it, and a third makes a new one."""
    file, lock_file, locked = tmp_path / "lock", _files.lock_file, []

    def late(descriptor):
        if not locked:
            file.unlink()
        locked.append(descriptor)
        return lock_file(descriptor)

    monkeypatch.setattr(_files, "lock_file", late)
    descriptor = open_locked(file)
    assert len(locked) == 2 and os.path.samestat(os.fstat(descriptor), os.stat(file))
    os.close(descriptor)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("PytorchStreamWriter failed: No space left on device (os error 28)"),
        Exception('Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "..." })'),
    ],
)
def test_a_full_disk_is_recognised(error):
    assert is_disk_full(error)
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied")) and not is_disk_full(ValueError("shape"))
