"""Builds of the C++ kernels and their cache: shared by processes, private to the user, repaired when damaged."""

import grp
import os
import platform
import pwd
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from forked import preload, run_code, start_code

from leanstep import cli
from leanstep._files import cache_folders, private_folder
from leanstep.kernels._backend import choose
from leanstep.kernels.cpp_impl import _build, _cache, _prebuilt

preload("leanstep.kernels.steps.common", "leanstep.kernels.cpp_impl._build")

NAME, MACROS = "steps/nonfinite_flags", {"TENSOR": "bf16"}
BUILD = f"from leanstep.kernels.cpp_impl import _build; _build.library({NAME!r}, {MACROS!r})"
STEP = (
    "import torch; from leanstep.kernels.steps.common import nonfinite_flags as f;"
    "assert f([torch.tensor([1.0, float('nan')]), torch.ones(3)]).tolist() == [1, 0];"
)


def forget():
    """Unload nothing, but look every library up anew."""
    for cached in (_build._library, _build._why_it_fails):
        cached.cache_clear()
    _cache._announced.clear()


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    """An empty cache folder, and no library in memory. The folders to fall back to are in ``tmp_path``, too."""
    monkeypatch.setenv("LEANSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    forget()
    yield tmp_path / "cache" / "cpp"
    forget()


def libraries(folder):
    return sorted(path.name for path in folder.iterdir())


def compiler(tmp_path, monkeypatch, script):
    """Make a shell script the C++ compiler."""
    path = tmp_path / "c++script"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


def give_away(path, monkeypatch):
    """Let a folder belong to another user."""
    if os.geteuid() == 0:
        os.chown(path, 54321, -1)
    else:
        other = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: other)


