"""The solver against brute force, and what the published dynamic program got wrong."""

import itertools

import numpy as np
import pytest

from leanstep.pruning import InfeasibleBudget, solve_knapsack
from leanstep.pruning.allocate import knapsack
from leanstep.pruning.allocate.knapsack import level_at, next_row


def instance(seed, ties=False):
    """Random groups, in all kinds: dominated levels, losses that are not monotone, single levels, cost 0."""
    rng = np.random.default_rng(seed)
    costs, losses = [], []
    for _ in range(rng.integers(1, 7)):
        levels = rng.integers(1, 6)
        costs.append(rng.integers(0, 12, levels) * int(rng.choice([1, 2, 3])))
        losses.append(rng.integers(0, 4, levels).astype(float) if ties else rng.normal(size=levels))
    return costs, losses


def every_choice(costs, losses):
    """Cost and loss of every combination of levels."""
    found = []
    for levels in itertools.product(*(range(len(c)) for c in costs)):
        found.append(
            (
                sum(int(c[k]) for c, k in zip(costs, levels, strict=True)),
                sum(float(d[k]) for d, k in zip(losses, levels, strict=True)),
            )
        )
    return np.array([c for c, _ in found]), np.array([d for _, d in found])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("block", range(5))
def test_every_budget_of_the_table_has_the_loss_of_brute_force(block, ties):
    for seed in range(50 * block, 50 * block + 50):
        costs, losses = instance(seed, ties)
        paid, lost = every_choice(costs, losses)
        table = solve_knapsack(costs, losses, int(paid.max()) + 3)
        assert (table.lowest, table.highest) == (paid.min(), paid.max())
        for budget in range(int(paid.min()), table.budget + 1):
            best = lost[paid <= budget].min()
            levels = table.choose(budget)
            assert table.value(budget) == pytest.approx(best, abs=1e-12)
            assert sum(d[k] for d, k in zip(losses, levels, strict=True)) == pytest.approx(best, abs=1e-12)
            assert sum(c[k] for c, k in zip(costs, levels, strict=True)) <= budget


@pytest.mark.parametrize("seed", range(30))
def test_the_front_is_that_of_brute_force_and_falls(seed):
    costs, losses = instance(seed)
    paid, lost = every_choice(costs, losses)
    table = solve_knapsack(costs, losses, int(paid.max()))
    at, values = table.front()
    assert (np.diff(at) > 0).all() and (np.diff(values) < 0).all()
    assert at[0] == paid.min()
    steps = [b for b in range(int(paid.min()), int(paid.max()) + 1)]
    best = np.array([lost[paid <= b].min() for b in steps])
    np.testing.assert_allclose(values[np.searchsorted(at, steps, side="right") - 1], best, atol=1e-12)


def test_convex_curves_spend_where_the_slope_is_steepest():
    rng = np.random.default_rng(0)
    costs, losses = [], []
    for _ in range(5):
        steps = rng.integers(1, 5, 4)
        slopes = np.sort(rng.random(4))[::-1]  # falling: convex
        costs.append(np.concatenate([[0], np.cumsum(steps)]))
        losses.append(10 - np.concatenate([[0], np.cumsum(slopes * steps)]))
    slopes = np.concatenate([-np.diff(d) / np.diff(c) for c, d in zip(costs, losses, strict=True)])
    steps = np.concatenate([np.diff(c) for c in costs])
    order = np.argsort(-slopes)
    saved = np.cumsum([0, *(slopes * steps)[order]])
    for budget, less in zip(np.cumsum([0, *steps[order]]).tolist(), saved, strict=True):
        assert solve_knapsack(costs, losses, budget).value() == pytest.approx(50 - less, abs=1e-12)


def test_a_level_inside_the_hull_is_a_level_too():
    assert solve_knapsack([[0, 1, 2]], [[1.0, 0.9, 0.0]], 1).choose() == [1]


def test_of_equal_losses_the_one_that_keeps_more_is_taken():
    table = solve_knapsack([[5, 3, 0], [5, 3, 0]], [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], 10)
    assert table.choose(10) == [0, 0]
    assert table.choose(0) == [2, 2]


@pytest.mark.parametrize("seed", range(10))
def test_a_row_and_its_level_are_the_formula(seed):
    """f_n(b) = min_k f_{n-1}(b - c_k) + d_k, and the level is one of those that reach it, the dearest."""
    rng = np.random.default_rng(seed)
    previous = np.sort(rng.integers(0, 9, int(rng.integers(1, 20))).astype(float))[::-1].copy()
    costs = np.array([0, *rng.integers(0, 9, 4)])
    losses = rng.integers(0, 5, 5) / 4
    states = int(rng.integers(0, 30))
    row = next_row(previous, costs, losses, states)
    at = np.concatenate([previous, np.full(60, previous[-1])])
    for b in range(states + 1):
        sums = [at[b - c] + d if c <= b else np.inf for c, d in zip(costs, losses, strict=True)]
        assert row[min(b, len(row) - 1)] == min(sums)
        if b < len(row):
            level = level_at(previous, row, costs, losses, b)
            assert sums[level] == min(sums)
            assert costs[level] == max(c for c, s in zip(costs, sums, strict=True) if s == min(sums))


