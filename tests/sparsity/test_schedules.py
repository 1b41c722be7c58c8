"""Schedules: the published tables, where frames begin, and that the target is always reached."""

import itertools
import math

import pytest

from leanstep.sparsity import NM, Schedule
from leanstep.sparsity.training.schedules import KINDS

TARGETS = [NM(2, 4), NM(1, 4), NM(1, 8), NM(1, 32), NM(1, 128), NM(3, 8), NM(3, 7), NM(0, 4), NM(3, 4), NM(4, 4)]


def frames_seen(schedule, target):
    """The patterns in order and the step each begins at."""
    seen = {}
    for step in range(schedule.total_steps):
        seen.setdefault(schedule.at(step, target).pattern, step)
    return seen


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        ("2:4", [3, 2]),
        ("1:8", [7, 4, 2, 1]),
        ("1:32", [31, 16, 8, 4, 2, 1]),
        ("1:128", [127, 64, 32, 16, 8, 4, 2, 1]),
        # no power of two: the published code ends at 4:8
        ("3:8", [7, 4, 3]),
        ("3:7", [6, 3]),
        ("3:4", [3]),
    ],
)
def test_stepwise_frames(target, kept):
    target = NM.parse(target)
    schedule = Schedule(kind="sdgf-stepwise", total_steps=100)
    assert schedule.frames(target) == [NM(n, target.m) for n in kept]
    assert list(frames_seen(schedule, target)) == schedule.frames(target)


@pytest.mark.parametrize(
    ("target", "coarsest", "names"),
    [
        ("2:4", 8, ["16:32", "8:16", "4:8", "2:4"]),
        ("1:8", 8, ["8:64", "4:32", "2:16", "1:8"]),
        # the five frames of the paper
        ("1:8", 16, ["16:128", "8:64", "4:32", "2:16", "1:8"]),
        ("1:8", 1, ["1:8"]),
    ],
)
def test_geometric_frames(target, coarsest, names):
    schedule = Schedule(kind="sdgf-geometric", total_steps=50, coarsest=coarsest)
    frames = schedule.frames(NM.parse(target))
    assert [str(frame) for frame in frames] == names
    assert {frame.density for frame in frames} == {NM.parse(target).density}


@pytest.mark.parametrize(("dense", "finetune"), [(0.0, 0.0), (0.1, 0.25), (0.33, 0.0)])
@pytest.mark.parametrize("total", [7, 100, 101])
def test_frames_begin_where_the_formula_says(total, dense, finetune):
    target = NM(1, 8)
    schedule = Schedule(kind="sdgf-stepwise", total_steps=total, dense=dense, finetune=finetune)
    d, f = int(dense * total), int(finetune * total)
    assert (schedule.dense_steps, schedule.finetune_steps, schedule.span) == (d, f, total - d - f)
    starts = [d + int(i * schedule.span / 4) for i in range(4)]
    found = frames_seen(schedule, target)
    assert [found[NM(n, 8)] for n in (7, 4, 2, 1)] == starts
    assert all(schedule.at(step, target).phase == "dense" for step in range(d))
    last = schedule.at(total - 1, target)
    assert last.pattern == target and last.phase == ("finetune" if f else "sparse")


@pytest.mark.parametrize("kind", KINDS)
def test_every_schedule_ends_at_its_target_and_never_turns_back(kind):
    lengths = ((1, 0, 0), (3, 0, 0.5), (97, 0.1, 0.2), (60, 1, 0), (60, 0.5, 0.5))
    for target, (total, dense, finetune) in itertools.product(TARGETS, lengths):
        schedule = Schedule(kind=kind, total_steps=total, dense=dense, finetune=finetune)
        stages = [schedule.at(step, target) for step in range(total + 3)]
        for before, after in itertools.pairwise(stages):
            assert after.pattern.density <= before.pattern.density
            assert 0 <= after.alpha <= before.alpha <= 1
        for step in (total, total + 2, 10**9):
            stage = schedule.at(step, target)
            assert (stage.pattern, stage.alpha) == (target, 0.0)
        for stage in stages:
            if stage.phase == "dense":
                assert stage.pattern.is_dense and stage.alpha == 1
            if stage.phase == "finetune":
                assert (stage.pattern, stage.alpha) == (target, 0.0)


@pytest.mark.parametrize(
    ("kind", "decay", "table"),
    [
        ("mdgf-exponential", 1e-4, {1_000: 0.905, 5_000: 0.607, 10_000: 0.368, 25_000: 0.082, 50_000: 0.007}),
        ("mdgf-exponential", 2e-4, {1_000: 0.819, 5_000: 0.368, 10_000: 0.135, 25_000: 0.007, 50_000: 5e-5}),
        ("mdgf-linear", 2e-4, {0: 1.0, 2_500: 0.5, 4_999: 0.0002, 5_000: 0.0, 50_000: 0.0}),
        ("mdgf-linear", 8e-4, {0: 1.0, 625: 0.5, 1_250: 0.0}),
    ],
)
def test_decay_follows_the_table(kind, decay, table):
    schedule = Schedule(kind=kind, total_steps=200_000, decay=decay)
    for step, alpha in table.items():
        stage = schedule.at(step, NM(1, 32))
        assert stage.alpha == pytest.approx(alpha, abs=5e-4 if alpha > 1e-3 else 5e-6)
        assert stage.pattern == NM(1, 32)


