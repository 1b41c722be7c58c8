"""The search of learning rates: its rounds, replayed on recorded runs, and ``find_lr`` on small models."""

import json
import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import nn

from leanstep.optimizers import create, find_lr
from leanstep.optimizers.rates.search import best_powers, next_powers

RESULTS = Path(__file__).parents[2] / "docs" / "results"
METHODS = ("sinkgd", "sinkgd-balanced", "lanton", "lanton-plain", "lion", "s-mfac")
FAR = 1e9


def search(loss_at, rates=2, most=100):
    losses = {}
    while (waiting := next_powers(losses, rates)) and len(losses) < most:
        losses.update((powers, loss_at(powers)) for powers in waiting)
    return best_powers(losses), losses


def bowl(minimum):
    return lambda powers: 1 + sum((a - b) ** 2 for a, b in zip(powers, minimum, strict=True))


@pytest.mark.parametrize(("minimum", "runs"), [((0,), 3), ((3,), 6), ((0, 0), 5), ((2, -1), 12), ((-4, 5), 18)])
def test_both_neighbours_of_the_best_are_tried(minimum, runs):
    best, losses = search(bowl(minimum), len(minimum))
    assert best == minimum and len(losses) <= runs
    for axis in range(len(minimum)):
        for step in (-1, 1):
            assert tuple(p + step * (a == axis) for a, p in enumerate(best)) in losses


def test_a_rate_without_effect_is_left_where_it_began():
    assert search(lambda powers: 1 + (powers[0] - 1) ** 2 + 1e-5 * powers[1])[0] == (1, 0)


def test_a_start_that_diverges_falls_until_it_does_not():
    best, losses = search(lambda powers: math.inf if powers[0] > -5 else bowl((-6, -6))(powers))
    assert best == (-6, -6) and (-2, -2) in losses and (-1, 0) not in losses


def recorded():
    """The tuning runs of the comparison of optimizers by method, over powers of two of their starts."""
    for name in ("llama-nano", "gpt-nano", "llama-micro"):
        lines = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
        starts = [line["starts"] for line in lines if line.get("kind") == "search"][-1]
        grids = defaultdict(dict)
        for run in lines:
            if run.get("kind") == "tune" and (run["weight_decay"], run["warmup"]) == (0.1, 0.05):
                start, rates = starts[run["method"]], (run["hidden_lr"], run["other_lr"])
                powers = tuple(round(math.log2(rate / first)) for rate, first in zip(rates, start, strict=True))
                grids[run["method"]][powers] = run["losses"][-1][2] if run["status"] == "done" else math.inf
        yield from ((name, method, grids[method]) for method in METHODS)


def test_recorded_searches_of_fifteen_runs_end_at_rates_within_a_factor_of_two():
    """The numbers of docs/howto/learning-rates.md."""
    counts, differ, unknown = [], [], 0
    for model, method, grid in recorded():
        best, losses = search(lambda powers, grid=grid: grid.get(powers, FAR))
        full = min(grid, key=grid.__getitem__)
        assert max(abs(a - b) for a, b in zip(best, full, strict=True)) <= 1, (model, method, best, full)
        assert grid[best] <= grid[full] + 0.05 and len(grid) >= 15, (model, method)
        counts.append(len(losses))
        unknown += len(losses.keys() - grid.keys())
        differ += [(model, method)] * (best != full)
    assert len(counts) == 18 and 8.5 < sum(counts) / len(counts) < 9.5
    assert differ == [("llama-micro", "sinkgd-balanced")] and unknown == 2


