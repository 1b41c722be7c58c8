"""A model under a controller: what it computes, what its optimizer sees, and what a checkpoint brings back."""

import copy
import math
import struct

import pytest
import torch
from accelerate import Accelerator
from sparse_models import MLP, batch, make_mlp, train
from torch import nn
from torch.nn.functional import linear

from leanstep.sparsity import NM, Schedule, is_nm, nm_mask, sparsify, squash, transposable_mask
from leanstep.sparsity.training.methods import METHODS

EVERY = [
    ("ste", None), ("srste", None), ("fixed", None), ("mdgf-linear", 12), ("mdgf-exponential", 12),
    ("sdgf-stepwise", 12), ("sdgf-geometric", 12), ("sdgf-stepwise+mdgf-linear", 12),
    ("sdgf-stepwise+mdgf-exponential", 12), ("sdgf-geometric+mdgf-linear", 12), ("sdgf-geometric+mdgf-exponential", 12),
    ("s-ste", None),
]  # fmt: skip


def test_every_method_is_tested():
    assert [name for name, _ in EVERY] == list(METHODS)


@pytest.mark.parametrize(("method", "schedule"), EVERY)
def test_every_method_trains_and_ends_at_its_pattern(method, schedule):
    model = make_mlp()
    controller = sparsify(model, MLP, schedule=schedule, method=method)
    before = train(model, controller, steps=1)
    after = train(model, controller, steps=40)
    assert after < before and controller.step_count == 41 and controller.finished
    for layer in controller.layers:
        weight = getattr(*layer.uses[0]).detach()
        assert is_nm(weight, layer.target) and not is_nm(layer.weight, layer.target), "the dense weight stays dense"
        exact = method == "s-ste" or int((weight == 0).sum()) == round(weight.numel() * layer.target.sparsity)
        assert exact


def test_the_one_call_chooses_layers_by_name():
    model = nn.ModuleDict(
        {"mlp": nn.ModuleDict({"up": nn.Linear(16, 8)}), "q_proj": nn.Linear(8, 8), "o": nn.Linear(8, 8)}
    )
    controller = sparsify(model, {"mlp.*": NM(1, 8), "q_proj": "2:4"})
    assert {layer.name: str(layer.target) for layer in controller.layers} == {"mlp.up": "1:8", "q_proj": "2:4"}
    assert not hasattr(model["o"], "parametrizations")
    # a dense pattern leaves layers out that a later rule would take
    model = make_mlp()
    controller = sparsify(model, {"2": NM(1, 1), "*": NM(2, 4)})
    assert [layer.name for layer in controller.layers] == ["0", "4"]


def test_parameters_stay_the_same_objects_and_their_optimizer_goes_on():
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    parameters = list(model.parameters())
    train(model, None, steps=2, optimizer=optimizer)
    moments = {id(p): optimizer.state[p]["exp_avg"].clone() for p in parameters}
    controller = sparsify(model, MLP).attach(optimizer)
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters}
    assert all(torch.equal(optimizer.state[p]["exp_avg"], moments[id(p)]) for p in parameters)
    train(model, controller, steps=1, optimizer=optimizer)
    assert controller.step_count == 1


def test_the_bias_of_a_sparse_layer_is_added_trained_and_kept():
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.bias.fill_(3.0)
    controller = sparsify(layer, {"weight": "2:4"}, srste_lambda=1e-3)
    inputs = torch.randn(5, 8)
    weight = controller.layers[0].uses[0][0].weight
    assert torch.equal(layer(inputs), linear(inputs, weight, layer.bias))
    assert not torch.allclose(layer(inputs), linear(inputs, weight)), "without the bias"
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    controller.attach(optimizer)
    layer(inputs).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((4,), 5.0))
    optimizer.step()
    expected = layer(inputs)
    assert torch.equal(squash(layer)(inputs), expected) and (layer.bias == 2.5).all()


