"""Fused experts become sparse along their inputs. Layers shorter than a group are named and stay dense."""

import copy

import pytest
import torch
from architectures import make
from pruned_models import VOCABULARY
from torch.nn.utils import parametrize

from leanstep.optimizers import param_groups
from leanstep.sparsity import export_compressed, load_compressed, sparsify, squash, verify
from leanstep.sparsity.training.modules import SparseWeight

# layer -> the dimension along which an expert's inputs lie
EXPERTS = {"mixtral": 2, "qwen3_moe": 2, "gpt_oss": 1, "llama4": 1}
NARROW = {
    "vit": "vit.embeddings.patch_embeddings.projection",
    "clip": "vision_model.embeddings.patch_embedding",
    "swin": "swin.embeddings.patch_embeddings.projection",
    "mamba": "backbone.layers.0.mixer.conv1d, backbone.layers.0.mixer.dt_proj",
    "jamba": "model.layers.0.mamba.conv1d",
}


def tokens():
    return torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


def experts_of(controller):
    return [layer for layer in controller.layers if layer.weight.dim() == 3]


@pytest.mark.parametrize("name", NARROW)
def test_one_pattern_names_the_layers_that_are_shorter_than_a_group(name):
    model = make(name)
    reason = "a group of 2:4 is longer than their rows"
    with pytest.warns(UserWarning, match=f"sparsify: .*{NARROW[name]}.* stays? dense: {reason}"):
        controller = sparsify(model, "2:4")
    assert all(layer.weight.shape[layer.dim] >= 4 for layer in controller.layers)
    with pytest.raises(ValueError, match="fewer than a group of 2:4 holds"):
        sparsify(make(name), {"*": "2:4"})


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", EXPERTS)
def test_every_expert_is_sparse_along_its_inputs(name, implementation):
    model = make(name).train()
    model.config._experts_implementation = implementation
    controller = sparsify(model, {"*experts*": "2:4"}, measure_every=1)
    layers = experts_of(controller)
    assert len(layers) == 4 and {layer.dim for layer in layers} == {EXPERTS[name]}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    controller.attach(optimizer)
    for _ in range(2):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = model.eval()(tokens()).logits
    assert all(row["sparsity"] == 0.5 for row in controller.statistics())
    squash(model)
    assert torch.equal(model(tokens()).logits, expected)
    for layer in layers:
        for expert in layer.weight.detach():
            matrix = expert if EXPERTS[name] == 2 else expert.t()
            assert (matrix.unflatten(1, (-1, 4)) != 0).sum(2).eq(2).all()


def test_the_masked_weights_of_experts_are_computed_once_per_pass(monkeypatch):
    model = make("mixtral").train()
    model.config._experts_implementation = "eager"
    sparsify(model, {"*experts*": "2:4"})
    calls, forward = [], SparseWeight.forward
    monkeypatch.setattr(SparseWeight, "forward", lambda self, weight: (calls.append(self), forward(self, weight))[1])
    loss = model(input_ids=tokens(), labels=tokens()).loss
    assert len(calls) == len(set(calls)) == 4  # two layers with two weights
    loss.backward()
    model.activation_checkpointing_enable({"use_reentrant": False})
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    again = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(gradients, again, strict=True))
    # nothing of a pass stays in the cache
    before = model.eval()(tokens()).logits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.mul_(2)
    assert not torch.equal(model(tokens()).logits, before)
    assert torch.equal(copy.deepcopy(model)(tokens()).logits, model(tokens()).logits)


def test_an_interrupted_pass_leaves_no_cache():
    model = make("mixtral").train()
    model.config._experts_implementation = "eager"
    sparsify(model, {"*experts*": "2:4"})

    def interrupt(module, inputs):
        raise KeyboardInterrupt

    hook = model.model.layers[0].mlp.experts.act_fn.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens())
    hook.remove()
    before = model(tokens()).logits
    assert not parametrize._cache_enabled
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.mul_(2)
    assert not torch.equal(model(tokens()).logits, before)


def test_a_squashed_model_runs_without_hooks_and_its_file_is_small(tmp_path):
    model = make("qwen3_moe")
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    controller = sparsify(model, "1:8")
    names = [layer.name for layer in experts_of(controller)]
    assert len(names) == 4
    squash(model)
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks
    rows = {row.name: row for row in export_compressed(model, tmp_path / "small.safetensors")}
    assert all(str(rows[name].pattern) == "1:8" and rows[name].stored_bytes < rows[name].dense_bytes for name in names)
    restored = load_compressed(tmp_path / "small.safetensors")
    assert all(torch.equal(restored[name], value) for name, value in model.state_dict().items())
    report = verify(model, {"*experts*": "1:8"})
    assert report.ok and all(row.dim == 2 for row in report.tensors if row.name in names)


def test_sparse_experts_have_the_groups_of_dense_ones():
    dense, sparse = make("gpt_oss"), make("gpt_oss")
    sparsify(sparse, {"*experts*": "2:4"})

    def routing(model):
        groups = param_groups(model, split="fused")
        return [(group["name"], group.get("transposed"), group.get("blocks"), len(group["params"])) for group in groups]

    assert routing(sparse) == routing(dense)


def test_experts_of_unknown_layout_are_named():
    with pytest.warns(UserWarning, match="ffn.experts.mlp.w1, .* stay dense: experts in one matrix"):
        sparsify(make("dbrx"), "2:4")
