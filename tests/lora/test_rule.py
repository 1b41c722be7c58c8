"""The formulas of leanstep.lora.layers.rule, each by itself in float64, against autograd of the plain formula."""

import pytest
import torch

from leanstep.kernels import lora_dropout
from leanstep.lora.layers import rule

M, N, OUT, R, SCALE = 7, 5, 6, 3, 1.7


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (M, N), "w": (OUT, N), "bias": (OUT,), "a": (R, N), "b": (OUT, R), "dy": (M, OUT)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(name != "dy")
        for name, shape in shapes.items()
    }


def detached(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def masked(x, p, seed):
    """X' by the definition: x times the mask that dropout has for this seed."""
    return x * lora_dropout(torch.ones_like(x), p, seed) if p else x


DROPOUT = [(0.0, None), (0.4, torch.tensor(3))]


@pytest.mark.parametrize(("p", "seed"), DROPOUT)
def test_plain_lora(tensors, p, seed):
    x, w, bias, a, b, dy = tensors.values()
    dropped = masked(x, p, seed)
    wanted = x @ w.t() + bias + SCALE * dropped @ a.t() @ b.t()
    of_x, of_a, of_b = torch.autograd.grad(wanted, (x, a, b), dy)
    x, w, bias, a, b, dy = detached(tensors).values()
    h = rule.hidden(x, a, p, seed)
    torch.testing.assert_close(h, dropped.detach() @ a.t())
    torch.testing.assert_close(rule.output(x, w, bias, h, b, SCALE), wanted.detach())
    e = rule.gradient_of_hidden(dy, b)
    torch.testing.assert_close(e, dy @ b)
    for again in (None, a):
        da, recomputed = rule.gradient_of_a(x, e, SCALE, torch.float64, p, seed, again)
        torch.testing.assert_close(da, of_a)
    torch.testing.assert_close(recomputed, h)
    torch.testing.assert_close(rule.gradient_of_b(dy, h, SCALE, torch.float64), of_b)
    torch.testing.assert_close(rule.gradient_of_input(dy, w, e, a, SCALE, p, seed), of_x)
    before = torch.ones_like(x)
    torch.testing.assert_close(rule.gradient_of_input(dy, w, e, a, SCALE, p, seed, before), of_x + 1)


def test_the_materialised_sum_stands_for_both_parts(tensors):
    x, w, bias, a, b, dy = detached(tensors).values()
    total = rule.materialized_sum(w, a, b, SCALE)
    torch.testing.assert_close(total, w + SCALE * b @ a)
    torch.testing.assert_close(x @ total.t() + bias, rule.output(x, w, bias, rule.hidden(x, a), b, SCALE))


@pytest.mark.parametrize("b_bias", [False, True])
@pytest.mark.parametrize(("p", "seed"), DROPOUT)
def test_dora(tensors, p, seed, b_bias):
    x, w, bias, a, b, dy = tensors.values()
    norm = (w + SCALE * b @ a).norm(dim=1).detach()
    magnitude = (norm * 1.3).requires_grad_()
    shift = torch.arange(OUT, dtype=torch.float64) if b_bias else torch.zeros(OUT, dtype=torch.float64)
    dropped = masked(x, p, seed)
    z = dropped @ w.t() + SCALE * (dropped @ a.t() @ b.t() + shift)
    wanted = (x - dropped) @ w.t() + bias + magnitude / norm * z
    of_x, of_a, of_b, of_magnitude = torch.autograd.grad(wanted, (x, a, b, magnitude), dy)
    x, w, bias, a, b, dy = detached(tensors).values()
    dropped, magnitude = dropped.detach(), magnitude.detach()
    c, h = rule.dora_factor(magnitude, norm), rule.hidden(x, a, p, seed)
    base = dropped @ w.t()
    rest = bias if p == 0 else rule.dora_rest(x, w, bias, base)
    found = rule.dora_product(base, h, b, SCALE, shift if b_bias else None)
    torch.testing.assert_close(found, z.detach())
    y = rule.dora_output(found, c, rest, keep_z=True)
    torch.testing.assert_close(y, wanted.detach())
    torch.testing.assert_close(found, z.detach())
    dz, sums = rule.gradient_of_product(dy, found, c)
    torch.testing.assert_close(rule.gradient_of_magnitude(sums, norm, norm), of_magnitude)
    e = rule.gradient_of_hidden(dz, b)
    torch.testing.assert_close(rule.gradient_of_a(x, e, SCALE, torch.float64, p, seed)[0], of_a)
    torch.testing.assert_close(rule.gradient_of_b(dz, h, SCALE, torch.float64), of_b)
    through = (dz, None) if p == 0 else (dy, dz - dy)
    dx = rule.gradient_of_input(through[0], w, e, a, SCALE, p, seed, masked_dy=through[1])
    torch.testing.assert_close(dx, of_x)


def test_the_magnitudes_gradient_from_the_output(tensors):
    dy = tensors["dy"]
    z = torch.randn(M, OUT, dtype=torch.float64)
    norm, magnitude = torch.rand(OUT, dtype=torch.float64) + 1, torch.rand(OUT, dtype=torch.float64) + 1
    norm[1], magnitude[2] = 0, 0
    c = rule.dora_factor(magnitude, norm)
    assert c[1] == 1 and c[2] == 0
    _, sums = rule.gradient_of_product(dy, c * z, c)
    wanted = (dy * z).sum(0) / norm
    wanted[1] = wanted[2] = 0
    torch.testing.assert_close(rule.gradient_of_magnitude(sums, magnitude, norm), wanted)
