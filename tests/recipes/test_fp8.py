"""The key ``fp8``: what torchao converts, and where it is refused."""

import copy

import pytest
import torch
from training import write_recipe

from leanstep.recipes.check.check import check
from leanstep.recipes.config.loader import ConfigError, load
from leanstep.recipes.methods import fp8
from leanstep.recipes.methods.fp8 import to_fp8, why_no_fp8
from leanstep.recipes.training.build import build_model, build_optimizer

OPTIONS = ["fp8=tensorwise", "precision=bf16"]


def problems(*overrides):
    with pytest.raises(ConfigError) as caught:
        load("llama-nano-adamw", overrides)
    return "".join(caught.value.problems)


def test_settings_that_it_excludes_are_named():
    assert "fp8 must be 'tensorwise', 'rowwise' or 'rowwise_with_gw_hp'" in problems("fp8=e4m3")
    assert "take precision=bf16" in problems("fp8=rowwise", "precision=fp32")
    assert "take fp8=null" in problems(*OPTIONS, "sparsity.patterns={'*': '2:4'}")


def test_a_machine_that_cannot_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fp8, "find_spec", lambda name: name)
    assert "needs a GPU that multiplies in fp8 (compute capability 8.9" in why_no_fp8(cpu=True)
    assert check(load(str(write_recipe(tmp_path)), [*OPTIONS, "device=cpu"])) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  - ")]
    assert "fp8: needs a GPU" in line and line.endswith("this run is on the CPU; take fp8=null")
    monkeypatch.setattr(fp8, "find_spec", lambda name: None)
    assert why_no_fp8(cpu=True) == "needs torchao, which is not installed: pip install torchao"


def test_converted_layers_train_like_those_that_are_not():
    pytest.importorskip("torchao.float8", reason="torchao is not installed")
    config = load("llama-nano-adamw", OPTIONS)
    torch.manual_seed(0)
    plain = build_model(config.model, 300)
    model = copy.deepcopy(plain)
    assert to_fp8(config, model, emulate=True) == 7 * model.config.num_hidden_layers
    assert type(model.lm_head) is torch.nn.Linear and set(model.state_dict()) == set(plain.state_dict())
    losses = []
    for trained in (plain, model):
        optimizer = build_optimizer(config.optimizer, trained)
        for _ in range(6):
            tokens = torch.arange(64).view(2, 32)
            loss = trained(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.1 and losses[0] < 5.5


def test_a_model_of_odd_sizes_is_refused():
    pytest.importorskip("torchao.float8", reason="torchao is not installed")
    config = load("llama-nano-adamw", [*OPTIONS, "model.config.hidden_size=40", "model.config.intermediate_size=56"])
    with pytest.raises(ValueError, match="no linear layer besides the head has sizes that are multiples of 16"):
        to_fp8(config, build_model(config.model, 300))
