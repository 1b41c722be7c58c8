"""The comparison of optimizers: its search, its statistics, its file of results, its tables."""

import importlib.util
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.stats
import torch
from comparison_runs import TINY, comparison_modules

ROOT = Path(__file__).parents[2]
parts = pytest.fixture(scope="module")(comparison_modules)


# -- the search


def loss_of(parts, surface, run, model):
    """Loss of a tuning run on a surface over log2 of its rates relative to the start."""
    start = parts.methods.METHODS[run.method].start_for(model)
    point = math.log2(run.hidden_lr / start[0]), math.log2(run.other_lr / start[1])
    return surface(*point, run.weight_decay, run.warmup)


def finish(parts, protocol, method, budget, surface):
    """Plan and make tuning runs until the settings are chosen; returns the last plan and the loss of each run made."""
    losses = {}
    while True:
        state = parts.search.plan(method, protocol, parts.search.Search.of_this_version(budget, protocol.model), losses)
        if state.chosen is not None:
            return state, losses
        losses |= {run: loss_of(parts, surface, run, protocol.model) for run in state.missing}


def quadratic(x0, y0, tilt=0.0, decay=0.0, warmup=0.15):
    def surface(x, y, weight_decay, used_warmup):
        other = 0.01 * (abs(weight_decay - decay) + abs(used_warmup - warmup))
        return 4 + 0.1 * (x - x0) ** 2 + 0.1 * (y - y0) ** 2 + tilt * (x - x0) * (y - y0) + other

    return surface


@pytest.mark.parametrize("tilt", [0.0, 0.12, -0.12])
@pytest.mark.parametrize("optimum", [(0, 0), (1, 0), (0, -1), (1, 1), (-1, 1), (2, 0), (0.4, -1.3)])
def test_the_search_finds_the_optimum_of_a_quadratic(parts, optimum, tilt):
    protocol, budget = parts.protocol.Protocol(), 22
    surface = quadratic(*optimum, tilt)
    state, _ = finish(parts, protocol, "muon", budget, surface)
    start = parts.methods.METHODS["muon"].start
    hidden, other = state.chosen.hidden_lr / start[0], state.chosen.other_lr / start[1]
    grid = [(i, j) for i in range(-5, 6) for j in range(-5, 6)]
    assert (math.log2(hidden), math.log2(other)) == min(grid, key=lambda p: surface(*p, 0.1, 0.05))
    assert (state.chosen.weight_decay, state.chosen.warmup) == (0.0, 0.15)


def test_every_method_gets_the_same_number_of_runs(parts):
    protocol, budget = parts.protocol.Protocol(), 20
    optima = [(0, 0), (1, 0), (0, 1), (-1, 0), (1, 1), (-1, -1)]
    counts = set()
    for number, (method, settings) in enumerate(parts.methods.METHODS.items()):
        if settings.start is not None:
            state, losses = finish(parts, protocol, method, budget, quadratic(*optima[number % len(optima)]))
            counts.add((len(state.counted), len(set(state.counted)), len(losses)))
            assert [run.seed for run in state.missing] == [1, 2, 3]
            assert {run.kind for run in state.missing} == {"judge"}
    assert counts == {(budget, budget, budget)}


def test_a_best_on_the_edge_is_an_error_that_a_larger_budget_cures(parts):
    protocol, surface = parts.protocol.Protocol(), quadratic(6, 0)
    with pytest.raises(parts.search.EdgeError, match=r"on the edge .* 20 tuning runs .* \(--budget 24\)"):
        finish(parts, protocol, "lion", 20, surface)
    state, losses = finish(parts, protocol, "lion", 32, surface)
    assert state.chosen.hidden_lr == parts.methods.METHODS["lion"].start[0] * 2**6
    # the runs of the smaller budget are the first of the larger one
    small, search = {}, parts.search.Search.of_this_version(20, protocol.model)
    with pytest.raises(parts.search.EdgeError):
        while missing := parts.search.plan("lion", protocol, search, small).missing:
            small |= {run: loss_of(parts, surface, run, protocol.model) for run in missing}
    assert set(small) < set(losses)


