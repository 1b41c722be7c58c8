"""LANTON's rule on its own: each function against its formula, and all of them together against the whole rule."""

import math

import pytest
import torch
from lanton_formula import Formula, direction, dual_norm

from leanstep.optimizers.lanton import rule

SHAPES = {"rms": (5, 8), "sign": (4, 6), "vector": (7,)}
SVD = {"steps": 60, "coefficients": "classic_quintic"}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def full_direction(momentum, norm, scaling="scion"):
    scale = rule.dual_norm_scale(norm, tuple(momentum.shape), scaling)
    if norm == "rms":
        return scale * rule.polar_factors([momentum], **SVD)[0]
    if norm == "sign":
        return rule.sign_direction(momentum)
    return rule.vector_direction(momentum, momentum.square().sum(), scale)


def full_dual_norm(difference, norm, scaling="scion"):
    scale = rule.dual_norm_scale(norm, tuple(difference.shape), scaling)
    if norm == "rms":
        return scale * rule.nuclear_norms([difference], "svd")[0]
    part = rule.partial_dual_norm(difference, norm, torch.float64)
    return scale * (part.sqrt() if norm == "vector" else part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_momentum_is_rounded_once(dtype, in_place):
    buffer, gradient = normal(40, 30, dtype=dtype), normal(40, 30, seed=1, dtype=torch.float32)
    exact = 0.9 * buffer.double() + 0.1 * gradient.double()
    before = buffer.clone()
    new = rule.momentum(buffer, gradient, 0.9, in_place=in_place)
    assert new.dtype == dtype and (new is buffer) == in_place
    assert in_place or torch.equal(buffer, before)
    inside = 1e-15 if dtype == torch.float64 else 1e-6  # what it is computed in
    assert ((new.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + inside).all()


@pytest.mark.parametrize("norm", SHAPES)
@pytest.mark.parametrize("scaling", ["scion", "muon"])
def test_directions_and_dual_norms(norm, scaling):
    gradient = normal(*SHAPES[norm])
    torch.testing.assert_close(full_direction(gradient, norm, scaling), direction(gradient, norm, scaling))
    assert full_dual_norm(gradient, norm, scaling).item() == pytest.approx(dual_norm(gradient, norm, scaling))
    assert (full_direction(gradient, norm, scaling) * gradient).sum().item() == pytest.approx(
        dual_norm(gradient, norm, scaling)
    )
    zero = torch.zeros(SHAPES[norm], dtype=torch.float64)
    assert not full_direction(zero, norm, scaling).any() and full_dual_norm(zero, norm, scaling) == 0


def test_a_dual_norm_is_the_sum_of_its_parts():
    difference = normal(12)
    for norm in ("sign", "vector"):
        parts = [rule.partial_dual_norm(part, norm, torch.float64) for part in difference.split(5)]
        torch.testing.assert_close(sum(parts), rule.partial_dual_norm(difference, norm, torch.float64))


@pytest.mark.parametrize("fraction", [0.5, 0.25, 2 / 3])
def test_noise_scale_gives_the_halves_the_variance_of_two_gradients(fraction):
    """12 samples of variance 1: a part of them has variance 1 / (12 w), the whole 1 / 12."""
    samples = normal(20000, 12)
    first = samples[:, : round(12 * fraction)].sum(1) / 12  # h = w * g_a
    difference = first - fraction * samples.mean(1)
    assert (rule.noise_scale("halves", fraction) * difference).var().item() == pytest.approx(2 / 12, rel=0.03)
    assert rule.noise_scale("previous") == 1.0


def test_estimates_and_factors():
    noise = torch.tensor([1.0, 16.0, 81.0], dtype=torch.float64)
    new = rule.noise_estimate(noise, torch.tensor([2.0, 0.0, 10.0], dtype=torch.float64), 0.9)
    torch.testing.assert_close(new, torch.tensor([1.3, 14.4, 82.9], dtype=torch.float64))
    everywhere = torch.ones(3, dtype=torch.bool)
    for alpha, expected in ((1e-9, [1, 1 / 2, 1 / 3]), (1e9, [1, 1, 1]), (1e-300, [1, 1 / 2, 1 / 3])):
        factors = rule.factors(rule.inverse_rates(noise, alpha), everywhere)
        torch.testing.assert_close(factors, torch.tensor(expected, dtype=torch.float64))
    rates = 2.0 / (4.0 + noise).sqrt()
    torch.testing.assert_close(1 / rule.inverse_rates(noise, 2.0), rates)
    torch.testing.assert_close(rule.factors(1 / rates, everywhere), (rates / rates.max()).sqrt())
    some = torch.tensor([False, True, True])
    torch.testing.assert_close(
        rule.factors(rule.inverse_rates(noise, 1e-9), some), torch.tensor([1.0, 1.0, 2 / 3], dtype=torch.float64)
    )
    assert rule.automatic_alpha(torch.tensor([4.0, math.nan, 1.0, 9.0])) == 2.0
    assert rule.automatic_alpha(torch.zeros(2)) > 0
    noise = torch.tensor([16.0, 1.0, 1.0, math.nan, 1.0, 9.0], dtype=torch.float64)
    weights = torch.tensor([1, 1 / 3, 1 / 3, 1, 1 / 3, 1], dtype=torch.float64)
    assert rule.automatic_alpha(noise, weights) == 3.0
    for count in (1, 2, 5, 6):
        values = torch.rand(count, dtype=torch.float64)
        assert rule.automatic_alpha(values, torch.full((count,), 1 / 3)) == rule.automatic_alpha(values)
    assert rule.automatic_alpha(torch.full((2,), math.nan), torch.ones(2)).isnan()


def test_update():
    params = [normal(4, 6), normal(2, 3, 5)]
    directions = [normal(4, 6, seed=1), normal(2, 3, 5, seed=1)]
    scales = [torch.tensor([0.5]), torch.tensor([2.0, 3.0])]
    expected = [
        p * (1 - 0.1 * 0.3) - 0.1 * s.view(-1, 1, 1) * o for p, s, o in zip(params, scales, directions, strict=True)
    ]
    rule.update(params, directions, scales, 0.1, 0.3)
    torch.testing.assert_close(params, [expected[0].view(4, 6), expected[1]])
    before = [p.clone() for p in params]
    flags = rule.update(params, directions, scales, 0.1, skipped=[torch.tensor(True), torch.tensor(False)])
    assert flags.tolist() == [1, 0] and torch.equal(params[0], before[0]) and not torch.equal(params[1], before[1])


def test_the_lines_together_are_the_rule():
    """Layers of all norms over five steps, in float64."""
    norms = ["rms", "rms", "sign", "sign", "vector", "vector"]
    params = [normal(*SHAPES[norm], seed=i) for i, norm in enumerate(norms)]
    formula = Formula([p.clone() for p in params], norms, lr=0.1, alpha=0.5, weight_decay=0.2)
    momenta, noise = [torch.zeros_like(p) for p in params], torch.zeros(len(params), dtype=torch.float64)
    previous = None
    for step in range(5):
        gradients = [normal(*p.shape, seed=100 * step + i) * 2.0**i for i, p in enumerate(params)]
        momenta = [rule.momentum(b, g, 0.95) for b, g in zip(momenta, gradients, strict=True)]
        measured = torch.full((len(params),), previous is not None)
        if previous is not None:
            differences = [g - h for g, h in zip(gradients, previous, strict=True)]
            duals = torch.stack([full_dual_norm(d, norm) for d, norm in zip(differences, norms, strict=True)])
            noise = rule.noise_estimate(noise, duals, 0.9)
        previous = gradients
        inverse = rule.inverse_rates(noise, 0.5)
        factors = torch.cat([rule.factors(inverse[i : i + 2], measured[i : i + 2]) for i in (0, 2, 4)])
        for param, momentum, norm, factor in zip(params, momenta, norms, factors.split(1), strict=True):
            matrix, o = param.view(-1, param.shape[-1]), full_direction(momentum, norm)
            rule.update([matrix], [o.view_as(matrix)], [factor], 0.1, 0.2)
        formula.step(gradients)
        torch.testing.assert_close(params, formula.params, rtol=0, atol=1e-9)
    assert len({round(f, 3) for f in formula.factors}) > 3
