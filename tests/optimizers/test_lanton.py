"""LANTON against its formula in float64, and what follows from the formula."""

import copy
import math
import warnings

import pytest
import torch
from lanton_formula import Formula, direction, dual_norm, own_norm

from leanstep.optimizers import LANTON, param_groups
from leanstep.optimizers.common.rounding import STATE_KEY
from leanstep.optimizers.lanton import optimizer as lanton_optimizer

SHAPES = {"rms": ((9, 6), (5, 12), (8, 8), (4, 2, 3, 3)), "sign": ((11, 4), (3, 7)), "vector": ((6,), (9,), ())}
# converges to the polar factor, with the steps that conftest.py gives it
EXACT = {"ns_coefficients": "classic_quintic", "nuclear": "svd"}


def layers(dtype=torch.float64, seed=0):
    """(parameters, norms) of every kind."""
    chance = torch.Generator().manual_seed(seed)
    norms = [norm for norm, shapes in SHAPES.items() for _ in shapes]
    shapes = [shape for shapes in SHAPES.values() for shape in shapes]
    return [torch.randn(s, generator=chance, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes], norms


def grouped(params, norms, **options):
    groups = [
        {"params": [p for p, n in zip(params, norms, strict=True) if n == norm], "norm": norm, "name": norm}
        for norm in SHAPES
    ]
    return LANTON([g for g in groups if g["params"]], **options)


def gradients(params, step):
    """The same for the same step; every layer with noise of its own size."""
    chance = torch.Generator().manual_seed(100 + step)
    return [
        (torch.randn(p.shape, generator=chance, dtype=torch.float64) * 3.0 ** (i % 4 - 2)).to(p.dtype)
        for i, p in enumerate(params)
    ]


def run(optimizer, params, steps, change=lambda g: g):
    for step in steps:
        for param, gradient in zip(params, gradients(params, step), strict=True):
            param.grad = change(gradient)
        optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.1, "weight_decay": 0.1},
        {"alpha": 30.0, "betas": (0.9, 0.5)},
        {"scaling": "muon", "nesterov": True},
        {"betas": (0.0, 0.0), "weight_decay": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("foreach", [None, False])
def test_follows_the_formula(options, foreach):
    params, norms = layers()
    formula = Formula([p.detach().clone() for p in params], norms, lr=0.1, **options)
    optimizer = grouped(params, norms, lr=0.1, foreach=foreach, **EXACT, **options)
    for step in range(6):
        step_gradients = gradients(params, step)
        for param, gradient in zip(params, step_gradients, strict=True):
            param.grad = gradient
        optimizer.step()
        formula.step(step_gradients)
        torch.testing.assert_close([p.detach() for p in params], formula.params, rtol=0, atol=1e-9)
        assert [row["factor"] for row in optimizer.noise_report()] == pytest.approx(formula.factors, rel=1e-6)
    assert [row["H"] for row in optimizer.noise_report()] == pytest.approx(formula.noise, rel=1e-6)
    assert len({round(f, 3) for f in formula.factors}) > 4 or options.get("alpha") == 30.0


@pytest.mark.parametrize("norm", SHAPES)
@pytest.mark.parametrize("scaling", ["scion", "muon"])
def test_directions_are_those_of_the_dual_norms(norm, scaling):
    """Feasible, and reaching the dual norm, which no other point of the ball passes."""
    chance = torch.Generator().manual_seed(0)
    for shape in SHAPES[norm]:
        param = torch.zeros(shape, dtype=torch.float64).requires_grad_()
        optimizer = LANTON([{"params": [param], "norm": norm}], lr=1.0, scaling=scaling, **EXACT)
        gradient = param.grad = torch.randn(shape, generator=chance, dtype=torch.float64)
        optimizer.step()
        o = -param.detach()
        best = dual_norm(gradient, norm, scaling)
        assert own_norm(o, norm, scaling) == pytest.approx(1.0, rel=1e-8)
        assert (o * gradient).sum().item() == pytest.approx(best, rel=1e-8)
        for _ in range(50):
            other = torch.randn(shape, generator=chance, dtype=torch.float64)
            other /= own_norm(other, norm, scaling)
            assert (other * gradient).sum().item() <= best * (1 + 1e-9)


def test_default_newton_schulz_is_within_its_bounds():
    """Jordan's iteration leaves singular values between 0.68 and 1.21, in bf16 a little wider."""
    param = torch.zeros(64, 96).requires_grad_()
    param.grad = torch.randn(64, 96)
    LANTON([param], lr=1.0, norm="rms").step()
    values = torch.linalg.svdvals(param.detach()) / math.sqrt(64 / 96)
    assert values.min() > 0.6 and values.max() < 1.25


def test_first_step_has_factor_one_and_uses_no_difference():
    params, norms = layers()
    base, base_norms = layers()
    a = grouped(params, norms, lr=0.1, alpha=1e-3, **EXACT)
    b = grouped(base, base_norms, lr=0.1, noise_adaptive=False, **EXACT)
    run(a, params, range(1))
    run(b, base, range(1))
    assert all(torch.equal(p, q) for p, q in zip(params, base, strict=True))
    assert all(row["H"] is None and row["factor"] == 1.0 for row in a.noise_report())
    run(a, params, range(1, 2))
    assert all(row["H"] > 0 for row in a.noise_report())


@pytest.mark.parametrize("without", [{"noise_adaptive": False}, {"noise": "halves"}], ids=str)
@pytest.mark.parametrize("noise_dtype", [None, torch.int8], ids=str)
def test_after_steps_that_stored_no_gradient_one_is_stored_before_one_is_compared(without, noise_dtype):
    params, norms = layers()
    optimizer = grouped(params, norms, lr=0.0, noise_dtype=noise_dtype, **EXACT)
    run(optimizer, params, range(3))
    before = [row["H"] for row in optimizer.noise_report()]
    for group in optimizer.param_groups:
        group.update(without, half_marked=True)
    run(optimizer, params, range(3, 5))
    assert not any(key.startswith("previous_grad") for p in params for key in optimizer.state[p])
    for group in optimizer.param_groups:
        group.update(noise_adaptive=True, noise="previous")
    run(optimizer, params, range(5, 6))
    assert [optimizer.state[p]["noise"].item() for p in params] == before
    assert all(row["H"] is None and row["factor"] == 1.0 for row in optimizer.noise_report())
    run(optimizer, params, range(5, 6))  # the same gradient: no noise
    rows = optimizer.noise_report()
    assert all(row["H"] == pytest.approx(0.9 * h, rel=0.1) for row, h in zip(rows, before, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["scion", "muon"])
@pytest.mark.parametrize("options", [{}, {"nesterov": True, "weight_decay": 0.1}], ids=["plain", "nesterov"])
def test_without_noise_it_is_the_base_optimizer_bit_for_bit(scaling, options):
    """Off, and with an alpha that no noise reaches, over 50 steps."""
    results = []
    for switch in ({"noise_adaptive": False}, {"alpha": 1e30}, {"alpha": 1e38, "noise": "previous"}):
        params, norms = layers(torch.float32)
        run(grouped(params, norms, lr=0.01, scaling=scaling, **options, **switch), params, range(50))
        results.append(params)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))
    params, norms = layers(torch.float32)
    run(grouped(params, norms, lr=0.01, scaling=scaling, alpha=1.0, **options), params, range(50))
    assert not all(torch.equal(p, q) for p, q in zip(params, results[0], strict=True))


