"""Masks through fine-tuning, and schedules of sparsity."""

import copy
from functools import partial

import accelerate
import pytest
import torch
from pruned_models import images, make_cnn
from torch import nn
from torch.nn.utils import prune as torch_prune

from leanstep.lora import LoraConfig, apply_lora, merge
from leanstep.optimizers import Lion, SinkGD, param_groups
from leanstep.pruning import (
    GradualPruner,
    find_targets,
    gradual_sparsity,
    iterative_sparsities,
    keep_masks,
    layer_pruner,
    prune,
    prune_iteratively,
    renew_batch_norms,
)


def net():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Linear(8, 4))


def prune_to(model, sparsity):
    """Magnitude, the same fraction of every hidden matrix."""
    for layer in (model[0], model[2]):
        keep = layer.weight.numel() - round(sparsity * layer.weight.numel())
        layer.weight.data.copy_(layer_pruner(layer.weight, "magnitude").prune(keep).weight)
    return sparsity


def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(32, 12, generator=generator)
        optimizer.zero_grad()
        (model(x) - x[:, :4].cos()).square().mean().backward()
        optimizer.step()


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
    "lion": lambda model: Lion(model.parameters(), lr=0.003, weight_decay=0.1),
    "sinkgd": lambda model: SinkGD(param_groups(model), lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_stay_zero_under_any_optimizer_and_the_others_move(name):
    model = net()
    prune_to(model, 0.7)
    zeros = [model[i].weight == 0 for i in (0, 2)]
    before = model[0].weight.detach().clone()
    dense = copy.deepcopy(model)
    optimizer = OPTIMIZERS[name](model)
    with keep_masks(model, optimizer) as keeper:
        train(model, optimizer, 5)
        assert keeper.sparsity() == pytest.approx(0.7, abs=0.01)
        assert set(keeper.masks) == {"0.weight", "2.weight"}
    for i, zero in zip((0, 2), zeros, strict=True):
        assert torch.equal(model[i].weight == 0, zero)
    assert not torch.equal(model[0].weight, before)
    # without the masks they come back at once
    train(dense, OPTIMIZERS[name](dense), 1)
    assert dense[0].weight[zeros[0]].any()


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion"])
def test_training_is_that_of_a_model_which_computes_with_masked_weights(name):
    """torch.nn.utils.prune multiplies in the forward pass: the same gradients, and the same weights bit for bit."""
    ours, theirs = net(), net()
    prune_to(ours, 0.6)
    theirs.load_state_dict(ours.state_dict())
    for i in (0, 2):
        torch_prune.custom_from_mask(theirs[i], "weight", ours[i].weight != 0)
    for model in (ours, theirs):
        optimizer = OPTIMIZERS[name](model)
        if model is ours:
            keep_masks(model, optimizer)
        train(model, optimizer, 6)
    for i in (0, 2):
        assert torch.equal(ours[i].weight, theirs[i].weight_orig * theirs[i].weight_mask)
    assert torch.equal(ours[4].bias, theirs[4].bias)


def closure_of(model, optimizer, x):
    def closure():
        optimizer.zero_grad()
        loss = (model(x) - x[:, :4].cos()).square().mean()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("name", [*OPTIMIZERS, "lbfgs"])
def test_a_closure_trains_as_a_backward_pass_before_the_step_does(name):
    """The closure computes the gradients anew within the step; no momentum may see those of pruned weights."""
    make = OPTIMIZERS.get(name, lambda model: torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3))
    plain, closed = net(), net()
    prune_to(plain, 0.7)
    closed.load_state_dict(plain.state_dict())
    zeros = plain[0].weight == 0
    for model in (plain, closed):
        optimizer = make(model)
        keep_masks(model, optimizer)
        for seed in range(4):
            x = torch.randn(32, 12, generator=torch.Generator().manual_seed(seed))
            closure = closure_of(model, optimizer, x)
            if model is closed or name == "lbfgs":
                optimizer.step(closure) if seed % 2 else optimizer.step(closure=closure)
            else:
                closure()
                optimizer.step()
        assert not model[0].weight[zeros].any() and not model[0].weight.grad[zeros].any()
        for state in optimizer.state.get(model[0].weight, {}).values():
            if torch.is_tensor(state) and state.shape == zeros.shape:
                assert not state[zeros].any()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), closed.parameters(), strict=True))