def test_no_state_is_skipped_where_a_stretch_ends(monkeypatch):
    """The published loop over pieces left every 4096th state at infinity."""
    rng = np.random.default_rng(1)
    costs = [rng.integers(0, 40, 5) for _ in range(6)]
    losses = [rng.random(5) for _ in range(6)]
    whole = solve_knapsack(costs, losses, 150)
    expected = [whole.value(b) for b in range(whole.lowest, 151)]
    for stretch in (1, 2, 7, 16):
        monkeypatch.setattr(knapsack, "_STRETCH", stretch)
        table = solve_knapsack(costs, losses, 150)
        assert [table.value(b) for b in range(table.lowest, 151)] == expected
        assert np.isfinite(expected).all()


def test_budgets_beyond_4096_units_are_met_to_the_unit():
    """One group, one weight per level: whatever is asked for must come back, multiples of 4096 included."""
    size = 9000
    table = solve_knapsack([np.arange(size + 1)], [np.arange(size, -1, -1.0)], size)
    for budget in (0, 1, 4095, 4096, 4097, 8191, 8192, 8193, size):
        assert table.choose(budget) == [budget]
        assert table.value(budget) == size - budget


def test_the_first_group_is_held_to_the_budget_and_to_its_levels():
    """The published base case takes, for the first layer, the level nearest to the budget, above it if need be."""
    assert solve_knapsack([[0, 10]], [[1.0, 0.0]], 9).choose() == [0]
    assert solve_knapsack([[0, 10], [3]], [[1.0, 0.0], [0.0]], 12).choose() == [0, 0]
    with pytest.raises(InfeasibleBudget):
        solve_knapsack([[10, 20]], [[1.0, 0.0]], 9)


def test_the_budget_is_inclusive():
    """Strict comparisons and a start at T - 1 made the published one waste up to a unit per layer."""
    table = solve_knapsack([[4, 0]] * 3, [[0.0, 1.0]] * 3, 12)
    assert table.value(12) == 0.0 and table.choose(12) == [0, 0, 0]
    assert table.value(11) == 1.0


def test_a_budget_that_cannot_be_met_says_what_can():
    with pytest.raises(InfeasibleBudget, match="cheapest levels cost 7, the dearest 15") as caught:
        solve_knapsack([[5, 9], [2, 6]], [[1.0, 0.0]] * 2, 6)
    assert (caught.value.lowest, caught.value.highest) == (7, 15)
    table = solve_knapsack([[5, 9], [2, 6]], [[1.0, 0.0]] * 2, 8)
    with pytest.raises(InfeasibleBudget):
        table.choose(6)
    with pytest.raises(ValueError, match="up to 8, not 9"):
        table.value(9)


def test_zero_and_full_budgets():
    costs, losses = [[3, 1, 0], [2, 0]], [[0.0, 0.2, 1.0], [0.0, 3.0]]
    table = solve_knapsack(costs, losses, 100)
    assert table.choose(0) == [2, 1] and table.value(0) == 4.0
    assert table.choose(5) == [0, 0] == table.choose(100)
    assert solve_knapsack([[0], [0]], [[1.0], [2.0]], 0).value() == 3.0


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_the_groups_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    costs = [rng.integers(0, 50, 6) for _ in range(6)]
    losses = [rng.random(6) for _ in range(6)]
    table = solve_knapsack(costs, losses, 120)
    order = rng.permutation(6).tolist()
    other = solve_knapsack([costs[g] for g in order], [losses[g] for g in order], 120)
    assert other.value() == table.value()  # bit for bit
    assert other.choose() == [table.choose()[g] for g in order]


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="must be integers, those of group 1 are float64"):
        solve_knapsack([[1, 0], [0.5, 0]], [[0.0, 1.0]] * 2, 1)
    for costs, losses in (([], []), ([[1]], []), ([[1, 0]], [[0.0]]), ([[-1]], [[0.0]]), ([[1]], [[float("nan")]])):
        with pytest.raises(ValueError, match="knapsack"):
            solve_knapsack(costs, losses, 5)


def llama_7b(steps=(16, 43)):
    """LLaMA-7B's 224 matrices with levels at every unit: 4096 x 4096 (q, k, v, o) and 4096 x 11008 (gate, up, down)."""
    rng = np.random.default_rng(0)
    costs, losses = [], []
    for numel, parts, count in ((4096 * 4096, steps[0], 128), (4096 * 11008, steps[1], 96)):
        for _ in range(count):
            kept = np.arange(parts, 0, -1) * (numel // parts)
            costs.append(kept)
            losses.append(rng.random() * (1 - kept / numel) ** 3 / (kept / numel))
    return costs, losses


def test_llama_7b_is_solved_in_units_of_2_to_the_20_without_rounding():
    costs, losses = llama_7b()
    total = 128 * 4096 * 4096 + 96 * 4096 * 11008
    table = solve_knapsack(costs, losses, total // 2)
    assert table.unit == 1 << 20
    assert total == 6176 * table.unit
    assert [len(c) for c in (costs[0], costs[-1])] == [16, 43]
    kept = sum(int(c[k]) for c, k in zip(costs, table.choose(), strict=True))
    assert kept == total // 2  # to the weight


def test_states_grow_with_the_budget():
    # counted rather than timed (benchmarks/pruning/knapsack.py times)
    rng = np.random.default_rng(0)
    narrow = [np.arange(0, 60, 3) + rng.integers(0, 2) for _ in range(40)]
    values = [rng.random(20) for _ in range(40)]
    narrow[0][-1] += 1  # so that the unit is 1
    sizes = [sum(len(row) for row in solve_knapsack(narrow, values, b)._rows) for b in (300, 600)]
    assert sizes[1] < 2.1 * sizes[0]
