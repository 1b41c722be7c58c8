"""The runs of the comparison of optimizers, in workers and after kill -9; the peers against their formulas."""

import json
import math
import signal
import time
from dataclasses import replace

import pytest
import torch
from comparison_runs import TINY, comparison, comparison_modules, killed
from forked import finish_code, preload, start_code

from leanstep.recipes.config.loader import load
from leanstep.recipes.data.sequences import load_data
from leanstep.recipes.training.train import train
from leanstep.recipes.training.validation import evaluate

preload("leanstep.recipes.training.train", "transformers.models.llama.modeling_llama")
parts = pytest.fixture(scope="module")(comparison_modules)


pytestmark = pytest.mark.usefixtures("fresh_accelerate")  # forgets the precision of runs


# -- peers


def polar_by_newton_schulz(matrix):
    """Muon's five steps, written out."""
    x = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T) / max(matrix.norm(), 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_normuon_is_its_formula(parts, shape, transposed):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    stored = torch.nn.Parameter((weight.T if transposed else weight).clone())
    group = {"params": [stored], "algorithm": "normuon", "transposed": transposed}
    optimizer = parts.peers.NorMuon([group], lr=0.1, weight_decay=0.2, momentum=0.9, beta2=0.8)
    momentum, mean_squares = torch.zeros_like(weight), torch.zeros(shape[0], dtype=torch.float64)
    for _ in range(3):
        gradient = torch.randn(shape, dtype=torch.float64)
        stored.grad = (gradient.T if transposed else gradient).clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        polar = polar_by_newton_schulz(0.9 * momentum + 0.1 * gradient)
        for i in range(shape[0]):
            mean_squares[i] = 0.8 * mean_squares[i] + 0.2 * (polar[i] ** 2).mean()
        update = torch.stack([row / (s.sqrt() + 1e-8) for row, s in zip(polar, mean_squares, strict=True)])
        weight = weight * (1 - 0.1 * 0.2) - 0.1 * 0.2 * math.sqrt(weight.numel()) / update.norm() * update
        torch.testing.assert_close(stored.detach().T if transposed else stored.detach(), weight, rtol=1e-10, atol=1e-10)


def test_scale_is_its_formula(parts):
    torch.manual_seed(0)
    start = [torch.randn(5, 7, dtype=torch.float64) for _ in range(3)]
    weights = [torch.nn.Parameter(value.clone()) for value in start]
    algorithms = ("rows", "columns", "head")
    groups = [{"params": [w], "algorithm": a} for w, a in zip(weights, algorithms, strict=True)]
    optimizer = parts.peers.SCALE(groups, lr=0.1, weight_decay=0.5, momentum=0.9)
    momentum = torch.zeros(5, 7, dtype=torch.float64)
    for _ in range(3):
        gradients = [torch.randn(5, 7, dtype=torch.float64) for _ in range(3)]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradients[2]
        directions = [gradients[0].clone(), gradients[1].clone(), momentum.clone()]
        for direction in (directions[0], directions[2]):
            for i in range(5):
                direction[i] /= direction[i].norm() / math.sqrt(7)
        for j in range(7):
            directions[1][:, j] /= directions[1][:, j].norm() / math.sqrt(5)
        start = [0.95 * value - 0.1 * direction for value, direction in zip(start, directions, strict=True)]
        for weight, expected in zip(weights, start, strict=True):
            torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)
    assert [len(optimizer.state[weight]) for weight in weights] == [0, 0, 1]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["RMNP", "MuonEq", "LionMuon"])
def test_rules_of_momentum_are_their_formulas(parts, name, transposed):
    torch.manual_seed(0)
    weight = torch.randn(10, 6, dtype=torch.float64)
    stored = torch.nn.Parameter((weight.T if transposed else weight).clone())
    optimizer = getattr(parts.peers, name)(
        [{"params": [stored], "algorithm": name.lower(), "transposed": transposed}], lr=0.1, weight_decay=0.2
    )
    momentum = torch.zeros_like(weight)
    for step in range(1, 5):
        gradient = torch.randn(10, 6, dtype=torch.float64)
        stored.grad = (gradient.T if transposed else gradient).clone()
        optimizer.step()
        if name == "LionMuon":
            average = 0.9 * momentum + 0.1 * gradient
            momentum = 0.99 * momentum + 0.01 * gradient
            polar = 0.2 * math.sqrt(10) * polar_by_newton_schulz(average)
            update = polar if step % 2 else 0.05 * average.sign()
        else:
            momentum = 0.95 * momentum + 0.05 * gradient
            average = 0.95 * momentum + 0.05 * gradient
            rows = torch.stack([row / row.norm() for row in average])
            update = math.sqrt(10 / 6) * rows if name == "RMNP" else 0.2 * math.sqrt(10) * polar_by_newton_schulz(rows)
        weight = weight * (1 - 0.1 * 0.2) - 0.1 * update
        torch.testing.assert_close(stored.detach().T if transposed else stored.detach(), weight, rtol=1e-10, atol=1e-10)


RULES = {"NorMuon": "normuon", "SCALE": "rows", "RMNP": "rmnp", "MuonEq": "muoneq", "LionMuon": "lionmuon"}


@pytest.mark.parametrize("name", RULES)
def test_the_rest_of_a_peer_is_adamw(parts, name):
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 9)) for _ in range(2))
    options = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9)}
    optimizers = [getattr(parts.peers, name)([ours], **options), torch.optim.AdamW([theirs], **options, fused=True)]
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(9)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="takes matrices"):
        getattr(parts.peers, name)([{"params": [ours], "algorithm": RULES[name]}])