@pytest.mark.parametrize(("scaling", "adjust"), [("muon", "match_rms_adamw")])
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_base_is_torch_muon(scaling, adjust, nesterov):
    """Without noise, "muon" steps matrices as torch.optim.Muon does; what is left is its bf16."""
    ours = [torch.randn(s).requires_grad_() for s in ((24, 16), (8, 40))]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    a = LANTON(ours, lr=0.01, weight_decay=0.1, norm="rms", scaling=scaling, nesterov=nesterov, noise_adaptive=False)
    b = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, momentum=0.95, nesterov=nesterov, adjust_lr_fn=adjust)
    for step in range(10):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).norm() < 0.03 * 10 * 0.01 * 0.2 * math.sqrt(max(p.shape)) * math.sqrt(min(p.shape))


def test_limits_of_alpha():
    """Small alpha: (H_min / H)^(1/4); large: 1; the least noisy layer of every norm has exactly 1."""
    for alpha in (1e-12, 1e-3, 1.0, 1e12):
        params, norms = layers()
        optimizer = grouped(params, norms, lr=0.01, alpha=alpha)
        run(optimizer, params, range(5))
        for norm in SHAPES:
            rows = optimizer.noise_report(norm)
            least = min(row["H"] for row in rows)
            assert max(row["factor"] for row in rows) == 1.0
            for row in rows:
                if alpha == 1e-12:
                    assert row["factor"] == pytest.approx((least / row["H"]) ** 0.25, rel=1e-9)
                if alpha == 1e12:
                    assert row["factor"] == pytest.approx(1.0, abs=1e-12)
                assert 0 < row["factor"] <= 1 and row["lr"] == 0.01 * row["factor"]


def with_noise(noise, alpha=1.0, extra=()):
    """An optimizer over vectors whose estimates are set by hand, before a step that does not change them much."""
    params = [torch.zeros(3, dtype=torch.float64).requires_grad_() for _ in (*noise, *extra)]
    optimizer = LANTON(params, lr=1.0, alpha=alpha)
    for param in params:
        param.grad = torch.ones(3, dtype=torch.float64)
    optimizer.step()
    for param, value in zip(params, (*noise, *extra), strict=True):
        optimizer.state[param]["noise"].fill_(value)
        optimizer.state[param]["noise_steps"].fill_(1)
    return optimizer


