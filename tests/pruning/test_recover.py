"""Recovery after pruning: the zeros stay, the rest approaches the dense model, and an error leaves the pruned model."""

import copy
import json
import math

import pytest
import torch
from pruned_models import images, make_gpt2, make_llama, make_mixtral, make_vit, tokens
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

from leanstep import SinkGD
from leanstep.pruning import Recovery, find_targets, prune, recover
from leanstep.pruning.measure.batches import as_batches
from leanstep.pruning.measure.metrics import Distortion
from leanstep.pruning.training import recovery as recovery_module
from leanstep.pruning.training import recovery_file


def pruned(make=make_llama, sparsity=0.6, **settings):
    model = make(**settings)
    prune(model, sparsity=sparsity, allocation="uniform", score="magnitude")
    return model


def masks(model):
    return {target.name: target.weight != 0 for target in find_targets(model)}


@pytest.mark.parametrize("make", [make_llama, make_gpt2, make_mixtral])
@pytest.mark.parametrize("rank", [None, 2])
def test_zeros_stay_and_the_model_approaches_the_dense_one(make, rank):
    runs = []
    for _ in range(2):
        model, dense = pruned(make), make()
        before, others = masks(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.train()
        result = recover(
            model, tokens(32), Recovery(12, lr=1e-2, rank=rank, batch_size=4), teacher=dense, held_out=tokens(8, seed=1)
        )
        runs.append((model.state_dict(), result))
        after = masks(model)
        assert all(torch.equal(after[name], mask) for name, mask in before.items())
        trained = {target.parameter for target in find_targets(model)}
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, others[name])}
        assert moved and moved <= trained and (rank or moved == trained)
        assert list(model.state_dict()) == list(others)
        assert all(p.requires_grad and p.grad is None for p in model.parameters()) and model.training
        assert result.applied and result.metric == "kl" and result.settings.distill
        assert result.after.mean < 0.9 * result.before.mean
        assert len(result.losses) == 12 and result.losses[-1] < result.losses[0]
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(tensor, runs[1][0][name]) for name, tensor in runs[0][0].items())


@pytest.mark.parametrize(("dtype", "rank"), [(torch.float32, None), (torch.bfloat16, None), (torch.float32, 2)])
def test_an_interrupted_recovery_goes_on_to_the_same_weights(dtype, rank, tmp_path, monkeypatch):
    monkeypatch.setattr(recovery_file, "_SECONDS", 0.0)
    monkeypatch.setattr(recovery_file, "_SHARE", 0)
    settings, state = Recovery(8, lr=1e-2, rank=rank, batch_size=4), tmp_path / "state.pt"

    def recovered(**more):
        model = pruned().to(dtype)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        try:
            return model, recover(model, tokens(12), settings, teacher=make_llama().to(dtype), **more)
        except KeyboardInterrupt:
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
            return model, None

    def interrupt(step, steps, phase):
        if step == 5:
            raise KeyboardInterrupt

    expected, whole = recovered()
    recovered(state=state, progress=interrupt)
    assert state.exists()
    steps = []
    model, result = recovered(state=state, progress=lambda step, *_: steps.append(step))
    assert steps == [6, 7, 8] and result == whole
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.state_dict().items())