def test_gradient_of_one_step_is_that_of_the_method():
    inputs, targets = batch()
    gradients = {}
    for flow in ("ste", "decay", "fixed"):
        model = make_mlp()
        controller = sparsify(model, {"2": "2:4"}, schedule=Schedule(kind="mdgf-linear", total_steps=4), grad_flow=flow)
        controller.layers[0].transform.alpha.fill_(0.25)
        (model(inputs) - targets).square().mean().backward()
        gradients[flow] = controller.layers[0].weight.grad
        mask = controller.layers[0].transform.mask
    torch.testing.assert_close(gradients["decay"], torch.where(mask, gradients["ste"], 0.25 * gradients["ste"]))
    torch.testing.assert_close(gradients["fixed"], torch.where(mask, gradients["ste"], 0.0))


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_sr_ste_adds_its_term_once_a_step_whatever_the_accumulation(micro_batches):
    # SGD: the step shows the gradient. lambda / 2 * |(1 - P) W|^2 has the gradient lambda (1 - P) W
    model, plain = make_mlp(), make_mlp()
    terms = sparsify(model, {"2": "2:4"}, srste_lambda=0.5)
    straight = sparsify(plain, {"2": "2:4"})
    start, mask = terms.layers[0].weight.detach().clone(), terms.layers[0].transform.mask.clone()
    for controller, net in ((terms, model), (straight, plain)):
        train(
            net, controller, steps=1, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), micro_batches=micro_batches
        )
    difference = straight.layers[0].weight.detach() - terms.layers[0].weight.detach()
    torch.testing.assert_close(difference, 0.1 * 0.5 * torch.where(mask, 0.0, start), rtol=1e-4, atol=1e-7)


def test_masks_change_once_a_step_and_not_in_between():
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    controller = sparsify(model, MLP).attach(optimizer)
    versions = lambda: [layer.transform.mask._version for layer in controller.layers]  # noqa: E731
    start = versions()
    inputs, targets = batch()
    for part in range(4):
        (model(inputs[part::4]) - targets[part::4]).square().mean().backward()
        model.eval()(inputs)
        model.train()
    assert versions() == start
    optimizer.step()
    after = versions()
    assert all(b > a for a, b in zip(start, after, strict=True)) and controller.step_count == 1


def test_dense_phase_is_dense_bit_for_bit_and_sparsity_starts_where_it_ends():
    dense, model = make_mlp(), make_mlp()
    controller = sparsify(model, MLP, schedule=Schedule(total_steps=8, dense=0.5))
    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-2) for net in (dense, model)]
    train(dense, None, steps=4, optimizer=optimizers[0])
    controller.attach(optimizers[1])
    train(model, controller, steps=3, optimizer=optimizers[1])
    assert controller.stage().phase == "dense" and controller.statistics()[0]["sparsity"] == 0
    train(model, controller, steps=1, optimizer=optimizers[1])
    assert controller.stage().phase == "sparse" and controller.statistics()[0]["sparsity"] == 0.5
    for layer in controller.layers:
        trained = dense[int(layer.name)]
        assert torch.equal(trained.weight, layer.weight) and torch.equal(trained.bias, model[int(layer.name)].bias)


