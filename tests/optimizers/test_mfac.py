"""M-FAC against the dense inverse in float64, and what its options promise."""

import pytest
import torch
from dense_fisher import DenseFisher, flatten, moved, new_params, relative, set_grads, step_and_compare

from leanstep.optimizers import MFAC

SHAPES = ((4, 3), (5,), (), (2, 2, 3))
LR = 0.1


@pytest.mark.parametrize("shrinkage", [0.0, 1.0])
@pytest.mark.parametrize("scaling", ["window", "count"])
@pytest.mark.parametrize("damping", [1.0, 1e-2, 1e-6])
@pytest.mark.parametrize("window", [1, 4])
def test_every_step_is_the_dense_inverse_of_the_last_gradients(scaling, damping, window, shrinkage):
    """While the window fills, and while it turns over three times."""
    params = new_params(SHAPES)
    optimizer = MFAC(params, lr=LR, window=window, damping=damping, scaling=scaling, shrinkage=shrinkage)
    dense = DenseFisher(window, damping, scaling, shrinkage)
    for step in range(3 * window + 2):
        expected = dense.update(set_grads(params, step))
        # the solver of the dense matrix loses condition * eps, with a condition of about |g|^2 / damping
        assert step_and_compare(optimizer, params, expected, LR) < 1e-12 + 1e-14 * 100 / damping


def test_one_gradient_and_orthogonal_ones():
    """F^-1 g = g / (damping + |g|^2 / m), whatever else is in the window, if it is orthogonal."""
    params = new_params(((6,),))
    optimizer = MFAC(params, lr=LR, window=6, damping=0.1, shrinkage=0.0)
    for i in range(6):
        params[0].grad = torch.zeros(6, dtype=torch.float64)
        params[0].grad[i] = 2.0 + i
        expected = params[0].grad / (0.1 + (2.0 + i) ** 2 / 6)
        assert step_and_compare(optimizer, params, expected, LR) < 1e-13


@pytest.mark.slow
def test_the_gram_matrix_stays_that_of_the_rows():
    params = new_params(((3, 2), (4,)))
    optimizer = MFAC(params, lr=1e-4, window=5, damping=1e-2)
    chance = torch.Generator().manual_seed(0)
    for _ in range(300):
        for param in params:
            param.grad = torch.randn(param.shape, generator=chance, dtype=torch.float64)
        optimizer.step()
    rows = torch.cat([optimizer.state[p]["window"].flatten(1) for p in params], dim=1)
    gram = optimizer.state[params[0]]["gram"][0]
    # an error of a rounding a step would add up to more
    assert (gram - rows @ rows.T).norm() <= 2e-15 * gram.norm()
    assert torch.equal(gram, gram.T)
    assert optimizer.state[params[0]]["counters"].tolist() == [300, 300]


def test_order_of_rows_does_not_matter():
    """A window that was filled in another order, ending with the same gradient, gives the same update."""
    updates = []
    for order in ((0, 1, 2, 3), (2, 0, 1, 3), (7, 8, 1, 2, 0, 3)):
        params = new_params(SHAPES)
        optimizer = MFAC(params, lr=LR, window=4, damping=1e-3)
        for number in order:
            set_grads(params, number)
            before = flatten(params)
            optimizer.step()
        updates.append(moved(params, before, LR))
    for other in updates[1:]:
        assert relative(other, updates[0]) < 1e-9


def test_large_damping_is_gradient_descent():
    params, plain = new_params(SHAPES), new_params(SHAPES)
    damping = 1e12
    optimizer = MFAC(params, lr=LR * damping, window=4, damping=damping)
    descent = torch.optim.SGD(plain, lr=LR)
    for step in range(6):
        set_grads(params, step)
        set_grads(plain, step)
        optimizer.step()
        descent.step()
    torch.testing.assert_close(flatten(params), flatten(plain), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("damping", "size"), [(1e-4, 1.0), (1e-6, 30.0), (1e-8, 1.0), (1e-8, 30.0)])
