"""Measured curves, partial curves and latency tables: what is read is valid, and damage under a checksum is told."""

import json
import math
import zlib

import pytest
from fuzzing import ENTRIES, NUMBERS, VALUES, damaged, edits, fuzz, json_files, judged, plant, same_as, write
from hypothesis import example, given
from hypothesis import strategies as st

from leanstep.pruning import LatencyTable
from leanstep.pruning.allocate.descent import Descent, SearchFile
from leanstep.pruning.measure.curve_file import PartialCurves
from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.measure.metrics import Distortion

IDENTITY = {"model": "abc", "levels": [0.5, 0.75], "metric": "kl"}
TABLE = {"levels": [0, 0.5, 0.75], "seconds": {"layer.0.weight": [3e-4, 2e-4, 1e-4], "layer.1.weight": [3e-4, 2e-4, 0]}}
CURVE = {
    "name": "layer.0.weight", "numel": 64, "counts": [64, 32, 16], "distortion": [0.0, 0.1, 0.4],
    "stderr": [0.0, 0.01, 0.02], "metric": "kl", "patterns": ["8:8", "4:8", "2:8"],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pruning")
    (root / "outside").mkdir()
    (root / "inside").mkdir()
    return root


@pytest.fixture(scope="module")
def partial_curves(folder):
    curves = PartialCurves(folder / "inside" / "out.curves.jsonl", IDENTITY)
    for layer in range(2):
        for count in (64, 32, 16):
            curves.add(f"layer.{layer}.weight", count, Distortion(count / 7, 0.25))
    return curves.path.read_bytes()


def read_points(folder, content):
    path = folder / "inside" / "out.curves.jsonl"
    write(path, content)
    return list(PartialCurves(path, IDENTITY).points.items())


def points_of(folder, content, right):
    inside, outside = folder / "inside", folder / "outside"
    return judged("partial curves", lambda: read_points(folder, content), right, inside, outside=outside)


@given(data=st.data())
@fuzz(80)
def test_damaged_partial_curves_are_refused_or_lose_lines_at_their_end(folder, partial_curves, data):
    """A line that a crash cut short counts as not measured, and so do lines after it."""
    expected = read_points(folder, partial_curves)

    def right(points):
        assert points == expected[: len(points)]
        return points == expected

    points_of(folder, data.draw(damaged(partial_curves)), right)


@given(data=st.data())
@fuzz(100)
def test_partial_curves_with_other_values_and_right_checksums_are_valid(folder, partial_curves, data):
    """Whoever writes right checksums may write other finite points."""
    rows = [json.loads(line.rpartition(" ")[0]) for line in partial_curves.decode().splitlines()]
    lines = [json.dumps(row) for row in data.draw(edits(rows))]
    expected = read_points(folder, partial_curves)

    def right(points):
        for (name, count), point in points:
            assert isinstance(name, str) and type(count) is int and count >= 0
            assert math.isfinite(point.mean) and math.isfinite(point.stderr) and point.stderr >= 0
        return points == expected

    content = "".join(f"{line} {zlib.crc32(line.encode()):08x}\n" for line in lines)
    points_of(folder, content.encode(), right)


@pytest.mark.parametrize("entry", ENTRIES)
def test_nothing_but_a_file_holds_partial_curves(folder, partial_curves, entry):
    path = folder / "inside" / "out.curves.jsonl"
    write(path, partial_curves)
    plant(path, entry, folder / "outside" / "curves")

    def add():
        curves = PartialCurves(path, IDENTITY)
        curves.add("more", 1, Distortion(0.5, 0.25))
        return list(curves.points)

    try:
        read = judged("partial curves", add, same_as([("more", 1)]), folder / "inside")
        assert read == (entry == "nothing")
        assert (
            not (folder / "outside" / "curves").exists()
            or (folder / "outside" / "curves").read_bytes() == partial_curves
        )
    finally:
        path.rmdir() if entry == "folder" else path.unlink()
        (folder / "outside" / "curves").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def search_state(folder):
    file = SearchFile(folder / "inside" / "out.refine.json", IDENTITY)
    file.write(Descent({"a": 5, "b": 7}, 9, 1.5, 2.25, [(0, 0.0, 1.0, 0.5), (4, 0.5, 0.25, 0.125)], "", 1, 3))
    return file.path.read_bytes()


def read_state(folder, content):
    path = folder / "inside" / "out.refine.json"
    write(path, content)
    return SearchFile(path, IDENTITY).read()


@given(data=st.data())
@fuzz(80)
def test_damaged_states_of_a_search_are_refused(folder, search_state, data):
    content, expected = data.draw(damaged(search_state)), read_state(folder, search_state)
    inside, outside = folder / "inside", folder / "outside"
    judged("state", lambda: read_state(folder, content), lambda state: state == expected, inside, outside=outside)


@given(data=st.data())
@fuzz(100)
def test_states_of_a_search_with_other_values_and_right_checksums_are_valid(folder, search_state, data):
    row = json.dumps(data.draw(edits(json.loads(search_state.decode().rpartition(" ")[0]))))
    content, expected = f"{row} {zlib.crc32(row.encode()):08x}\n".encode(), read_state(folder, search_state)

    def right(state):
        assert all(type(count) is int and count >= 0 for count in state.counts.values())
        assert type(state.evaluations) is int and state.points and math.isfinite(state.points[-1][2])
        return state == expected

    inside, outside = folder / "inside", folder / "outside"
    judged("state", lambda: read_state(folder, content), right, inside, outside=outside)


@given(content=json_files(json.dumps(TABLE).encode()))
@example(content=b'{"levels": [0, 0.5], "seconds": {"w": [1%s, 1]}}' % (b"0" * 400))
@fuzz(150)
def test_latency_tables(folder, content):
    """A table of other numbers is another table; its levels and seconds are in range."""
    path = folder / "inside" / "table.json"
    write(path, content)

    def right(table):
        assert table.levels[0] == 0 and all(
            0 <= a < b < 1 for a, b in zip(table.levels, table.levels[1:], strict=False)
        )
        assert all(len(row) == len(table.levels) and row[0] > 0 for row in table.seconds.values())
        assert all(math.isfinite(value) and value >= 0 for row in table.seconds.values() for value in row)
        return table.levels == tuple(TABLE["levels"]) and table.seconds == {
            name: tuple(row) for name, row in TABLE["seconds"].items()
        }

    judged("latency tables", lambda: LatencyTable.read(path), right, outside=folder / "outside")


@pytest.mark.parametrize("entry", ENTRIES)
def test_nothing_but_a_file_holds_a_latency_table(folder, entry):
    """A link that the user names is followed."""
    path = folder / "inside" / "table.json"
    write(path, json.dumps(TABLE).encode())
    plant(path, entry, folder / "outside" / "table")
    try:
        read = judged("latency tables", lambda: LatencyTable.read(path).levels, same_as((0, 0.5, 0.75)))
        assert read == (entry == "link outside")
    finally:
        (path.rmdir if path.is_dir() and not path.is_symlink() else lambda: path.unlink(missing_ok=True))()


@given(content=edits(CURVE, VALUES | st.lists(st.sampled_from(NUMBERS), min_size=3, max_size=3)))
@fuzz(150)
def test_curves_of_a_sidecar(content):
    """A curve with other numbers is another curve, with which an allocation can be computed."""

    def right(curve):
        clean = curve.cleaned()
        assert clean.distortion[0] == 0 and all(map(math.isfinite, clean.distortion))
        assert list(clean.distortion) == sorted(clean.distortion)
        return curve.to_dict() == CURVE

    judged("curves", lambda: Curve.from_dict(content), right)
