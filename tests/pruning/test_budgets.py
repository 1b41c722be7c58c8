"""Budgets of operations, bytes and seconds, by the command and by :func:`prune`: they are met, and what is left is
told."""

import json
import math

import pytest
import torch
from pruned_models import images, make_cnn, make_llama, save_model, tokens
from texts import sentences
from torch import nn
from transformers import AutoModelForCausalLM

from leanstep.cli import main
from leanstep.pruning import Budget, InfeasibleBudget, LatencyTable, Layer, find_targets, prune
from leanstep.pruning.allocate.budgets import cost, keep_total
from leanstep.pruning.measure.batches import as_batches
from leanstep.pruning.measure.curve_file import weights_hash
from leanstep.pruning.score.targets import count_uses

SMALL = ["--samples", "6", "--curve-samples", "3", "--held-out", "2", "--seq-len", "24"]
LEVELS = (0.0, 0.4, 0.6, 0.8)


def seconds_of(model, slow: str = "down_proj") -> dict[str, list[float]]:
    """A matrix takes a nanosecond a weight, some five, and half of that is saved by what is pruned."""
    return {
        target.name: [
            1e-9 * (5 if slow in target.name else 1) * target.layer.numel * (1 - level / 2) for level in LEVELS
        ]
        for target in find_targets(model)
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model = make_llama(2)
    save_model(model, folder / "model")
    (folder / "text.txt").write_text(sentences(60))
    table = {"levels": list(LEVELS), "seconds": seconds_of(model)}
    (folder / "table.json").write_text(json.dumps(table))
    return folder


def leanstep_prune(base, out, *more):
    return main(["prune", str(base / "model"), "--out", str(out), "--data", str(base / "text.txt"), *SMALL, *more])


def test_costs_of_a_matrix_and_weights_of_a_sparsity():
    layer = Layer("a", (3, 4), uses=3, itemsize=2)
    assert cost("flops", layer, [5, 12]).tolist() == [30, 72]
    assert cost("bytes", layer, [5, 12]).tolist() == [12, 24]  # a mask of two bytes, which a dense matrix needs not
    assert keep_total(100, 0.55) == 45 and math.ceil(0.55 * 100) == 56


@pytest.mark.parametrize("kind", ["flops", "bytes"])
def test_the_command_removes_a_fraction_of_operations_or_bytes(kind, base, tmp_path, capsys):
    levels = ["--levels", "0.3,0.5,0.7,0.9"]
    assert leanstep_prune(base, tmp_path / "out", "--sparsity", "0.4", "--budget", kind, *levels) == 0
    told = capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    targets = find_targets(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    model = make_llama(2)
    counted = count_uses(model, find_targets(model), as_batches(tokens(2, 24), model)[0])
    layers = [target.layer for target in counted]
    dense = sum(int(cost(kind, layer, layer.numel)) for layer in layers)
    left = sum(
        int(cost(kind, layer, int(target.weight.count_nonzero())))
        for layer, target in zip(layers, targets, strict=True)
    )
    assert content["budget"] == {
        "kind": kind,
        "target": pytest.approx(0.6 * dense),
        "dense": dense,
        "before": dense,
        "after": left,
    }
    assert 0.59 * dense < left <= 0.6 * dense
    assert f"budget         {left:,.0f} " in told and "40.00% asked for" in told
    unit = {"flops": "Operations per sample", "bytes": "Bytes"}[kind]
    assert unit in (tmp_path / "out" / "report.html").read_text()
    assert {one["method"] for one in content["compared"]} == {"dp", "uniform"}


def test_the_command_reads_seconds_from_a_table(base, tmp_path):
    more = ["--sparsity", "0.3", "--budget", "latency", "--latency-table", str(base / "table.json")]
    assert leanstep_prune(base, tmp_path / "out", *more) == 0
    content = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    seconds = json.loads((base / "table.json").read_text())["seconds"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    spent = 0.0
    for target in find_targets(model):
        zeros = float((target.weight == 0).float().mean())
        level = min(range(len(LEVELS)), key=lambda place: abs(LEVELS[place] - zeros))
        assert abs(LEVELS[level] - zeros) <= 0.5 / target.layer.numel + 1e-9
        spent += seconds[target.name][level]
    dense = sum(row[0] for row in seconds.values())
    budget = content["budget"]
    assert budget["after"] == pytest.approx(spent) and spent <= budget["target"] == pytest.approx(0.7 * dense)
    assert budget["dense"] == budget["before"] == pytest.approx(dense)
    assert {one["method"] for one in content["compared"]} == {"dp", "uniform"}


def test_the_number_of_weights_is_what_a_sparsity_limits(base, tmp_path):
    more = ["--allocation", "uniform", "--budget", "params", "--sparsity", "0.5"]
    assert leanstep_prune(base, tmp_path / "out", *more) == 0
    budget = json.loads((tmp_path / "out" / "sparsity.json").read_text())["budget"]
    assert budget["kind"] == "params" and budget["after"] == budget["target"] == budget["dense"] // 2


REFUSED = {
    "no table": (["--budget", "latency"], "goes with a --latency-table FILE"),
    "a table for nothing": (["--latency-table", "table.json"], "goes with a --latency-table FILE"),
    "no file": (["--budget", "latency", "--latency-table", "none.json"], "latency table .*none.json cannot be read"),
    "another allocation": (["--budget", "flops", "--allocation", "erk"], "needs allocation='dp', got 'erk'"),
    "a pattern for all": (["--budget", "flops", "--pattern", "2:4"], "the same for every matrix, whatever the budget"),
    "out of reach": (
        ["--budget", "bytes", "--sparsity", "0.97"],
        r"removing 0.97 of the cost \(bytes\) is out of reach: the matrices' levels remove from 0 to 0.9",
    ),
    "too slow": (
        ["--budget", "latency", "--latency-table", "table.json", "--sparsity", "0.5"],
        r"removing 0.5 of the cost \(latency\) is out of reach: .* from 0 to 0.4; .* or a table with sparser levels",
    ),
    "another level": (
        ["--budget", "latency", "--latency-table", "table.json", "--levels", "0.5", "--sparsity", "0.1"],
        "has no level 0.5, which model.layers.0.self_attn.q_proj.weight may be pruned to; its levels are 0, 0.4, 0.6",
    ),
    "a pattern's level": (
        ["--budget", "latency", "--latency-table", "table.json", "--pattern", "N:8", "--sparsity", "0.1"],
        "has no level 0.125",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_budgets_that_cannot_be_met_are_refused_with_nothing_written(case, base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(base)
    more, message = REFUSED[case]
    wanted = [] if "--sparsity" in more or "--pattern" in more else ["--sparsity", "0.5"]
    assert leanstep_prune(base, tmp_path / "out", *wanted, *more) == 2
    (error,) = capsys.readouterr().err.splitlines()[-1:]
    assert error.startswith("error: ")
    import re

    assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == []


GOOD = {"levels": [0, 0.5], "seconds": {"a": [2.0, 1.0]}}
TABLES = {
    "no JSON": ("{", "Expecting"),
    "a list": ([], "expected an object with 'levels' and 'seconds', got list"),
    "another key": (GOOD | {"unit": "ms"}, "expected an object with 'levels' and 'seconds', got levels, seconds, unit"),
    "no levels": ({"levels": 3, "seconds": {}}, "expected a list of levels"),
    "one level": (GOOD | {"levels": [0]}, "two levels or more"),
    "not from 0": (GOOD | {"levels": [0.1, 0.5]}, "the first 0"),
    "falling": (GOOD | {"levels": [0, 0.5, 0.4]}, "increasing"),
    "percent": (GOOD | {"levels": [0, 50]}, "from 0 to below 1"),
    "a word as level": (GOOD | {"levels": [0, "half"]}, "from 0 to below 1"),
    "no layers": (GOOD | {"seconds": {}}, "a row of seconds for every layer"),
    "a level too few": (GOOD | {"seconds": {"a": [2.0]}}, "a needs 2 numbers, one for each level 0, 0.5; got 1 number"),
    "no row": (GOOD | {"seconds": {"a": 2.0}}, "a needs 2 numbers, .* got float"),
    "a word": (GOOD | {"seconds": {"a": [2.0, "fast"]}}, "a at level 0.5: expected seconds, got 'fast'"),
    "null": (GOOD | {"seconds": {"a": [2.0, None]}}, "a at level 0.5: expected seconds, got None"),
    "not a number": ('{"levels": [0, 0.5], "seconds": {"a": [2.0, NaN]}}', "a at level 0.5: expected seconds, got nan"),
    "negative": (GOOD | {"seconds": {"a": [2.0, -1.0]}}, "a at level 0.5: expected seconds, got -1.0"),
    "no time": (GOOD | {"seconds": {"a": [0, 0]}}, "a at level 0: expected seconds, got 0"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_that_is_none_is_refused_with_its_place(case, tmp_path):
    content, message = TABLES[case]
    file = tmp_path / "table.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=f"(?s)table.json: .*{message}"):
        LatencyTable.read(file)


def test_a_matrix_without_seconds_is_named_before_anything_is_measured():
    model = make_llama(1)
    rows = {name: tuple(row) for name, row in seconds_of(model).items() if "up_proj" not in name}
    before = weights_hash(model)
    with pytest.raises(ValueError, match="no row for model.layers.0.mlp.up_proj.weight; every pruned matrix"):
        prune(model, tokens(6), sparsity=0.2, budget=LatencyTable(LEVELS, rows))
    assert weights_hash(model) == before
    found = prune(model, tokens(6), sparsity=0.2, budget=LatencyTable(LEVELS, rows), exclude=["*up_proj*"])
    assert found.budget["after"] <= found.budget["target"]


def test_groups_cost_what_their_matrices_do_and_zeros_of_before_stay():
    model = make_llama(2)
    table = LatencyTable(LEVELS, {name: tuple(row) for name, row in seconds_of(model).items()})
    first = prune(model, tokens(6), sparsity=0.2, budget=table, granularity="block")
    again = prune(model, tokens(6), sparsity=0.35, budget=table, granularity="block")
    assert first.budget["dense"] == again.budget["dense"] == first.budget["before"]
    assert again.budget["before"] == pytest.approx(first.budget["after"])
    assert again.budget["after"] <= again.budget["target"] == pytest.approx(0.65 * first.budget["dense"])


def test_patterns_keep_within_a_budget_of_operations_also_where_uniform_is_better():
    result = prune(
        make_cnn(), images(10), sparsity=0.4, budget="flops", score="magnitude", pattern="N:8", exclude=["conv1.weight"]
    )
    assert result.budget["after"] <= result.budget["target"]
    assert set(result.allocation.patterns) == set(result.allocation.counts)


def test_counting_operations_leaves_a_model_in_training_as_it_was():
    model = make_cnn().train()
    prune(model, images(10), sparsity=0.4, budget="flops", score="magnitude", levels=LEVELS[1:])
    fresh = make_cnn().state_dict()
    assert model.training
    assert all(torch.equal(t, fresh[name]) for name, t in model.state_dict().items() if "bn" in name)


def test_every_call_of_a_weight_is_an_operation():
    inner = nn.Linear(8, 8)
    model = nn.Sequential(inner, inner, inner, nn.Linear(8, 8))
    counted = count_uses(model, find_targets(model), as_batches(torch.randn(4, 5, 8), model)[0])
    assert [target.layer.uses for target in counted] == [15, 5]


def test_a_budget_of_its_own_has_its_own_target_and_no_sparsity():
    model = make_llama(1)
    layers = [target.layer for target in find_targets(model)]
    result = prune(model, tokens(6), budget=Budget.fraction("bytes", 0.3, layers))
    assert result.budget["after"] <= result.budget["target"] == pytest.approx(0.3 * result.budget["dense"])
    # levels were laid around the sparsity that this takes, and not around a half
    assert 0.7 < result.sparsity < 0.75


def test_matrices_of_different_use_are_not_one_group_of_operations():
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False))
    model = nn.Sequential(nn.Sequential(layers, layers[1]), nn.Flatten(), nn.Linear(4 * 12 * 12, 5))
    with pytest.raises(ValueError, match="used differently often"):
        prune(model, images(10), sparsity=0.4, budget="flops", score="magnitude", granularity="block", include=["*"])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"budget": "watts"}, "budget must be params, flops, bytes, a Budget or, for latencies, a LatencyTable"),
        ({"budget": "flops", "sparsity": None}, "expected a sparsity"),
        ({"budget": Budget("bytes", 100.0)}, "a Budget alone"),
        ({"budget": "latency"}, "for latencies, a LatencyTable; got 'latency'"),
    ],
)
def test_budgets_that_are_none_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        prune(make_llama(1), tokens(6), **{"sparsity": 0.5} | settings)


def test_a_budget_below_the_sparsest_levels_tells_what_can_be_removed():
    with pytest.raises(InfeasibleBudget, match="remove from 0 to 0.7999") as refused:
        prune(make_llama(1), tokens(6), sparsity=0.95, budget="flops", levels=[0.4, 0.8])
    assert refused.value.lowest == pytest.approx(refused.value.highest * 0.2, rel=0.01)