def test_small_damping_in_single_precision(damping, size):
    """Where the subtractive form of the inverse is lost in rounding (shown), the combination of rows is not."""
    d, m = 2000, 16
    chance = torch.Generator().manual_seed(3)
    rows = torch.randn(m, d, generator=chance) + 2.0 * torch.randn(d, generator=chance)
    rows = size * rows / rows.norm(dim=1, keepdim=True)
    param = torch.zeros(d, requires_grad=True)
    optimizer = MFAC([param], lr=1.0, window=m, damping=damping, shrinkage=0.0)
    for row in rows:
        param.grad = row.clone()
        before = param.detach().clone()
        with torch.no_grad():
            before = param.zero_().clone()
        optimizer.step()
    wide = rows.double()
    gram = wide @ wide.T
    target = torch.zeros(m, dtype=torch.float64)
    target[-1] = 1.0
    expected = wide.T @ torch.linalg.solve(damping * torch.eye(m, dtype=torch.float64) + gram / m, target)
    assert relative(before - param.detach(), expected) < 1e-4
    inner = torch.linalg.solve(m * torch.eye(m) + rows @ rows.T / damping, rows @ rows[-1])
    naive = rows[-1] / damping - rows.T @ inner / damping**2
    if damping * m < 1e-4 * size**2:
        assert relative(naive, expected) > 0.01


def test_momentum_of_updates():
    params = new_params(SHAPES)
    optimizer = MFAC(params, lr=LR, window=3, damping=0.1, momentum=0.8)
    dense, average = DenseFisher(3, 0.1), 0.0
    for step in range(5):
        average = 0.8 * average + 0.2 * dense.update(set_grads(params, step))
        assert step_and_compare(optimizer, params, average, LR) < 1e-11
    assert optimizer.state[params[0]]["momentum_buffer"].shape == params[0].shape


def test_decoupled_decay_stays_out_of_the_window_and_coupled_decay_enters_it():
    for decay in ("decoupled", "coupled"):
        params = new_params(SHAPES)
        optimizer = MFAC(params, lr=LR, window=3, damping=0.1, weight_decay=0.5, decay=decay)
        dense = DenseFisher(3, 0.1)
        for step in range(5):
            gradient, weights = set_grads(params, step), flatten(params)
            if decay == "coupled":
                expected = dense.update(gradient + 0.5 * weights)
            else:
                expected = dense.update(gradient) + 0.5 * weights
            assert step_and_compare(optimizer, params, expected, LR) < 1e-11


def test_layers_blocks_and_groups_are_windows_of_their_own():
    named = [("a.weight", (4, 3)), ("a.bias", (4,)), ("b.weight", (2, 5)), ("c", (3,))]
    for scope, sets in (("layer", ([0, 1], [2], [3])), ("group", ([0, 1], [2, 3])), ("model", ([0, 1, 2, 3],))):
        params = new_params(tuple(shape for _, shape in named))
        pairs = [(name, p) for (name, _), p in zip(named, params, strict=True)]
        groups = [{"params": pairs[:2]}, {"params": pairs[2:], "lr": LR / 2}]
        optimizer = MFAC(groups, lr=LR, window=3, damping=0.1, scope=scope)
        dense = [DenseFisher(3, 0.1) for _ in sets]
        for step in range(5):
            set_grads(params, step)
            before = [p.detach().clone() for p in params]
            optimizer.step()
            for fisher, members in zip(dense, sets, strict=True):
                expected = fisher.update(flatten([params[i].grad for i in members]))
                rates = [LR if i < 2 else LR / 2 for i in members]
                found = flatten([(before[i] - params[i].detach()) / r for i, r in zip(members, rates, strict=True)])
                assert relative(found, expected) < 1e-11
        assert sum("gram" in state for state in optimizer.state.values()) == len(sets)


