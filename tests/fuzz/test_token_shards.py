"""Token files of the cache: a damaged one is refused and built again, and no change passes without notice."""

import io
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from fuzzing import damaged, fuzz, judged, replaced, same_as
from hypothesis import example, given
from hypothesis import strategies as st

from leanstep.recipes.data.tokens import TokenFile, write_documents, write_shard


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "tokens"
    folder.mkdir()
    write_shard(folder / "tokens.bin", [np.arange(300) % 251], 300)
    write_documents(folder / "documents.npy", [70, 200, 300], [210, 400, 333])
    (folder.parent / "outside").mkdir()
    return folder


def content(folder):
    """Everything that training reads; the file's maps are closed, so that it may be replaced."""
    file = TokenFile(folder)
    assert file.ends.dtype == file.text_bytes.dtype == np.int64
    return str(file.tokens.dtype), *(np.array(values).tolist() for values in (file.tokens, file.ends, file.text_bytes))


def check(saved, name, data):
    """A changed file is refused by the error that builds it again, or says exactly the same."""
    expected = content(saved)
    with replaced(saved / name, data):
        judged("token files", lambda: content(saved), same_as(expected), outside=saved.parent / "outside")


@given(data=st.data())
@fuzz(150)
def test_damaged_files(saved, data):
    name = data.draw(st.sampled_from(("tokens.bin", "documents.npy", "documents.npy")))
    check(saved, name, data.draw(damaged((saved / name).read_bytes())))


def test_every_flipped_bit_of_the_document_index_is_noticed(saved):
    whole = (saved / "documents.npy").read_bytes()
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        check(saved, "documents.npy", bytes(changed))


@given(
    header=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=4, max_size=4)
    | st.tuples(st.just(20240520), st.sampled_from((1, 2)), st.integers(-(2**31), 2**31 - 1), st.just(0)),
    size=st.integers(0, 1100),
)
@example(header=(20240520, 1, -300, 0), size=1024 - 600)
@example(header=(20240520, 1, 2**31 - 1, 0), size=1024)
@fuzz(60)
def test_other_headers(saved, header, size):
    check(saved, "tokens.bin", (struct.pack("<4i", *header).ljust(1024, b"\0") + bytes(2**10))[:size])


def _npy(values):
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


DTYPES = ("<i8", "<i4", "<u8", ">i8", "<f8", "|b1", "|O", "<U3", "<M8[s]", "|V8")


@given(
    dtype=st.sampled_from(DTYPES), shape=st.sampled_from(((3, 3), (2, 3), (2, 0), (0,), (), (2, 3, 1), (1, 3), (3, 2)))
)
@fuzz(40)
def test_indices_of_other_types_and_shapes(saved, dtype, shape):
    """With a right checksum at their end, if they have the bytes for one."""
    raw = _npy(np.zeros(shape, dtype))
    check(saved, "documents.npy", raw)
    check(saved, "documents.npy", raw + struct.pack("<I", zlib.crc32(raw)))


@given(
    rows=st.lists(
        st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 400), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    )
)
@example(rows=[[70, 200, 300], [-210, 400, 333]])
@example(rows=[[-70, 200, 300], [210, 400, 333]])
@example(rows=[[0, 200, 300], [210, 400, 333]])
@example(rows=[[70, 60, 300], [210, 400, 333]])
@fuzz(60)
def test_indices_that_are_out_of_range_are_refused_whatever_their_checksum(saved, rows, tmp_path_factory):
    folder = saved.parent / "other"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    ends, sizes = rows[0], rows[1] if len(rows) > 1 else [1, 1, 1]
    write_documents(folder / "documents.npy", ends, sizes)
    right = min(sizes) >= 0 and ends[0] > 0 and sorted(set(ends)) == ends and ends[-1] == 300
    expected = (*content(saved)[:2], ends, sizes)
    assert judged("token files", lambda: content(folder), same_as(expected)) == right


class _Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_a_pickled_index_runs_nothing(saved, tmp_path):
    raw = _npy(np.array([[_Touch(str(tmp_path / "executed"))]], dtype=object))
    assert pickle.dumps(_Touch("x")) and b"executed" in raw
    check(saved, "documents.npy", raw)
    assert not (tmp_path / "executed").exists()