def test_masks_and_gradual_pruning_hold_under_accelerate_s_optimizer():
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = net()
    prune_to(model, 0.5)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    zeros = model[0].weight == 0
    with keep_masks(model, optimizer):
        train(model, optimizer, 3)
        optimizer.step(closure_of(model, optimizer, torch.randn(8, 12)))
        assert torch.equal(model[0].weight == 0, zeros)
        assert not optimizer.state[model[0].weight]["momentum_buffer"][zeros].any()
    pruner = GradualPruner(model, optimizer, partial(prune_to, model), lambda step: min(0.5 + 0.1 * step, 0.8))
    train(model, optimizer, 4)
    assert pruner.step_count == 4 and pruner.sparsity == 0.8
    assert int((model[0].weight == 0).sum()) == round(0.8 * 192)
    optimizer.step(closure_of(model, optimizer, torch.randn(8, 12)))
    assert not model[0].weight.grad[model[0].weight == 0].any()


@pytest.mark.gpu
def test_masks_follow_a_model_that_is_moved():
    model = net()
    prune_to(model, 0.5)
    keeper = keep_masks(model)
    model.cuda()
    keeper.apply()
    keeper.refresh()
    assert not keeper.filled() and all(mask.is_cuda for mask in keeper.masks.values())


def test_masks_can_be_given_and_are_applied_at_once():
    model = net()
    mask = torch.rand(16, 12) > 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keeper = keep_masks(model, optimizer, {"0.weight": mask})
    assert torch.equal(model[0].weight != 0, mask) and torch.equal(keeper.masks["0.weight"], mask)
    train(model, optimizer, 2)
    assert torch.equal(model[0].weight != 0, mask)
    keeper.detach()
    train(model, optimizer, 1)
    assert (model[0].weight[~mask] != 0).any()
    keeper.apply()
    assert not model[0].weight[~mask].any()


def test_a_step_that_is_refused_attaches_nothing():
    model = net()
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no matrix of the model has a zero"):
        keep_masks(model, optimizer)
    prune_to(model, 0.5)
    bad = [
        (lambda: keep_masks(model, optimizer), ValueError, "SGD does not train"),
        (lambda: keep_masks(model, optimizer.state), TypeError, "expected a torch optimizer"),
        (lambda: keep_masks(model, masks={"9.weight": torch.ones(2)}), ValueError, "no parameter '9.weight'"),
        (lambda: keep_masks(model, masks={"0.weight": torch.ones(16, 12)}), ValueError, "expected a bool mask"),
    ]
    for call, kind, said in bad:
        with pytest.raises(kind, match=said):
            call()
    assert not optimizer._optimizer_step_post_hooks and not optimizer._optimizer_step_pre_hooks


def test_statistics_of_batch_norms_are_those_of_the_pruned_model():
    model, data = make_cnn(), images(12)
    prune(model, sparsity=0.8, allocation="erk", score="magnitude")
    model.train()
    model.relu.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert renew_batch_norms(model, data, batch_size=6) == len(norms) > 2
    assert model.training and not model.relu.training and all(norm.momentum == 0.1 for norm in norms)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in changed)
    # of the first norm, the mean over two batches of what the first convolution gives now
    block = model.layer1[0]
    first = block.conv1(model.relu(model.conv1(data))).detach()
    torch.testing.assert_close(block.bn1.running_mean, first.mean((0, 2, 3)))
    variance = torch.stack([half.transpose(0, 1).flatten(1).var(1) for half in first.split(6)]).mean(0)
    torch.testing.assert_close(block.bn1.running_var, variance)
    assert renew_batch_norms(nn.Linear(2, 2), torch.ones(4, 2)) == 0


