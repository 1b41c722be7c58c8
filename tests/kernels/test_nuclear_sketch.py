"""nuclear_norm(estimator="sketch") against singular values in fp64, and the law by which it extrapolates."""

import math

import pytest
import torch

from leanstep.kernels import nuclear_norm
from leanstep.kernels.reference.matrices import nuclear_sketch


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_values(values, columns):
    left = torch.linalg.qr(normal(len(values), len(values)))[0]
    return left * values @ torch.linalg.qr(normal(columns, len(values), seed=1))[0].mT


def spectra(rows, columns):
    k = torch.arange(1, rows + 1, dtype=torch.float64)
    kinds = {"k^-0.5": k**-0.5, "1/k": 1 / k, "exp(-k/50)": torch.exp(-k / 50), "equal": torch.ones_like(k)}
    mats = {name: with_values(values, columns) for name, values in kinds.items()}
    return mats | {"gaussian": normal(rows, columns), "rank 8": normal(rows, 8) @ normal(8, columns, seed=1)}


def sketched(*mats):
    return nuclear_norm(list(mats), estimator="sketch").double()


def relative_error(mat, dtype=torch.float64):
    return float(sketched(mat.to(dtype))[0] / torch.linalg.svdvals(mat).sum() - 1)


@pytest.mark.parametrize("shape", [(1, 1), (7, 40), (256, 300), (300, 100)], ids=str)
def test_up_to_256_rows_it_is_exact(shape):
    mat = normal(*shape)
    assert abs(relative_error(mat)) < 1e-9
    assert abs(relative_error(mat, torch.float32)) < 1e-3


@pytest.mark.parametrize("shape", [(320, 320), (321, 500)], ids=str)
def test_above_it_is_within_3_percent(shape):
    for name, mat in spectra(*shape).items():
        errors = [relative_error(mat), relative_error(mat, torch.float32), relative_error(mat.mT.contiguous())]
        assert max(map(abs, errors)) < 0.03, (name, errors)
        assert abs(errors[0] - errors[1]) < 5e-3, name


def test_a_sketch_has_the_effective_dimension_at_another_ridge():
    """d(r) = d_S(t) at r = t (m - d) / (k - d): exactly for equal singular values, closely for others."""
    for name, mat in spectra(400, 600).items():
        values = torch.linalg.svdvals(mat).square()
        half = torch.linalg.eigvalsh(nuclear_sketch.gram(mat.unsqueeze(0)))[0]
        assert len(half) == 200
        for ridge in (1e-3, 1e-2, 0.1, 1.0):
            t = ridge * half[-1]
            d = (half / (half + t)).sum()
            r = t * (400 - d) / (200 - d)
            assert (values / (values + r)).sum() / d == pytest.approx(1.0, rel=1e-9 if name == "equal" else 0.05), name


def test_lists_give_the_bits_of_single_matrices():
    mats = [normal(280, 300, seed=i).float() for i in range(3)] + [normal(5, 9).float(), normal(300, 280).float()]
    assert torch.equal(sketched(*mats), torch.cat([sketched(mat) for mat in mats]))
    torch.testing.assert_close(sketched(torch.stack(mats[:3])), sketched(*mats[:3]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(6, 9), (270, 300)], ids=str)
def test_any_size_and_non_finite_entries(shape):
    mat = normal(*shape).float()
    for factor in (1e-30, 1e-15, 1e15, 1e30):
        torch.testing.assert_close(sketched(mat * factor) / factor, sketched(mat), rtol=1e-3, atol=0)
    assert sketched(torch.zeros(shape)).item() == 0
    for value in (math.nan, math.inf):
        bad = mat.clone()
        bad[2, 3] = value
        norms = sketched(bad, mat)
        assert norms[0].isnan() and norms[1].isfinite()


def test_auto_is_the_sketch_on_a_cpu():
    mat = normal(270, 300).float()
    assert torch.equal(nuclear_norm([mat], estimator="auto"), nuclear_norm([mat], estimator="sketch"))
