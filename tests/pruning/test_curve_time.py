"""What the time for measurements is spent on, by a clock that the tests set."""

import time

import pytest
from pruned_models import make_llama, tokens

from leanstep.pruning import measure_curves
from leanstep.pruning.measure import measure, measurement
from leanstep.pruning.score import calibration

LEVELS = (0.5, 0.9)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that ``time.monotonic`` returns; a list of one number."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def sources(score, method, minutes):
    curves = measure_curves(make_llama(2), tokens(4), score=score, levels=LEVELS, method=method, minutes=minutes)
    return [curve.source for curve in curves.values()]


@pytest.fixture
def slow_levels(clock, monkeypatch):
    """A matrix takes ten seconds to be pruned to a level, however large it is."""

    def pruned(*arguments):
        for changed in real(*arguments):
            clock[0] += 10.0
            yield changed

    real = measurement.prune_group
    monkeypatch.setattr(measurement, "prune_group", pruned)


def test_the_time_of_fisher_curves_is_not_taken_from_the_measurements(clock, monkeypatch):
    def slow(*arguments):
        clock[0] += 1000.0
        return real(*arguments)

    real = measure.fisher_curves
    monkeypatch.setattr(measure, "fisher_curves", slow)
    assert set(sources("wanda", "anchored", minutes=1.0)) == {"anchored"}


def test_the_choice_of_curves_counts_the_time_of_the_levels(slow_levels):
    # 14 matrices, two levels each
    assert set(sources("sparsegpt", None, minutes=60.0)) == {"measured"}
    assert "measured" not in sources("sparsegpt", None, minutes=3.0)


def test_within_the_time_those_matrices_are_measured_for_which_it_suffices(slow_levels, clock):
    begin, anchored = clock[0], sources("alps", "anchored", minutes=1.0).count("anchored")
    assert 4 <= anchored <= 8
    # Fisher curves (28 levels), one block's levels for the clock, and a minute of measurements, overrun by one at most
    assert clock[0] - begin <= 280 + 70 + 70


def test_the_first_measurements_show_how_many_more_fit_into_the_time(clock, monkeypatch):
    """Each takes longer than a pass of the model tells. The time does not end them at the first blocks."""

    def slow(self, changed):
        clock[0] += 2.5
        return real(self, changed)

    real = measurement.Measurement.measure
    monkeypatch.setattr(measurement.Measurement, "measure", slow)
    monkeypatch.setattr(measurement.Measurement, "seconds_of_singles", lambda self, groups: 1.0 * len(groups))
    monkeypatch.setattr(measurement.Measurement, "affordable", lambda self, groups, seconds: groups[: int(seconds)])
    begin = clock[0]
    curves = measure_curves(make_llama(4), tokens(4), score="wanda", levels=LEVELS, method="anchored", minutes=0.5)
    names = [name.split(".")[2:5] for name, curve in curves.items() if curve.source == "anchored"]
    # ten in a third of the half minute, as expected, and two in what they left
    assert len(names) == 12 and clock[0] - begin <= 30.0
    assert len({kind for _, _, kind in names}) == 7 and len({block for block, _, _ in names}) == 4


def test_the_pruners_of_a_score_count_for_a_single_measurement(clock, monkeypatch):
    def slow(self, name):
        if name not in before:
            before.add(name)
            clock[0] += 10.0
        return real(self, name)

    before, real, seconds = set(), calibration.Pruners.__getitem__, []
    monkeypatch.setattr(calibration.Pruners, "__getitem__", slow)
    affordable = measurement.Measurement.affordable

    def noted(self, groups, limit):
        seconds.append(self.seconds_of_singles(groups))
        return affordable(self, groups, limit)

    monkeypatch.setattr(measurement.Measurement, "affordable", noted)
    sources("sparsegpt", "anchored", minutes=1.0)
    assert seconds[0] == pytest.approx(140.0), "ten for each of 14 matrices"


def test_no_stage_is_entered_after_the_time(clock, monkeypatch):
    def late(self, changed):
        clock[0] += 100.0
        return real(self, changed)

    real, entered = measurement.Measurement.measure, []
    monkeypatch.setattr(measurement.Measurement, "measure", late)
    enter = measurement.Measurement._enter
    monkeypatch.setattr(measurement.Measurement, "_enter", lambda self, *a: (entered.append(a[0]), enter(self, *a))[1])
    assert sources("wanda", "anchored", minutes=1.0).count("anchored") == 1
    assert len(entered) == 1
