"""The comparison of N:M methods on digits: its search, its statistics, its page."""

import json
import math
from pathlib import Path

import pytest
from comparison_runs import benchmark_modules, check_page

ROOT = Path(__file__).parents[2]
SETTINGS = {"budget": 16, "seeds": 3, "steps": 8}


@pytest.fixture(scope="module")
def parts():
    yield from benchmark_modules("digits", ("training", "search", "tables", "carried"))


def loss_at(run, start, x0=1, y0=0):
    """A surface over log2 of both settings relative to the start."""
    x, y = math.log2(run.rate / start[0]), math.log2(run.second / start[1])
    return 0.1 + (x - x0) ** 2 + 0.5 * (y - y0) ** 2


def finish(parts, cell, loss, **settings):
    done = {}
    while (state := parts.search.plan(cell, done, **SETTINGS | settings)).missing:
        assert not done.keys() & set(state.missing)
        done |= {run: {"accuracy": 0.9, "loss": loss(run)} for run in state.missing}
    return state, done


def test_every_cell_gets_the_same_runs_and_its_three_best_settings(parts):
    for cell in parts.search.CELLS:
        start = parts.search.STARTS[cell.method]
        state, done = finish(parts, cell, lambda run, start=start: loss_at(run, start))
        assert not state.on_edge
        best = [(run.rate / start[0], run.second / start[1]) for run in state.finalists]
        assert best == [(2, 1), (2, 0.5), (1, 1)]  # (2, 2) has the loss of (2, 0.5)
        tuned, judged = ([run for run in done if run.kind == kind] for kind in ("tune", "judge"))
        assert len(tuned) == SETTINGS["budget"] and {run.seed for run in tuned} == {0}
        assert {run.steps for run in tuned} == {4}
        assert [run.seed for run in judged] == 3 * [1, 2, 3] and {run.steps for run in judged} == {8}
        assert list(dict.fromkeys(run[5:] for run in judged)) == [run[5:] for run in state.finalists]


def test_a_best_on_the_edge_gets_no_row(parts):
    cell = parts.search.CELLS[1]
    start = parts.search.STARTS[cell.method]
    state, done = finish(parts, cell, lambda run: loss_at(run, start, x0=8))
    assert state.on_edge and not state.missing and all(run.kind == "tune" for run in done)


def test_a_search_may_go_as_far_as_its_budget_reaches(parts):
    cell = parts.search.CELLS[1]
    start = parts.search.STARTS[cell.method]
    state, done = finish(parts, cell, lambda run: loss_at(run, start, x0=0, y0=-30), budget=60)
    assert state.on_edge and len(done) == 60
    assert min(run.second for run in done) < start[1] / 2**9


def test_an_equal_loss_inside_is_preferred_to_one_on_the_edge(parts):
    """Less than a step at the target is none: from there on, the second setting changes nothing."""
    cell = parts.search.CELLS[3]
    start = parts.search.STARTS[cell.method]

    def loss(run):
        return 0.1 + math.log2(run.rate / start[0]) ** 2 + max(math.log2(run.second / start[1]), -1)

    state, _ = finish(parts, cell, loss)
    best = state.finalists[0]
    assert not state.on_edge and best.rate == start[0] and best.second < start[1]
    tuning = [loss(run) for run in state.finalists]
    assert tuning == sorted(set(tuning)) and len(tuning) == 3  # settings that train alike are judged once


def test_runs_are_reproducible_and_a_file_of_other_settings_is_refused(parts, tmp_path):
    """Tuning and judging read different images; the same run gives the same result."""
    path = tmp_path / "digits.jsonl"
    run = parts.training.Run("tune", "srste", "1:4", 0, 2, 1e-3, 2e-4)
    first = parts.training.train(run)
    again, judged = parts.training.train(run), parts.training.train(run._replace(kind="judge"))
    assert (first["accuracy"], first["loss"]) == (again["accuracy"], again["loss"]) and judged["loss"] != first["loss"]
    late = run._replace(method="mdgf-linear", second=1.6)
    assert parts.training.train(late)["loss"] == math.inf
    images = parts.training.images()
    assert [len(images[name][1]) for name in ("train", "tune", "judge")] == [898, 225, 674]
    path.write_text(json.dumps({**SETTINGS, "machine": "m"}) + "\n")
    with pytest.raises(ValueError, match=r"was made with \{'budget': 16\}"):
        parts.search.make(path, {**SETTINGS, "budget": 17}, 1)


def test_a_seed_has_the_setting_that_the_other_seeds_choose(parts):
    """The lowest mean over all seeds would let a lucky seed choose its own setting."""
    run = parts.training.Run("tune", "srste", "1:8", 0, 4, 1e-3, 2e-4)
    lucky, steady = run, run._replace(rate=2e-3)
    losses = {lucky: [0.0, 0.4, 0.4], steady: [0.3, 0.3, 0.3]}
    cell = parts.tables.Judged({r: [{"accuracy": 1 - x, "loss": x} for x in xs] for r, xs in losses.items()})
    assert parts.tables.Judged({steady: [{"accuracy": 0.7, "loss": 0.3}]}).losses == [0.3]
    assert cell.losses == [0.3, 0.4, 0.4] and cell.accuracies == pytest.approx([70, 60, 60])
    cells = {parts.tables.Cell("srste", "1:8"): cell}
    page = parts.tables.text({**SETTINGS, "machine": "m"}, cells, 3)
    assert "2 of 3 cells are not complete." in page
    assert "0.001 · 0.0002: 0.267<br>0.002 · 0.0002: 0.300" in page
    assert "in 0 of the 1 cells" in page and "3 settings are judged of no cell, fewer of the others" in page


def test_the_page_is_that_of_the_committed_results(parts):
    settings, cells, on_edge = parts.search.summarise(ROOT / "docs" / "results" / "sparse-digits.jsonl")
    assert len(cells) + len(on_edge) == len(parts.search.CELLS) and len(cells) > 20
    text = parts.tables.text(settings, cells, len(parts.search.CELLS))
    page = (ROOT / "docs" / "measured" / "sparsity.md").read_text("utf-8")
    assert f"<!-- table:sparse-quality -->\n{text}\n<!-- /table:sparse-quality -->" in page


def test_the_page_has_the_digits_with_adamws_rates_carried_over(parts):
    check_page(parts.carried.table, "digits-carried.jsonl")