@pytest.mark.parametrize("block", [1, 5, 12, 100])
def test_blocks_invert_a_block_diagonal_matrix(block):
    params = new_params(((4, 3), (5,)))
    optimizer = MFAC(params, lr=LR, window=3, damping=0.1, scope=block)
    sizes = [min(block, p.numel() - start) for p in params for start in range(0, p.numel(), block)]
    dense = [DenseFisher(3, 0.1) for _ in sizes]
    for step in range(5):
        parts = set_grads(params, step).split(sizes)
        expected = torch.cat([fisher.update(part) for fisher, part in zip(dense, parts, strict=True)])
        assert step_and_compare(optimizer, params, expected, LR) < 1e-11


def test_a_missing_gradient_is_a_row_of_zeros_and_its_parameter_stays():
    params = new_params(((4,), (3,), (2,)))
    optimizer = MFAC(params, lr=LR, window=3, damping=0.1, shrinkage=0.0)
    dense = DenseFisher(3, 0.1, shrinkage=0.0)
    for step in range(7):
        set_grads(params, step)
        missing = step % 3  # the third parameter first takes part at the second step
        if step == 0:
            params[2].grad = None
        params[missing].grad = None
        row = flatten([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
        expected = dense.update(row)
        stays = flatten([torch.full_like(p, float(p.grad is None)) for p in params]) > 0
        before = flatten(params)
        optimizer.step()
        assert torch.equal(flatten(params)[stays], before[stays])
        assert relative(moved(params, before, LR)[~stays], expected[~stays]) < 1e-11


def test_parameters_added_later_join_with_rows_of_zeros():
    params = new_params(((4,), (3,)))
    optimizer = MFAC(params[:1], lr=LR, window=4, damping=0.1, shrinkage=0.0)
    dense = DenseFisher(4, 0.1, shrinkage=0.0)
    for step in range(6):
        if step == 2:
            optimizer.add_param_group({"params": [params[1]]})
        row = set_grads(params, step)
        if step < 2:
            row[4:] = 0.0
        expected, before = dense.update(row), flatten(params)
        optimizer.step()
        assert relative(moved(params, before, LR), expected) < 1e-11


def test_zeros_stay_zero_and_out_of_the_window():
    params = new_params(((4, 3), (5,)))
    with torch.no_grad():
        params[0][:, 1] = 0.0
        params[1][2] = 0.0
    optimizer = MFAC(params, lr=LR, window=3, damping=0.1, weight_decay=0.1, sparse=True)
    kept = flatten(params) != 0
    start = flatten(params)
    dense = DenseFisher(3, 0.1)
    for step in range(5):
        expected = 0.1 * flatten(params)
        expected[kept] += dense.update(set_grads(params, step)[kept])
        assert step_and_compare(optimizer, params, expected, LR) < 1e-11
    rows = torch.cat([optimizer.state[p]["window"].flatten(1) for p in params], dim=1)
    assert not rows[:, ~kept].any()
    assert not params[0][:, 1].any()
    assert (flatten(params)[kept] != start[kept]).all()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scope, alone", [("model", "model"), ("layer", "layer"), (8, 2)])
def test_weights_that_remain_step_as_they_do_alone(scope, alone, compiled):
    mask = torch.arange(20) % 4 == 0  # two weights of every eight remain
    whole = new_params(((20,), (2,)))
    parts = [whole[0].detach()[mask].requires_grad_(), whole[1].detach().clone().requires_grad_()]
    with torch.no_grad():
        whole[0][~mask] = 0.0
    options = {"lr": LR, "window": 3, "damping": 1e-6, "scaling": "count"}
    masked = MFAC(whole, scope=scope, sparse=True, **options)
    subset = MFAC(parts, scope=alone, **options)
    step_masked = torch.compile(masked.step, backend="aot_eager") if compiled else masked.step
    for step in range(4):
        set_grads(whole, step)
        parts[0].grad, parts[1].grad = whole[0].grad[mask], whole[1].grad.clone()
        before, before_alone = whole[0].detach().clone(), flatten(parts)
        step_masked()
        subset.step()
        changes = torch.cat([(before - whole[0])[mask], before_alone[5:] - whole[1]]).detach()
        torch.testing.assert_close(changes, before_alone - flatten(parts), rtol=1e-9, atol=1e-12)
        assert torch.equal(before[~mask], whole[0].detach()[~mask])


def test_the_damping_of_a_group_can_change_between_steps():
    params = new_params(SHAPES)
    optimizer = MFAC(params, lr=LR, window=3, damping=1.0)
    dense = DenseFisher(3, 1.0)
    for step in range(6):
        optimizer.param_groups[0]["damping"] = dense.damping = 1.0 + (0.2 - 1.0) * min(step / 4, 1)
        assert step_and_compare(optimizer, params, dense.update(set_grads(params, step)), LR) < 1e-11
        assert optimizer.diagnostics()["damping"] == dense.damping


def test_a_matrix_that_is_not_positive_is_solved_another_way_and_counted():
    """Rounding can leave K with negative eigenvalues; here it is given some."""
    params = new_params(((6,),))
    optimizer = MFAC(params, lr=LR, window=3, damping=1e-6)
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    assert optimizer.diagnostics()["jittered"] == optimizer.diagnostics()["eigen"] == 0
    gram = optimizer.state[params[0]]["gram"]
    gram[0, 1, 1] = -1.0
    set_grads(params, 3)
    optimizer.step()
    assert optimizer.diagnostics()["eigen"] == 1
    assert all(torch.isfinite(p).all() for p in params)
    gram[0] = torch.ones(3, 3, dtype=torch.float64)
    gram[0, 1, 1] = 1.0 - 1e-8
    params[0].grad = torch.full((6,), 6**-0.5, dtype=torch.float64)
    optimizer.param_groups[0]["damping"] = 1e-15
    optimizer.step()
    figures = optimizer.diagnostics()
    assert figures["jittered"] + figures["eigen"] == 2
    assert all(torch.isfinite(p).all() for p in params)


@pytest.mark.parametrize("scope", ["model", "layer", 4])
def test_what_is_not_finite_never_enters_a_window(scope):
    for nonfinite in ("skip", "pass"):
        params = new_params(((4, 3), (5,)), torch.float32)
        optimizer = MFAC(params, lr=LR, window=3, damping=0.1, scope=scope, nonfinite=nonfinite)
        for step in range(2):
            set_grads(params, step)
            optimizer.step()
        windows = [optimizer.state[p]["window"].clone() for p in params]
        set_grads(params, 2)
        params[1].grad[2] = float("inf")
        optimizer.step()
        assert torch.equal(optimizer.state[params[1]]["window"], windows[1])
        assert torch.equal(optimizer.state[params[0]]["window"], windows[0]) == (scope == "model")
        assert torch.isfinite(params[1]).all() == (nonfinite == "skip")
        assert optimizer.nonfinite_count() == optimizer.diagnostics()["nonfinite"] == (nonfinite == "skip")


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-10, 1e10, 1e30, 1e37])
@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_any_finite_gradient_leaves_finite_weights(size, storage):
    params = new_params(((4, 3), (5,)), torch.float32)
    optimizer = MFAC(params, lr=LR, window=3, damping=1e-6, storage=storage)
    for step in range(5):
        set_grads(params, step, size if step == 2 else 1.0)
        optimizer.step()
        assert all(torch.isfinite(p).all() for p in params)
    gram = optimizer.state[params[0]]["gram"]
    assert torch.isfinite(gram).all()


