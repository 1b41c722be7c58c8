"""The examples run as they are, and their loss falls. They need the packages of the extra ``dev``."""

import copy
import runpy
from pathlib import Path

import pytest
import torch

from leanstep.optimizers import Lion, SinkGD

FOLDER = Path(__file__).parents[2] / "examples"
TRAINED = ("transformers_trainer", "trl_sft", "lightning_module")


def test_every_example_is_short_and_tested():
    names = {path.stem: len(path.read_text("utf-8").splitlines()) for path in FOLDER.glob("*.py")}
    assert set(names) == {*TRAINED, "torchtitan_container"}
    assert max(names.values()) < 40


@pytest.mark.filterwarnings("ignore")  # of the trainers' packages
@pytest.mark.parametrize("name", TRAINED)
def test_the_loss_of_an_example_falls(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.manual_seed(0)
    losses = runpy.run_path(str(FOLDER / f"{name}.py"))["losses"]
    assert sum(losses[-4:]) < 0.75 * sum(losses[:4])


@pytest.mark.parametrize(("name", "cls"), [("sinkgd", SinkGD), ("lion", Lion)])
def test_the_container_steps_saves_and_loads_its_parts(name, cls):
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
    ours, loaded = (container(p, name=name, lr=1e-2, say=None) for p in (first, second))
    assert all(isinstance(o, cls) for o in ours.optimizers)
    train(first, ours, range(3))
    for part, source in zip(second, first, strict=True):
        part.load_state_dict(source.state_dict())
    loaded.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert {key.split(".")[1] for key in ours.state_dict() if key.startswith("state.")} == set("0123")
    train(first, ours, range(3, 5))
    train(second, loaded, range(3, 5))
    for part, source in zip(second, first, strict=True):
        for a, b in zip(part.parameters(), source.parameters(), strict=True):
            assert torch.equal(a, b)