def masks(controller):
    return [layer.transform.mask.clone() for layer in controller.layers]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_mask_every_fixed_and_frozen():
    settings = {
        "every third": {"mask_every": 3},
        "fixed": {"method": "fixed"},
        "frozen": {"schedule": Schedule(total_steps=4, finetune=0.5, freeze_mask_in_finetune=True)},
    }
    history = {}
    for name, options in settings.items():
        model = make_mlp()
        controller = sparsify(model, MLP, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        seen = [masks(controller)]
        controller.attach(optimizer)
        for _ in range(6):
            train(model, controller, steps=1, optimizer=optimizer)
            seen.append(masks(controller))
        history[name] = [same(a, b) for a, b in zip(seen, seen[1:], strict=False)]
    assert history["every third"] == [True, True, False, True, True, False]
    assert history["fixed"] == [True] * 6
    assert history["frozen"] == [False, True, True, True, True, True]


@pytest.mark.parametrize("score", ["magnitude", "gradient"])
def test_skipped_steps_are_steps_of_the_schedule_and_leave_the_masks(score):
    schedule = Schedule(kind="sdgf-stepwise+mdgf-linear", total_steps=12)
    model = make_mlp()
    controller = sparsify(model, MLP, schedule=schedule, method=schedule.kind, score=score)
    layer = controller.layers[0]
    for step in range(1, 13):
        before, pattern = layer.transform.mask.clone(), layer.transform.pattern
        if step % 3:
            train(model, controller, steps=1)
        else:
            # the gradient of a step that is left out
            model(batch()[0] * 1e3).square().sum().backward()
            controller.skip()
            model.zero_grad()
            changed = layer.transform.pattern != pattern
            assert is_nm(layer.transform.mask, layer.transform.pattern)
            assert changed or torch.equal(layer.transform.mask, before)
        stage = schedule.at(step, layer.target)
        assert (controller.step_count, layer.transform.pattern) == (step, stage.pattern)
        assert float(layer.transform.alpha) == pytest.approx(stage.alpha)
    assert controller.finished


def test_geometric_frames_are_shortened_to_rows_that_are_short():
    # 8:64 and 4:32 do not fill rows of 16
    model = make_mlp()
    controller = sparsify(model, {"2": NM(1, 8)}, schedule=8, method="sdgf-geometric")
    patterns = []
    for _ in range(8):
        patterns.append(str(controller.layers[0].transform.pattern))
        train(model, controller, steps=1)
    assert patterns == ["2:16"] * 6 + ["1:8"] * 2


def by_hand(layer, weight):
    """Scores that fall along every row."""
    return torch.arange(weight.shape[1], 0, -1, dtype=torch.float32).expand_as(weight)


@pytest.mark.parametrize("score", ["magnitude", "gradient", by_hand])
def test_scores(score):
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    controller = sparsify(model, {"0": "2:4"}, score=score).attach(optimizer)
    inputs, targets = batch()
    (model(inputs) - targets).square().mean().backward()
    optimizer.step()
    layer = controller.layers[0]
    weight = layer.weight.detach()
    values = {"magnitude": weight, "gradient": weight * layer.weight.grad, by_hand: by_hand(layer, weight)}[score]
    kept = torch.zeros(values.shape).view(-1, 4).scatter(1, values.abs().view(-1, 4).topk(2).indices, 1.0)
    assert torch.equal(layer.transform.mask, kept.view_as(values) == 1)


@pytest.mark.parametrize("schedule", [None, Schedule(kind="sdgf-geometric+mdgf-linear", total_steps=6)])
def test_transposable_masks(schedule):
    """At every step, those of transposable_mask for the weights as they are, whatever frame the schedule is at."""
    model = make_mlp()
    controller = sparsify(model, {"0": "2:4"}, schedule=schedule, score="transposable")
    layer, patterns = controller.layers[0], set()
    for _ in range(7):
        pattern = layer.transform.pattern
        patterns.add(str(pattern))
        assert torch.equal(layer.transform.mask, transposable_mask(layer.weight.detach(), pattern))
        assert is_nm(layer.transform.mask, pattern) and is_nm(layer.transform.mask.mT, pattern)
        train(model, controller, steps=1)
    assert patterns == ({"2:4"} if schedule is None else {"4:8", "2:4"})  # rows of 8 hold no 8:16
    squash(model)
    assert is_nm(model[0].weight, "2:4") and is_nm(model[0].weight.mT, "2:4")


def test_transposable_masks_need_whole_tiles():
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Conv2d(8, 8, 3))
    for name, shape in (("0", r"\(6, 8\)"), ("1", r"\(8, 8, 3, 3\)")):
        with pytest.raises(ValueError, match=f"tiles of 4 x 4 fill, and '{name}' has a weight of shape {shape}"):
            sparsify(model, {name: "2:4"}, score="transposable")


def test_a_score_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"the score of layer '0' has shape \(16,\), its weight \(16, 8\)"):
        sparsify(make_mlp(), MLP, score=lambda layer, weight: weight[:, 0])


@pytest.mark.parametrize(
    ("method", "schedule", "through"), [*((*case, "model") for case in EVERY), (*EVERY[-1], "controller")]
)
def test_resuming_is_exact(method, schedule, through, tmp_path):
    def fresh():
        model = make_mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
        options = {"mask_every": 3, "score": "gradient"} if method not in ("s-ste",) else {"mask_every": 3}
        return model, optimizer, sparsify(model, MLP, schedule=schedule, method=method, **options).attach(optimizer)

    model, optimizer, controller = fresh()
    train(model, controller, steps=7, optimizer=optimizer)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if through == "controller":
        saved["controller"] = controller.state_dict()
        saved["model"] = {key: value for key, value in saved["model"].items() if not key.endswith("_extra_state")}
    torch.save(saved, tmp_path / "checkpoint.pt")
    output = model(batch()[0])
    train(model, controller, steps=8, optimizer=optimizer)

    again, other, resumed = fresh()
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again.load_state_dict(loaded["model"], strict=through == "model")
    other.load_state_dict(loaded["optimizer"])
    if through == "controller":
        resumed.load_state_dict(loaded["controller"])
    assert resumed.step_count == 7
    # what is evaluated after reloading is what was evaluated before saving, whatever the phase
    assert torch.equal(again(batch()[0]), output)
    train(again, resumed, steps=8, optimizer=other)
    assert same(masks(controller), masks(resumed))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def _later(state):
    """The state of a layer at another step."""
    changed = state.clone()
    changed[0] += 1
    return changed


