"""Allocations against their formulas on toy tensors and against brute force, to the exact count."""

import itertools
import json
import tracemalloc

import numpy as np
import pytest
import torch

from leanstep.pruning import (
    Allocation,
    Budget,
    Curve,
    InfeasibleBudget,
    Layer,
    allocate,
    allocations_along,
    atp_betas,
    level_grid,
    nm_levels,
    outlier_ratio,
    snap,
)
from leanstep.pruning.allocate import allocation, closed_form, knapsack
from leanstep.pruning.allocate.closed_form import lamp_scores
from leanstep.pruning.allocate.knapsack import solve_knapsack
from leanstep.pruning.allocate.relaxed import RelaxedKnapsack


def power_curve(layer, weight, power=2.0, levels=None):
    """D = weight * sparsity^power / density."""
    kept = levels or level_grid(layer.numel, 0.7)
    found = [weight * (1 - k / layer.numel) ** power / max(k / layer.numel, 0.01) for k in kept]
    return Curve(layer.name, layer.numel, kept, tuple(found), (0.0,) * len(kept), "kl")


def sparsity_of(allocation, name):
    return 1 - allocation.counts[name] / allocation.numel[name]


@pytest.fixture
def blocks():
    """Twelve layers of three sizes in four blocks, curves of different steepness."""
    shapes = {"q": (32, 32), "up": (96, 32), "down": (32, 90)}
    layers = [Layer(f"{b}.{name}", shape, b) for b in range(4) for name, shape in shapes.items()]
    curves = {layer.name: power_curve(layer, 1.0 + 3 * (i % 5), 2.0 + i % 3) for i, layer in enumerate(layers)}
    return layers, curves


def needs(method, layers):
    """What a method asks for, made up."""
    generator = torch.Generator().manual_seed(3)
    scores = {layer.name: torch.randn(layer.shape, generator=generator).abs() for layer in layers}
    return {
        "global": {"scores": scores},
        "lamp": {"scores": scores},
        "owl": {"outliers": {0: 5.0, 1: 3.5, 2: 1.0, 3: 2.0}},
        "atp": {"beta": 0.05},
    }.get(method, {})


@pytest.mark.parametrize("method", ["dp", "uniform", "global", "lamp", "erk", "owl", "atp"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.8137])
def test_every_rule_keeps_exactly_what_was_asked(blocks, method, sparsity):
    layers, curves = blocks
    total = sum(layer.numel for layer in layers)
    found = allocate(layers, sparsity, method=method, curves=curves, **needs(method, layers))
    assert sum(found.counts.values()) == found.target == total - int(np.ceil(sparsity * total - 1e-6))
    assert found.sparsity >= sparsity and found.sparsity - sparsity < 1 / total
    assert list(found.counts) == [layer.name for layer in layers]
    assert all(0 <= found.counts[layer.name] <= layer.numel for layer in layers)
    saved = json.loads(json.dumps(found.to_dict()))
    assert Allocation.from_dict(saved) == found
    # as before the counts were renamed
    former = {"kept" if key == "counts" else key: value for key, value in saved.items()} | {"lagrange_gap": 0.0}
    assert Allocation.from_dict(former) == found and found.kept == found.counts
    reverse = allocate(layers[::-1], sparsity, method=method, curves=curves, **needs(method, layers))
    assert reverse.counts == found.counts and reverse.predicted == pytest.approx(found.predicted, rel=1e-12)


def jagged(rng, numel, levels):
    """A measured curve that no smooth one goes through: steps of any height at counts of any kind."""
    kept = np.sort(rng.choice(np.arange(1, numel), levels, replace=False))[::-1]
    distortion = np.cumsum(rng.random(levels) ** 6)
    return (numel, *kept.tolist()), (0.0, *distortion.tolist())