def test_a_state_of_another_recovery_or_a_damaged_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(recovery_file, "_SECONDS", 0.0)
    state, settings = tmp_path / "state.pt", Recovery(3, lr=1e-2, batch_size=4)
    recover(pruned(), tokens(12), settings, teacher=make_llama(), state=state)
    model = pruned()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for given, data, message in (
        (Recovery(4, lr=1e-2, batch_size=4), tokens(12), "measured under other circumstances .settings: "),
        (settings, tokens(13), "measured under other circumstances .data: "),
    ):
        with pytest.raises(ValueError, match=message):
            recover(model, data, given, teacher=make_llama(), state=state)
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"state\.pt holds no state of a recovery .*; remove it to begin again"):
        recover(model, tokens(12), settings, teacher=make_llama(), state=state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_disk_without_room_for_a_state_ends_no_recovery(tmp_path, monkeypatch):
    monkeypatch.setattr(recovery_file, "_SECONDS", 0.0)
    result = recover(pruned(), tokens(12), Recovery(3, batch_size=4), teacher=make_llama(), state=tmp_path / "no" / "s")
    assert len(result.losses) == 3
    assert result.notes[0].startswith("the state of recovery could not be saved, and an interrupted run begins again")


def test_the_first_step_is_that_of_the_formula():
    data = tokens(4)
    model, by_hand, dense = pruned(), pruned(), make_llama()
    recover(model, data, Recovery(1, lr=1e-3, batch_size=4), teacher=dense)
    targets = find_targets(by_hand)
    with torch.no_grad():
        expected = dense(data).logits.log_softmax(-1)
    loss = kl_div(by_hand(data).logits.log_softmax(-1), expected, log_target=True, reduction="none").sum(-1).mean()
    loss.backward()
    held = masks(by_hand)
    for target in targets:
        target.module.weight.grad.mul_(held[target.name])
    SinkGD([target.module.weight for target in targets], lr=1e-3, scale=1.0, algorithm="sinkgd").step()
    for target, other in zip(targets, find_targets(model), strict=True):
        torch.testing.assert_close(other.weight, target.weight * held[target.name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distilled", [True, False])
def test_the_loss_is_that_of_float64_without_masked_tokens(distilled):
    model, dense = pruned(), make_llama()
    data = tokens(3)
    mask = torch.ones_like(data)
    mask[0, 10:] = 0
    [batch] = as_batches([{"input_ids": data, "attention_mask": mask}], model)
    got = recovery_module._loss(model, dense if distilled else None, batch)
    with torch.no_grad():
        rows = model(data, attention_mask=mask).logits.double()
        expected = dense(data, attention_mask=mask).logits.double()
    if distilled:
        p, q = expected.log_softmax(-1), rows.log_softmax(-1)
        oracle = (p.exp() * (p - q)).sum(-1)[mask.bool()].mean()
    else:
        labels = data.masked_fill(mask == 0, -100)
        oracle = cross_entropy(rows[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert float(got.detach()) == pytest.approx(float(oracle), rel=1e-5)
    got.backward()


def test_next_tokens_are_learnt_without_a_teacher():
    model = pruned()
    data = torch.arange(16).repeat(8, 1)
    result = recover(model, data, Recovery(10, lr=1e-2, batch_size=4), held_out=data[:2])
    assert result.metric == "cross_entropy" and not result.settings.distill
    assert result.applied and result.after.mean < result.before.mean


def test_images_are_distilled_and_need_a_teacher():
    model = pruned(make_vit)
    with pytest.raises(ValueError, match="without distillation predicts the next token"):
        recover(model, images(6), Recovery(2))
    result = recover(model, images(12), Recovery(8, lr=1e-2, batch_size=6), teacher=make_vit(), held_out=images(6))
    assert result.after.mean < result.before.mean


def test_factors_are_trained_beside_layers_that_take_none():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 4))
    dense, data = copy.deepcopy(model), torch.randn(16, 1, 8, 8)
    for layer in (model[0], model[2]):
        layer.weight.data[torch.rand(layer.weight.shape) < 0.5] = 0
    before, masks_before = copy.deepcopy(model.state_dict()), masks(model)
    result = recover(model, data, Recovery(10, lr=1e-2, rank=2), teacher=dense, held_out=data)
    assert result.applied and all(torch.equal(masks(model)[name], mask) for name, mask in masks_before.items())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"2.weight", "4.weight"}
    with pytest.raises(ValueError, match=r"recovery with rank=2 adapts linear layers, and Sequential has none among"):
        recover(model, data, Recovery(10, rank=2), teacher=dense, include=["0.weight"])


def test_matrices_beside_which_no_factors_stand_are_noted():
    results = [
        recover(pruned(make_mixtral), tokens(8), Recovery(2, rank=rank), teacher=make_mixtral(), held_out=tokens(4))
        for rank in (2, None)
    ]
    targets = find_targets(make_mixtral())
    experts = [target.name for target in targets if target.expert is not None]
    assert experts and not any("not trained" in note for note in results[1].notes)
    [note] = [note for note in results[0].notes if "not trained" in note]
    assert note.startswith(f"{len(experts)} of {len(targets)} pruned matrices were not trained: {experts[0]}, ")
    assert f" and {len(experts) - 3} more. Recovery with rank=2 adapts linear layers" in note
    linear = recover(pruned(), tokens(8), Recovery(2, rank=2), teacher=make_llama())
    assert not any("not trained" in note for note in linear.notes)


def test_factors_adapt_no_layer_whose_name_ends_in_that_of_a_target():
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "outer": nn.ModuleDict({"fc": nn.Linear(4, 4)})})
    model.forward = lambda x: model["fc"](model["outer"]["fc"](x).tanh())
    dense, other = copy.deepcopy(model), model["outer"]["fc"].weight.clone()
    dense.forward = lambda x: dense["fc"](dense["outer"]["fc"](x).tanh())
    model["fc"].weight.data[0] = 0
    recover(model, torch.randn(16, 4), Recovery(5, lr=1e-2, rank=2), teacher=dense, include=["fc.weight"])
    assert torch.equal(model["outer"]["fc"].weight, other)


