"""scaled_step against its formula in fp64, on every backend that a CPU has."""

import pytest
import torch
from kernel_cases import rounding_states

from leanstep.kernels import StepOptions, scaled_step, use_backend
from leanstep.kernels.reference.rounding import widen

BACKENDS = ["reference", "cpp"]
SHAPES = [(1, 1), (5, 7), (6, 128), (33, 192), (3, 4, 6), (2, 5, 128), (0, 3), (4, 0), (2, 0, 3), (0, 4, 3), (2, 3, 0)]


def arguments(shape, dtype=torch.float32, mat_dtype=None, seed=0):
    chance = torch.Generator().manual_seed(seed)
    p = torch.randn(shape, generator=chance).to(dtype)
    g = torch.randn(shape, generator=chance).to(mat_dtype or dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = torch.rand(shape[:-1], generator=chance).to(wide)
    cols = torch.rand((*shape[:-2], shape[-1]), generator=chance).to(wide)
    return p, g, rows, cols


def scalars(dtype=torch.float32):
    return torch.tensor([0.125, 0.75], dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def step_options(dtype=torch.float32, **settings):
    return StepOptions(scalars(dtype), **settings)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_formula(backend, shape, dtype, dirty_memory):
    if backend == "cpp" and dtype in (torch.float16, torch.float64):
        backend = "auto"  # which takes another one
    p, g, rows, cols = arguments(shape, dtype)
    old, untouched = p.double().clone(), [t.clone() for t in (g, rows, cols)]
    with use_backend(backend):
        flags = scaled_step([p], [g], [rows], [cols], [], step_options(dtype))
    assert flags.dtype == torch.int32 and flags.tolist() == [0]
    want = old * 0.75 - 0.125 * (rows.double().unsqueeze(-1) * g.double() * cols.double().unsqueeze(-2))
    # one rounding of the storage dtype, and a few of the arithmetic
    bound = torch.finfo(dtype).eps * want.abs() + 4 * torch.finfo(rows.dtype).eps * (want.abs() + 1)
    assert ((p.double() - want).abs() <= bound).all()
    for tensor, before in zip((g, rows, cols), untouched, strict=True):
        assert torch.equal(tensor, before)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan", "master", "split"])
def test_backends_agree(rounding):
    """To the last bit of the storage dtype, for every way of rounding, in one list of several shapes."""
    results = []
    for backend in BACKENDS:
        rows = [arguments(s, torch.bfloat16, torch.float32, i) for i, s in enumerate([(6, 128), (5, 7), (2, 3, 128)])]
        params, mats, r, c = (list(x) for x in zip(*rows, strict=True))
        states = rounding_states(params, rounding)
        seeds = torch.tensor([5, 6, 7]) if rounding == "stochastic" else None
        with use_backend(backend):
            scaled_step(params, mats, r, c, states, step_options(rounding=rounding, seeds=seeds))
        if states:
            params = [widen(p, e, rounding) for p, e in zip(params, states, strict=True)]
        results.append(params)
    for a, *others in zip(*results, strict=True):
        for b in others:
            if rounding in ("nearest", "stochastic"):
                assert (a != b).float().mean() < 0.01  # products in another order can cross a tie
                torch.testing.assert_close(a, b, rtol=2**-7, atol=0)
            else:
                torch.testing.assert_close(a, b, rtol=2**-15, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(6, 128), (2, 5, 7)], ids=str)
def test_decay_where_update_and_value_agree_in_sign(backend, dtype, shape):
    """Chen et al., arXiv 2510.12402: p - step * (u + weight_decay * [u p >= 0] p). A product of 0 decays."""
    p, g, rows, cols = arguments(shape, dtype)
    g.view(-1)[3] = p.view(-1)[5] = 0.0
    old = p.double().clone()
    u = rows.double().unsqueeze(-1) * g.double() * cols.double().unsqueeze(-2)
    with use_backend(backend if dtype != torch.float64 else "auto"):
        scaled_step([p], [g], [rows], [cols], [], step_options(dtype, decay_where_aligned=True))
    want = old - 0.25 * (u * old >= 0) * old - 0.125 * u
    bound = torch.finfo(dtype).eps * want.abs() + 4 * torch.finfo(rows.dtype).eps * (want.abs() + 1)
    assert ((p.double() - want).abs() <= bound).all()
    assert 0 < (u * old < 0).double().mean() < 1 and p.view(-1)[3] == (old.view(-1)[3] * 0.75).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(6, 128), (5, 7)])
def test_a_nan_column_leaves_the_matrix_alone(backend, shape):
    bad, good = arguments(shape), arguments(shape, seed=1)
    bad[3].fill_(float("nan"))
    before, extra = bad[0].clone(), bad[0].clone()
    with use_backend(backend):
        params, mats, rows, cols = ([a, b] for a, b in zip(bad, good, strict=True))
        flags = scaled_step(params, mats, rows, cols, [extra, good[0].clone()], step_options(rounding="master"))
        assert flags.tolist() == [1, 0]
        assert torch.equal(bad[0], before) and torch.equal(extra, before)
        scaled_step(params, mats, rows, cols, [], step_options(skip_nonfinite=False))
    assert bad[0].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_bad_matrix_of_a_stack(backend):
    p, g, rows, cols = arguments((3, 4, 128))
    cols[1] = float("nan")
    before = p.clone()
    with use_backend(backend):
        assert scaled_step([p], [g], [rows], [cols], [], step_options()).tolist() == [1]
    assert torch.equal(p[1], before[1])
    assert (p[[0, 2]] != before[[0, 2]]).all()