def jagged_layers(seed, sizes, levels):
    rng = np.random.default_rng(seed)
    layers = [Layer(f"{i}", (1, numel)) for i, numel in enumerate(sizes)]
    points = [jagged(rng, layer.numel, levels) for layer in layers]
    return layers, {
        layer.name: Curve(layer.name, layer.numel, kept, distortion, (0.0,) * (levels + 1), "kl")
        for layer, (kept, distortion) in zip(layers, points, strict=True)
    }


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("scale", [1, 1000])
def test_no_allocation_of_measured_levels_beats_the_program(seed, scale):
    """Exact up to 65,536 weights between sparsest and densest; above, costs are rounded to 1/32768 of the layers."""
    layers, curves = jagged_layers(seed, [n * scale for n in (150, 400, 700, 333)], 5)
    every = list(itertools.product(*(range(6) for _ in layers)))
    paid = np.array([sum(curves[x.name].counts[k] for x, k in zip(layers, ks, strict=True)) for ks in every])
    lost = np.array([sum(curves[x.name].distortion[k] for x, k in zip(layers, ks, strict=True)) for ks in every])
    for budget in np.random.default_rng(seed).permutation(paid)[:60].tolist():
        found = allocate(layers, budget=Budget("params", budget), curves=curves)
        best = lost[paid <= budget].min()
        assert found.predicted <= best * (1 + (1e-12 if scale == 1 else 1e-3)) + 1e-15
        if all(found.counts[x.name] in curves[x.name].counts for x in layers):
            assert found.predicted == sum(
                curves[x.name].distortion[curves[x.name].counts.index(found.counts[x.name])] for x in layers
            )


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7])
def test_one_layer_is_predicted_what_was_measured(sparsity):
    kept = level_grid(100_000, sparsity)
    rng = np.random.default_rng(0)
    distortion = (0.0, *np.cumsum(rng.random(len(kept) - 1) ** 6).tolist())
    layer, measured = Layer("w", (1, 100_000)), Curve("w", 100_000, kept, distortion, (0.0,) * len(kept), "kl")
    for count, expected in zip(kept, distortion, strict=True):
        found = allocate([layer], budget=Budget("params", count), curves={"w": measured})
        assert found.counts == {"w": count} and found.predicted == expected


@pytest.mark.parametrize("method", ["dp", "uniform", "global", "lamp", "erk", "owl", "atp"])
def test_bounds_hold_and_the_total_too(blocks, method):
    layers, curves = blocks
    before = {layer.name: layer.numel - 100 * i for i, layer in enumerate(layers)}
    before = {name: max(count, 500) for name, count in before.items()}
    found = allocate(layers, 0.6, method=method, curves=curves, at_most=before, **needs(method, layers))
    assert sum(found.counts.values()) == found.target
    for layer in layers:
        assert 0 <= found.counts[layer.name] <= before[layer.name]


def test_uniform_differs_by_rounding_only():
    layers = [Layer(name, (1, n)) for name, n in (("a", 10), ("b", 7), ("c", 100))]
    assert allocate(layers, 0.5, method="uniform").counts == {
        "a": 5,
        "b": 3,
        "c": 50,
    }  # 58.5 kept: zeros are rounded up
    assert allocate(layers, 0.0, method="uniform").counts == {"a": 10, "b": 7, "c": 100}


def test_what_is_a_whole_number_is_not_rounded_up():
    assert allocate([Layer("a", (10, 100))], 0.7, method="uniform").target == 300
    assert allocate([Layer("a", (10, 100))], 0.29, method="uniform").target == 710


def test_global_keeps_the_largest_of_all():
    layers = [Layer("a", (2, 3)), Layer("b", (2, 2))]
    scores = {"a": torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.8, 0.0]]), "b": torch.tensor([[5.0, 0.2], [0.4, 0.6]])}
    assert allocate(layers, 0.5, method="global", scores=scores).counts == {"a": 3, "b": 2}
    assert allocate(layers, 0.9, method="global", scores=scores).counts == {"a": 0, "b": 1}
    assert allocate(layers, 0.5, method="global", scores=scores, at_most={"a": 2}).counts == {"a": 2, "b": 3}