def test_a_state_of_other_layers_or_patterns_is_refused():
    controller, other = sparsify(make_mlp(), MLP), sparsify(make_mlp(), {"2": "2:4"})
    with pytest.raises(ValueError, match=r"other layers; missing \['0', '4'\]"):
        controller.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"trained towards 2:4 along dimension 1, this model is set to 1:4"):
        sparsify(make_mlp(), {"2": "1:4"}).load_state_dict(other.state_dict())
    # the last of three layers has another pattern
    third, before = sparsify(make_mlp(), MLP | {"4": "1:4"}), controller.state_dict()
    with pytest.raises(ValueError, match="trained towards 1:4 along dimension 1, this model is set to 2:4"):
        controller.load_state_dict({**third.state_dict(), "0": _later(before["0"])})
    assert all(torch.equal(value, before[name]) for name, value in controller.state_dict().items())
    header = struct.Struct("<6q2d")
    for place, value in ((0, -1), (1, 9), (6, math.nan)):  # steps, n of the pattern, alpha
        fields = list(header.unpack(before["4"][: header.size].numpy().tobytes()))
        fields[place] = value
        damaged = before["4"].clone()
        damaged[: header.size] = torch.frombuffer(bytearray(header.pack(*fields)), dtype=torch.uint8)
        with pytest.raises(ValueError, match="the sparsity state of a weight of shape .* is damaged"):
            controller.load_state_dict({**before, "0": _later(before["0"]), "4": damaged})
        assert all(torch.equal(value, before[name]) for name, value in controller.state_dict().items())
    with pytest.raises(ValueError, match="another model, or damaged"):
        other.load_state_dict({"2": torch.zeros(3, dtype=torch.uint8)})


def test_deepcopy_computes_the_same_and_goes_its_own_way():
    model = make_mlp()
    controller = sparsify(model, MLP)
    twin, twins_controller = copy.deepcopy((model, controller))
    inputs = batch()[0]
    assert torch.equal(model(inputs), twin(inputs))
    train(model, controller, steps=3)
    assert twins_controller.step_count == 0 and controller.step_count == 3
    train(twin, twins_controller, steps=3)
    assert torch.equal(model(inputs), twin(inputs))


def test_averaged_weights_are_masked_after_averaging():
    model = make_mlp()
    controller = sparsify(model, {"2": "2:4"})
    averaged, its_controller = copy.deepcopy((model, controller))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    controller.attach(optimizer)
    for _ in range(5):
        train(model, controller, steps=1, optimizer=optimizer)
        with torch.no_grad():
            for mean, value in zip(averaged.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 0.2)
    its_controller.refresh()
    layer = its_controller.layers[0]
    assert is_nm(getattr(*layer.uses[0]), "2:4")
    best = layer.weight.detach().abs().view(-1, 4).topk(2).values.sum()
    torch.testing.assert_close(getattr(*layer.uses[0]).detach().abs().sum(), best)


def test_statistics_say_what_they_are_called():
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    controller = sparsify(model, {"2": "1:4"}, measure_every=2, srste_lambda=1e-3).attach(optimizer)
    before = masks(controller)[0]
    assert controller.statistics()[0]["flip_rate"] is None
    inputs, targets = batch()
    (model(inputs) - targets).square().mean().backward()
    gradient = controller.layers[0].weight.grad.clone()
    optimizer.step()
    row = controller.statistics()[0]
    layer = controller.layers[0]
    mask, weight = layer.transform.mask, layer.weight.detach()
    assert row["flip_rate"] == pytest.approx(float((mask != before).float().mean())) and row["flip_rate"] > 0
    assert row["gradient_noise"] == pytest.approx(float(gradient[~before].square().sum() / gradient.square().sum()))
    assert row["kept_magnitude"] == pytest.approx(float(weight[mask].abs().sum() / weight.abs().sum()))
    assert (row["sparsity"], row["target"], row["phase"], row["alpha"]) == (0.75, "1:4", "sparse", 0.0)
    flat = controller.diagnostics()
    assert flat["sparsity/all"] == 0.75
    assert all(flat[f"{what}/2"] == row[what] for what in ("sparsity", "flip_rate", "kept_magnitude", "gradient_noise"))
    assert all(isinstance(value, float) for value in flat.values())


def test_masks_settle_as_the_rate_falls():
    rates = []
    for lr in (0.5, 0.05, 0.005, 0.0):
        model = make_mlp()
        controller = sparsify(model, {"2": "1:4"}, measure_every=1)
        train(model, controller, steps=1, optimizer=torch.optim.SGD(model.parameters(), lr=lr))
        rates.append(controller.statistics()[0]["flip_rate"])
    assert rates == sorted(rates, reverse=True) and rates[0] > 0 and rates[-1] == 0