def test_a_rate_that_no_longer_matters_is_no_edge(parts):
    protocol = parts.protocol.Protocol()
    surface = quadratic(-1, 0)

    def flat_below(slope):  # the loss falls by ``slope`` with every halving of the hidden rate
        return lambda x, y, *rest: surface(max(x, -1), y, *rest) + slope * min(x, -1)

    state, losses = finish(parts, protocol, "lion", 20, flat_below(1e-4))
    rate = state.chosen.hidden_lr
    assert rate < parts.methods.METHODS["lion"].start[0] and any(run.hidden_lr < rate for run in losses)
    with pytest.raises(parts.search.EdgeError):
        finish(parts, protocol, "lion", 20, flat_below(1e-2))


def test_diverged_runs_are_the_worst(parts):
    protocol = parts.protocol.Protocol()
    surface = quadratic(0, 0)
    state, _ = finish(parts, protocol, "sgd", 20, lambda x, y, *rest: math.inf if x > 0 else surface(x, y, *rest))
    assert state.chosen.hidden_lr == parts.methods.METHODS["sgd"].start[0]
    with pytest.raises(parts.search.EdgeError, match="every run of the grid diverged"):
        finish(parts, protocol, "sgd", 20, lambda *_: math.inf)


def test_a_budget_that_cannot_widen_the_grid_is_refused(parts):
    with pytest.raises(parts.protocol.ComparisonError, match="take at least 15"):
        parts.search.grid_size(parts.protocol.Protocol(), 14)


def test_a_missing_class_is_told(parts):
    method = parts.methods.Method("torch.optim:NoSuchOptimizer", "No such optimizer")
    with pytest.raises(parts.protocol.ComparisonError, match="install a torch that has it.*--methods"):
        method.optimizer_class()


@pytest.mark.parametrize("optimum", [0, 2, -3, 1.4])
def test_adapters_have_one_rate(parts, optimum):
    protocol = parts.protocol.Protocol(model="llama-nano-lora")
    assert protocol.num_rates == 1 and parts.search.grid_size(protocol, 12) == 7
    surface = quadratic(optimum, 0)
    state, losses = finish(parts, protocol, "sinkgd", 12, surface)
    hidden, other = parts.methods.METHODS["sinkgd"].start_for(protocol.model)
    assert {run.other_lr for run in losses} == {other} and len(losses) == 12
    assert math.log2(state.chosen.hidden_lr / hidden) == round(optimum)
    with pytest.raises(parts.search.EdgeError, match="on the edge"):
        finish(parts, protocol, "sinkgd", 9, quadratic(4, 0))
    with pytest.raises(parts.protocol.ComparisonError, match="3 are the first grid.*take at least 9"):
        parts.search.grid_size(protocol, 8)


def test_without_a_search_all_have_the_rates_of_the_tuned_adamw(parts):
    protocol = parts.protocol.Protocol(weight_decays=(0.0,), warmups=(0.15,))
    search, searched = parts.search.Search(0, {"adamw": (1e-3, 4e-2)}), parts.search.Search.of_this_version(20, "x")
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4))
    for method in ("adamw", "sinkgd-carried", "lanton-carried"):
        state = parts.search.plan(method, protocol, search, {})
        assert [run.seed for run in state.missing] == [1, 2, 3] and search.takes(method)
        assert {(run.hidden_lr, run.other_lr, run.weight_decay, run.warmup) for run in state.missing} == {
            (1e-3, 4e-2, 0.0, 0.15)
        }
        groups = {
            group["name"]: group for group in parts.methods.METHODS[method].build(model, state.chosen).param_groups
        }
        assert (groups["hidden"]["lr"], groups["embedding"]["lr"]) == (1e-3, 4e-2)
    assert groups["hidden"]["scaling"] == "muon"
    assert parts.search.plan("lanton-auto", protocol, search, {}).chosen.hidden_lr is None and search.takes(
        "lanton-auto"
    )
    assert not search.takes("muon") and not searched.takes("lion-carried") and searched.takes("lion-create")


# -- statistics


def test_statistics_are_scipys(parts):
    summary = parts.summary
    ours, base = [4.52, 4.47, 4.55], [4.71, 4.70, 4.66]
    assert summary.standard_error(ours) == pytest.approx(scipy.stats.sem(ours), rel=1e-12)
    expected = scipy.stats.ttest_rel(ours, base).confidence_interval(0.95)
    interval = summary.paired_difference(ours, base)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert interval.mean == pytest.approx(sum(ours) / 3 - sum(base) / 3)
    assert interval.reading == "lower loss"
    assert summary.paired_difference([1.0, 2.0, 3.0], [1.1, 1.8, 3.1]).reading == "no difference seen"
    assert summary.paired_difference([2.0, 3.1, 4.0], [1.0, 2.0, 3.0]).reading == "higher loss"


