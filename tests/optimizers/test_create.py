"""A model's optimizer by name, and balanced embeddings against their formula."""

import math
import re

import pytest
import torch
from torch import nn

from leanstep.optimizers import LANTON, MFAC, Lion, ParamGroups, SinkGD, create, param_groups
from leanstep.optimizers.rates.adamw import customary_rates, step_length
from leanstep.recipes.config.schema import OPTIMIZERS, OptimizerConfig
from leanstep.recipes.training.build import build_optimizer


class Model(nn.Module):
    def __init__(self, vocabulary=12, width=6):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.layer = nn.Linear(width, width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        return self.lm_head(self.layer(self.norm(self.embed(tokens))))


def groups_of(optimizer):
    return {group["name"]: group for group in optimizer.param_groups}


@pytest.mark.parametrize("name, cls", [("lanton", LANTON), ("lion", Lion), ("mfac", MFAC), ("sinkgd", SinkGD)])
def test_the_class_its_options_and_the_groups_of_the_model(name, cls):
    model, lines = Model(), []
    optimizer = create(model, name, lr=3e-3, settings={"head": {"lr": 1e-3}}, say=lines.append)
    assert type(optimizer) is cls and OPTIMIZERS[name] == f"leanstep.optimizers:{cls.__name__}"
    groups = groups_of(optimizer)
    assert set(groups) == {"hidden", "embedding", "head", "norm", "bias"}
    assert groups["hidden"]["lr"] == 3e-3 and groups["head"]["lr"] == 1e-3
    assert groups["norm"]["weight_decay"] == 0
    first, head, *rows = lines[0].splitlines()
    assert first == cls.__name__ and head.split()[-6:] == ["lr", "tensors", "elements", "share", "first", "parameters"]
    assert [row.split()[-6 if row.endswith(" more)") else -5] for row in rows if row.startswith("head")] == ["0.001"]
    assert len(rows) == len(groups) and all("0.003" in row for row in rows if not row.startswith("head"))
    before = [parameter.clone() for parameter in model.parameters()]
    model(torch.arange(12)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "muon", "scale", "sgd"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_optimizers_to_compare_with_step_as_in_recipes(name, tied):
    trained = []
    for make in (
        lambda model: create(model, name, lr=1e-2, weight_decay=0.1, say=None),
        lambda model: build_optimizer(OptimizerConfig(name=name, lr=1e-2, weight_decay=0.1), model),
    ):
        torch.manual_seed(0)
        model = Model()
        if tied:
            model.lm_head.weight = model.embed.weight
        model.get_output_embeddings = lambda model=model: model.lm_head
        optimizer = make(model)
        for _ in range(3):
            model(torch.arange(12)).square().sum().backward()
            optimizer.step()
        rules = {role: group.get("algorithm") for role, group in groups_of(optimizer).items()}
        trained.append((model.state_dict(), rules if name not in ("adamw", "sgd") else None))
    (ours, ours_rules), (theirs, theirs_rules) = trained
    assert ours_rules == theirs_rules
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("options", [{"lr": -1e-3}, {"lr": "1e-3"}, {"momentum": 2.0}])
@pytest.mark.parametrize("name", ["muon", "normuon", "scale"])
def test_numbers_of_muon_and_scale_are_checked(name, options):
    with pytest.raises((ValueError, TypeError), match="MuonAdamW|NorMuon|SCALE"):
        create(Model(), name, say=None, **options)


def test_normuon_steps_hidden_matrices_and_adamw_the_rest():
    model = Model()
    optimizer = create(model, "normuon", lr=1e-2, say=None)
    rules = {role: group["algorithm"] for role, group in groups_of(optimizer).items()}
    assert rules == {"hidden": "normuon", **dict.fromkeys(("embedding", "head", "norm", "bias"), "adamw")}
    model(torch.arange(12)).square().sum().backward()
    optimizer.step()
    rows = optimizer.state[model.layer.weight]["row_mean_sq"]
    assert rows.shape == (6, 1) and optimizer.state[model.embed.weight].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_the_table_shows_what_muon_steps(capsys):
    create(Model(), "muon")
    table = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert table["group"][1] == "algorithm" and [table[r][1] for r in ("hidden", "embedding")] == ["muon", "adamw"]


def test_the_rates_of_adamw_are_its_own_and_muon_has_no_rule_for_them():
    groups = groups_of(create(Model(), "adamw", like_adamw={"lr": 3e-4, "weight_decay": 0.1}, say=None))
    assert groups["hidden"]["lr"] == groups["norm"]["lr"] == 3e-4 and groups["hidden"]["weight_decay"] == 0.1
    assert groups["norm"]["weight_decay"] == 0 and groups["hidden"]["fused"]
    with pytest.raises(ValueError, match="no rule carries AdamW's rate over to MuonAdamW"):
        create(Model(), "muon", like_adamw={"lr": 3e-4})


@pytest.mark.parametrize(
    "name, rules", [("sinkgd", ["sinkgd", "adamw"]), ("lanton", ["rms", "sign"]), ("lion", []), ("mfac", [])]
)
def test_the_table_is_printed_with_the_rules_of_the_class(name, rules, capsys):
    create(Model(), name)
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"(LANTON|Lion|MFAC|SinkGD)$", lines[0])
    table = {line.split()[0]: line.split() for line in lines[1:]}
    assert [table[role][1] for role in ("hidden", "embedding")][: len(rules)] == rules
    shown = [column for column in table["group"] if column in ("algorithm", "norm", "SinkGD", "LANTON")]
    assert shown == ["algorithm" if name == "sinkgd" else "norm"][: len(rules)]
    assert table["hidden"][2 + len(shown)] == "1"  # tensors, after the rate


@pytest.mark.parametrize("roles, told", [(["head", "router"], "head, router (a tied head is"), (["hidden"], "")])
def test_settings_of_a_role_that_no_parameter_has_are_told(roles, told):
    model, lines = Model(), []
    model.lm_head.weight = model.embed.weight
    create(model, "lion", settings=dict.fromkeys(roles, {"lr": 1e-3}), overrides={"layer": {}}, say=lines.append)
    last = lines[0].splitlines()[-1]
    assert last.startswith("settings without effect: no parameter has the role") == bool(told) and told in last


@pytest.mark.parametrize(
    "name, options, error, message",
    [
        ("adam", {}, ValueError, "expected one of 'adamw', 'lanton', .* as name, got 'adam'; take 'adamw'$"),
        ("lion", {"momentum": 0.9}, TypeError, "Lion has no option momentum; it has .*betas"),
        ("lion", {"embeddings": "balanced"}, ValueError, "'balanced' is a rule of SinkGD; Lion does not have it"),
        ("sinkgd", {"embeddings": "sinkhorn"}, ValueError, r"one of \('adamw', 'balanced'\), got 'sinkhorn'"),
        ("sinkgd", {"lr": -1.0}, ValueError, "learning rate"),
        ("sinkgdd", {}, ValueError, "'sinkgd' as name, got 'sinkgdd'; take 'sinkgd'$"),
        (nn.Linear(1, 1), {}, TypeError, r"expected the model first, then the name, as in create\(model, 'sinkgd'\)$"),
        ("Lion", {}, ValueError, "got 'Lion'; take 'lion'$"),
        ("lion", {"lr": "1e-3"}, TypeError, "must be a number, got '1e-3'; write 0.001, without quotes$"),
        ("lion", {"lr": "fast"}, TypeError, "must be a number, got 'fast'$"),
        ("adamw", {"lr": "1e-3"}, TypeError, "AdamW: learning rate must be a number, got '1e-3'; write 0.001"),
    ],
)
def test_mistakes_are_told(name, options, error, message):
    lines = []
    with pytest.raises(error, match=message):
        create(Model(), name, say=lines.append, **options)
    assert not lines
    with pytest.raises(TypeError, match="expected the model"):
        create(list(Model().parameters()), "lion", say=None)


@pytest.mark.parametrize("newest, beta", [(0.1, 0.9), (0.19, 0.9), (0.05, 0.95), (1.0, 0.9), (0.01, 0.99)])
def test_the_length_of_a_step_is_that_of_its_average(newest, beta):
    """The weights of all gradients in the average, squared and summed, are what is left of the noise's variance."""
    weights = [newest, *((1 - newest) * (1 - beta) * beta**age for age in range(5000))]
    assert math.fsum(weights) == pytest.approx(1)
    signal, noise = 0.03, math.fsum(weight**2 for weight in weights)
    assert step_length(newest, beta) == pytest.approx(math.sqrt((signal + noise) / (signal + 1)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_schedule_may_end_at_zero(name):
    model = Model()
    optimizer = create(model, name, **({"window": 4} if name == "mfac" else {}), say=None)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=2)
    for step in range(3):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        schedule.step()
        unchanged = [torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)]
        assert all(unchanged) if step == 2 else not any(unchanged)


CARRIED = [("sinkgd", {}), ("sinkgd", {"momentum": 0.9}), ("sinkgd", {"embeddings": "balanced"}), ("lion", {}),
           ("lanton", {"noise_adaptive": False}), ("lanton", {"noise_adaptive": False, "nesterov": True})]  # fmt: skip


@pytest.mark.parametrize("name, options", CARRIED)
def test_like_adamw_moves_as_far_and_decays_as_much(name, options):
    """Gradients of a steady mean under noise: each role moves along the mean as by AdamW, and decays as much."""
    rates, embedding = {"lr": 1e-3, "weight_decay": 0.1}, {"lr": 4e-3}
    moved = {}
    for one in ("adamw", name):
        torch.manual_seed(0)
        model = Model(vocabulary=48, width=40)
        if one == "adamw":
            others = [p for p in model.parameters() if p is not model.embed.weight]
            optimizer = torch.optim.AdamW([{"params": others}, {"params": [model.embed.weight], **embedding}], lr=1e-3,
                                          weight_decay=0.0)  # fmt: skip
        else:
            optimizer = create(model, name, like_adamw=rates, settings={"embedding": embedding}, say=None, **options)
            before = [model.layer.weight.detach().clone(), model.embed.weight.detach().clone()]
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            torch.testing.assert_close(model.layer.weight, before[0] * (1 - 1e-4), rtol=1e-6, atol=1e-9)
            assert torch.equal(model.embed.weight, before[1])
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.0
            optimizer.state.clear()
        # of matrices in one direction, as LANTON's steps have all singular values alike
        means = {key: torch.randn(p.shape[0]).sign() * 0.17 for key, p in model.named_parameters()}
        means = {
            key: mean if p.dim() == 1 else torch.outer(mean, torch.randn(p.shape[1]).sign())
            for (key, p), mean in zip(model.named_parameters(), means.values(), strict=True)
        }
        noise = torch.Generator().manual_seed(1)
        for step in range(250):
            if step == 125:  # Lion's average takes a hundred steps
                start = {key: p.detach().clone() for key, p in model.named_parameters()}
            for key, p in model.named_parameters():
                p.grad = 1e-4 * (means[key] + torch.randn(p.shape, generator=noise))
            optimizer.step()
        moved[one] = {k: ((p.detach() - start[k]) * means[k].sign()).mean().item() for k, p in model.named_parameters()}
    for key in ("layer.weight", "embed.weight", "lm_head.weight"):
        assert moved[name][key] / moved["adamw"][key] == pytest.approx(1, abs=0.3), key


@pytest.mark.parametrize("name", ["lanton", "lion", "sinkgd"])
def test_without_a_rate_the_customary_ones_of_adamw_hold(name):
    def settings(**options):
        groups = groups_of(create(Model(width=32), name, say=None, **options))
        return {name: {k: v for k, v in group.items() if k != "params"} for name, group in groups.items()}

    rest = {role: {"lr": 2e-2} for role in ("embedding", "head", "norm", "bias")}
    assert settings(weight_decay=0.1) == settings(like_adamw={"lr": 2e-3, "weight_decay": 0.1}, settings=rest)
    assert settings(settings={"router": {"weight_decay": 0.5}}) == settings()
    if name == "lion":
        assert {group["lr"] for group in settings(settings={"head": {"lr": 1e-3}}).values()} == {1e-4, 1e-3}
        return
    if name == "sinkgd":
        for options in ({"lr": 2e-2}, {"scale": 0.05}, {"settings": {"head": {"lr": 2e-2}}}):
            assert {(group["lr"], group["scale"]) for group in settings(**options).values()} == {(2e-2, 0.05)}
        return
    groups = settings()
    assert {group["alpha"] for group in groups.values()} == {"auto"}
    assert [groups[role]["noise_adaptive"] for role in ("hidden", "embedding", "head", "norm")] == [1, 0, 0, 1]
    given = settings(alpha=0.5, noise_adaptive=True)
    assert {(group["alpha"], group["noise_adaptive"]) for group in given.values()} == {(0.5, True)}
    paper = ({"lr": 5e-3}, {"scaling": "muon"}, {"radius": 2.0}, {"settings": {"head": {"lr": 1e-3}}})
    for group in (group for options in paper for group in settings(**options).values()):
        assert group["lr"] in (5e-3, 1e-3) and group["alpha"] == 1.0 and group["noise_adaptive"]


@pytest.mark.parametrize("shape, width", [((24, 96), 96), ((4, 24, 48), 48), ((8, 3, 4, 4), 48), ((64, 3, 4, 4), 64)])
def test_the_width_of_the_customary_rate_is_a_larger_side(shape, width):
    groups = [{"norm": "rms", "params": [("p", torch.empty(shape))]}]
    assert customary_rates(LANTON, groups, {"weight_decay": 0.1}) == {
        "lr": pytest.approx(1e-3 * (128 / width) ** 0.5),
        "weight_decay": 0.1,
    }


def test_create_at_a_width_of_128_steps_as_the_class_of_sinkgd_with_its_defaults():
    """So rows of the class's defaults on such models, which docs/measured has, are those of create, too."""
    models = [Model(width=128) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, optimizer in zip(
        models, (create(models[0], "sinkgd", say=None), SinkGD(param_groups(models[1]))), strict=True
    ):
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_adapters_have_the_rate_of_their_width_and_lanton_no_more_directions_than_their_rank():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            # of a layer with 32 inputs and 8 outputs, which are not the width
            self.lora_A, self.lora_B = nn.Linear(32, 4, bias=False), nn.Linear(4, 8, bias=False)
            self.layer = nn.Linear(32, 32, bias=False)

    groups = groups_of(create(Adapted(), "lanton", say=None))
    assert groups["lora"]["lr"] == pytest.approx(5e-4 * (2000 / 32) ** 0.781)
    assert groups["hidden"]["lr"] == pytest.approx(2e-3)
    assert groups["lora"]["radius"] == pytest.approx(groups["hidden"]["radius"] / 2)  # the root of 4, not 4


@pytest.mark.parametrize(
    "name, rates, options, error, message",
    [
        ("lion", {"weight_decay": 0.1}, {}, ValueError, r"like_adamw: expected AdamW's 'lr'.*without 'lr'"),
        ("lion", {"lr": 1e-3, "beta": 1}, {}, ValueError, r"got a mapping with \['beta'\]; rates of roles go into set"),
        ("lion", {"lr": "3e-4"}, {}, TypeError, r"like_adamw, group 'hidden': lr must be a number.*write 0.0003"),
        ("lanton", {"lr": -1.0}, {}, ValueError, "Invalid lr: -1.0; create: like_adamw"),
        ("sinkgd", {"lr": 1e-3, "weight_decay": -1}, {}, ValueError, "Invalid weight_decay: -1"),
        ("sinkgd", 3e-4, {}, TypeError, r"expected a mapping such as \{'lr'.*got 0.0003"),
        ("sinkgd", {"lr": 1e-3}, {"lr": 1e-3}, ValueError, "like_adamw: leave out lr; the rates are AdamW's"),
        ("lanton", {"lr": 1e-3}, {"weight_decay": 0.1, "radius": 2.0}, ValueError, "leave out radius, weight_decay;"),
        ("sinkgd", {"lr": 1e-3}, {"settings": {"hidden": {"scale": 0.1}}}, ValueError, "leave out scale;"),
        ("lion", {"lr": 1e-3}, {"settings": {"router": {"lr": 1.0}}}, ValueError, "no parameter has the role router"),
        ("lion", {"lr": 1e-3}, {"settings": {"norm": {"lr": "fast"}}}, TypeError, "group 'norm': lr must be a number"),
        (
            "mfac",
            {"lr": 1e-3},
            {},
            ValueError,
            "no rule carries AdamW.s rate over to MFAC. Its step grows.*give lr=, from 1e-3",
        ),
    ],
)
def test_mistakes_of_like_adamw_are_told(name, rates, options, error, message):
    with pytest.raises(error, match=message):
        create(Model(), name, like_adamw=rates, say=None, **options)


def balanced_update(buffer, gradient, momentum=0.95, tau=1e-3, alternations=11, eps=1e-20):
    """Nesterov momentum, quiet rows dropped, rows and columns normalized in turn, the rows last. In float64."""
    buffer.mul_(momentum).add_(gradient, alpha=1 - momentum)
    update = momentum * buffer + (1 - momentum) * gradient
    norms = update.norm(dim=1)
    update = torch.where((norms > tau * norms.mean()).unsqueeze(1), update, 0.0)
    for turn in range(alternations):
        dim = 1 if turn % 2 == 0 else 0
        update = update * update.shape[dim] ** 0.5 / (update.norm(dim=dim, keepdim=True) + eps)
    return update


def test_balanced_embeddings_are_one_word_and_follow_the_formula():
    model = Model().double()
    groups = param_groups(model, embeddings="balanced")
    assert isinstance(groups, ParamGroups)
    named = {group["name"]: group for group in groups}
    assert {name for name, group in named.items() if group["algorithm"] == "balanced"} == {"embedding", "head"}
    assert named["embedding"]["weight_decay"] == named["head"]["weight_decay"] == 0
    optimizer = SinkGD(groups, lr=0.1, scale=0.5, weight_decay=0.3)
    tables = {name: weight for name, weight in model.named_parameters() if name in ("embed.weight", "lm_head.weight")}
    expected = {name: weight.detach().clone() for name, weight in tables.items()}
    buffers = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    for step in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        for weight in tables.values():
            weight.grad[step] *= 1e-5  # quiet, but for its momentum
            weight.grad[-1] = 0  # never seen
        for name, weight in tables.items():
            expected[name] -= 0.1 * 0.5 * balanced_update(buffers[name], weight.grad)
        optimizer.step()
    for name, weight in tables.items():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-11, atol=1e-13)
        assert set(optimizer.state[weight]) == {"momentum_buffer"}


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (128, 128)])
def test_muon_beside_balanced_embeddings_has_the_update_of_the_report(shape):
    """docs/optimizers.md: a root mean square of 0.18, also of every head (whose rows are half of the matrix here)."""
    settings = {"noise_adaptive": False, "scaling": "muon", "radius": 0.9, "ns_coefficients": "polar_express"}
    for blocks in (None, shape[0] // 2):
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        LANTON([weight], lr=1.0, norm="rms", blocks=blocks, **settings).step()
        for block in weight.detach().split(blocks or shape[0]):
            torch.testing.assert_close(block.square().mean().sqrt().item(), 0.18, rtol=0.03, atol=0)


def test_settings_change_balanced_embeddings():
    groups = {
        group["name"]: group
        for group in param_groups(
            Model(), {"embedding": {"momentum": 0.0}, "head": {"algorithm": "adamw"}}, embeddings="balanced"
        )
    }
    assert groups["embedding"]["momentum"] == 0.0 and groups["embedding"]["algorithm"] == "balanced"
    assert groups["head"]["algorithm"] == "adamw"


@pytest.mark.parametrize("cls", [LANTON, Lion, MFAC])
def test_balanced_groups_are_refused_by_optimizers_without_the_rule(cls):
    groups = param_groups(Model(), embeddings="balanced")
    with pytest.raises(ValueError, match=rf"{cls.__name__}: group 'embedding' has algorithm='balanced'"):
        cls(groups)
    rest = [group for group in groups if group["algorithm"] != "balanced"]
    assert len(cls(rest).param_groups) == len(rest) > 0