def factors_of(noise, alpha=1.0, extra=()):
    return [row["factor"] for row in with_noise(noise, alpha, extra).noise_report()]


def test_closed_forms():
    assert factors_of((1.0, 16.0, 81.0), alpha=1e-9) == pytest.approx([1, 1 / 2, 1 / 3])
    assert factors_of((7.0, 7.0, 7.0)) == [1.0, 1.0, 1.0]
    expected = [1.0, 0.98, 0.84, 0.55, 0.32]
    assert factors_of((0.01, 0.1, 1.0, 10.0, 100.0)) == pytest.approx(expected, abs=0.006)
    assert factors_of((0.0, 1.0)) == pytest.approx([1.0, 2**-0.25])


def test_another_layer_changes_others_only_when_it_is_the_least_noisy():
    alone = factors_of((1.0, 4.0))
    assert factors_of((1.0, 4.0), extra=(9.0,))[:2] == alone
    lower = factors_of((1.0, 4.0), extra=(0.1,))
    assert lower[2] == 1.0 and all(a < b for a, b in zip(lower[:2], alone, strict=True))


def test_multiplying_gradients_is_dividing_alpha():
    results = []
    for c in (1.0, 8.0):  # a power of two: exact
        params, norms = layers(torch.float32)
        run(grouped(params, norms, lr=0.01, alpha=0.5 * c), params, range(8), lambda g, c=c: g * c)
        results.append(params)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    results = []
    for c in (1.0, 8.0):  # and with alpha="auto" it makes no difference
        params, norms = layers(torch.float32)
        run(grouped(params, norms, lr=0.01, alpha="auto"), params, range(8), lambda g, c=c: g * c)
        results.append(params)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_alpha_auto_is_the_median_of_the_maximum_s_layers():
    noise = (1.0, 4.0, 9.0)
    assert factors_of(noise, alpha="auto") == pytest.approx(factors_of(noise, alpha=2.0), rel=1e-12)
    assert factors_of((0.0, 0.0), alpha="auto") == [1.0, 1.0]


def test_the_same_gradient_again_lets_noise_decay_to_nothing():
    params, norms = layers()
    optimizer = grouped(params, norms, lr=0.01, betas=(0.9, 0.5))
    run(optimizer, params, range(3))
    before = [row["H"] for row in optimizer.noise_report()]
    for _ in range(40):
        optimizer.step()
    rows = optimizer.noise_report()
    assert [row["H"] for row in rows] == pytest.approx([h * 0.5**40 for h in before], rel=1e-6)
    assert all(row["factor"] == pytest.approx(1.0, abs=1e-9) for row in rows)


def test_estimates_are_twice_the_noise_of_a_gradient():
    """Independent gradients: E H = E dual(G - G')^2 = 2 E dual(noise)^2."""
    param = torch.zeros(24, 32, dtype=torch.float64).requires_grad_()
    optimizer = LANTON([param], lr=0.0, betas=(0.9, 0.99), nuclear="svd", norm="rms")
    mean, duals = torch.randn(24, 32, dtype=torch.float64), []
    for _ in range(400):
        noise = 0.3 * torch.randn(24, 32, dtype=torch.float64)
        duals.append(dual_norm(noise, "rms") ** 2)
        param.grad = mean + noise
        optimizer.step()
    estimate = optimizer.noise_report()[0]["H"] / (1 - 0.99**399)
    assert estimate == pytest.approx(2 * sum(duals) / len(duals), rel=0.03)


@pytest.mark.parametrize(
    ("nuclear", "low", "high"), [("polar", 0.85, 1.12), ("svd", 0.999, 1.001), ("frobenius", 0.1, 1)]
)
def test_nuclear_estimators(nuclear, low, high):
    param = torch.zeros(40, 30).requires_grad_()
    optimizer = LANTON([param], lr=0.0, betas=(0.9, 0.0), norm="rms", nuclear=nuclear)
    first, second = torch.randn(40, 30), torch.randn(40, 30)
    for gradient in (first, second):
        param.grad = gradient
        optimizer.step()
    ratio = math.sqrt(optimizer.noise_report()[0]["H"]) / dual_norm((second - first).double(), "rms")
    assert low < ratio < high