def test_gradients_may_be_accumulated():
    """Two backward passes and one step are one row: their sum."""
    params, twins = new_params(((4, 3),)), new_params(((4, 3),))
    a, b = (MFAC(p, lr=LR, window=3, damping=0.1) for p in (params, twins))
    for step in range(4):
        first = set_grads(params, step).view(4, 3)
        second = set_grads(params, step + 10).view(4, 3)
        params[0].grad = first.clone()
        params[0].grad += second
        twins[0].grad = first + second
        a.step()
        b.step()
    assert torch.equal(params[0], twins[0])
    assert a.state[params[0]]["counters"].tolist() == [4, 4]


@pytest.mark.slow
def test_a_sparse_step_compiled_by_inductor_is_the_eager_one():
    """The window wraps around; the battery compiles dense steps."""
    torch._dynamo.reset()
    eager, compiled = new_params(SHAPES, torch.float32), new_params(SHAPES, torch.float32)
    options = {"compression": "topk", "density": 0.3, "momentum": 0.9}
    a, b = (MFAC(params, lr=LR, window=3, damping=0.1, **options) for params in (eager, compiled))
    step = torch.compile(b.step, backend="inductor")
    for number in range(5):
        set_grads(eager, number)
        set_grads(compiled, number)
        a.step()
        step()
    for p, q in zip(eager, compiled, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)  # inductor rounds the average of updates differently
        torch.testing.assert_close(dict(a.state[p]), dict(b.state[q]), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"momentum": 0.5, "scope": "layer"}, {"compression": "topk"}], ids=str)