@pytest.mark.parametrize("seed", range(10))
def test_the_threshold_is_that_of_a_sort(seed):
    """With scores of every size, equal ones and zeros among them, and layers in several dtypes."""
    generator = torch.Generator().manual_seed(seed)
    layers, scores = [], {}
    for i in range(5):
        numel = int(torch.randint(1, 300, (), generator=generator))
        layers.append(Layer(f"{i}", (1, numel)))
        score = 10.0 ** torch.randint(-30, 30, (numel,), generator=generator) * torch.rand(numel, generator=generator)
        scores[f"{i}"] = score if i < 3 else (torch.rand(numel, generator=generator) * 8).round().to(torch.bfloat16)
    every = torch.cat([scores[layer.name].float() for layer in layers]).sort(descending=True).values
    for sparsity in (0.0, 0.1, 0.5, 0.77, 0.99):
        found = allocate(layers, sparsity, method="global", scores=scores)
        threshold = every[found.target - 1] if found.target else torch.inf
        assert sum(found.counts.values()) == found.target
        for layer in layers:
            score = scores[layer.name].float()
            assert int((score > threshold).sum()) <= found.counts[layer.name] <= int((score >= threshold).sum())


def test_negative_scores_cannot_be_compared():
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scores of 'a' must be finite and >= 0"):
            allocate([Layer("a", (1, 2))], 0.5, method="global", scores={"a": torch.tensor([[bad, 1.0]])})


def test_lamp_divides_by_the_squares_of_the_larger_ones():
    scores = lamp_scores(torch.tensor([[3.0, -1.0], [2.0, 4.0]]))
    assert scores.tolist() == pytest.approx([9 / 25, 1 / 30, 4 / 29, 1.0])
    assert lamp_scores(torch.zeros(2, 2)).tolist() == [0.0] * 4
    layers = [Layer("a", (2, 2)), Layer("b", (1, 2))]
    weights = {"a": torch.tensor([[3.0, -1.0], [2.0, 4.0]]), "b": torch.tensor([[1e-3, 2e-3]])}
    # b's scores: 1/5 and 1; the scale of a layer does not matter
    assert allocate(layers, 0.5, method="lamp", scores=weights).counts == {"a": 2, "b": 1}
    assert allocate(layers, 0.34, method="lamp", scores=weights).counts == {"a": 2, "b": 1}
    assert allocate(layers, 0.33, method="lamp", scores=weights).counts == {"a": 2, "b": 2}
    assert allocate(layers, 0.66, method="lamp", scores=weights).counts == {"a": 1, "b": 1}


def test_erk_is_dense_where_it_would_be_more_than_dense():
    layers = [Layer("conv", (8, 4, 3, 3)), Layer("fc", (100, 50)), Layer("head", (10, 20))]
    # (8+4+3+3)/288, 150/5000, 30/200
    found = allocate(layers, 0.5, method="erk")
    # c = 2744 / 198 would give the head 0.15 c > 1: it is dense, and the others share the rest
    c = (2744 - 200) / (0.0625 * 288 + 0.03 * 5000)
    assert found.counts == {"conv": round(c * 18), "fc": round(c * 150), "head": 200}
    sparse = allocate(layers, 0.95, method="erk").counts
    total = sum(sparse.values())
    c = total / (0.0625 * 288 + 0.03 * 5000 + 0.15 * 200)
    assert all(abs(sparse[n] - c * s) < 1 for n, s in (("conv", 18), ("fc", 150), ("head", 30)))


def test_owl_is_its_formula_where_blocks_are_equal():
    layers = [Layer(f"{b}", (40, 25), b) for b in range(4)]
    o = np.array([5.0, 3.5, 1.0, 2.0])
    r = (o - o.min()) / (o.max() - o.min()) * 2 * 0.08
    expected = (r - r.mean() + (1 - 0.7)) * 1000
    found = allocate(layers, 0.7, method="owl", outliers=dict(enumerate(o)))
    assert sum(found.counts.values()) == 1200
    assert max(abs(found.counts[f"{b}"] - expected[b]) for b in range(4)) < 1
    by_name = allocate(layers, 0.7, method="owl", outliers={f"{b}": o[b] for b in range(4)})
    assert by_name.counts == found.counts
    flat = allocate(layers, 0.7, method="owl", outliers=dict.fromkeys(range(4), 2.0))
    assert set(flat.counts.values()) == {300}
    wide = allocate(layers, 0.7, method="owl", outliers=dict(enumerate(o)), spread=0.2)
    assert wide.counts["0"] - wide.counts["2"] == pytest.approx(400, abs=1)


