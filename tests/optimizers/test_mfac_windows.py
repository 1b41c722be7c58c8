"""The forms of M-FAC's window: rounded, sparse and low-rank rows."""

import copy
import math

import pytest
import torch
from dense_fisher import (
    DenseFisher,
    flatten,
    moved,
    new_params,
    newest_preconditioned,
    relative,
    set_grads,
    slow_rows,
    step_and_compare,
    stored_rows,
)

from leanstep.kernels import use_backend
from leanstep.optimizers import MFAC

SHAPES = ((6, 20), (5,), (3, 4, 2, 2), (2, 3, 10))
LR = 0.1


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e6])
def test_rounded_rows_give_the_inverse_of_their_own_matrix(size):
    """Exact for the rounded rows, near for the gradients, whatever their size."""
    params = new_params(SHAPES, torch.float32)
    damping = 1e-6 * size**2
    optimizer = MFAC(params, lr=LR * size, window=4, damping=damping, storage="bf16")
    dense, rounded = DenseFisher(4, damping), DenseFisher(4, damping)
    for step in range(7):
        gradient = set_grads(params, step, size)
        before = flatten(params)
        optimizer.step()
        found = moved(params, before, LR * size)
        states = [optimizer.state[p] for p in params]
        row = flatten([s["window"][step % 4] for s in states])
        assert relative(row, gradient) < 1e-2
        # parameters in fp32 show an update of this size to three or four digits
        assert relative(found, rounded.update(row)) < 1e-3
        assert relative(found, dense.update(gradient)) < 2e-2
    assert {s["window"].dtype for s in states} == {torch.bfloat16}


def test_fp64_parameters_have_fp64_windows_unless_told_otherwise():
    params = new_params(SHAPES)
    for storage, dtype in ((None, torch.float64), ("fp32", torch.float32), ("fp64", torch.float64)):
        optimizer = MFAC(params, lr=LR, window=2, storage=storage)
        set_grads(params, 0)
        optimizer.step()
        assert optimizer.state[params[0]]["window"].dtype == dtype


# ---- gradients that change slowly

FORMS = {
    "dense": {},
    "bf16": {"storage": "bf16"},
    "sparse": {"compression": "topk", "density": 0.3, "storage": "fp32"},
    "sparse bf16": {"compression": "topk", "density": 0.3},
    "blocks": {"scope": 50},
    "layers": {"scope": "layer"},
}


def worst_error(options, gradient_of, steps, window, damping, shapes, backend):
    """Largest relative error of an update, beside the float64 inverse of the rows that the window holds."""
    params = [torch.zeros(s, requires_grad=True) for s in shapes]
    optimizer = MFAC(params, lr=1.0, window=window, damping=damping, shrinkage=0.0, **options)
    weights, worst = torch.zeros(sum(p.numel() for p in params), dtype=torch.float64), 0.0
    sizes = [weights.numel()]
    if "scope" in options:  # an int cuts every parameter into blocks
        limit = options["scope"] if options["scope"] != "layer" else weights.numel()
        sizes = [min(limit, p.numel() - start) for p in params for start in range(0, p.numel(), limit)]
    for step in range(steps):
        gradients = gradient_of(step, weights).float().split([p.numel() for p in params])
        with torch.no_grad():
            for param, gradient in zip(params, gradients, strict=True):
                param.zero_()  # fp32 weights show the whole update then
                param.grad = gradient.view(param.shape).clone()
        with use_backend(backend):
            optimizer.step()
        update = -flatten(params)
        weights += update * -1.0
        rows = stored_rows(optimizer, params)[: step + 1]
        exact = [newest_preconditioned(r, damping, window, step % window) for r in rows.split(sizes, dim=1)]
        worst = max(worst, relative(update, torch.cat(exact)))
    assert optimizer.diagnostics()["jittered"] == optimizer.diagnostics()["eigen"] == 0
    return worst


def least_squares(step, weights):
    """The full-batch gradient of least squares on twenty examples: the same examples at every step."""
    chance = torch.Generator().manual_seed(2)
    data = torch.randn(20, weights.numel(), generator=chance, dtype=torch.float64)
    target = torch.randn(20, generator=chance, dtype=torch.float64)
    return data.T @ (data @ weights - target) / 20