def test_brackets_in_names_are_no_wildcards():
    model = nn.Sequential(nn.ModuleDict({"x[0]": nn.Linear(4, 4)}))
    model.forward = lambda x: model[0]["x[0]"](x)
    dense = copy.deepcopy(model)
    dense.forward = lambda x: dense[0]["x[0]"](x)
    model[0]["x[0]"].weight.data[0] = 0
    assert len(recover(model, torch.randn(4, 4), Recovery(2), teacher=dense).losses) == 2


@pytest.mark.parametrize("distilled", [True, False])
def test_batches_without_a_token_that_counts_are_no_steps(distilled):
    data, teacher = tokens(4), make_llama() if distilled else None
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in data]
    for batch, count in zip(batches[:2], (0, 0 if distilled else 1), strict=True):
        batch["attention_mask"][:, count:] = 0
    results = [recover(pruned(), given, Recovery(4), teacher=teacher) for given in (batches, batches[2:])]
    assert results[0] == results[1]
    with pytest.raises(ValueError, match="no token that counts, or that follows another"):
        recover(pruned(), batches[:2], Recovery(4), teacher=teacher)


def test_logits_of_minus_infinity_are_no_reason_to_stop():
    model, dense = pruned(), make_llama()
    for one in (model, dense):
        one.lm_head.register_forward_hook(lambda *given: given[-1].index_fill(-1, torch.tensor([0]), -torch.inf))
    result = recover(model, tokens(8), Recovery(8, lr=1e-2, batch_size=4), teacher=dense, held_out=tokens(4, seed=1))
    assert result.applied and 0 < result.losses[-1] < result.losses[0]


def test_training_that_makes_it_worse_is_taken_back():
    model = pruned()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = recover(model, tokens(8), Recovery(3, lr=5.0), teacher=make_llama(), held_out=tokens(4, seed=1))
    assert not result.applied and result.after.mean > result.before.mean
    assert "was not applied" in result.notes[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("after", [1.0, math.nan])
def test_a_pruned_model_that_overflows_is_recovered_if_the_trained_one_does_not(after, monkeypatch):
    costs = iter([Distortion(math.nan, math.nan), Distortion(after, 0.1)])
    monkeypatch.setattr(recovery_module, "_cost", lambda *_: next(costs))
    result = recover(pruned(), tokens(8), Recovery(2), teacher=make_llama(), held_out=tokens(4, seed=1))
    assert result.applied == math.isfinite(after)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["before"] == {"mean": None, "stderr": None}


@pytest.mark.parametrize("rank", [None, 2])
def test_an_error_on_the_way_puts_the_pruned_weights_back(rank, monkeypatch):
    model = pruned()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses, steps = recovery_module._loss, []

    def third_is_nan(*arguments):
        steps.append(1)
        return losses(*arguments) * (float("nan") if len(steps) == 3 else 1)

    monkeypatch.setattr(recovery_module, "_loss", third_is_nan)
    with pytest.raises(ValueError, match="recovery stopped, take a smaller learning rate: the loss is nan"):
        recover(model, tokens(16), Recovery(5, rank=rank), teacher=make_llama())
    assert len(steps) == 3
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_recovered_is_refused():
    for settings, text in (
        ({"steps": 0}, "steps=0"),
        ({"steps": 5, "lr": -1.0}, "lr=-1.0"),
        ({"steps": 5, "rank": 0}, "rank=0"),
        ({"steps": 5, "lr": float("nan")}, "lr=nan"),
    ):
        with pytest.raises(ValueError, match=f"takes positive steps.*{text}"):
            Recovery(**settings)
    for name, value in (("steps", 1e3), ("batch_size", 2.0), ("rank", 1.5), ("seed", "0")):
        with pytest.raises(ValueError, match=f"takes a whole number as {name}, such as 100, got {value!r}"):
            Recovery(**{"steps": 5, name: value})
    with pytest.raises(ValueError, match="no matrix of the model has a zero"):
        recover(make_llama(), tokens(4), Recovery(2), teacher=make_llama())
    with pytest.raises(ValueError, match="needs the dense model as teacher"):
        recover(pruned(), tokens(4), Recovery(2, distill=True))
    with pytest.raises(ValueError, match="the dense model gives logits"):
        recover(pruned(), tokens(4), Recovery(2), teacher=make_llama(vocab_size=70))