def test_owl_and_atp_meet_the_target_where_blocks_differ_in_size():
    """A mean over blocks is not a mean over weights: the papers' formulas would miss the target here."""
    layers = [Layer("small", (10, 10), 0), Layer("large", (100, 90), 1)]
    found = allocate(layers, 0.7, method="owl", outliers={0: 5.0, 1: 0.0})
    assert sum(found.counts.values()) == 2730
    assert found.counts["small"] / 100 - found.counts["large"] / 9000 == pytest.approx(0.16, abs=0.01)
    deep = allocate(layers, 0.7, method="atp", beta=0.2)
    assert sum(deep.counts.values()) == 2730
    assert deep.counts["small"] / 100 - deep.counts["large"] / 9000 == pytest.approx(0.2, abs=0.01)


def test_outliers_are_counted_over_a_block():
    scores = torch.tensor([1.0] * 18 + [30.0, 60.0])
    assert outlier_ratio(scores) == 10.0  # the mean is 5.4
    assert outlier_ratio(scores, multiple=10) == 5.0
    assert outlier_ratio([scores[:18].view(3, 6), scores[18:].view(1, 2)]) == 10.0


def test_atp_is_its_formula():
    layers = [Layer(f"{b}", (100, 100), b) for b in (3, 5, 8)]
    found = allocate(layers, 0.6, method="atp", beta=0.1)
    s = [0.6 - 0.1 * (3 - 1) / 2 + 0.1 * i for i in range(3)]
    assert [sparsity_of(found, layer.name) for layer in layers] == pytest.approx(s, abs=1e-4)
    assert atp_betas(0.6, 5, 0.05) == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert atp_betas(0.99, 40) == [pytest.approx(0.02 / 39)]
    with pytest.raises(ValueError, match="0 < beta <= 0.4 for 3 blocks"):
        allocate(layers, 0.6, method="atp", beta=0.41)
    with pytest.raises(ValueError, match="number of its block"):
        allocate([Layer("x", (2, 2))], 0.5, method="atp", beta=0.1)


@pytest.mark.parametrize("seed", range(20))
def test_dp_is_the_best_of_all_combinations_of_patterns(seed):
    rng = np.random.default_rng(seed)
    layers = [Layer(f"{i}", (int(rng.integers(1, 5)), 8)) for i in range(4)]
    curves = {}
    for layer in layers:
        kept, patterns = nm_levels(layer.numel, 8, 3)
        losses = (0.0, *np.sort(rng.random(len(kept) - 1)))
        curves[layer.name] = Curve(layer.name, layer.numel, kept, losses, (0.0,) * len(kept), "kl", patterns)
    total = sum(layer.numel for layer in layers)
    for sparsity in (0.1, 0.35, 0.5, 0.62):
        found = allocate(layers, sparsity, curves=curves)
        assert sum(found.counts.values()) <= found.target
        best = min(
            sum(curves[layer.name].distortion[k] for layer, k in zip(layers, ks, strict=True))
            for ks in itertools.product(range(6), repeat=4)
            if sum(curves[layer.name].counts[k] for layer, k in zip(layers, ks, strict=True)) <= found.target
        )
        assert found.predicted == pytest.approx(best, abs=1e-12)
        assert all(int(found.patterns[layer.name][0]) * layer.numel == 8 * found.counts[layer.name] for layer in layers)
    with pytest.raises(InfeasibleBudget, match="the levels of the layers cost") as caught:
        allocate(layers, 0.63, curves=curves)
    assert caught.value.lowest == total * 3 // 8


def test_dp_has_no_more_distortion_than_any_rule(blocks):
    layers, curves = blocks
    for sparsity in (0.3, 0.5, 0.7, 0.8):
        best = allocate(layers, sparsity, curves=curves)
        for method in ("uniform", "erk", "owl", "atp"):
            other = allocate(layers, sparsity, method=method, curves=curves, **needs(method, layers))
            if other.predicted is not None:
                assert best.predicted <= other.predicted * (1 + 1e-3)


