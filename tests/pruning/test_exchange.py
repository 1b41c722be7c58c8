"""Exchanges between layers and the search by them: the budget holds exactly, and the search descends to the optimum."""

import itertools
import math

import numpy as np
import pytest

from leanstep.pruning import Budget, Curve, Layer, Refinement, allocate, nm_levels
from leanstep.pruning.allocate.allocation import layer_levels
from leanstep.pruning.allocate.descent import STEPS, Descent, SearchFile, descend
from leanstep.pruning.allocate.exchange import ExchangeSpace
from leanstep.pruning.measure.metrics import Distortion

SIZES = {"a": 1000, "b": 1600, "c": 800, "d": 3000, "e": 1200}
# D = weight * sparsity^power
FORMS = {"a": (1.0, 2.0), "b": (0.1, 3.0), "c": (3.0, 2.5), "d": (0.7, 2.0), "e": (0.02, 4.0)}
NO_FILE = SearchFile(None, {})


def curve(name, counts, patterns=()):
    scale, power = FORMS[name]
    size = SIZES[name]
    distortion = tuple(scale * (1 - count / size) ** power for count in counts)
    return Curve(name, size, counts, distortion, (0.0,) * len(counts), "kl", patterns)


def space_of(kind="params", fraction=0.4, patterns=False):
    """The layers, their curves, a budget of ``fraction`` of the dense cost, and the space of exchanges."""
    layers = [Layer(name, (size // 8, 8), uses=1 + index) for index, (name, size) in enumerate(SIZES.items())]
    curves = {}
    for name, size in SIZES.items():
        counts = tuple(round(size * (1 - level)) for level in np.linspace(0, 0.95, 12))
        curves[name] = curve(name, *(nm_levels(size, 8, 1) if patterns else (counts,)))
    seconds = None
    if kind == "latency":
        seconds = {name: tuple(1e-3 * count / 7 for count in curves[name].counts) for name in SIZES}
    budget = Budget.fraction(kind, fraction, layers, seconds)
    if kind == "params":
        budget = Budget(kind, math.floor(budget.target))
    return layers, curves, budget, ExchangeSpace(layer_levels(layers, curves, budget), budget.target)


class AdditiveJudge:
    """Exact, without noise: the sum of the layers' distortions by their formulas."""

    def __init__(self, counts):
        self.counts, self.passes, self.judged = dict(counts), 0.0, []

    def at(self, counts):
        return sum(s * (1 - counts[n] / SIZES[n]) ** p for n, (s, p) in FORMS.items())

    @property
    def distortion(self):
        return Distortion(self.at(self.counts), 0.0)

    def go_to(self, counts, patterns):
        self.counts = dict(counts)

    def judge(self, counts, patterns, noise):
        self.judged.append(dict(counts))
        self.passes += 1
        change = self.at(counts) - self.at(self.counts)
        if change < 0:
            self.counts = dict(counts)
        return Distortion(change, 0.0)

    def slopes(self, levels):
        return {name: self.at({**self.counts, name: level[0]}) - self.at(self.counts) for name, level in levels.items()}


KINDS = [("params", False), ("params", True), ("flops", False), ("bytes", False), ("latency", False)]


@pytest.mark.parametrize(("kind", "patterns"), KINDS)
def test_no_exchange_costs_more_than_the_budget_and_levels_stay_levels(kind, patterns):
    layers, curves, budget, space = space_of(kind, patterns=patterns)
    counts = allocate(layers, budget=budget, curves=curves).counts
    generator = np.random.default_rng(0)
    drawn = [space.random(counts, generator, float(share)) for share in generator.choice(STEPS, 200)]
    possible = [new for new in drawn if new is not None]
    assert len(possible) > 20
    for new in possible:
        assert new != counts and space.cost(new) <= budget.target * (1 + 1e-9)
        assert all(curves[name].counts[-1] <= count <= SIZES[name] for name, count in new.items())
        if patterns or kind == "latency":
            assert all(count in curves[name].counts for name, count in new.items())
        elif kind == "params":
            assert sum(new.values()) == budget.target
    if patterns:
        assert all(pattern == f"{8 * new[n] // SIZES[n]}:8" for n, pattern in space.patterns(new).items())


def test_a_layer_gains_its_share_and_the_payers_pay_by_size():
    layers, curves, budget, space = space_of()
    counts = allocate(layers, 0.6, method="uniform").counts
    space.target = sum(counts.values())
    new = space.exchange(counts, ["a"], ["b", "d"], 0.1)
    assert new == {**counts, "a": counts["a"] + 100, "b": new["b"], "d": new["d"]}
    assert counts["b"] - new["b"] == math.ceil(100 * 1600 / 4600) and sum(new.values()) == space.target
    assert space.exchange(counts, ["a"], [], 0.1) is None
    dense = {**counts, "a": 1000}
    assert space.exchange(dense, ["a"], ["b"], 0.1) is None


def test_a_step_down_reaches_a_level_that_is_farther_than_its_share():
    *_, space = space_of(patterns=True)
    assert space.step_down("a", 500, 0.01) == 375 and space.step_down("a", 500, 0.3) == 250
    assert space.denser("a", 500, 0.01) == 625


def test_proposals_begin_with_many_layers_and_go_on_with_the_steepest_pair():
    layers, curves, budget, space = space_of()
    counts = allocate(layers, 0.6, method="uniform").counts
    space.target = sum(counts.values())
    up = dict(zip("abcde", (-5.0, -1.0, -9.0, -2.0, -3.0), strict=True))
    down = {name: -slope for name, slope in up.items()}
    first, *others = space.proposals(counts, up, down, 0.05, 20)
    changed = {name: first[name] - counts[name] for name in counts}
    assert changed["c"] > 0 and changed["a"] > 0 and changed["b"] < 0 and changed["d"] < 0 and changed["e"] == 0
    pair = {name for name in counts if others[0][name] != counts[name]}
    assert pair == {"c", "b"} and others[0]["c"] > counts["c"]
    assert all(one != two for one, two in itertools.combinations([first, *others], 2))


@pytest.mark.parametrize("start", ["uniform", "erk"])
def test_the_search_comes_near_the_optimum_of_distortions_that_add_up(start):
    layers, curves, budget, space = space_of()
    best = allocate(layers, budget=budget, curves=curves)
    counts = allocate(layers, 1 - budget.target / sum(SIZES.values()), method=start).counts
    judge = AdditiveJudge(counts)
    before, optimum = judge.distortion.mean, judge.at(best.counts)
    descent = descend(judge, space, Refinement(evaluations=400), NO_FILE)
    means = [point[2] for point in descent.points]
    assert means[0] == before and means == sorted(means, reverse=True)
    assert descent.accepted == len(means) - 1 > 3 and descent.ended == "evaluations"
    assert len(judge.judged) == descent.evaluations == 400 and descent.passes == 400
    assert means[-1] == judge.at(descent.counts) < optimum + 0.02 * (before - optimum)
    assert sum(descent.counts.values()) <= budget.target


def test_the_search_depends_on_the_seed_alone():
    layers, curves, budget, space = space_of()
    counts = allocate(layers, budget=budget, curves=curves).counts

    def judged(seed):
        judge = AdditiveJudge(counts)
        descend(judge, space, Refinement(evaluations=150, seed=seed), NO_FILE)
        return judge.judged

    assert judged(0) == judged(0) != judged(1)


def test_an_accepted_exchange_is_repeated_without_new_slopes_until_it_is_rejected():
    layers, curves, budget, space = space_of()
    counts = allocate(layers, 1 - budget.target / sum(SIZES.values()), method="uniform").counts

    class Counting(AdditiveJudge):
        calls = 0

        def judge(self, new, patterns, noise):
            before, calls, self.calls = self.counts, self.calls, 0
            change = super().judge(new, patterns, noise)
            steps.append(({name: new[name] - before[name] for name in SIZES}, calls, self.counts == new, new))
            return change

        def slopes(self, levels):
            self.calls += 1
            return super().slopes(levels)

    steps = []
    descend(Counting(counts), space, Refinement(evaluations=200), NO_FILE)
    repetitions = 0
    for (step, _, accepted, at), (following, calls, *_) in itertools.pairwise(steps):
        again = {name: at[name] + step[name] for name in SIZES}
        if accepted and space.holds(again):
            assert following == step and calls == 0
            repetitions += 1
    assert repetitions > 2


def test_without_a_gradient_the_curves_order_the_exchanges():
    layers, curves, budget, space = space_of()
    counts = allocate(layers, 1 - budget.target / sum(SIZES.values()), method="uniform").counts
    judge = AdditiveJudge(counts)
    judge.slopes = lambda levels: None
    before, best = judge.distortion.mean, judge.at(allocate(layers, budget=budget, curves=curves).counts)
    assert descend(judge, space, Refinement(evaluations=400), NO_FILE).points[-1][2] < best + 0.02 * (before - best)


@pytest.mark.parametrize("stop", [1, 7, 33, 90])
def test_an_interrupted_search_goes_on_to_the_same_end(tmp_path, stop):
    layers, curves, budget, space = space_of()
    counts = allocate(layers, budget=budget, curves=curves).counts

    class Killed(AdditiveJudge):
        def judge(self, *given):
            if len(self.judged) == stop:
                raise KeyboardInterrupt
            return super().judge(*given)

    settings, identity = Refinement(evaluations=120), {"weights": "abc"}
    whole = descend(AdditiveJudge(counts), space, settings, NO_FILE)
    file = SearchFile(tmp_path / "out.refine.json", identity)
    with pytest.raises(KeyboardInterrupt):
        descend(Killed(counts), space, settings, file)
    again = descend(AdditiveJudge(counts), space, settings, SearchFile(file.path, identity))
    assert again.counts == whole.counts and again.evaluations == 120
    assert [(e, mean) for e, _, mean, _ in again.points] == [(e, mean) for e, _, mean, _ in whole.points]
    assert file.read() == again


def test_a_search_that_ended_without_an_exchange_ends_again_when_continued(tmp_path):
    class Nothing(ExchangeSpace):
        drawn = 0

        def proposals(self, *given):
            return iter(())

        def random(self, *given):
            self.drawn += 1
            assert self.drawn < 1000, "the search does not end"

    layers, curves, budget, space = space_of()
    counts = allocate(layers, budget=budget, curves=curves).counts
    file = SearchFile(tmp_path / "out.refine.json", {})
    for _ in range(3):
        descent = descend(
            AdditiveJudge(counts), Nothing(list(space.levels.values()), space.target), Refinement(minutes=5), file
        )
        assert descent.ended == "no exchange" and descent.evaluations == 0


def test_another_search_and_damage_are_refused(tmp_path):
    path = tmp_path / "out.refine.json"
    descent = Descent({"a": 5}, 3, points=[(0, 0.0, 1.0, math.nan), (2, 0.5, 0.5, 0.25)])
    SearchFile(path, {"weights": "abc", "seed": 0}).write(descent)
    read = SearchFile(path, {"weights": "abc", "seed": 0}).read()
    assert (read.counts, read.evaluations, read.points[1]) == ({"a": 5}, 3, (2, 0.5, 0.5, 0.25))
    with pytest.raises(ValueError, match="weights: abc then, def now.*undo the change.*or remove it"):
        SearchFile(path, {"weights": "def", "seed": 0}).read()
    whole = path.read_bytes()
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(ValueError, match=r"out.refine.json holds no state of a search"):
            SearchFile(path, {"weights": "abc", "seed": 0}).read()


def test_a_state_beyond_the_budget_is_refused(tmp_path):
    layers, curves, budget, space = space_of()
    counts = allocate(layers, budget=budget, curves=curves).counts
    file = SearchFile(tmp_path / "out.refine.json", {"weights": "abc"})
    for wrong in ({**counts, "a": counts["a"] + 1}, {"a": 5}, {**counts, "a": 0}):
        file.write(Descent(wrong, 3, points=[(0, 0.0, 1.0, 0.5)]))
        with pytest.raises(ValueError, match=r"out.refine.json holds counts that are no levels within the budget"):
            descend(AdditiveJudge(counts), space, Refinement(evaluations=9), file)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give minutes, evaluations or both"),
        ({"minutes": 0.0}, "minutes must be positive, got 0"),
        ({"minutes": math.nan}, "minutes must be positive, got nan"),
        ({"evaluations": 0}, "a whole number from 1 on, got 0"),
        ({"minutes": 1.0, "seed": -1}, "seed must be a whole number from 0 on, got -1"),
        ({"minutes": 1.0, "seed": 1.5}, "seed must be a whole number from 0 on, got 1.5"),
        ({"evaluations": 2, "noise": -1.0}, "noise must be a number from 0 on, got -1"),
    ],
)
def test_limits_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Refinement(**settings)
