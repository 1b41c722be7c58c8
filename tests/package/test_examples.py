"""The examples run as they are, and their loss falls. They need the packages of the extra ``dev``."""

import copy
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchtitan_interface import stand_in
from transformers import LlamaForCausalLM

from leanstep.optimizers import Lion, SinkGD

FOLDER = Path(__file__).parents[2] / "examples"
TRAINED = ("transformers_trainer", "trl_sft", "trl_lora", "trl_dpo", "lightning_module", "sparse_export")
OTHERS = ("fsdp2_loop", "prune_then_lora", "sparse_to_onnx", "torchtitan_container")


@pytest.fixture
def one_thread():
    """Small products, which several threads slow down where other processes have the cores."""
    torch.set_num_threads(1)


def test_every_example_is_short_and_tested():
    names = {path.stem: len(path.read_text("utf-8").splitlines()) for path in FOLDER.glob("*.py")}
    assert set(names) == {*TRAINED, *OTHERS}
    assert max(names.values()) < 40


@pytest.mark.filterwarnings("ignore")  # of the trainers' packages
@pytest.mark.parametrize("name", TRAINED)
def test_the_loss_of_an_example_falls(name, one_thread, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.manual_seed(0)
    losses = runpy.run_path(str(FOLDER / f"{name}.py"))["losses"]
    assert sum(losses[-4:]) < 0.75 * sum(losses[:4])


def test_the_exported_model_is_sparse_and_computes_the_same(one_thread, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(FOLDER / "sparse_export.py"))
    model, loaded, tokens = names["model"].eval(), names["loaded"].eval(), names["tokens"]
    weights = [w for name, w in loaded.named_parameters() if ".mlp." in name]
    assert len(weights) == 6 and all((w.unflatten(-1, (-1, 8)) != 0).sum(-1).max() == 1 for w in weights)
    assert torch.equal(model(input_ids=tokens).logits, loaded(input_ids=tokens).logits)


@pytest.mark.slow
def test_lora_recovers_a_pruned_model_and_keeps_its_zeros(one_thread, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(FOLDER / "prune_then_lora.py"))
    weights = dict(names["model"].named_parameters())
    pruned = [name for name, zeros in names["zeros"].items() if zeros.any()]
    assert len(pruned) == 14 and all((weights[name][names["zeros"][name]] == 0).all() for name in pruned)
    assert abs(names["result"].sparsity - 0.6) < 0.01
    assert names["dense"] < names["pruned"] and names["recovered"] < 0.5 * names["pruned"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_zeros_and_logits_survive_in_an_onnx_file(one_thread, tmp_path, monkeypatch, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(FOLDER / "sparse_to_onnx.py"))
    assert names["zeros_in_file"] == names["zeros"] > 10_000
    assert names["logits"].shape == (3, 7, 64) and names["error"] < 1e-5


@pytest.mark.slow
def test_two_processes_share_the_model_of_the_plain_loop(tmp_path):
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for _ in range(2):
        run = subprocess.run(
            [*launcher, FOLDER / "fsdp2_loop.py"], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if "terminate called without an active exception" not in run.stderr:  # a thread of torch, now and then
            break
    assert run.returncode == 0, run.stderr
    first, last = map(float, re.search(r"^2 processes, loss ([\d.]+) -> ([\d.]+)$", run.stdout, re.MULTILINE).groups())
    assert last < 0.25 * first
    assert len(list((tmp_path / "runs" / "fsdp2").glob("*.distcp"))) == 2


@pytest.mark.filterwarnings("ignore")  # of the trainers' packages
def test_what_the_lora_example_saves_opens_in_peft_and_transformers(one_thread, tmp_path, monkeypatch, capsys):
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    runpy.run_path(str(FOLDER / "trl_lora.py"))
    base = LlamaForCausalLM.from_pretrained("runs/base")
    merged = LlamaForCausalLM.from_pretrained("runs/sft-lora/merged").eval()
    ids = torch.arange(2, 34).view(1, -1)
    adapted = peft.PeftModel.from_pretrained(base, "runs/sft-lora/adapter").eval()
    torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.fixture
def torchtitan(monkeypatch):
    """torchtitan, or what stands in for it."""
    if importlib.util.find_spec("torchtitan") is None:
        stand_in(monkeypatch)


@pytest.mark.parametrize(("name", "cls"), [("sinkgd", SinkGD), ("lion", Lion)])
def test_the_container_steps_saves_and_loads_its_parts(name, cls, torchtitan):
    """As torchtitan uses it: built by its configuration, a scheduler for each part, hooks of the whole."""
    container = runpy.run_path(str(FOLDER / "torchtitan_container.py"))["LeanOptimizersContainer"]

    def parts():
        torch.manual_seed(0)
        layers = {str(i): torch.nn.Linear(6, 6) for i in range(4)}
        return [torch.nn.ModuleDict({k: layers[k] for k in half}) for half in ("01", "23")]

    def train(parts, optimizer, steps):
        for step in steps:
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
            for part in parts:
                for layer in part.values():
                    x = layer(x).tanh()
            x.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    first, second = parts(), parts()
    config = container.Config(name=name, options={"lr": 1e-2, "say": None})
    ours, loaded = (config.build(model_parts=p) for p in (first, second))
    assert len(ours) == 2 and all(isinstance(optimizer, cls) for optimizer in ours)
    assert isinstance(ours, torch.optim.Optimizer)
    for optimizer in (ours, loaded):
        schedulers = [torch.optim.lr_scheduler.LambdaLR(part, lambda step: 0.5) for part in optimizer]
        assert {group["lr"] for part in schedulers for group in part.optimizer.param_groups} == {5e-3}
    steps = []
    ours.register_step_post_hook(lambda *_: steps.append(1))
    train(first, ours, range(3))
    assert len(steps) == 3
    for part, source in zip(second, first, strict=True):
        part.load_state_dict(source.state_dict())
    loaded.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert {key.split(".")[1] for key in ours.state_dict() if key.startswith("state.")} == set("0123")
    train(first, ours, range(3, 5))
    train(second, loaded, range(3, 5))
    for part, source in zip(second, first, strict=True):
        for a, b in zip(part.parameters(), source.parameters(), strict=True):
            assert torch.equal(a, b)