def test_a_step_compiled_with_dynamic_shapes_is_the_eager_one(options):
    """Sizes and settings are symbols there; a changed setting is compiled anew."""
    torch._dynamo.reset()
    eager, compiled = new_params(((4, 3), (5,)), torch.float32), new_params(((4, 3), (5,)), torch.float32)
    a, b = (MFAC(params, lr=LR, window=3, damping=0.1, **options) for params in (eager, compiled))
    step = torch.compile(b.step, dynamic=True, fullgraph=True, backend="aot_eager")
    for number in range(5):
        for optimizer in (a, b):
            optimizer.param_groups[0]["damping"] = 0.1 if number < 4 else 0.7
        set_grads(eager, number)
        set_grads(compiled, number)
        a.step()
        step()
        torch.testing.assert_close(eager, compiled, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"storage": "bf16"}, {"compression": "topk", "density": 0.1}])
def test_a_gpu_steps_as_the_cpu_does(options):
    results = []
    for device in ("cpu", "cuda"):
        params = [p.detach().to(device).requires_grad_() for p in new_params(((64, 48), (33,)), torch.float32)]
        optimizer = MFAC(params, lr=LR, window=8, damping=1e-2, **options)
        for step in range(20):
            set_grads([p.detach().cpu().requires_grad_() for p in params], step)
            grads = new_params(((64, 48), (33,)), torch.float32, seed=50 + step)
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.detach().to(device)
            optimizer.step()
        results.append([p.detach().cpu() for p in params])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def steps_until_learned(build, seed, limit=400):
    """Least squares with noise on features of very different variance: steps to a tenth of the first excess loss."""
    chance = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -1.5, 12, dtype=torch.float64)
    data = torch.randn(1024, 12, generator=chance, dtype=torch.float64) * scales
    target = data @ (0.2 / scales) + torch.randn(1024, generator=chance, dtype=torch.float64)
    best = torch.linalg.lstsq(data, target.unsqueeze(1)).solution.squeeze(1)

    def excess(weight):
        return (data @ (weight - best)).square().mean().item()

    weight = torch.zeros(12, dtype=torch.float64, requires_grad=True)
    optimizer, first = build(weight), excess(weight.detach())
    draws = torch.Generator().manual_seed(seed)
    for step in range(1, limit + 1):
        rows = torch.randint(1024, (64,), generator=draws)
        optimizer.zero_grad()
        (0.5 * (data[rows] @ weight - target[rows]).square().mean()).backward()
        optimizer.step()
        if excess(weight.detach()) < 0.1 * first:
            return step
    return limit


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fewer_steps_than_gradient_descent(seed):
    """With SGD at the best of its rates, with momentum and without."""
    ours = steps_until_learned(lambda w: MFAC([w], lr=2e-3, window=128, damping=1e-4, shrinkage=0.0), seed)
    theirs = min(
        steps_until_learned(lambda w, lr=lr, m=m: torch.optim.SGD([w], lr=lr, momentum=m), seed)
        for lr in (0.1, 0.3, 1.0, 2.0)
        for m in (0.0, 0.9)
    )
    assert 2 * ours < theirs