def test_noise_does_not_change_the_decay():
    optimizer = with_noise((1.0, 16.0), alpha=1e-9)
    params = optimizer.param_groups[0]["params"]
    assert len({row["factor"] for row in optimizer.noise_report()}) == 2
    optimizer.param_groups[0].update(weight_decay=0.1, radius=0.0, betas=(0.95, 1.0 - 1e-12))
    before = [p.detach().clone() for p in params]
    for param in params:
        param.grad = torch.full((3,), 2.0, dtype=torch.float64)
    optimizer.step()
    for param, old in zip(params, before, strict=True):
        torch.testing.assert_close(param.detach(), old * 0.9, rtol=1e-9, atol=0)


def test_a_radius_scales_the_update_and_not_the_decay():
    results = []
    for radius in (1.0, 3.0):
        param = torch.ones(4, 6, dtype=torch.float64).requires_grad_()
        param.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        LANTON([param], lr=0.1, radius=radius, weight_decay=0.5, norm="rms", **EXACT).step()
        results.append(0.95 * torch.ones(4, 6) - param.detach())
    torch.testing.assert_close(results[1], 3 * results[0])


def test_noise_every():
    """Every third step measures, against the gradient right before it."""
    params, norms = layers()
    optimizer = grouped(params, norms, lr=0.0, noise_every=3, nuclear="svd")
    estimates = []
    for step in range(8):
        run(optimizer, params, range(step, step + 1))
        estimates.append(optimizer.noise_report()[0]["H"])
    assert (
        estimates[0] is None
        and estimates[1] == estimates[2] == estimates[3]
        and estimates[4] == estimates[5] == estimates[6]
        and estimates[3] != estimates[4]
    )
    first, second = (gradients(params, step)[0] for step in (0, 1))
    assert estimates[1] == pytest.approx(0.1 * dual_norm(second - first, "rms") ** 2, rel=1e-6)
    third, fourth = (gradients(params, step)[0] for step in (3, 4))
    assert estimates[4] == pytest.approx(0.9 * estimates[1] + 0.1 * dual_norm(fourth - third, "rms") ** 2, rel=1e-6)


def test_momentum_and_inputs_are_not_overwritten_in_bf16():
    """Newton-Schulz divides by a norm: the momentum it is given must still be the average afterwards."""
    param = torch.randn(16, 24).bfloat16().requires_grad_()
    optimizer = LANTON([param], lr=0.01, norm="rms", noise_adaptive=False)
    expected = torch.zeros(16, 24)
    for step in range(4):
        param.grad = torch.randn(16, 24, generator=torch.Generator().manual_seed(step)).bfloat16()
        optimizer.step()
        expected = expected.lerp(param.grad.float(), 1.0 - 0.95).bfloat16().float()
        assert torch.equal(optimizer.state[param]["momentum_buffer"].float(), expected)


def test_stochastic_rounding_keeps_small_updates():
    """Nearest loses an update of a quarter of a bf16 step; stochastic rounding keeps it on average."""
    moved = {}
    for rounding in ("nearest", "stochastic"):
        param = torch.ones(64, 64).bfloat16().requires_grad_()
        optimizer = LANTON([{"params": [param], "norm": "sign"}], lr=2**-10, rounding=rounding)
        for _ in range(16):
            param.grad = torch.ones(64, 64).bfloat16()
            optimizer.step()
        moved[rounding] = (1 - param.detach().float()).mean().item()
    assert moved["nearest"] == 0.0
    assert moved["stochastic"] == pytest.approx(16 * 2**-10, rel=0.1)


def test_experts_are_layers_of_their_own():
    """A stack steps as its matrices would, with estimates of their own."""
    stack = torch.randn(3, 6, 5, dtype=torch.float64).requires_grad_()
    singles = [m.detach().clone().requires_grad_() for m in stack]
    a = LANTON([{"params": [stack], "norm": "rms"}], lr=0.1, **EXACT)
    b = LANTON([{"params": singles, "norm": "rms"}], lr=0.1, **EXACT)
    for step in range(4):
        gradient = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        gradient *= torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1)
        if step == 2:
            gradient[1] = 0.0
        stack.grad = gradient.clone()
        for single, own in zip(singles, gradient, strict=True):
            single.grad = own.clone()
        a.step()
        b.step()
    torch.testing.assert_close(stack.detach(), torch.stack([s.detach() for s in singles]), rtol=0, atol=1e-10)
    rows = a.noise_report()
    assert [row["name"] for row in rows] == ["group.0[0]", "group.0[1]", "group.0[2]"]
    assert [row["H"] for row in rows] == pytest.approx([row["H"] for row in b.noise_report()], rel=1e-9)
    assert set(a.diagnostics()) == {"noise/group.0", "factor/group.0"}


