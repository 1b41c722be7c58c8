"""Files of measured points and of latencies: whatever is changed in them is noticed, or makes no difference."""

import json
import math
import os
import random
import resource
import zlib

import pytest

from leanstep._processes import Processes
from leanstep.pruning import LatencyTable
from leanstep.pruning.measure.curve_file import PartialCurves
from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.measure.metrics import Distortion

IDENTITY = {"model": "abc", "levels": [0.5, 0.75], "metric": "kl"}


@pytest.fixture
def file(tmp_path):
    curves = PartialCurves(tmp_path / "out.curves.jsonl", IDENTITY)
    for layer in range(3):
        for kept in (64, 32, 16):
            curves.add(f"layer.{layer}.weight", kept, Distortion(kept / 7, 0.25))
    return curves.path


def points(file):
    return PartialCurves(file, IDENTITY).points


def test_points_of_one_sample_have_no_error_and_are_read_again(file):
    PartialCurves(file, IDENTITY).add("layer.3.weight", 64, Distortion(0.5, math.nan))
    assert points(file)["layer.3.weight", 64] == Distortion(0.5, 0.0)


def test_every_flipped_bit_is_noticed_or_costs_the_last_line(file):
    whole, expected = file.read_bytes(), points(file)
    chance = random.Random(0)
    for _ in range(400):
        damaged = bytearray(whole)
        place = chance.randrange(len(whole))
        damaged[place] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        try:
            curves = points(file)
        except ValueError as error:
            assert str(file) in str(error)
            continue
        # another line break says the same; without the last one, the last line counts as cut short
        assert curves == expected or (place == len(whole) - 1 and curves == dict(list(expected.items())[:-1]))


def test_cut_files_keep_their_whole_lines(file):
    whole, expected = file.read_bytes(), list(points(file).items())
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        lines = whole[:length].count(b"\n")
        assert points(file) == dict(expected[: max(0, lines - 1)])


ROWS = {
    "text for a number": ["w", 3, "0.5", 0.1],
    "NaN": ["w", 3, float("nan"), 0.1],
    "a negative error": ["w", 3, 0.5, -0.1],
    "a fraction of a weight": ["w", 3.5, 0.5, 0.1],
    "a truth value": ["w", True, 0.5, 0.1],
    "no name": [7, 3, 0.5, 0.1],
    "too few": ["w", 3],
    "no list": 5,
    "two points of a level": ["layer.0.weight", 64, 0.5, 0.1],
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_are_no_points_are_refused(file, case):
    text = json.dumps(ROWS[case])
    with file.open("a") as lines:
        lines.write(f"{text} {zlib.crc32(text.encode()):08x}\n")
    with pytest.raises(ValueError, match="holds no measured curves"):
        points(file)


def test_a_layer_with_two_rows_of_latencies_is_refused(tmp_path):
    file = tmp_path / "table.json"
    file.write_text('{"levels": [0, 0.5], "seconds": {"w": [2, 1], "v": [2, 1], "w": [4, 1]}}')
    with pytest.raises(ValueError, match="table.json: it has the name 'w' twice"):
        LatencyTable.read(file)


def test_a_latency_that_no_float_holds_is_refused(tmp_path):
    file = tmp_path / "table.json"
    file.write_text('{"levels": [0, 0.5], "seconds": {"w": [1%s, 1]}}' % ("0" * 400))
    with pytest.raises(ValueError, match="table.json: w at level 0: expected seconds"):
        LatencyTable.read(file)


def test_a_distortion_that_no_float_holds_is_refused(file):
    text = json.dumps(["w", 3, 10**400, 0.1])
    with file.open("a") as lines:
        lines.write(f"{text} {zlib.crc32(text.encode()):08x}\n")
    with pytest.raises(ValueError, match="holds no measured curves"):
        points(file)


def test_other_circumstances_are_told_in_one_line(file):
    with pytest.raises(ValueError, match="measured under other circumstances") as refused:
        PartialCurves(file, {**IDENTITY, "model": "a\nb\x1b[31m"})
    assert str(refused.value).isprintable()


def test_of_two_runs_with_one_file_the_second_is_refused(file):
    with PartialCurves.shared(file, IDENTITY, Processes()) as curves:
        curves.add("layer.3.weight", 64, Distortion(0.5, 0.25))
        with pytest.raises(ValueError, match="another run measures curves and writes .*out.curves.jsonl; wait"):
            PartialCurves.shared(file, IDENTITY, Processes()).__enter__()
    with PartialCurves.shared(file, IDENTITY, Processes()) as curves:
        assert curves.points["layer.3.weight", 64] == Distortion(0.5, 0.25)


def test_a_run_that_ends_before_its_first_point_leaves_no_file(tmp_path):
    path = tmp_path / "out.curves.jsonl"
    with PartialCurves.shared(path, IDENTITY, Processes()):
        assert path.exists()
    assert not path.exists()


def test_a_point_twice_is_one_point(file):
    expected = points(file)
    text = file.read_text()
    file.write_text(text + text.splitlines(keepends=True)[1])
    assert points(file) == expected


@pytest.mark.parametrize("entry", ["link", "dangling link", "pipe"])
def test_points_are_appended_to_no_link_or_pipe(file, tmp_path, entry):
    victim = tmp_path / "victim"
    if entry == "link":
        victim.write_bytes(file.read_bytes())
    before = victim.read_bytes() if entry == "link" else None
    file.unlink()
    os.mkfifo(file) if entry == "pipe" else file.symlink_to(victim)
    with pytest.raises(OSError, match="regular file"):
        points(file)
    assert (victim.read_bytes() if victim.exists() else None) == before


@pytest.mark.parametrize(
    "change", [{"numel": "64"}, {"counts": [64.0, 32]}, {"name": None}, {"stderr": 3}, {"more": 1}]
)
def test_a_curve_of_other_types_is_refused(change):
    saved = Curve("w", 64, (64, 32), (0.0, 0.5), (0.0, 0.0), "kl").to_dict()
    with pytest.raises(ValueError, match="^Curve "):
        Curve.from_dict(saved | change)


def test_whole_numbers_in_a_curve_are_numbers():
    saved = Curve("w", 64, (64, 32, 16), (0.0, 0.5, 1.0), (0.0, 0.5, 0.5), "kl").to_dict()
    assert Curve.from_dict(saved | {"stderr": [0, 1, 10**30]}).cleaned().distortion == (0.0, 0.5, 1.0)


def test_a_point_that_is_written_in_part_is_an_error_and_the_others_are_read(file):
    curves = PartialCurves(file, IDENTITY)
    before, limits = dict(curves.points), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(OSError, match="large"):
            curves.add("layer.3.weight", 64, Distortion(1.0, 0.25))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert PartialCurves(file, IDENTITY).points == before