def test_a_curve_between_evaluations(parts):
    curve = [(40, 400, 6.0), (80, 800, 5.0), (120, 1200, 4.5)]
    assert parts.summary.loss_at_step(curve, 60) == 5.5
    assert parts.summary.loss_at_step(curve, 110) == pytest.approx(4.625)
    assert parts.summary.loss_at_step(curve, 300) == 4.5
    assert parts.summary.loss_at_step(curve, 10) is None
    assert parts.summary.tokens_to_loss(curve, 5.5) == 600
    assert parts.summary.tokens_to_loss(curve, 4.75) == 1000
    assert parts.summary.tokens_to_loss(curve, 6.5) == 400
    assert parts.summary.tokens_to_loss(curve, 4.0) is None


# -- the pages


def test_the_page_has_the_numbers_of_the_code(parts):
    protocol = parts.protocol.Protocol()
    methods = [method for method in parts.methods.METHODS.values() if method.carried is None]
    text = " ".join((ROOT / "docs" / "protocol.md").read_text("utf-8").split())
    tuned, seeds = sum(method.start is not None for method in methods), len(protocol.judge_seeds)
    first, *others = [f"{value:g}" for value in protocol.weight_decays]
    for phrase in (
        f"weight decay {first}, {' and '.join(others)} (decoupled",
        f"warm-up over {' and '.join(f'{100 * value:g}' for value in protocol.warmups)} % of the steps",
        f"(20: {parts.search.grid_size(protocol, 20)} of the grid, {len(protocol.other_settings())} of the rest)",
        f"Tuning runs have {protocol.tune_steps} steps, with a schedule of that length, and seed {protocol.tune_seed}.",
        f"full length ({protocol.judge_steps} steps of {protocol.config.batch.tokens_per_step} tokens)",
        f"with seeds {', '.join(map(str, protocol.judge_seeds[:-1]))} and {protocol.judge_seeds[-1]}.",
        f"It is evaluated every {protocol.eval_every} steps.",
        f"{tuned} x 20 tuning runs and {len(methods)} x {seeds} judged runs",
    ):
        assert phrase in text, phrase


def test_the_pages_are_those_of_the_committed_results(parts):
    folder = ROOT / "docs" / "results"
    files = [file for family in ("llama", "gpt", "mixtral") for file in folder.glob(f"{family}-*.jsonl")]
    assert files
    for file in files:
        for page, text in parts.tables.pages(file, ROOT).items():
            assert page.read_text("utf-8") == text, f"{page} is not what --report {file.name} --write makes of it"


def appended(parts, path, protocol, kind, loss, methods=("adamw", "sinkgd", "lion-default")):
    """Add judged runs of a kind, for each of the methods; ``loss`` of method and seed."""
    with parts.results.writing(path, protocol) as (results, writer):
        for method in methods:
            best = parts.search.plan(method, protocol, results.search, results.losses).chosen
            for run in parts.search.judged_runs(best, protocol, kind):
                steps = run.steps(protocol)
                row = {"status": "done", "losses": [[steps, 4000, loss(method, run.seed)]], "bytes": {"weights": 1}}
                writer.append(
                    parts.results.run_row(
                        protocol, run, {**row, "environment": {"processor": "a", "torch": "1", "commit": "abc"}}
                    )
                )


@pytest.mark.parametrize(("sinkgd", "reading"), [
    (5.6, "SinkGD, AdamW on the rest and AdamW (an interval of their difference holds zero)"),
    (5.0, "the same with half of the steps and with all"),
])  # fmt: skip
def test_orders_at_half_and_all_steps(parts, tmp_path, sinkgd, reading):
    path = tmp_path / "r.jsonl"
    protocol = synthetic(parts, path)
    assert "budgets-llama-nano" not in parts.tables.blocks(path)
    levels = {"adamw": 5.5, "sinkgd": sinkgd, "lion-default": 7.0}
    # at 5.6, the difference is 0, 0.1 and 0.2
    appended(parts, path, protocol, "half", lambda m, seed: levels[m] + 0.1 * (seed - 2) * (2 if m == "sinkgd" else 1))
    assert parts.protocol.Run("half", "adamw", 1, None, None, None, 0.05).steps(protocol) == protocol.judge_steps // 2
    text = parts.tables.blocks(path)["budgets-llama-nano"]
    assert reading in " ".join(text.split())
    assert f"| AdamW | 5.500 ± {scipy.stats.sem([5.4, 5.5, 5.6]):.3f} | {1 if sinkgd > 5.5 else 2} | – |" in text