def test_the_decay_counts_from_the_end_of_the_dense_phase():
    late = Schedule(kind="mdgf-exponential", total_steps=1000, dense=0.3, decay=1e-2)
    early = Schedule(kind="mdgf-exponential", total_steps=700, decay=1e-2)
    target = NM(1, 8)
    assert [late.at(300 + j, target) for j in range(700)] == [early.at(j, target) for j in range(700)]
    assert late.at(299, target).alpha == late.at(300, target).alpha == 1


@pytest.mark.parametrize(("kind", "end"), [("mdgf-linear", None), ("mdgf-linear", 0.2), ("mdgf-exponential", 1e-3)])
def test_the_decay_may_be_given_by_its_end(kind, end):
    schedule = Schedule(kind=kind, total_steps=400, finetune=0.25, alpha_end=end)
    rate = schedule.at(0, NM(1, 4)).alpha - schedule.at(1, NM(1, 4)).alpha
    expected = (1 - (end or 0)) / 300 if kind == "mdgf-linear" else 1 - math.exp(math.log(1e-3) / 300)
    assert rate == pytest.approx(expected, rel=1e-9)
    assert schedule.at(299, NM(1, 4)).alpha > (end or 0) and schedule.at(300, NM(1, 4)).alpha == 0


def test_an_alpha_that_no_float_would_miss_is_zero():
    schedule = Schedule(kind="mdgf-exponential", total_steps=1000, decay=0.1)
    smallest = min(a for step in range(1000) if (a := schedule.at(step, NM(1, 4)).alpha))
    assert 1e-6 <= smallest < 1.2e-6


def test_both_kinds_of_gradient_flow_at_once():
    schedule = Schedule(kind="sdgf-geometric+mdgf-linear", total_steps=80)
    stages = [schedule.at(step, NM(1, 4)) for step in (0, 20, 40, 60, 79)]
    assert [str(s.pattern) for s in stages] == ["8:32", "4:16", "2:8", "1:4", "1:4"]
    assert [s.alpha for s in stages] == pytest.approx([1, 0.75, 0.5, 0.25, 1 / 80])


def test_a_schedule_has_no_memory():
    schedule = Schedule(kind="sdgf-stepwise+mdgf-exponential", total_steps=53, dense=0.1, finetune=0.1)
    forwards = [schedule.at(step, NM(3, 8)) for step in range(60)]
    twin = Schedule(kind="sdgf-stepwise+mdgf-exponential", total_steps=53, dense=0.1, finetune=0.1)
    assert [twin.at(step, NM(3, 8)) for step in reversed(range(60))] == forwards[::-1]
    assert twin == schedule and hash(twin) == hash(schedule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "mdgf"}, "one of constant, mdgf-linear.*got .mdgf.$"),
        ({"total_steps": 0}, "total_steps must be an integer >= 1, got 0"),
        ({"dense": 1.5}, "dense must be a fraction"),
        ({"dense": 0.6, "finetune": 0.6}, "finetune must be a fraction in"),
        ({"kind": "mdgf-linear", "decay": 0.0}, "decay must be > 0"),
        ({"kind": "mdgf-exponential", "alpha_end": 0.0}, "alpha_end must be in"),
        ({"kind": "mdgf-linear", "decay": 1e-3, "alpha_end": 0.1}, "set the same rate"),
        ({"decay": 1e-3}, "has no decay"),
        ({"coarsest": 6}, "coarsest must be a power of two"),
        ({"coarsest": 8.0}, "coarsest must be a power of two"),
    ],
)
def test_settings_that_cannot_be_meant(options, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{"total_steps": 100, **options})


@pytest.mark.parametrize("dense", [0.9, 0.7, 0.8, 0.1])
def test_a_dense_and_a_last_phase_may_fill_the_run(dense):
    """1 - 0.9 is less than 0.1 in floating point."""
    schedule = Schedule(kind="mdgf-linear", total_steps=100, dense=dense, finetune=round(1 - dense, 1))
    assert schedule.span in (0, 1)  # phases are rounded down
    assert schedule.at(99, NM(2, 4)).phase == "finetune"


def test_there_is_no_step_before_the_first():
    with pytest.raises(ValueError, match="step must be >= 0, got -1"):
        Schedule(total_steps=3).at(-1, NM(2, 4))