def test_scaled_gradients_of_a_fused_optimizer_get_a_scaled_term():
    class Fused(torch.optim.SGD):
        grad_scale = torch.tensor(8.0)

    model, plain = make_mlp(), make_mlp()
    controllers = [sparsify(net, {"2": "2:4"}, srste_lambda=0.5) for net in (model, plain)]
    for net, factor in ((model, 8.0), (plain, 1.0)):
        inputs, targets = batch()
        (factor * (net(inputs) - targets).square().mean()).backward()
    controllers[0].before_step(Fused(model.parameters(), lr=0.1))
    controllers[1].before_step(torch.optim.SGD(plain.parameters(), lr=0.1))
    torch.testing.assert_close(controllers[0].layers[0].weight.grad, 8 * controllers[1].layers[0].weight.grad)


@pytest.mark.parametrize("order", ["attach first", "prepare first"])
def test_accelerate_wraps_the_optimizer(order):
    from accelerate import Accelerator

    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = sparsify(model, MLP)
    if order == "attach first":
        controller.attach(optimizer)
    model, wrapped = Accelerator(cpu=True).prepare(model, optimizer)
    assert wrapped is not optimizer
    if order == "prepare first":
        controller.attach(wrapped)
    train(model, controller, steps=3, optimizer=wrapped)
    assert controller.step_count == 3


def test_detaching_and_attaching():
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = sparsify(model, MLP).attach(optimizer)
    with pytest.raises(ValueError, match="attached already"):
        controller.attach(optimizer)
    controller.detach()
    train(model, None, steps=2, optimizer=optimizer)
    assert controller.step_count == 0
    with pytest.raises(TypeError, match=r"expected a torch optimizer, got Wrapper \(its .optimizer\?\)"):
        controller.attach(type("Wrapper", (), {"optimizer": optimizer})())
    with pytest.raises(ValueError, match="SGD does not train 0.weight, 2.weight, 4.weight; build"):
        controller.attach(torch.optim.SGD(make_mlp().parameters(), lr=0.1))


@pytest.mark.parametrize("form", ["closure", "accelerate"])
def test_the_terms_gradient_is_added_where_a_closure_computes_it(form):
    """A step with a closure recomputes the gradient after the step has begun."""
    weights = {}
    for with_closure in (False, True):
        model = make_mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        stepped = Accelerator(cpu=True).prepare_optimizer(optimizer) if form == "accelerate" else optimizer
        controller = sparsify(model, MLP, method="srste", srste_lambda=0.5).attach(stepped)
        inputs, targets = batch()

        def closure(model=model, optimizer=optimizer, inputs=inputs, targets=targets):
            optimizer.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            if not with_closure:
                closure()
            stepped.step(closure if with_closure else None)
        assert controller.step_count == 3
        weights[with_closure] = [layer.weight.detach().clone() for layer in controller.layers]
    for plain, by_closure in zip(weights[False], weights[True], strict=True):
        assert torch.equal(plain, by_closure)
    assert not torch.equal(weights[True][0], make_mlp()[0].weight)


def test_every_evaluation_of_lbfgs_has_the_term():
    model = make_mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")
    controller = sparsify(model, MLP, method="srste", srste_lambda=0.5).attach(optimizer)
    layer, inputs, gradients = controller.layers[0], batch()[0], []

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().mean() * 0
        loss.backward()
        return loss + 0.25 * sum(x.weight.masked_fill(x.transform.mask, 0).square().sum() for x in controller.layers)

    original = optimizer._gather_flat_grad
    optimizer._gather_flat_grad = lambda: gradients.append(layer.weight.grad.clone()) or original()
    pruned = layer.weight.detach().masked_fill(layer.transform.mask, 0)
    optimizer.step(closure)
    assert torch.equal(gradients[0], 0.5 * pruned) and len(gradients) > 1
    assert controller.step_count == 1


def test_a_skipped_step_scores_by_the_weight_where_the_pattern_changes():
    model = nn.Sequential(nn.Linear(8, 8))
    controller = sparsify(
        model, {"0": "2:4"}, schedule=Schedule(total_steps=10, dense=0.1), method="fixed", score="gradient"
    )
    layer = controller.layers[0]
    layer.weight.grad = torch.full((8, 8), torch.nan)
    controller.skip()
    assert torch.equal(layer.transform.mask, nm_mask(layer.weight.detach(), "2:4"))
