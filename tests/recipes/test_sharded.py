"""The same run with the model sharded over its processes by FSDP2, through Accelerate."""

from functools import partial

import pytest
import torch
from faults import first_save_fails, fsdp2_on_cpu, held_at, on_backend
from safetensors.torch import load_file
from training import Training, numbers, run, write_recipe
from transformers import AutoModelForCausalLM

LLAMA = "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "part"), [("adamw", "export"), ("sinkgd", "staging")])
def test_sharded_equals_replicated_and_resumes(recipe, tmp_path, optimizer, part):
    options = [f"model={{family: llama, config: {LLAMA}}}", f"optimizer.name={optimizer}", "max_grad_norm=1.0"]
    options += ["steps=12", "batch.micro_batch_size=2"]
    replicated = run(recipe, options, tmp_path / "replicated", world=2, prepare=partial(on_backend, "reference"))
    assert replicated.codes == [0, 0], replicated.text()

    options += ["distributed.strategy=fsdp2"]
    prepare = partial(held_at, 10, fsdp2_on_cpu)
    sharded = Training(recipe, options, tmp_path / "sharded", world=2, prepare=prepare)
    sharded.wait_for(lambda training: training.last_step() >= 8)
    sharded.kill(1)
    assert 0 not in sharded.wait()
    # a save that fails in the first process alone ends in all of them, and training goes on
    prepare = partial(first_save_fails, part, fsdp2_on_cpu)
    again = Training(recipe, options, tmp_path / "sharded", world=2, prepare=prepare)
    assert again.wait(timeout=300) == [0, 0], again.text()
    assert "wrapping FSDP2" in again.text() and "resuming from" in again.text()
    failed = "WARNING: checkpoint at step 9 failed: disk full: the user's quota is used up; training goes on"
    assert again.text().count(failed) == 1, again.text()
    saved = sorted(path.name for path in (tmp_path / "sharded" / "checkpoints").iterdir())
    assert saved == ["step-000006", "step-000012"]

    # kind, step, loss, lr, gradient norm; the order of additions differs between the two
    left, right = numbers(tmp_path / "replicated")[:-1], numbers(tmp_path / "sharded")[:-1]
    for a, b in zip(left, right, strict=True):
        assert a[:2] == b[:2] and a[3] == b[3]
        assert a[2] == pytest.approx(b[2], rel=1e-4)
        assert a[4] is None or a[4] == pytest.approx(b[4], rel=1e-3)
    last = tmp_path / "sharded" / "last"
    assert list((last / "trainer").glob("*/*.distcp")), "weights and optimizer state are stored in shards"
    expected = load_file(tmp_path / "replicated" / "final" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(last / "hf")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-3, atol=2e-3)