def test_twice_the_hidden_rate_is_told_beside_the_chosen_one(parts, tmp_path):
    path = tmp_path / "r.jsonl"
    protocol = synthetic(parts, path)
    results = parts.results.read(path)
    assert "twice" not in parts.tables.blocks(path)["chosen-llama-nano"]
    rows = {row.method: row for row in parts.summary.summarise(results)[0]}
    appended(parts, path, protocol, "double", lambda method, seed: rows[method].losses[seed - 1] - 0.25)
    doubled = [run for run in parts.results.read(path).rows if run.kind == "double" and run.method == "adamw"]
    assert {run.hidden_lr for run in doubled} == {2 * rows["adamw"].chosen.hidden_lr}
    assert {run.steps(protocol) for run in doubled} == {protocol.judge_steps}
    text = " ".join(parts.tables.blocks(path)["chosen-llama-nano"].split())
    assert f"AdamW {rows['adamw'].mean - 0.25:.3f}, -0.250 [-0.250, -0.250], lower loss" in text


def test_the_other_warm_up_is_judged_and_each_method_compared_with_its_better_one(parts, tmp_path):
    path = tmp_path / "r.jsonl"
    protocol = synthetic(parts, path)
    assert "warmups-llama-nano" not in parts.tables.blocks(path)
    rows = {row.method: row for row in parts.summary.summarise(parts.results.read(path))[0]}
    # AdamW is better by 0.25 with the other warm-up, SinkGD worse
    changes = {"adamw": -0.25, "sinkgd": 0.5}
    appended(parts, path, protocol, "warmup", lambda m, seed: rows[m].losses[seed - 1] + changes[m], [*changes])
    again = [run for run in parts.results.read(path).rows if run.kind == "warmup"]
    assert all({run.warmup, rows[run.method].chosen.warmup} == {0.05, 0.15} for run in again)
    assert {run.steps(protocol) for run in again} == {protocol.judge_steps}
    text = parts.tables.blocks(path)["warmups-llama-nano"]
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines()}
    adamw, sinkgd = rows["adamw"], rows["sinkgd"]
    chosen, mean = adamw.chosen.warmup, adamw.mean
    assert cells["AdamW"][:2] == [
        f"{chosen:.0%}: {mean:.3f} ± {adamw.error:.3f}",
        f"{0.2 - chosen:.0%}: {mean - 0.25:.3f} ± {adamw.error:.3f}, -0.250 [-0.250, -0.250]",
    ]
    assert cells["SinkGD, AdamW on the rest"][2].startswith(f"{sinkgd.mean - adamw.mean + 0.25:+.3f} [")
    assert cells["Lion, defaults"][1] == "–"
    assert cells["Lion, defaults"][2].startswith(f"{rows['lion-default'].mean - adamw.mean + 0.25:+.3f} [")


def test_rates_of_the_nano_beside_a_larger_model(parts, tmp_path, monkeypatch):
    nano, larger = tmp_path / "llama-nano.jsonl", tmp_path / "llama-micro.jsonl"
    synthetic(parts, larger, model="llama-micro")
    assert "transfer-llama-micro" not in parts.tables.blocks(larger)
    synthetic(parts, nano)
    assert "transfer-llama-nano" not in parts.tables.blocks(nano)
    text = parts.tables.blocks(larger)["transfer-llama-micro"]
    assert "| AdamW | 0.001 | 0.02 | 0.001 (1 x) | 0.02 (1 x) | +0.000 |" in text and "Lion" not in text

    def on_edge(*_):
        raise parts.search.EdgeError("the nano's best rates are on an edge")

    monkeypatch.setattr("comparison.growth.plan", on_edge)
    assert "transfer-llama-micro" not in parts.tables.blocks(larger)