def test_dp_finds_the_optimum_of_a_convex_problem():
    """min sum a_g (1 - x_g)^2 with a mean of x: the multipliers say 1 - x_g ~ 1 / a_g, in closed form."""
    layers = [Layer(f"{i}", (1000, 100)) for i in range(4)]
    a = np.array([1.0, 2.0, 4.0, 8.0])
    kept = tuple(range(100_000, 0, -1000))
    curves = {
        f"{i}": Curve(f"{i}", 100_000, kept, tuple(a[i] * (1 - k / 1e5) ** 2 for k in kept), (0.0,) * 100, "kl")
        for i in range(4)
    }
    removed = 4 * 0.4 / (1 / a).sum() / a
    assert removed.max() < 0.99
    found = allocate(layers, 0.4, curves=curves)
    assert found.predicted == pytest.approx(float((a * removed**2).sum()), rel=2e-3)
    assert [sparsity_of(found, f"{i}") for i in range(4)] == pytest.approx(removed.tolist(), abs=0.02)


def test_targets_from_one_table_are_those_from_their_own(blocks):
    layers, curves = blocks
    sparsities = [0.8, 0.3, 0.55]
    together = allocations_along(layers, sparsities, curves=curves)
    for sparsity, found in zip(sparsities, together, strict=True):
        alone = allocate(layers, sparsity, curves=curves)
        assert (found.counts, found.predicted) == (alone.counts, alone.predicted)
    costs, losses = zip(*together[0].front, strict=True)
    assert (np.diff(costs) > 0).all() and (np.diff(losses) < 0).all()
    assert 100 < len(costs) <= 200
    assert allocations_along(layers, [], curves=curves) == []


def test_a_coarse_table_is_over_satisfied_by_a_unit_at_most_and_then_repaired(blocks, monkeypatch):
    layers, curves = blocks
    exact = allocate(layers, 0.6, curves=curves)
    for states in (100, 1000):
        monkeypatch.setattr(allocation, "STATES", states)
        monkeypatch.setattr(knapsack, "STATES", states)
        coarse = allocate(layers, 0.6, curves=curves)
        assert sum(coarse.counts.values()) == coarse.target == exact.target
        assert coarse.predicted >= exact.predicted * (1 - 1e-3)
    assert coarse.predicted == pytest.approx(exact.predicted, rel=0.02)


def expert_curves(count):
    """Matrices of one size, with convex curves of very different height, as the experts of a mixture have."""
    generator = np.random.default_rng(0)
    layers = [Layer(f"{i:04d}", (64, 64)) for i in range(count)]
    heights = dict(zip([layer.name for layer in layers], np.exp(generator.normal(0, 1.5, count)), strict=True))
    return layers, {layer.name: power_curve(layer, float(heights[layer.name])) for layer in layers}


def test_many_layers_are_allocated_as_well_as_a_fine_table_does(monkeypatch):
    """A table has less than three states for each of 12,288 experts, as that of 256 states has here for each of 96."""
    layers, curves = expert_curves(96)
    fine = allocate(layers, 0.6, curves=curves)
    monkeypatch.setattr(knapsack, "MOST_GROUPS", 95)
    relaxed = allocate(layers, 0.6, curves=curves)
    assert sum(relaxed.counts.values()) == relaxed.target == fine.target
    assert relaxed.predicted == pytest.approx(fine.predicted, rel=1e-3)
    costs, losses = zip(*relaxed.front, strict=True)
    assert (np.diff(costs) > 0).all() and (np.diff(losses) < 0).all() and costs[-1] <= relaxed.target
    monkeypatch.undo()
    monkeypatch.setattr(allocation, "STATES", 256)
    monkeypatch.setattr(knapsack, "STATES", 256)
    assert allocate(layers, 0.6, curves=curves).predicted > 1.2 * relaxed.predicted