def slow(step, weights):
    return slow_rows(24, weights.numel(), 1e-3)[step]


def slow_and_compressible(step, weights):
    """A matrix (12, 20) of rank 2 with six columns that are not zero, and a vector: compression loses nothing of it."""
    gradient = slow(step, weights).double()
    chance = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(n, 2, generator=chance, dtype=torch.float64)).Q for n in (12, 6))
    matrix = gradient[:240].view(12, 20)
    matrix[:, :6] = left @ (left.T @ matrix[:, :6] @ right) @ right.T
    matrix[:, 6:] = 0.0
    return gradient


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("gradient_of", [least_squares, slow])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_that_change_slowly(form, gradient_of, backend):
    """fp32 sums lose the differences of the rows: least squares at the default damping was wrong by 100 %."""
    damping = 1e-5 if gradient_of is least_squares else 1e-7
    if gradient_of is slow and "compression" in FORMS[form]:
        gradient_of = slow_and_compressible
    error = worst_error(FORMS[form], gradient_of, 24, 24, damping, ((12, 20), (15,)), backend)
    assert error < 1e-5


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize("form", ["dense", "sparse", "blocks"])
def test_gradients_that_change_slowly_in_triton(form):
    gradient_of = slow_and_compressible if "compression" in FORMS[form] else slow
    assert worst_error(FORMS[form], gradient_of, 8, 8, 1e-7, ((12, 20), (15,)), "triton") < 1e-5


# ---- sparse rows


def literal_top_k(total, density):
    """The largest entries of every row of a matrix (of every filter of a convolution, a vector whole)."""
    if total.dim() < 2:
        return total.clone()
    rows = total.flatten(0, -2) if total.dim() < 4 else total.flatten(1)
    kept = torch.zeros_like(rows)
    count = math.ceil(round(density * rows.shape[1], 9))
    for row, out in zip(rows, kept, strict=True):
        order = sorted(range(len(row)), key=lambda i: (-abs(float(row[i])), i))[:count]
        out[order] = row[order]
    return kept.view_as(total)


@pytest.mark.parametrize("density", [0.05, 0.3])
def test_sparse_rows_with_error_feedback(density):
    """c = TopK(e + g), e += g - c, u = F_c^-1 c, literally; and nothing is lost."""
    params = new_params(SHAPES)
    optimizer = MFAC(
        params, lr=LR, window=4, damping=0.1, compression="topk", density=density, storage="fp64"
    )  # fmt: skip
    dense = DenseFisher(4, 0.1)
    errors = [torch.zeros_like(p.detach()) for p in params]
    sums = [torch.zeros_like(p.detach()) for p in params]
    for step in range(10):
        set_grads(params, step)
        row = []
        for i, param in enumerate(params):
            total = errors[i] + param.grad
            kept = literal_top_k(total, density)
            errors[i] = total - kept
            sums[i] += kept
            row.append(kept)
        assert step_and_compare(optimizer, params, dense.update(flatten(row)), LR) < 1e-11
        for param, error in zip(params, errors, strict=True):
            if param.dim() > 1:
                torch.testing.assert_close(optimizer.state[param]["error"], error, rtol=0, atol=1e-12)
    total = [sum(new_grads(params, i, s) for s in range(10)) for i in range(len(params))]
    for i, whole in enumerate(total):
        torch.testing.assert_close(sums[i] + errors[i], whole, rtol=0, atol=1e-12)


def new_grads(params, which, step):
    """The gradient that ``set_grads`` gives a parameter at a step."""
    twins = [p.detach().clone().requires_grad_() for p in params]
    set_grads(twins, step)
    return twins[which].grad


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"scope": "layer"}])
def test_density_one_is_the_dense_window_bit_for_bit(options):
    sparse, dense = new_params(SHAPES, torch.float32), new_params(SHAPES, torch.float32)
    a = MFAC(sparse, lr=LR, window=3, damping=1e-3, compression="topk", density=1.0, storage="fp32", **options)
    b = MFAC(dense, lr=LR, window=3, damping=1e-3, **options)
    for step in range(7):
        set_grads(sparse, step)
        set_grads(dense, step)
        a.step()
        b.step()
        assert all(torch.equal(p, q) for p, q in zip(sparse, dense, strict=True))