@pytest.mark.parametrize(("samples", "batch_size"), [(257, 256), (5, 2), (9, 4), (3, 2)])
def test_statistics_of_batch_norms_need_no_number_of_samples_that_batches_divide(samples, batch_size):
    """One sample alone has no variance. Batches of nearly equal size make their mean that of all samples, nearly."""
    model, x = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(samples, 3)
    assert renew_batch_norms(model, x, batch_size=batch_size) == 1
    sizes = max(1, min(-(-samples // batch_size), samples // 2))
    means = [part.mean(0) for part in x.tensor_split(sizes)]
    torch.testing.assert_close(model[0].running_mean, torch.stack(means).mean(0))


def test_statistics_of_batch_norms_stay_where_they_cannot_be_taken():
    model = make_cnn()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        renew_batch_norms(model, [images(4), torch.ones(2, 5)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(norm.momentum == 0.1 for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))


def test_a_frozen_base_needs_no_optimizer():
    """Under a low-rank adapter the base is not trained; after a merge the masks take out what it put there."""
    model = net()
    prune_to(model, 0.5)
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    keeper = keep_masks(model, optimizer)
    mask = keeper.masks["0.weight"]
    model[0].weight.data += torch.randn(16, 2) @ torch.randn(2, 12)  # merged
    keeper.apply()
    assert torch.equal(model[0].weight != 0, mask)


def test_iterative_pruning_follows_the_paper_s_targets_and_nothing_comes_back():
    assert iterative_sparsities(0.9, 0.2) == pytest.approx([1 - 0.8**i for i in range(1, 11)] + [0.9])
    assert iterative_sparsities(0.36, 0.2) == pytest.approx([0.2, 0.36])
    assert iterative_sparsities(0.1) == [0.1]
    model, seen = net(), []

    def fine_tune(keeper):
        zeros = model[0].weight == 0
        assert all((zeros | ~earlier).all() for earlier in seen)
        seen.append(zeros)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        keeper.attach(optimizer)
        train(model, optimizer, 3)
        assert torch.equal(model[0].weight == 0, zeros)

    done = prune_iteratively(model, iterative_sparsities(0.7, 0.4), partial(prune_to, model), fine_tune)
    assert done == pytest.approx([0.4, 0.64, 0.7])
    assert [int(zeros.sum()) for zeros in seen] == [round(s * 192) for s in done]
    assert int((model[0].weight == 0).sum()) == round(0.7 * 192)
    with pytest.raises(ValueError, match="must increase"):
        prune_iteratively(model, [0.5, 0.5], partial(prune_to, model), fine_tune)


def test_brackets_in_names_are_no_wildcards():
    model = nn.Sequential()
    model.add_module("fc[0]", nn.Linear(12, 16))
    settings = {"allocation": "uniform", "score": "magnitude"}
    prune_iteratively(model, [0.25, 0.5], lambda sparsity: prune(model, sparsity=sparsity, **settings), lambda _: None)
    assert int((model[0].weight == 0).sum()) == 96


@pytest.mark.parametrize("include", [["4.weight", "0.weight"], ["4.weight"]])
def test_zeros_of_matrices_that_pruning_includes_by_name_are_held(include):
    """A head is left out by default, and pruned where a rule names it."""
    model = nn.ModuleDict({"body": net()})
    model.get_output_embeddings = lambda: model["body"][4]
    assert "body.4.weight" not in {target.parameter for target in find_targets(model)}
    names = [f"body.{name}" for name in include]

    def to(model, sparsity):
        return prune(model, sparsity=sparsity, allocation="uniform", score="magnitude", include=names)

    def zeros(model):
        return [int((model.get_parameter(name) == 0).sum()) for name in names]

    def fine_tune(keeper):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        keeper.attach(optimizer)
        train(model["body"], optimizer, 3)

    start = copy.deepcopy(model)
    prune_iteratively(model, [0.25, 0.5], partial(to, model), fine_tune)
    expected = [model.get_parameter(name).numel() // 2 for name in names]
    assert zeros(model) == expected

    model = start
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pruner = GradualPruner(model, optimizer, partial(to, model), lambda step: 0.5)
    train(model["body"], optimizer, 3)
    assert zeros(model) == expected
    pruner.detach()
    resumed = GradualPruner(model, optimizer, partial(to, model), lambda step: 0.5)
    resumed.load_state_dict(pruner.state_dict())
    train(model["body"], optimizer, 3)
    assert zeros(model) == expected


def test_zeros_are_held_in_the_matrices_that_rules_name_where_pruning_returns_no_result():
    model = net()
    model.get_output_embeddings = lambda: model[4]

    def to(sparsity):
        model[4].weight.data.copy_(layer_pruner(model[4].weight, "magnitude").prune(16).weight)

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    GradualPruner(model, optimizer, to, lambda step: 0.5, include=["4.weight"])
    train(model, optimizer, 3)
    assert int((model[4].weight == 0).sum()) == 16


def test_schedules_are_their_formulas():
    at = partial(gradual_sparsity, begin=10, end=20, final=0.8)
    for kind in ("cubic", "geometric"):
        values = [at(step, kind=kind, initial=0.2) for step in range(0, 30)]
        assert values[0] == values[10] == pytest.approx(0.2) and values[20] == values[29] == pytest.approx(0.8)
        assert values == sorted(values)
    assert at(15) == pytest.approx(0.8 - 0.8 * 0.5**3)
    assert 1 - at(15, kind="geometric") == pytest.approx((1.0 * 0.2) ** 0.5)
    for wrong in ({"kind": "square"}, {"begin": 20}, {"final": 1.0}, {"initial": 0.9}):
        with pytest.raises(ValueError, match="gradual_sparsity"):
            at(1, **wrong)


def test_gradual_pruning_goes_on_after_a_resume_as_without_one():
    schedule = partial(gradual_sparsity, begin=2, end=8, final=0.75)

    def run(model, steps, state=None):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        pruner = GradualPruner(model, optimizer, partial(prune_to, model), schedule, every=2)
        if state:
            pruner.load_state_dict(state)
        reached = []
        for _ in range(steps):
            train(model, optimizer, 1)
            reached.append(float((model[0].weight == 0).float().mean()))
        return pruner, reached

    whole = net()
    start = copy.deepcopy(whole)
    pruner, reached = run(whole, 10)
    assert reached == sorted(reached) and reached[1] == 0.0
    assert reached[3] == pytest.approx(schedule(4), abs=0.01) and reached[4] == reached[3]
    assert reached[9] == 0.75
    first, _ = run(start, 5)
    second = copy.deepcopy(start)
    second.load_state_dict(start.state_dict())
    _, rest = run(second, 5, first.state_dict())
    assert rest == reached[5:] and torch.equal(second[0].weight, whole[0].weight)
    pruner.detach()
    with pytest.raises(ValueError, match="every >= 1"):
        GradualPruner(whole, pruner.optimizer, print, schedule, every=0)


def test_a_low_rank_adapter_on_a_pruned_base_keeps_its_zeros_and_a_merge_is_masked():
    model = net()
    prune_to(model, 0.6)
    keeper = keep_masks(model)
    base = model[0].weight.detach().clone()
    apply_lora(model, LoraConfig(r=2, target_modules=["0", "2"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    keeper.attach(optimizer)
    train(model, optimizer, 4)
    assert torch.equal(keeper.parameters["0.weight"], base)  # frozen: not a weight of it moved
    merge(model)
    assert (keeper.parameters["0.weight"] != 0)[base == 0].any()
    keeper.apply()
    assert torch.equal(keeper.parameters["0.weight"] != 0, base != 0)
    assert not torch.equal(keeper.parameters["0.weight"], base)


def test_curves_are_measured_anew_between_rounds_of_fine_tuning():
    """The paper's loop: prune by curves, fine-tune under the masks, measure the pruned model, prune it further."""
    model, curves = net(), []
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01), 30)
    data = torch.randn(48, 12)

    def prune_by_curves(sparsity):
        result = prune(model, data, sparsity=sparsity, score="magnitude", metric="mse_logits")
        curves.append(result.curves)
        return result

    def fine_tune(keeper):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        keeper.attach(optimizer)
        train(model, optimizer, 5)

    results = prune_iteratively(model, iterative_sparsities(0.6, 0.3), prune_by_curves, fine_tune)
    total = sum(curve.numel for curve in curves[0].values())
    assert [result.allocation.sparsity for result in results] == pytest.approx([0.3, 0.51, 0.6], abs=1 / total)
    # each round starts from what the one before kept
    for before, after in zip(results, curves[1:], strict=False):
        assert {name: curve.counts[0] for name, curve in after.items()} == before.allocation.counts
    zeros = sum(int((p == 0).sum()) for name, p in model.named_parameters() if name in curves[0])
    assert zeros == total - results[-1].allocation.target