def test_the_table_of_rates_carried_over_says_what_they_are(parts, tmp_path):
    path = tmp_path / "llama-nano-carried.jsonl"
    protocol = parts.protocol.Protocol(overrides=TINY, weight_decays=(0.1,), warmups=(0.15,))
    with parts.results.writing(path, protocol) as (_, writer):
        writer.append({"kind": "search", "budget": 0, "starts": {"adamw": [1e-3, 4e-2]}})
    methods = ("adamw", "sinkgd-carried", "lanton-auto")
    appended(parts, path, protocol, "judge", lambda method, seed: 5 - methods.index(method) + 0.01 * seed, methods)
    (block,) = parts.tables.blocks(path).items()
    assert block[0] == "llama-nano-carried" and "rates of 0.001 for hidden matrices and 0.04 for the rest" in " ".join(
        block[1].split()
    )
    assert "| SinkGD, AdamW on the rest | 4.020 ± 0.006 | -1.000 [-1.000, -1.000] | lower loss |" in block[1]
    assert "| LANTON, alpha='auto', defaults | 3.020 ± 0.006 |" in block[1] and "Muon" not in block[1]


# -- the file of results


def synthetic(parts, path, **changes):
    """A complete file of results of AdamW, SinkGD and default Lion on a quadratic surface; returns its rows."""
    protocol = replace(parts.protocol.Protocol(overrides=TINY), **changes)
    environment = {"processor": "a", "torch": "1", "commit": "abc"}
    with parts.results.writing(path, protocol) as (_, writer):
        search = parts.search.Search.of_this_version(20, protocol.model)
        writer.append({"kind": "search", **search._asdict()})
        for method, level in (("adamw", 0.0), ("sinkgd", -0.3), ("lion-default", 0.2)):
            losses = {}
            while (state := parts.search.plan(method, protocol, search, losses)).missing:
                for run in state.missing:
                    loss = 5 + level + 0.01 * run.seed + 0.003 * run.seed**2 * (method != "adamw")
                    if run.hidden_lr is not None:
                        start = parts.methods.METHODS[method].start
                        loss += abs(math.log2(run.hidden_lr / start[0])) + abs(math.log2(run.other_lr / start[1]))
                        loss += run.weight_decay + run.warmup
                    losses[run], steps = loss, run.steps(protocol)
                    result = {
                        "status": "done",
                        "losses": [[40, 4000, loss + 1], [steps, 100 * steps, loss]],
                        "bytes": {"weights": 100, "state": 0 if method == "sinkgd" else 50},
                        "environment": environment,
                    }
                    writer.append(parts.results.run_row(protocol, run, result))
    return protocol


def test_the_table_says_no_more_than_the_intervals(parts, tmp_path):
    synthetic(parts, tmp_path / "r.jsonl")
    rows, others = parts.summary.summarise(parts.results.read(tmp_path / "r.jsonl"))
    assert [row.method for row in rows] == ["sinkgd", "adamw", "lion-default"]
    assert rows[0].difference.mean == pytest.approx(-0.3 + 0.003 * 14 / 3)
    assert [row.on_frontier for row in rows] == [True, False, False]
    assert rows[0].tokens < 1 and rows[1].tokens == 1 and rows[2].tokens is None
    assert others["muon"] == "not begun"
    text = "\n".join(parts.tables.blocks(tmp_path / "r.jsonl").values())
    assert "| SinkGD, AdamW on the rest |" in text and "| lower loss |" in text
    assert "| Muon" not in text and "Not begun: Muon" in text
    assert "<svg" in parts.tables.figure(rows, "llama-nano")


def test_pages_are_written_between_their_marks(parts):
    text = "a\n<!-- table:x -->\nold\n<!-- /table:x -->\nb <!-- table:y -->\n<!-- /table:y -->\n"
    new = parts.tables.replace_blocks(text, {"x": "new \\1"})
    assert new == text.replace("old", "new \\1")


def test_pages_without_a_place_are_told(parts, tmp_path):
    synthetic(parts, tmp_path / "r.jsonl")
    pages = [tmp_path / "docs" / "measured" / "losses.md", tmp_path / "docs" / "protocol.md"]
    pages[0].parent.mkdir(parents=True)
    pages[0].write_text("<!-- table:compare-llama-nano -->\n<!-- /table:compare-llama-nano -->\n")
    with pytest.raises(parts.protocol.ComparisonError, match="has the marks <!-- table:chosen-llama-nano -->"):
        parts.tables.write(tmp_path / "r.jsonl", tmp_path)
    assert "SinkGD" not in pages[0].read_text()  # nothing is written where a mark is missing
    pages[1].write_text("<!-- table:chosen-llama-nano -->\n<!-- /table:chosen-llama-nano -->\n")
    written = [*pages, tmp_path / parts.tables.figure_path("llama-nano")]
    assert sorted(parts.tables.write(tmp_path / "r.jsonl", tmp_path)) == sorted(written)
    assert parts.tables.write(tmp_path / "r.jsonl", tmp_path) == []
    assert "SinkGD" in pages[0].read_text() and "4.7630, 4.7820, 4.8070" in pages[1].read_text()