def test_of_equal_entries_the_first_are_kept():
    param = torch.zeros(2, 10, requires_grad=True)
    optimizer = MFAC([param], lr=LR, window=2, damping=0.1, compression="topk", density=0.3)
    param.grad = torch.tensor([[1.0] * 10, [-2.0, 2.0] * 5])
    optimizer.step()
    assert optimizer.state[param]["window_indices"][0].view(torch.int16).tolist() == [[0, 1, 2], [0, 1, 2]]


def test_bf16_values_feed_their_rounding_back():
    params = new_params(((6, 20),), torch.float32)
    optimizer = MFAC(params, lr=LR, window=4, damping=0.1, compression="topk", density=0.2)
    total = torch.zeros(6, 20, dtype=torch.float64)
    kept = torch.zeros(6, 20, dtype=torch.float64)
    for step in range(12):
        total += set_grads(params, step).view(6, 20)
        optimizer.step()
        state = optimizer.state[params[0]]
        values, places = state["window_values"][step % 4], state["window_indices"].view(torch.int16)[step % 4].long()
        kept.scatter_add_(1, places, values.double())
    assert state["window_values"].dtype == torch.bfloat16
    torch.testing.assert_close(kept + state["error"].double(), total, rtol=0, atol=1e-5)


def test_memory_of_sparse_rows():
    """m rows of k values and places of 2 bytes each, and the error: 1 / 90 of the dense window here."""
    m, k = 64, math.ceil(0.01 * 512)
    params = [torch.zeros(256, 512, requires_grad=True)]
    optimizer = MFAC(params, lr=LR, window=m, damping=0.1, compression="topk", density=0.01)
    params[0].grad = torch.randn(256, 512)
    optimizer.step()
    home = m * m * 8 + 2 * 8 + 6 * 8
    assert optimizer.state_bytes() == m * 256 * k * (2 + 2) + 256 * 512 * 4 + home
    dense = m * 256 * 512 * 4
    assert 20 * optimizer.state_bytes() < dense


def test_rows_longer_than_a_block_of_16_bit_places():
    param = torch.zeros(2, 70_000, requires_grad=True)
    optimizer = MFAC([param], lr=LR, window=2, damping=0.1, shrinkage=0.0, compression="topk", density=0.001)
    dense = DenseFisher(2, 0.1)
    for step in range(3):
        param.grad = torch.zeros(2, 70_000)
        places = torch.arange(0, 70_000, 3500) + step
        param.grad[:, places] = torch.randn(2, len(places)).to(torch.bfloat16).float()
        expected = param.grad[:, places].double()
        dense.insert(torch.cat([expected.flatten(), torch.zeros(0, dtype=torch.float64)]))
        before = param.detach().clone()
        optimizer.step()
        found = (before - param.detach())[:, places] / LR
        # rows of different steps have no place in common, so each is divided by damping + |g|^2 / m
        assert relative(found, expected / (0.1 + expected.square().sum() / 2)) < 1e-5


@pytest.mark.parametrize("index", [-1, 32767])
def test_saved_indices_outside_of_their_rows_are_refused(index):
    weights = [torch.nn.Parameter(torch.randn(40, 30)) for _ in range(2)]
    before, after = (MFAC([w], lr=1e-3, window=4, compression="topk") for w in weights)
    weights[0].grad = torch.randn_like(weights[0])
    before.step()
    saved = copy.deepcopy(before.state_dict())
    after.load_state_dict(saved)
    saved["state"][0]["window_indices"].view(torch.int16).flatten()[3] = index
    current, whole = after.state_dict(), copy.deepcopy(after.state_dict())
    with pytest.raises(ValueError, match=r"MFAC: the saved window of .* has indices outside of its rows"):
        after.load_state_dict(saved)
    assert torch.equal(current["state"][0]["window_indices"], whole["state"][0]["window_indices"])