def test_matrices_stored_transposed():
    weight = torch.randn(12, 5, dtype=torch.float64)
    straight, stored = weight.clone().requires_grad_(), weight.t().contiguous().requires_grad_()
    a = LANTON([straight], lr=0.1, norm="rms", **EXACT)
    b = LANTON([stored], lr=0.1, norm="rms", transposed=True, **EXACT)
    for step in range(3):
        straight.grad = torch.randn(12, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        stored.grad = straight.grad.t().contiguous()
        a.step()
        b.step()
    torch.testing.assert_close(stored.detach().t(), straight.detach(), rtol=0, atol=1e-9)
    assert a.noise_report()[0]["H"] == pytest.approx(b.noise_report()[0]["H"], rel=1e-9)


def test_one_dimensional_convolutions_are_flattened():
    weight = torch.randn(6, 4, 3, dtype=torch.float64)
    results = []
    for param in (weight.clone(), weight.flatten(1).clone()):
        param.requires_grad_()
        optimizer = LANTON([param], lr=0.1, norm="rms", flatten=True, **EXACT)
        for step in range(3):
            gradient = torch.randn(6, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            param.grad = gradient.view_as(param)
            optimizer.step()
        results.append(param.detach().flatten(1))
    assert torch.equal(*results)


def test_what_is_missing_or_not_finite_leaves_the_estimates():
    params, norms = layers(torch.float32)
    optimizer = grouped(params, norms, lr=0.01)
    run(optimizer, params, range(3))
    before = {key: optimizer.state[params[0]][key].clone() for key in ("noise", "noise_steps", "previous_grad")}
    moved = params[1].detach().clone()
    for change in (None, float("nan"), 0.0):
        for param, gradient in zip(params, gradients(params, 3), strict=True):
            param.grad = gradient
        if change is None:
            params[0].grad = None
        else:
            params[0].grad.fill_(change)
        optimizer.step()
        for key, value in before.items():
            assert torch.equal(optimizer.state[params[0]][key], value), (change, key)
    assert not torch.equal(params[1], moved)
    assert optimizer.nonfinite_count() == 1


@pytest.mark.parametrize("nonfinite", ["skip", "pass"])
@pytest.mark.parametrize("options", [{}, {"momentum_dtype": torch.int8}, {"blocks": 4}], ids=str)
def test_without_looking_at_values_the_bits_are_those_of_the_host(options, nonfinite, monkeypatch):
    """A device's steps look at no value; a compiled step is compared in the battery, where its sums have other bits."""
    states, made = [], lanton_optimizer.LayerStep
    for on_host in (True, False):
        monkeypatch.setattr(lanton_optimizer, "LayerStep", lambda *a, on_host, h=on_host, **k: made(*a, on_host=h, **k))
        params = [torch.ones(shape).requires_grad_() for shape in ((8, 6), (8, 6), (2, 8, 4), (8, 0))]
        vectors = [torch.ones(5, dtype=torch.bfloat16).requires_grad_(), torch.ones(3).requires_grad_()]
        groups = [{"params": params, "norm": "rms", **options}, {"params": vectors, "norm": "vector"}]
        # one by one: the host leaves skipped matrices out of a batch, whose products then have other bits
        optimizer = LANTON(groups, lr=0.01, nonfinite=nonfinite, foreach=False)
        for step, change in enumerate((1.0, 0.0, float("inf"), 1.0)):
            for param, gradient in zip(params + vectors, gradients(params + vectors, step), strict=True):
                param.grad = gradient
            for changed in (params[0].grad, params[2].grad[1], vectors[0].grad):
                changed.mul_(change)
            optimizer.step()
        states.append([*params, *vectors, *(t for s in optimizer.state.values() for t in s.values())])
    torch.testing.assert_close(*states, rtol=0, atol=0, equal_nan=True)


def test_a_layer_without_a_gradient_keeps_its_place_in_the_maximum():
    params = [torch.zeros(4, dtype=torch.float64).requires_grad_() for _ in range(2)]
    optimizer = LANTON(params, lr=0.01)
    for step in range(4):
        for param, size in zip(params, (0.01, 1.0), strict=True):
            param.grad = size * torch.randn(4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.step()
    before = optimizer.noise_report()
    params[0].grad = None
    params[1].grad = params[1].grad.clone()
    optimizer.step()
    after = optimizer.noise_report()
    assert after[0] == before[0] and after[1]["factor"] < 1.0


@pytest.mark.parametrize("norm", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("foreach", [None, False])
def test_the_scale_of_a_gradient_does_not_change_its_direction(norm, dtype, foreach):
    """From 1e-30 to 1e30, by powers of two; zeros stay where they are."""
    chance = torch.Generator().manual_seed(0)
    for shape in ((9, 6), (3, 8, 8)) if norm == "rms" else SHAPES[norm]:
        gradient = torch.randn(shape, generator=chance).to(dtype)
        steps = {}
        for exponent in (0, -100, -70, -40, -24, 24, 100):
            param = torch.zeros(shape, dtype=dtype).requires_grad_()
            param.grad = gradient * 2.0**exponent
            LANTON([{"params": [param], "norm": norm}], lr=1.0, foreach=foreach).step()
            steps[exponent] = param.detach().double()
        for exponent, step in steps.items():
            unit = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
            assert (step - steps[0]).norm() < 8 * unit * steps[0].norm(), exponent
        param.grad = torch.zeros_like(param)
        before = param.detach().clone()
        LANTON([{"params": [param], "norm": norm}], lr=1.0, foreach=foreach).step()
        assert torch.equal(param, before)


@pytest.mark.parametrize("rounding", ["kahan", "master", "split"])
def test_convolutions_of_one_shape_in_channels_last(rounding):
    """Their matrices are copies, to be written back with what the rounding keeps: each to its own parameter."""
    results = []
    for layout in (torch.channels_last, torch.contiguous_format):
        chance = torch.Generator().manual_seed(0)
        weights = [torch.randn(6, 4, 3, 3, generator=chance).bfloat16() for _ in range(2)]
        params = [w.contiguous(memory_format=layout).requires_grad_() for w in weights]
        optimizer = LANTON(params, lr=0.01, norm="rms", rounding=rounding)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=chance).bfloat16()
            optimizer.step()
        key = STATE_KEY[rounding]
        results.append([t for p in params for t in (p.detach(), optimizer.state[p][key])])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_a_compiled_step_is_the_step_whether_it_measures_or_not():
    """The battery compiles steps that all measure; here every other one does, which is looked up at every step."""
    torch._dynamo.reset()
    optimizers, parameters = [], []
    for _ in range(2):
        parameters.append([torch.ones(shape).requires_grad_() for shape in ((5, 4), (2, 3, 4))])
        settings = {"lr": torch.tensor(0.01), "noise_every": 2, "alpha": "auto"}
        optimizers.append(grouped(parameters[-1], ["rms", "rms"], **settings))
    steps = [torch.compile(optimizers[0].step, fullgraph=True, backend="aot_eager"), optimizers[1].step]
    for i in range(4):
        for params, step in zip(parameters, steps, strict=True):
            for param, gradient in zip(params, gradients(params, i), strict=True):
                param.grad = gradient
            step()
        compiled, plain = (optimizer.noise_report() for optimizer in optimizers)
        for row, expected in zip(compiled, plain, strict=True):
            assert row == {key: pytest.approx(value, rel=1e-5) if i and key in ("H", "factor", "lr") else value
                           for key, value in expected.items()}  # fmt: skip
        torch.testing.assert_close(*parameters, rtol=1e-5, atol=1e-6)
    assert all(row["H"] > 0 for row in compiled) and len({row["factor"] for row in compiled}) > 1
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_estimates_have_one_dimension_in_the_state_and_none_when_saved(dtype):
    """torch.compile does not write to 0-d ones; saved ones stay as older versions read and write them."""
    params, norms = layers(dtype)
    params.append(torch.randn(2, 3, 4).to(dtype).requires_grad_())
    norms.append("rms")
    optimizer = grouped(params, norms, lr=0.01)
    run(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    for key in ("noise", "noise_steps"):
        assert {tuple(state[key].shape) for state in optimizer.state.values()} == {(1,), (2,)}
        assert {tuple(state[key].shape) for state in saved["state"].values()} == {(), (2,)}
    other = [p.detach().clone().requires_grad_() for p in params]
    resumed = grouped(other, norms, lr=0.01)
    resumed.load_state_dict(saved)
    assert resumed.noise_report()[0]["H"] == optimizer.noise_report()[0]["H"] > 0
    for o, ps in ((optimizer, params), (resumed, other)):
        run(o, ps, range(3, 5))
    for p, q in zip(params, other, strict=True):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert value.dtype == resumed.state[q][key].dtype and torch.equal(value, resumed.state[q][key]), key


@pytest.mark.parametrize(
    ("setting", "value", "read"),
    [
        ("decay_rate", "group", True), ("decay_rate", "layer", False), ("bias_correction", True, False),
        ("nuclear_steps", 5, False), ("nuclear_coefficients", "nuclear", True), ("grouping", "role", False),
        ("grouping", "norm", True), ("ns_steps", 5, True), ("ns_steps", 6, False), ("ns_dtype", "float32", False),
    ],
)  # fmt: skip
def test_settings_of_older_versions_are_read_or_refused(setting, value, read):
    """A state that relied on a setting that is gone would go on with another rule."""
    params, norms = layers()
    optimizer = grouped(params, norms, lr=0.01)
    run(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group[setting] = value
    if read:
        optimizer.load_state_dict(saved)
        assert all(setting not in group for group in optimizer.param_groups)
    else:
        with pytest.raises(ValueError, match=f"saved with {setting}={value!r}, which no longer exists .{setting} was"):
            optimizer.load_state_dict(saved)


@pytest.mark.parametrize("nuclear", ["polar", "svd", "frobenius"])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30, 1e37])
def test_gradients_of_any_size_leave_finite_weights(size, nuclear):
    params, norms = layers(torch.float32)
    optimizer = grouped(params, norms, lr=0.01, nuclear=nuclear)
    run(optimizer, params, range(4), lambda g: g * size)
    assert all(torch.isfinite(p).all() for p in params)
    assert all(torch.isfinite(v).all() for state in optimizer.state.values() for v in state.values())
    assert optimizer.nonfinite_count() == 0


def test_passed_through_gradients_never_enter_the_estimates():
    param = torch.ones(4, 6).requires_grad_()
    for nuclear in ("polar", "svd", "frobenius"):
        optimizer = LANTON([param], lr=0.01, norm="rms", nonfinite="pass", nuclear=nuclear)
        for step in range(4):
            param.grad = torch.randn(4, 6)
            if step == 2:
                param.grad[0, 0] = float("inf")
            optimizer.step()
        assert math.isfinite(optimizer.noise_report()[0]["H"])


# ---- who shares a maximum


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.q_proj, self.up_proj = torch.nn.Linear(4, 4), torch.nn.Linear(4, 8)
        self.down_proj, self.norm = torch.nn.Linear(8, 4), torch.nn.LayerNorm(4)
        self.lm_head = torch.nn.Linear(4, 7, bias=False)

    def forward(self, tokens):
        x = self.norm(self.q_proj(self.embed(tokens)))
        return torch.nn.functional.cross_entropy(self.lm_head(self.down_proj(self.up_proj(x).tanh())), tokens.roll(1))


def trained(model, optimizer, steps=3):
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randint(7, (20,), generator=torch.Generator().manual_seed(step))).backward()
        optimizer.step()
    return optimizer


def test_layers_of_one_norm_share_a_maximum():
    model = Net()
    groups = param_groups(model, overrides=[("q_proj", {})])
    rows = trained(model, LANTON(groups, lr=0.01)).noise_report()
    norms = {row["name"]: row["norm"] for row in rows}
    expected = {
        "q_proj.weight": "rms", "up_proj.weight": "rms", "embed.weight": "sign", "lm_head.weight": "sign",
        "norm.weight": "vector", "q_proj.bias": "vector",
    }  # fmt: skip
    assert {name: norms[name] for name in expected} == expected
    for norm in set(norms.values()):
        factors = [row["factor"] for row in rows if row["norm"] == norm]
        assert factors.count(1.0) == 1 == max(factors)


def test_maxima_reach_over_parameter_groups():
    params = [torch.randn(4, 5).requires_grad_() for _ in range(2)]
    optimizer = LANTON([{"params": [p], "norm": "rms", "alpha": a} for p, a in zip(params, (1.0, 1e6), strict=True)])
    for step in range(3):
        for param in params:
            param.grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    first, second = optimizer.noise_report()
    assert first["factor"] < 0.9 and second["factor"] == 1.0


def test_parameter_groups_route_every_role():
    model = torch.nn.Module()
    model.experts = torch.nn.Module()
    model.experts.weight = torch.nn.Parameter(torch.randn(2, 3, 4))
    model.experts.bias = torch.nn.Parameter(torch.randn(2, 3))
    model.conv = torch.nn.Conv1d(2, 3, 4)
    model.net = Net()
    groups = param_groups(model)
    norms = {name: group["norm"] for group in groups for name, _ in group["params"]}
    assert norms["experts.weight"] == norms["conv.weight"] == norms["net.q_proj.weight"] == "rms"
    assert norms["experts.bias"] == norms["net.embed.weight"] == norms["net.lm_head.weight"] == "sign"
    assert norms["conv.bias"] == norms["net.norm.weight"] == "vector"
    optimizer = LANTON(groups)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    shapes = [row["name"] for row in optimizer.noise_report("rms")]
    assert {"experts.weight[0]", "experts.weight[1]", "conv.weight"} <= set(shapes)


def test_it_says_once_how_bare_parameters_are_routed():
    with pytest.warns(UserWarning, match="LANTON: 1 parameters .* hidden matrices, 1 others as vectors"):
        LANTON([torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LANTON(param_groups(Net()))


# ---- reports


def test_noise_report_and_diagnostics():
    model = Net()
    optimizer = LANTON(param_groups(model), lr=0.02, alpha=0.01)
    assert optimizer.noise_report() == [] and optimizer.diagnostics() == {}
    trained(model, optimizer)
    rows = optimizer.noise_report()
    assert {row["name"] for row in rows} == {name for name, _ in model.named_parameters()}
    for row in rows:
        assert row.keys() == {"name", "norm", "H", "factor", "lr"}
        assert row["H"] > 0 and row["lr"] == pytest.approx(0.02 * row["factor"])
    logged = optimizer.diagnostics()
    assert logged["noise/embed.weight"] == next(r["H"] for r in rows if r["name"] == "embed.weight")
    assert len(logged) == 2 * len(rows) and all(isinstance(v, float) for v in logged.values())
    assert {row["norm"] for row in optimizer.noise_report("sign")} == {"sign"}
    assert LANTON(param_groups(Net()), noise_adaptive=False).noise_report() == []


@pytest.mark.parametrize("names", [(None, None, "heads"), ("heads", "heads", None)])
def test_every_parameter_of_groups_without_names_has_its_own_entry(names):
    params = [torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(4)]
    groups = [{"params": params[:2], "norm": "rms"}, {"params": params[2:3], "norm": "sign"}]
    groups.append({"params": params[3:], "norm": "rms"})
    optimizer = LANTON([{**g, "name": n} if n else g for g, n in zip(groups, names, strict=True)])
    run(optimizer, params, range(2))
    rows = optimizer.noise_report()
    assert len({row["name"] for row in rows}) == 4
    logged = optimizer.diagnostics()
    assert len(logged) == 8 and all(logged[f"noise/{row['name']}"] == row["H"] for row in rows)


# ---- bad input


def named(*shapes):
    return [(f"layer{i}.weight", torch.nn.Parameter(torch.zeros(s))) for i, s in enumerate(shapes)]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"alpha": 0.0}, ValueError, "Invalid alpha: 0.0.*above 0"),
        ({"alpha": -1.0}, ValueError, "Invalid alpha: -1.0"),
        ({"alpha": "median"}, ValueError, "Invalid alpha: 'median'.*a number above 0, or 'auto'"),
        ({"alpha": None}, TypeError, "alpha must be a number"),
        ({"alpha": torch.ones(2)}, ValueError, "alpha as a tensor must be 1-element; LANTON got shape .2,."),
        ({"norm": "spectral"}, ValueError, "Invalid norm: 'spectral'.*rms"),
        ({"noise": "next"}, ValueError, "Invalid noise: 'next'"),
        ({"noise_every": 0}, ValueError, "Invalid noise_every: 0"),
        ({"ns_coefficients": "muon"}, ValueError, "Invalid ns_coefficients: 'muon'.*jordan"),
        ({"nuclear": "trace"}, ValueError, "Invalid nuclear: 'trace'.*svd"),
        ({"scaling": "adam"}, ValueError, "Invalid scaling: 'adam'"),
        ({"radius": -1.0}, ValueError, "Invalid radius: -1.0"),
        ({"noise_adaptive": 1}, TypeError, "noise_adaptive must be True or False"),
        ({"noise_dtype": torch.int16}, TypeError, "noise_dtype"),
        ({"transposed": True, "flatten": True}, ValueError, "choose one"),
    ],
    ids=str,
)
def test_settings_out_of_range(options, kind, message):
    with pytest.raises(kind, match=message):
        LANTON([{"params": named((2, 3)), "norm": "rms", **({} if "norm" not in options else options)}], **options)