def test_many_layers_snap_to_patterns_within_the_budget(monkeypatch):
    layers, curves = expert_curves(24)
    wanted = allocate(layers, 0.6, curves=curves)
    levels = {layer.name: nm_levels(layer.numel, 8, 1) for layer in layers}
    exact = snap(wanted, levels)
    monkeypatch.setattr(closed_form, "MOST_GROUPS", 23)
    relaxed = snap(wanted, levels)
    away = {
        id(one): sum((one.counts[name] - wanted.counts[name]) ** 2 for name in wanted.counts)
        for one in (exact, relaxed)
    }
    assert sum(relaxed.counts.values()) <= sum(wanted.counts.values())
    assert away[id(exact)] <= away[id(relaxed)] <= 1.1 * away[id(exact)]


def test_a_thousand_experts_take_seconds_and_no_table():
    layers, curves = expert_curves(1200)
    tracemalloc.start()
    result = allocate(layers, 0.6, curves=curves)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(result.counts.values()) == result.target
    # a table has 1,200 rows of 2^15 states: 315 MB
    assert peak < 100e6


@pytest.mark.parametrize("seed", range(20))
def test_the_relaxed_knapsack_is_a_step_above_the_optimum_at_most(seed):
    generator = np.random.default_rng(seed)
    costs = [np.cumsum(generator.integers(1, 9, size=5)) for _ in range(6)]
    losses = [generator.random(5) * generator.integers(1, 9) for _ in range(6)]
    budget = int(sum(cost[0] for cost in costs) + generator.integers(0, 80))
    least = solve_knapsack(costs, losses, budget).value()
    levels = RelaxedKnapsack(costs, losses).choose(budget)
    assert sum(int(cost[k]) for cost, k in zip(costs, levels, strict=True)) <= budget
    total = sum(float(loss[k]) for loss, k in zip(losses, levels, strict=True))
    assert least - 1e-12 <= total <= least + max(float(np.ptp(loss)) for loss in losses)


@pytest.mark.parametrize(("sparsity", "gap"), [(0.2, 4e-3), (0.4, 1e-3)])
def test_the_allocation_is_near_the_continuous_optimum_of_convex_curves(sparsity, gap):
    """Of powers of the sparsity: the optimum has one derivative per weight in all layers, found by bisection."""
    worst = 0.0
    for seed in range(3):
        generator = np.random.default_rng(seed)
        shapes = [(128, 128), (128, 128), (352, 128), (128, 352)] * 2
        layers = [Layer(f"layer{index}", shape) for index, shape in enumerate(shapes)]
        sizes = np.array([layer.numel for layer in layers], dtype=float)
        scales, powers = np.exp(generator.normal(0, 2.5, len(layers))), generator.uniform(1.2, 3, len(layers))

        def total(sparsities, scales=scales, powers=powers):
            return float((scales * sparsities**powers).sum())

        low, high = -60.0, 20.0
        for _ in range(100):
            middle = (low + high) / 2
            best = np.minimum((np.exp(middle) * sizes / (scales * powers)) ** (1 / (powers - 1)), 0.95)
            low, high = (middle, high) if (best * sizes).sum() < sparsity * sizes.sum() else (low, middle)
        curves = {}
        for layer, scale, power in zip(layers, scales, powers, strict=True):
            counts = level_grid(layer.numel, sparsity)
            distortion = tuple(float(scale * (1 - count / layer.numel) ** power) for count in counts)
            curves[layer.name] = Curve(layer.name, layer.numel, counts, distortion, (0.0,) * len(counts), "kl")
        counts = np.array(list(allocate(layers, sparsity, curves=curves).counts.values()))
        worst = max(worst, total(1 - counts / sizes) / total(best) - 1)
    assert -1e-4 < worst < gap  # with 101 levels, none of them denser near the first: 0.081 and 0.0033