def test_a_row_with_a_diverged_seed_has_no_mean(parts, tmp_path):
    path = tmp_path / "r.jsonl"
    protocol = synthetic(parts, path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    last = next(line for line in lines if line.get("kind") == "judge" and line["method"] == "sinkgd")
    last |= {"status": "diverged at step 50", "losses": []}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, _ = parts.summary.summarise(parts.results.read(path))
    row = next(row for row in rows if row.method == "sinkgd")
    assert (row.mean, row.difference, row.diverged) == (None, None, 1)
    assert "1 of 3 diverged" in parts.tables.blocks(path)[f"compare-{protocol.model}"]


def edited(path, number, **changes):
    lines = path.read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | changes)
    path.write_text("\n".join(lines) + "\n")


DAMAGE = {
    "not JSON": (lambda path: path.write_text(path.read_text().replace('{"id"', "{id", 3)), "not a JSON object"),
    "no protocol": (lambda path: path.write_text("".join(path.read_text().splitlines(True)[1:])), "does not begin"),
    "other settings": (lambda path: edited(path, 3, weight_decay=0.3), "settings are not those"),
    "mixed": (lambda path: edited(path, 3, protocol="0" * 12), "several protocols are mixed"),
    "incomplete": (lambda path: drop(path, 3, "losses"), "no complete result"),
    "not a number": (lambda path: edited(path, 3, losses=[[1, 2, math.nan]]), "no complete result"),
    "cut short": (lambda path: edited(path, 3, losses=[[40, 4000, 5.0]]), "no complete result"),
    "two machines": (lambda path: edited(path, 3, environment={"processor": "b", "torch": "1"}), "processor a and b"),
    "two texts": (
        lambda path: [
            edited(path, n, environment={"processor": "a", "text": text}) for n, text in ((4, "x"), (5, "y"))
        ],
        "text x and y",
    ),
    "no starts": (lambda path: drop(path, 1, "starts"), "has no budget and starts; remove the line"),
    "unknown status": (lambda path: edited(path, 3, status="running"), "no complete result"),
    "two results": (lambda path: path.write_text(path.read_text() + again(path)), "second result of the same run"),
}


def drop(path, number, key):
    lines = path.read_text().splitlines()
    line = json.loads(lines[number])
    del line[key]
    lines[number] = json.dumps(line)
    path.write_text("\n".join(lines) + "\n")


def again(path):
    line = json.loads(path.read_text().splitlines()[3])
    return json.dumps(line | {"losses": [[60, 6000, 0.1]]}) + "\n"


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_refused(parts, tmp_path, case):
    damage, message = DAMAGE[case]
    synthetic(parts, tmp_path / "r.jsonl")
    damage(tmp_path / "r.jsonl")
    with pytest.raises(parts.protocol.ComparisonError, match=message):
        parts.results.read(tmp_path / "r.jsonl")


def test_other_versions_and_settings_are_refused(parts, tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    protocol = synthetic(parts, path)
    with (
        pytest.raises(parts.protocol.ComparisonError, match="another protocol: judge_steps 200, not 100"),
        parts.results.writing(path, replace(protocol, judge_steps=100)),
    ):
        pass
    monkeypatch.setitem(
        parts.methods.METHODS, "sinkgd", replace(parts.methods.METHODS["sinkgd"], args={"num_iters": 3})
    )
    with pytest.raises(parts.protocol.ComparisonError, match="this version has .*num_iters"):
        parts.results.read(path)
    monkeypatch.setattr(parts.results, "VERSION", 99)
    with pytest.raises(parts.protocol.ComparisonError, match="version 1, this is version 99"):
        parts.results.read(path)


@pytest.mark.parametrize("below", [".", "more/folders"])
def test_a_folder_of_results_that_is_a_file_is_told(parts, tmp_path, below):
    file = tmp_path / "llama-micro.jsonl"
    file.write_text("{}")
    with (
        pytest.raises(parts.protocol.ComparisonError, match="--out is a folder of results, and .* is a file"),
        parts.results.writing(file / below / "llama-micro.jsonl", protocol=None),
    ):
        pass
    assert file.read_text() == "{}"


def test_a_full_disk_and_a_second_writer_are_told(parts, tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    protocol = synthetic(parts, path)
    before = path.read_bytes()
    with parts.results.writing(path, protocol) as (_, writer):
        with (
            pytest.raises(parts.protocol.ComparisonError, match="another process writes"),
            parts.results.writing(path, protocol),
        ):
            pass
        write = os.write
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:10]))
            with pytest.raises(parts.protocol.ComparisonError, match="No space left on device; .*: make room"):
                writer.append({"kind": "search"})
        assert path.read_bytes() == before
    monkeypatch.setattr(parts.results, "free_bytes", lambda _: 1000)
    with pytest.raises(parts.protocol.ComparisonError, match="make room first"), parts.results.writing(path, protocol):
        pass


