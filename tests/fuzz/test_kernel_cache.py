"""Compiled kernels in the cache: a library that differs in one bit never reaches the loader, and is built again."""

import ctypes
import subprocess

import pytest
from fuzzing import ENTRIES, damaged, fuzz, judged, plant, write
from hypothesis import given
from hypothesis import strategies as st

from leanstep.kernels.cpp_impl import _cache

NAME = "answer.so"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A library of one function, as the compiler writes it."""
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "answer.c").write_text("int answer(void) { return 42; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "answer.c", "-o", NAME], cwd=folder, check=True)
    return (folder / NAME).read_bytes()


@pytest.fixture
def cache(compiled, tmp_path, monkeypatch):
    """A cache with that library; the loader is only told whole ones."""
    monkeypatch.setenv("LEANSTEP_CACHE", str(tmp_path / "cache"))
    _cache.load_or_build(NAME, lambda path: path.write_bytes(compiled))
    path = tmp_path / "cache" / "cpp" / NAME
    whole = path.read_bytes()
    assert whole.startswith(compiled) and len(whole) == len(compiled) + 32

    def loader(name):
        with open(name, "rb") as file:
            assert file.read() == whole, "the loader was given a damaged library"
        return whole

    monkeypatch.setattr(ctypes, "CDLL", loader)
    return path


def read(cache, compiled):
    """Load the library; (what the loader got, whether it was built again)."""
    builds = []

    def build(path):
        builds.append(path)
        path.write_bytes(compiled)

    return _cache.load_or_build(NAME, build), bool(builds)


@given(data=st.data())
@fuzz(60)
def test_damaged_libraries_are_built_again(cache, compiled, data):
    whole = cache.read_bytes()
    changed = data.draw(damaged(whole))
    write(cache, changed)

    def right(result):
        library, built = result
        assert library == whole and built == (changed != whole)
        return not built

    judged("kernel libraries", lambda: read(cache, compiled), right, cache.parents[1])
    assert cache.read_bytes() == whole


@pytest.mark.parametrize("entry", ENTRIES)
def test_nothing_but_a_file_is_loaded(cache, compiled, tmp_path, monkeypatch, entry):
    """What is no file or link in its place is not replaced: the next cache folder takes the library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "next"))
    plant(cache, entry, tmp_path / "outside.so")

    def right(result):
        assert result[1]
        return False

    assert judged("kernel libraries", lambda: read(cache, compiled), right, tmp_path)
    next_folder = tmp_path / "next" / "leanstep" / "cpp" / NAME
    assert next_folder.is_file() or (cache.is_file() and not cache.is_symlink())