def test_what_rounding_leaves_goes_where_it_saves_most(monkeypatch):
    monkeypatch.setattr(allocation, "STATES", 3)
    monkeypatch.setattr(knapsack, "STATES", 3)
    monkeypatch.setattr(allocation, "POINTS", 2)
    layers = [Layer("flat", (10, 10)), Layer("steep", (10, 10))]
    flat = Curve("flat", 100, (100, 50), (0.0, 1.0), (0.0, 0.0), "kl")
    steep = Curve("steep", 100, (100, 50), (0.0, 5.0), (0.0, 0.0), "kl")
    found = allocate(layers, 0.435, curves={"flat": flat, "steep": steep})
    assert found.counts == {"flat": 50, "steep": 63} and found.target == 113


def test_a_budget_of_operations_counts_uses():
    """An early convolution's weights are used many times: a budget of operations prunes it more."""
    layers = [Layer("early", (16, 3, 3, 3), uses=1024), Layer("late", (64, 64, 3, 3), uses=16)]
    curves = {layer.name: power_curve(layer, 1.0) for layer in layers}
    dense = 2 * (1024 * 432 + 16 * 36864)
    budget = Budget.fraction("flops", 0.5, layers)
    assert budget.target == dense / 2
    found = allocate(layers, curves=curves, budget=budget)
    spent = 2 * (1024 * found.counts["early"] + 16 * found.counts["late"])
    assert spent == found.cost and budget.target - 2 * 16 < spent <= budget.target
    by_weights = allocate(layers, 0.5, curves=curves)
    assert sparsity_of(found, "early") > sparsity_of(by_weights, "early")
    assert found.target is None and found.budget_kind == "flops"


def test_a_budget_of_bytes_counts_the_mask_until_dense_is_smaller():
    layers = [Layer("a", (80, 10), itemsize=2), Layer("b", (80, 10), itemsize=2)]
    curves = {"a": power_curve(layers[0], 1.0), "b": power_curve(layers[1], 50.0)}
    budget = Budget.fraction("bytes", 0.6, layers)
    found = allocate(layers, curves=curves, budget=budget)
    stored = sum(min(1600, 2 * kept + 100) for kept in found.counts.values())
    assert stored == found.cost and budget.target - 2 < stored <= budget.target == 0.6 * 3200
    assert found.counts["b"] > found.counts["a"]


def test_a_budget_of_seconds_reads_the_table():
    layers = [Layer("a", (8, 8)), Layer("b", (8, 8))]
    curves = {
        name: Curve(name, 64, *((kept, d, (0.0,) * 3, "kl", patterns)))
        for name, d in (("a", (0.0, 1.0, 4.0)), ("b", (0.0, 0.5, 8.0)))
        for kept, patterns in [((64, 48, 32), ("8:8", "6:8", "4:8"))]
    }
    seconds = {"a": [1e-3, 1.1e-3, 0.4e-3], "b": [1e-3, 0.9e-3, 0.4e-3]}  # 6:8 is no faster than dense
    found = allocate(layers, curves=curves, budget=Budget("latency", 1.35e-3, seconds))
    assert found.patterns == {"a": "4:8", "b": "6:8"} and found.cost == pytest.approx(1.3e-3)
    assert found.predicted == 4.5
    assert allocate(layers, curves=curves, budget=Budget.fraction("latency", 1.0, layers, seconds)).predicted == 0.0
    with pytest.raises(InfeasibleBudget, match="cost 0.0008 to 0.0021"):
        allocate(layers, curves=curves, budget=Budget("latency", 0.7e-3, seconds))
    shorter = curves | {"b": curves["b"].until(2)}  # its sparsest level overflowed, or was beyond uniform sparsity
    assert allocate(layers, curves=shorter, budget=Budget("latency", 1.35e-3, seconds)).patterns == found.patterns
    with pytest.raises(ValueError, match="expected 3 latencies of 'b'"):
        allocate(layers, curves=curves, budget=Budget("latency", 1.0, {"a": seconds["a"], "b": [1.0]}))