def test_another_environment_is_refused(parts, tmp_path):
    protocol = synthetic(parts, tmp_path / "r.jsonl")
    with parts.results.writing(tmp_path / "r.jsonl", protocol) as (results, writer):
        search = parts.search.Search.of_this_version(20, protocol.model)
        scheduler = parts.schedule.Scheduler(results, writer, ["adamw"], search, 1, 0.0)
        with pytest.raises(parts.protocol.ComparisonError, match="another environment: processor a, now"):
            scheduler.go()


def test_a_cut_file_is_reported_without_its_last_line(parts, tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    synthetic(parts, path)
    spec = importlib.util.spec_from_file_location("compare", ROOT / "benchmarks" / "optimizers" / "compare.py")
    compare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compare)
    assert compare.report(path, False) == 0
    whole = capsys.readouterr()
    path.write_text(path.read_text() + '{"id": "cut')
    assert compare.report(path, False) == 0
    cut = capsys.readouterr()
    assert (whole.err, cut.out) == ("", whole.out)
    assert "is cut off and does not count" in cut.err


def test_a_file_of_a_first_line_alone_has_no_rows(parts, tmp_path):
    path = tmp_path / "r.jsonl"
    synthetic(parts, path)
    path.write_text(path.read_text().splitlines(True)[0])
    assert "no run is finished yet" in parts.tables.blocks(path)["compare-llama-nano"]


@pytest.mark.parametrize(("options", "message"), [
    (["--judge-seeds", "1", "1"], "two or more different --judge-seeds, not [1, 1]"),
    (["--eval-every", "0"], "--eval-every of at least 1"),
    (["--double", "muon", "--methods", "adamw"], "judge methods of --methods; add muon there"),
    (["--out", "/proc/none"], "--out: /proc/none cannot be made"),
])  # fmt: skip
def test_options_that_no_run_could_use_are_refused_before_the_first(parts, options, message, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("compare", ROOT / "benchmarks" / "optimizers" / "compare.py")
    compare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compare)
    monkeypatch.setattr("sys.argv", ["compare", *options])
    assert compare.main() == 2
    assert message in capsys.readouterr().err


def test_a_start_is_moved_for_the_model_whose_search_ended_on_an_edge(parts):
    lanton = parts.methods.METHODS["lanton"]
    assert lanton.start_for("llama-nano") == lanton.start != lanton.start_for("gpt-nano")
    assert parts.methods.METHODS["lanton-default"].start_for("gpt-nano") is None
    labels = {method.label for method in parts.methods.METHODS.values() if method.start}
    assert {label for label, _ in parts.methods.MOVED_STARTS} <= labels


def test_the_difference_between_two_rows_is_paired_by_seed(parts):
    """That of a method to tuned AdamW is the table's; a pair turned round changes its sign."""
    results = parts.results.read(ROOT / "docs" / "results" / "llama-micro.jsonl")
    rows = parts.summary.summarise(results)[0]
    (muon,) = (row for row in rows if row.method == "muon")
    told = list(parts.growth.differences(results, rows, "muon", "adamw"))
    assert told[0] == f"judge: muon - adamw: {muon.difference:+.3f}" and told[1].startswith("half: muon - adamw: -")
    assert next(parts.growth.differences(results, rows, "adamw", "muon")).startswith("judge: adamw - muon: +")
    with pytest.raises(parts.protocol.ComparisonError, match="--between: no complete row of nothing; the file has"):
        list(parts.growth.differences(results, rows, "muon", "nothing"))