# -- runs


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_every_method_builds_with_the_rates_of_its_roles(parts, family):
    overrides = TINY[4:] if family == "gpt" else TINY
    sizes = ("model.config.n_embd=16", "model.config.n_layer=1", "model.config.n_head=2", "model.config.n_positions=32")
    protocol = parts.protocol.Protocol(
        f"{family}-nano", (*overrides, *(sizes if family == "gpt" else ())), judge_steps=2
    )
    for method, settings in [(m, s) for m, s in parts.methods.METHODS.items() if family == "llama" or s.start]:
        run = parts.methods.default_run(method, protocol, 1)
        if settings.start is not None or settings.carried == "rates":
            run = replace(run, hidden_lr=1e-3, other_lr=2e-3, weight_decay=0.1)
        training = parts.training.Training(protocol, run)
        groups = training.optimizer.param_groups
        names = [id(p) for group in groups for p in group["params"]]
        assert sorted(names) == sorted(id(p) for p in training.model.parameters())
        if settings.start is not None:
            factor = training.schedule.lr_lambdas[0](0)
            rates = {group["name"]: group["lr"] / factor for group in groups}
            assert rates == pytest.approx({name: 1e-3 if name == "hidden" else 2e-3 for name in rates})
            decays = {group["weight_decay"] for group in groups if group["name"] == "hidden"}
            assert decays == {0.1}
        training.backward()
        training.update()
        assert training.bytes()["weights"] == training.bytes()["gradients"] > 0


def test_a_mixture_has_the_sizes_of_the_llama_and_carried_rates(parts):
    protocol = parts.protocol.Protocol("mixtral-nano", TINY, judge_steps=2)
    assert protocol.definition["recipe"]["mixture"]["num_local_experts"] == 4
    run = replace(parts.methods.default_run("lanton-carried", protocol, 1), hidden_lr=1e-3, other_lr=2e-3)
    training = parts.training.Training(protocol, replace(run, weight_decay=0.1))
    groups = {group["name"]: group for group in training.optimizer.param_groups}
    assert training.model.config.hidden_size == 16 and {*groups} == {"hidden", "expert", "router", "embedding", "norm"}
    assert groups["expert"]["radius"] == groups["hidden"]["radius"] > groups["embedding"]["radius"]
    losses = [training.backward()[0]]
    training.update()
    assert losses[0] == pytest.approx(math.log(2048), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_is_that_of_the_recipe(parts, tmp_path, precision):
    protocol = parts.protocol.Protocol(overrides=TINY, precision=precision, judge_steps=5)
    run = parts.protocol.Run("judge", "adamw", 3, 1e-3, 2e-2, 0.1, 0.05)
    training = parts.training.Training(protocol, run)
    for _ in range(5):
        training.backward()
        training.update()
        training.optimizer.zero_grad()
    validation = load_data(protocol.config.data, seed=3).validation
    ours = evaluate(training.model, validation, micro_batch_size=2).loss
    overrides = [*TINY, "optimizer.lr=2e-2", "optimizer.groups=[{role: hidden, lr: 1e-3}]", "seed=3", "steps=5"]
    overrides.append(f"precision={precision}")
    config = load("llama-nano-adamw", [*overrides, f"out={tmp_path / 'run'}", "device=cpu"])
    assert train(config) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows if row["kind"] == "eval"][-1] == ours


@pytest.mark.slow
def test_a_killed_comparison_goes_on_and_repeats_nothing(parts, tmp_path):
    path = tmp_path / "llama-nano.jsonl"
    process = start_code(*comparison(tmp_path))
    while process.is_alive() and (not path.exists() or path.read_bytes().count(b"\n") < 8):
        time.sleep(0.05)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with path.open("ab") as file:
        file.write(b'{"id": "cut')
    before = path.read_bytes().rpartition(b"\n")[0]
    result = finish_code(*comparison(tmp_path))
    assert result.returncode == 0, result.stdout
    assert path.read_bytes().startswith(before + b"\n")
    results = parts.results.read(path)
    keys = parts.protocol.Run.__dataclass_fields__
    made = [json.loads(line) for line in path.read_text().splitlines()]
    runs = [parts.protocol.Run(**{key: line[key] for key in keys}) for line in made if "seed" in line]
    assert len(runs) == len(set(runs)) == len(results.rows)
    kinds = [(run.method, run.kind) for run in runs]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        ("adamw", "tune"): 15, ("adamw", "judge"): 2, ("sinkgd", "tune"): 15, ("sinkgd", "judge"): 2,
    }  # fmt: skip
    rows, _ = parts.summary.summarise(results)
    assert {row.method for row in rows} == {"adamw", "sinkgd"} and all(row.step_seconds for row in rows)
    assert "| SinkGD, AdamW on the rest |" in result.stdout


@pytest.fixture
def scheduler(parts, tmp_path):
    protocol = parts.protocol.Protocol(overrides=TINY, tune_steps=2, judge_steps=2)
    with parts.results.writing(tmp_path / "r.jsonl", protocol) as (results, writer):
        search = parts.search.Search.of_this_version(20, protocol.model)
        yield lambda minutes: parts.schedule.Scheduler(results, writer, ["adamw"], search, 1, minutes)


def test_the_time_that_is_given_is_not_passed(parts, scheduler):
    with pytest.raises(parts.schedule.Stopped, match="time is up; 0 runs are in .*the same command goes on"):
        scheduler(1e-4).go()


@pytest.mark.slow
def test_a_killed_worker_is_told(parts, scheduler, monkeypatch):
    monkeypatch.setattr(parts.schedule, "train", killed)
    with pytest.raises(parts.protocol.ComparisonError, match="a worker process was killed, .*fewer --workers"):
        scheduler(0).go()