def test_a_variant_is_built_once_and_loaded_by_another_process(fresh_cache):
    _build.library(NAME, MACROS)
    built = libraries(fresh_cache)
    assert len(built) == 1 and built[0].startswith("steps-nonfinite_flags-")
    stamp = (fresh_cache / built[0]).stat().st_mtime_ns
    run_code(BUILD)
    assert libraries(fresh_cache) == built
    assert (fresh_cache / built[0]).stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_processes_that_build_at_one_time_do_not_meet(fresh_cache):
    together = [start_code(STEP) for _ in range(3)]
    for process in together:
        process.join(120)
    assert [process.exitcode for process in together] == [0, 0, 0]
    assert len(libraries(fresh_cache)) == 1


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the switch names instructions of x86")
@pytest.mark.parametrize(("held", "most"), [("avx2", 1), ("default", 0)])
def test_torchs_switch_holds_what_is_compiled(held, most, fresh_cache, monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", held)
    monkeypatch.setenv("LEANSTEP_PREBUILT", "0")
    monkeypatch.setattr(_prebuilt, "levels", _prebuilt.levels.__wrapped__)
    assert _build.library("sparse/instructions", {}).instructions() <= most


def test_a_broken_compiler_is_named_and_not_used(fresh_cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, "echo 'license expired' >&2\nexit 1")
    with pytest.raises(_build.BuildError, match="license expired"):
        _build.library("steps/nonfinite_flags", {"TENSOR": "float"})
    choice = choose("nonfinite_flags", torch.device("cpu"), torch.float32)
    assert choice.backend == "reference" and "license expired" in choice.reason
    assert not libraries(fresh_cache)


def test_the_compiler_may_have_arguments(fresh_cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, f'echo "$1" >> {tmp_path}/seen\nshift\nexec g++ "$@"')
    script = os.environ["CXX"]
    monkeypatch.setenv("CXX", f" {script} '-O 1' ")
    _build.library(NAME, MACROS)
    assert set((tmp_path / "seen").read_text().splitlines()) == {"-O 1"}
    assert _build.cpp_compiler() == (script, "-O 1")
    monkeypatch.setenv("CXX", f"{script} -O2")
    forget()
    _build.library(NAME, MACROS)
    assert len(libraries(fresh_cache)) == 2


def test_a_compiler_whose_path_has_spaces(tmp_path, monkeypatch):
    (tmp_path / "my tools").mkdir()
    compiler(tmp_path / "my tools", monkeypatch, "")
    assert _build.cpp_compiler() == (str(tmp_path / "my tools" / "c++script"),)


@pytest.mark.parametrize("value", ["missing-c++ -O3", "g++ 'half"])
def test_a_compiler_that_is_missing_is_named(monkeypatch, value):
    monkeypatch.setenv("CXX", value)
    monkeypatch.setenv("LEANSTEP_PREBUILT", "0")
    assert _build.cpp_compiler() == ()
    assert _build.why_not_cpp() == f"no C++ compiler on the PATH (CXX is {value!r}, which names no program)"


@pytest.mark.skipif(not _build._bundled_openmp(), reason="this torch carries no OpenMP runtime")
def test_a_torch_with_another_openmp_runtime_has_its_own_library(fresh_cache, tmp_path, monkeypatch):
    _build.library(NAME, MACROS)
    other = tmp_path / "libgomp-0123abcd.so.1"
    other.symlink_to(_build._bundled_openmp()[0])
    monkeypatch.setattr(_build, "_bundled_openmp", lambda: [other])
    forget()
    _build.library(NAME, MACROS)
    assert len(libraries(fresh_cache)) == 2


# ---- damage


def test_a_pipe_in_place_of_a_library_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "steps-other.so")
    assert _cache._load(tmp_path / "steps-other.so") is None


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped bit", "of another name", "without digest"])
def test_a_damaged_library_is_built_again(fresh_cache, damage):
    run_code(STEP)
    path = next(fresh_cache.iterdir())
    sound = path.read_bytes()
    if damage == "flipped bit":
        middle = len(sound) // 2
        content = sound[:middle] + bytes([sound[middle] ^ 4]) + sound[middle + 1 :]
    elif damage == "of another name":
        other = path.with_name("steps-other.so")
        _cache._write(other, lambda partial: partial.write_bytes(sound[:-32]))
        content = other.read_bytes()
        other.unlink()
    else:
        content = sound[: {"truncated": len(sound) // 3, "empty": 0, "without digest": -32}[damage]]
    path.write_bytes(content)
    run_code(STEP)
    assert path.read_bytes() == sound and len(libraries(fresh_cache)) == 1


@pytest.mark.slow
def test_a_killed_build_leaves_nothing_for_long(fresh_cache, tmp_path, monkeypatch):
    started = tmp_path / "started"
    compiler(tmp_path, monkeypatch, f'case "$*" in *--version*) ;; *) touch {started}; exec sleep 60;; esac')
    process = start_code("import os; os.setsid();" + BUILD)
    while not started.exists():
        assert process.is_alive()
        time.sleep(0.05)
    # as a linker that was stopped while it wrote
    (partial,) = fresh_cache.glob(".*.tmp")
    (partial / "half.so").write_bytes(b"\x7fELF")
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    monkeypatch.delenv("CXX")
    run_code(BUILD)
    assert len(libraries(fresh_cache)) == 2, "a young temporary file may belong to another process"
    os.utime(partial, (0, 0))
    run_code(STEP)
    assert not partial.exists() and len(libraries(fresh_cache)) == 2


def test_a_library_is_flushed_before_it_takes_its_name(fresh_cache, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(f"fsync {os.readlink(f'/proc/self/fd/{fd}')}"), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    _build.library(NAME, MACROS)
    assert events[0].endswith(".so") and ".so.tmp/" in events[0] and events[1] == "rename"


# ---- other users


@pytest.mark.slow
@pytest.mark.parametrize("refused", ["folder of another", "writable folder", "writable parent", "parent of another"])
def test_a_folder_that_others_can_change_is_replaced_by_the_next(fresh_cache, tmp_path, monkeypatch, refused):
    run_code(BUILD)  # a library that must not be loaded
    folder = fresh_cache if "folder" in refused else fresh_cache.parent
    if "writable" in refused:
        folder.chmod(0o777)
        reason = f"{folder}: others may write to it .mode 777; chmod go-w"
    else:
        give_away(folder, monkeypatch)
        reason = "expected a folder of uid .*, it belongs to"
    if os.geteuid() != 0 and "of another" in refused:  # then the other folders belong to another user as well
        with pytest.raises(_cache.KernelCacheError, match=reason):
            _build.library(NAME, MACROS)
        return
    with pytest.warns(
        UserWarning, match=f"compiled kernels go to {tmp_path}/xdg/leanstep/cpp: .*{reason}.*LEANSTEP_CACHE"
    ):
        _build.library(NAME, MACROS)
    assert len(libraries(tmp_path / "xdg" / "leanstep" / "cpp")) == 1
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        _build.library("steps/nonfinite_flags", {"TENSOR": "float"})


def test_a_sticky_folder_such_as_tmp_is_a_parent_but_no_cache(tmp_path):
    tmp_path.chmod(0o1777)
    assert private_folder(tmp_path / "cache") == tmp_path / "cache"
    with pytest.raises(PermissionError, match="others may write to it"):
        private_folder(tmp_path)


@pytest.mark.parametrize(("member", "private"), [((), True), (("guest",), False)])
def test_the_private_group_of_the_user_may_write_to_parents(tmp_path, monkeypatch, member, private):
    account = pwd.getpwuid(os.geteuid())
    group = grp.struct_group((account.pw_name, "x", account.pw_gid, list(member)))
    monkeypatch.setattr(grp, "getgrgid", lambda _: group)
    tmp_path.chmod(0o775)
    if private:
        assert private_folder(tmp_path / "cache") == tmp_path / "cache"
    else:
        with pytest.raises(PermissionError, match="others may write to it"):
            private_folder(tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["writable", "a symbolic link"])
def test_a_file_that_others_could_have_written_is_replaced(fresh_cache, tmp_path, kind):
    run_code(BUILD)
    path = next(fresh_cache.iterdir())
    if kind == "writable":
        path.chmod(0o664)
    else:
        path.rename(tmp_path / "elsewhere.so")
        path.symlink_to(tmp_path / "elsewhere.so")
    _build.library(NAME, MACROS)
    assert path.lstat().st_mode & 0o022 == 0 and not path.is_symlink()


def test_where_every_folder_is_refused_the_definition_runs_and_info_says_why(
    fresh_cache, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    tmp_path.chmod(0o777)
    choice = choose("nonfinite_flags", torch.device("cpu"), torch.float32)
    assert choice.backend == "reference"
    for text in (str(tmp_path), "others may write to it (mode 777; chmod go-w)", "Set LEANSTEP_CACHE to a folder"):
        assert text in choice.reason
    assert not (tmp_path / "cache").exists()
    assert cli.main(["info"]) == 0
    assert "cache of compiled CPU kernels: none: " in capsys.readouterr().out


@pytest.mark.slow
def test_a_user_without_home_and_entry_builds_in_the_temporary_folder(tmp_path):
    program = "import pwd\ndef getpwuid(uid): raise KeyError(uid)\npwd.getpwuid = getpwuid\n"
    program += STEP + "from leanstep.recipes.data.cache import cache_root; print(cache_root())"
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "LEANSTEP_CACHE", "XDG_CACHE_HOME")}
    command = [sys.executable, "-P", "-W", "error", "-c", program]
    ran = subprocess.run(
        command, env={**environment, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=120
    )
    folder = tmp_path / f"leanstep-{os.geteuid()}"
    assert ran.returncode == 0 and ran.stdout.split() == [str(folder)], ran.stderr
    assert len(libraries(folder / "cpp")) == 1


# ---- folders that cannot be written


def test_a_cache_that_cannot_be_made_is_replaced(fresh_cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LEANSTEP_CACHE", str(tmp_path / "file" / "inside"))
    with pytest.warns(UserWarning, match=f"{tmp_path}/file: expected a folder"):
        _build.library(NAME, MACROS)
    assert len(libraries(tmp_path / "xdg" / "leanstep" / "cpp")) == 1


def test_a_read_only_cache_is_read_and_not_written(fresh_cache, tmp_path, monkeypatch):
    _build.library(NAME, MACROS)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and Path(path) != fresh_cache)
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _build.library(NAME, MACROS)
    with pytest.warns(UserWarning, match=f"{fresh_cache} is not writable"):
        _build.library("steps/nonfinite_flags", {"TENSOR": "float"})
    assert len(libraries(fresh_cache)) == 1 and len(libraries(tmp_path / "xdg" / "leanstep" / "cpp")) == 1


def test_a_full_disk_is_replaced_and_if_all_are_full_a_command_ends_without_traceback(
    fresh_cache, tmp_path, monkeypatch, capsys
):
    full = "echo 'ld: final link failed: No space left on device' >&2; exit 1"
    compiler(tmp_path, monkeypatch, f'case "$*" in *{fresh_cache}*) {full};; *) exec g++ "$@";; esac')
    with pytest.warns(UserWarning, match=f"{fresh_cache.parent}: disk full"):
        _build.library(NAME, MACROS)
    assert libraries(fresh_cache) == [] and len(libraries(tmp_path / "xdg" / "leanstep" / "cpp")) == 1
    compiler(tmp_path, monkeypatch, full)
    forget()
    monkeypatch.setattr(cli, "_info", lambda *arguments: _build.library(NAME, {"TENSOR": "float"}))
    assert cli.main(["info"]) == 1
    assert "error: no folder can hold the compiled kernels: " in capsys.readouterr().err


def test_the_folders_are_those_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("LEANSTEP_CACHE")
    monkeypatch.setattr("tempfile.tempdir", "/var/tmp")
    temporary = Path(f"/var/tmp/leanstep-{os.geteuid()}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folders() == [tmp_path / ".cache" / "leanstep", temporary]
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folders() == [Path("/xdg/leanstep"), temporary]
    monkeypatch.setenv("LEANSTEP_CACHE", "~/kernels")
    assert cache_folders() == [tmp_path / "kernels", Path("/xdg/leanstep"), temporary]