class Counter(nn.Module):
    """Predicts the next of 16 tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens):
        self.calls += 1
        return self.head(self.hidden(self.embed(tokens)).relu())


def loss_fn(model, batch):
    tokens, noise = batch
    return nn.functional.cross_entropy(model(tokens), (tokens * 3 + 1 + noise) % 16)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Counter()


@pytest.fixture
def data():
    chance = torch.Generator().manual_seed(0)
    return [torch.randint(16, (2, 32), generator=chance) * torch.tensor([[1], [step % 2]]) for step in range(12)]


@pytest.mark.parametrize("options", [{"lr": 5e-3}, {"like_adamw": {"lr": 5e-3, "weight_decay": 0.1}}])
def test_the_chosen_rates_train_better_than_the_start_and_the_model_is_as_before(model, data, options):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = []
    rates = find_lr(model, loss_fn, data, "sinkgd", steps=24, validation=data[:2], say=said.append, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert rates.is_bracketed and len(said) == len(rates.trials) and rates.loss < rates.trials[0][1]
    assert rates.loss <= 1.0002 * min(loss for _, loss in rates.trials)
    assert "best" in str(rates) and "edge" not in str(rates)
    like = rates.options.get("like_adamw", rates.options)
    assert (rates.rates, rates.loss) in rates.trials
    assert rates.rates == {"matrices": like["lr"], "the rest": rates.options["settings"]["embedding"]["lr"]}
    groups = create(model, "sinkgd", say=None, **rates.options).param_groups
    assert {group["lr"] for group in groups if group["name"] != "hidden"} == {rates.rates["the rest"]}


def test_rates_of_settings_keep_their_ratio(model, data):
    settings = {"head": {"lr": 3e-2}, "hidden": {"lr": 5e-3}}
    rates = find_lr(model, loss_fn, data, "lion", steps=4, lr=1e-2, settings=settings, most_runs=4, say=None)
    of_roles = {role: values["lr"] for role, values in rates.options["settings"].items()}
    assert of_roles["head"] == pytest.approx(3 * of_roles["embedding"])
    assert of_roles["hidden"] == pytest.approx(rates.options["lr"] / 2)
    assert not rates.is_bracketed and "more runs" in str(rates)


def test_a_model_of_matrices_has_one_rate(data):
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    batches = [torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    rates = find_lr(model, lambda m, x: (m(x) - x).square().mean(), iter(batches), "lanton", steps=6, say=None)
    assert [list(trial[0]) for trial in rates.trials] == [["matrices"]] * len(rates.trials)
    assert "settings" not in rates.options


@pytest.mark.parametrize("name", ["lanton", "lion"])
def test_the_search_starts_where_create_does(model, data, name):
    options = {"weight_decay": 0.1, "settings": {"head": {"weight_decay": 0.0}}, "say": None}
    made = {group["name"]: group for group in create(model, name, **options).param_groups}
    rates = find_lr(model, loss_fn, data, name, steps=2, most_runs=1, **options)
    if name == "lanton":  # whose rates are AdamW's
        assert rates.rates == {"matrices": made["hidden"]["lr"], "the rest": made["embedding"]["lr"]}
    again = {group["name"]: group for group in create(model, name, **rates.options, say=None).param_groups}
    for role, group in made.items():
        assert {k: v for k, v in again[role].items() if k != "params"} == {
            k: v for k, v in group.items() if k != "params"
        }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": []}, "expected batches in data, got none"),
        ({"steps": 1}, "at least two steps .*got steps=1"),
        ({"loss_fn": lambda model, batch: {"loss": 1.0}}, "^find_lr: loss_fn.* got dict$"),
        ({"loss_fn": lambda model, batch: batch.float()}, r"^find_lr: loss_fn.* got a tensor of shape \("),
        ({"name": "lyon"}, "take 'lion'"),
        ({"loss_fn": lambda model, batch: loss_fn(model, batch) * math.nan, "most_runs": 2}, "every run diverged"),
        ({"learning_rate": 1.0}, "^find_lr: SinkGD has no option learning_rate; take lr;"),
        ({"name": "lion", "embeddings": "balanced"}, "^find_lr: embeddings='balanced' is a rule of SinkGD"),
        ({"like_adamw": {}}, "^find_lr: like_adamw: expected AdamW's 'lr'"),
        ({"lr": "high"}, "learning rate must be a number, got 'high'"),
        ({"lr": 0.0}, "expected a start above 0, .* got lr=0.0"),
        ({"like_adamw": {"lr": 0}}, "expected a start above 0, .* got lr=0"),
    ],
)
def test_what_cannot_be_searched_is_said(model, data, change, message):
    arguments = {"model": model, "loss_fn": loss_fn, "data": data, "name": "sinkgd", "steps": 2, "say": None, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        find_lr(**arguments)
