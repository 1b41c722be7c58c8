"""The moving average of the weights: its formula, and runs that evaluate, save and resume it."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from faults import held_at, on_backend
from safetensors.torch import load_file
from training import Training, numbers, read_log, run, status, write_recipe, write_text

from leanstep.recipes.config.loader import ConfigError, load
from leanstep.recipes.evaluate import main as evaluate
from leanstep.recipes.methods.ema import Averages, WeightAverage
from leanstep.recipes.training.run import Run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_is_its_formula_and_the_weights_come_back(dtype):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3).to(dtype)
    model.bias.requires_grad_(False)
    ema, expected = WeightAverage(model, 0.5), model.weight.detach().double()
    for n in range(12):
        with torch.no_grad():
            model.weight.add_(torch.randn(3, 5).to(dtype))
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    assert list(ema.averages) == ["weight"] and ema.averages["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.averages["weight"].double(), expected, rtol=1e-5, atol=1e-6)
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        assert torch.equal(model.weight, ema.averages["weight"].to(dtype)) and not torch.equal(model.weight, before)
        raise RuntimeError("inside")
    assert torch.equal(model.weight, before)


WRONG = {
    "another model": ({"updates": 1, "averages": {"bias": torch.zeros(3)}}, "not those of the trained weights"),
    "shape": (
        {"updates": 1, "averages": {"weight": torch.zeros(5, 3)}},
        r"weight must be an fp32 tensor of shape \(3, 5",
    ),
    "count": ({"updates": -1, "averages": {"weight": torch.zeros(3, 5)}}, "expected a number of updates, got -1"),
    "nothing": ({}, "expected a number of updates, got None"),
}


@pytest.mark.parametrize(("state", "message"), WRONG.values(), ids=WRONG)
def test_a_state_of_another_model_is_refused_and_changes_nothing(state, message):
    ema = WeightAverage(torch.nn.Linear(5, 3, bias=False), 0.9)
    before = ema.averages["weight"].clone()
    with pytest.raises(ValueError, match=message):
        ema.load_state_dict(state)
    assert torch.equal(ema.averages["weight"], before) and ema.updates == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ema.decay=1"], "ema.decay must be less than 1, got 1"),
        (
            ["ema.decay=0.9", "sparsity.patterns={'*.mlp.*': '2:4'}"],
            "ema.decay averages weights under masks that change",
        ),
        (["ema.decay=0.9", "distributed.strategy=fsdp2"], "ema.decay averages whole weights, which fsdp2 shards"),
    ],
)
def test_settings_that_exclude_an_average_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load("llama-nano-adamw", overrides)


def test_the_expected_loss_of_a_recipe_holds_with_an_average():
    assert load("llama-nano-adamw", ["ema.decay=0.99"]).expect == load("llama-nano-adamw").expect


def test_a_step_that_a_gradient_scaler_skips_is_none_of_the_average():
    nothing, registers = SimpleNamespace(step=lambda: None), SimpleNamespace(register_for_checkpointing=lambda _: None)
    run = SimpleNamespace(optimizer=nothing, schedule=nothing, drop_gradients=lambda **_: None, accelerator=registers)
    run.config, part = SimpleNamespace(ema=SimpleNamespace(decay=0.9)), Averages(run)
    run.parts = [part]
    part.prepared(torch.nn.Linear(5, 3), None)
    for apply, finite, updates in ((True, False, 0), (True, True, 1), (False, False, 1)):
        Run.update(run, apply=apply, finite=finite)
        assert part.average.updates == updates


@pytest.mark.slow
def test_a_run_averages_beside_training_and_resumes_bit_for_bit(tmp_path, capsys):
    recipe, backend = write_recipe(tmp_path), partial(on_backend, "reference")
    held_out = write_text(tmp_path / "held-out.txt", words=200, seed=1)
    options = ["steps=12", "eval.every=4", f"data.val_path={held_out}"]
    plain = run(recipe, options, tmp_path / "plain", prepare=backend)
    options.append("ema.decay=0.8")
    whole = run(recipe, options, tmp_path / "whole", prepare=backend)
    broken = Training(recipe, options, tmp_path / "broken", prepare=partial(held_at, 8, backend))
    broken.wait_for(lambda training: training.last_step() >= 7)
    broken.kill()
    broken.wait()
    again = run(recipe, options, tmp_path / "broken", prepare=backend)
    assert (plain.codes, whole.codes, again.codes) == ([0], [0], [0]), whole.text() + again.text()
    assert "resuming from" in again.text()
    assert numbers(whole.out) == numbers(plain.out) == numbers(again.out)

    final, averaged = (load_file(whole.out / name / "model.safetensors") for name in ("final", "final-ema"))
    resumed = load_file(again.out / "final-ema" / "model.safetensors")
    for name, tensor in load_file(plain.out / "final" / "model.safetensors").items():
        assert torch.equal(final[name], tensor) and torch.equal(resumed[name], averaged[name]), name
    assert any(not torch.equal(final[name], averaged[name]) for name in final)
    assert not (plain.out / "final-ema").exists()

    losses = [
        [entry["ema_loss"] for entry in read_log(out) if entry["kind"] == "eval"] for out in (whole.out, again.out)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert status(whole.out)["ema_loss"] == losses[0][-1] and "ema_loss" not in status(plain.out)
    assert "averaged weights" in (whole.out / "report.html").read_text()
    capsys.readouterr()
    assert evaluate([str(whole.out / "final-ema"), "--data", str(held_out), "--seq-len", "32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(losses[0][-1], abs=1e-5)