def test_what_a_norm_is_not_made_for_is_named():
    with pytest.raises(ValueError, match=r"norm='vector' takes vectors, got layer1.weight \(2, 3\).*'rms'"):
        LANTON([{"params": named((4,), (2, 3)), "norm": "vector"}])
    with pytest.raises(ValueError, match=r"norm='rms' takes matrices, got layer0.weight \(4,\).*'vector'"):
        LANTON([{"params": named((4,)), "norm": "rms"}])
    with pytest.raises(ValueError, match=r"norm='rms' takes matrices, got layer0.weight \(2, 3, 4, 5\)"):
        LANTON([{"params": named((2, 3, 4, 5)), "norm": "rms", "transposed": True}])
    optimizer = LANTON([{"params": [torch.nn.Parameter(torch.zeros(2, 3))], "norm": "rms"}])
    with pytest.raises(ValueError, match="norm='sign' has no parameter"):
        optimizer.add_param_group({"params": [], "norm": "sign"})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=r"no parameter has norm 'sign'; this optimizer has \['rms'\]"):
        optimizer.noise_report("sign")


def test_gradients_cannot_be_released():
    from leanstep.optimizers import release_gradients

    model = torch.nn.Linear(3, 2)
    with pytest.raises(TypeError, match="LANTON cannot step parameters one by one"):
        release_gradients(model, LANTON(param_groups(model)))


def test_directions_of_the_formula_are_optimal():
    """The oracle itself: no random point of the ball does better."""
    gradient = torch.randn(5, 8, dtype=torch.float64)
    for norm in ("rms", "sign"):
        assert (direction(gradient, norm) * gradient).sum().item() == pytest.approx(dual_norm(gradient, norm))