def test_nothing_that_was_pruned_comes_back():
    """The published base case ignores what was pruned before. Curves here were measured on the pruned model."""
    layers = [Layer("a", (10, 100)), Layer("b", (10, 100))]
    curves = {
        "a": Curve("a", 1000, (300, 200, 100), (0.0, 5.0, 9.0), (0.0,) * 3, "kl"),
        "b": Curve("b", 1000, (900, 500, 100), (0.0, 0.1, 0.2), (0.0,) * 3, "kl"),
    }
    found = allocate(layers, 0.6, curves=curves)
    assert found.counts == {"a": 300, "b": 500}
    held = allocate(layers, 0.6, curves=curves, at_most={"a": 250})
    assert held.counts["a"] <= 250 and sum(held.counts.values()) == 800


def test_baselines_snap_to_patterns_within_their_total():
    layers = [Layer("a", (8, 8)), Layer("b", (8, 16)), Layer("c", (4, 8))]
    wanted = allocate(layers, 0.4, method="erk")
    levels = {layer.name: nm_levels(layer.numel, 8, 2) for layer in layers}
    found = snap(wanted, levels)
    assert sum(found.counts.values()) <= sum(wanted.counts.values())
    best = min(
        sum((k - wanted.counts[layer.name]) ** 2 / layer.numel for k, layer in zip(kept, layers, strict=True))
        for kept in itertools.product(*(levels[layer.name][0] for layer in layers))
        if sum(kept) <= sum(wanted.counts.values())
    )
    assert sum(
        (found.counts[layer.name] - wanted.counts[layer.name]) ** 2 / layer.numel for layer in layers
    ) == pytest.approx(best)
    for layer in layers:
        assert int(found.patterns[layer.name][0]) * layer.numel == 8 * found.counts[layer.name]
    with pytest.raises(InfeasibleBudget, match="the patterns keep 56 or more"):
        snap(allocate(layers, 0.9, method="uniform"), levels)


def test_what_cannot_be_allocated_is_refused_with_the_reason(blocks):
    layers, curves = blocks
    bad = [
        (lambda: allocate(layers, 0.5, method="best"), "method must be one of dp, uniform"),
        (lambda: allocate(layers, 0.5), "needs curves"),
        (lambda: allocate(layers, 0.5, method="owl"), "needs outliers"),
        (lambda: allocate(layers, 0.5, method="owl", outliers={0: 1.0}), "no outlier ratio for"),
        (lambda: allocate(layers, 0.5, method="lamp", scores={}), "no scores of"),
        (lambda: allocate(layers, 1.0, method="uniform"), "0 <= sparsity < 1"),
        (lambda: allocate(layers, method="uniform"), "a sparsity or a budget"),
        (lambda: allocate(layers, method="erk", budget=Budget("params", 9.0)), "a budget is for method 'dp'"),
        (lambda: allocate([layers[0]] * 2, 0.5, method="uniform"), "unique names"),
        (lambda: allocate([], 0.5, method="uniform"), "unique names"),
        (lambda: allocate(layers, 0.5, curves={}), "'0.q' has none"),
        (lambda: allocate([Layer("0.q", (5, 5))], 0.5, curves=curves), "for 1024 weights, the layer has 25"),
        (lambda: allocate(layers, 0.5, method="uniform", at_most={"0.q": -1}), "at_most >= 0, got -1 for '0.q'"),
        (lambda: allocate(layers, 0.5, method="uniform", at_most={x.name: 9 for x in layers}), "the bounds allow"),
        (lambda: allocate(layers, 0.99, curves=curves), "cannot be met: .* sparsities of 0 to 0.9498, not 0.99"),
        (lambda: allocate(layers, 0.5, curves=curves, at_most={"0.q": 9}), "no level of '0.q' keeps 9 weights or"),
        (lambda: Budget("params", 0), "positive target"),
        (lambda: Budget("watts", 1.0), "kind must be one of"),
        (lambda: Budget("latency", 1.0), "goes with a table"),
        (lambda: Layer("x", (3,)), "expected a shape"),
    ]
    for call, said in bad:
        with pytest.raises(ValueError, match=said):
            call()
    mixed = dict(curves)
    mixed["0.q"] = Curve("0.q", 1024, (1024, 512), (0.0, 1.0), (0.0, 0.0), "mse_logits")
    with pytest.raises(ValueError, match="different metrics cannot be added: kl, mse_logits"):
        allocate(layers, 0.5, curves=mixed)
