"""The autograd function: gradients, orders, what it forms and what it keeps."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from leanstep.kernels import lora_dropout
from leanstep.lora.layers.autograd import Setting, Weights, lora_linears
from leanstep.lora.layers.contraction import ContractionPath, backward_flops, contraction_path, forward_flops
from leanstep.lora.layers.rule import dora_factor, gradient_of_magnitude, gradient_of_product
from leanstep.lora.memory import saved_bytes

N, M_OUT, R = 5, 4, 3


def double(*shape, grad=True, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape) + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def layer(n=N, m=M_OUT, r=R, bias=True, b_bias=False, dora=False, transposed=False, dtype=torch.float64):
    weight = double(m, n, grad=False)
    tensors = Weights(
        weight.t().contiguous() if transposed else weight,
        double(m, seed=1) if bias else None,
        double(r, n, seed=2),
        double(m, r, seed=3),
        double(m, seed=4) if b_bias else None,
        (double(m, seed=5, grad=False).abs() + 0.5).requires_grad_() if dora else None,
        double(m, seed=6, grad=False).abs() + 0.5 if dora else None,
    )
    return Weights(*(None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad) for t in tensors))


def run(x, setting, weights, seed=None):
    return lora_linears(x, (setting,), (weights,), (seed,))[0]


def formula(x, setting, weights, seed=None):
    """The layer in plain torch, from the formulas."""
    inputs = x
    if setting.dropout:
        ones = torch.ones(x.reshape(-1, x.shape[-1]).shape, dtype=x.dtype)
        inputs = x * lora_dropout(ones, setting.dropout, seed).view(x.shape)
    w = weights.weight.t() if setting.transposed else weights.weight
    update = inputs @ weights.a.t() @ weights.b.t()
    if weights.b_bias is not None:
        update = update + weights.b_bias
    update = setting.scale * update
    bias = 0 if weights.bias is None else weights.bias
    if weights.magnitude is None:
        return x @ w.t() + bias + update
    c = dora_factor(weights.magnitude, weights.norm)
    return x @ w.t() + bias + (c - 1) * (inputs @ w.t()) + c * update


VARIANTS = list(itertools.product(("min", "full"), (False, True), (0.0, 0.3), (False, True), (False, True)))


@pytest.mark.parametrize(("save", "dora", "p", "b_bias", "transposed"), VARIANTS)
def test_gradients_are_those_of_the_formula(save, dora, p, b_bias, transposed):
    weights = layer(b_bias=b_bias, dora=dora, transposed=transposed)
    setting = Setting(1.7, p, save, transposed)
    seed = torch.tensor(11) if p else None
    x = double(2, 3, N, seed=9)
    leaves = [t for t in (x, *weights) if t is not None and t.requires_grad]
    y, wanted = run(x, setting, weights, seed), formula(x, setting, weights, seed)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    g = double(2, 3, M_OUT, seed=10, grad=False)
    gradients = torch.autograd.grad(y, leaves, g)
    for a, b in zip(gradients, torch.autograd.grad(wanted, leaves, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("dora", "p", "path"),
    [
        *((dora, p, ContractionPath()) for dora in (False, True) for p in (0.0, 0.3)),
        # the sum is formed without dropout and DoRA only
        *(
            (False, 0.0, path)
            for path in (ContractionPath(True, True), ContractionPath(True, False), ContractionPath(False, True))
        ),
    ],
)
def test_gradcheck(dora, p, path):
    weights, x = layer(dora=dora, b_bias=True), double(2, N)
    setting = Setting(0.8, p, "min", False, path)
    seed = torch.tensor(3) if p else None
    norm = weights.norm

    def function(x, bias, a, b, b_bias, magnitude=None):
        return run(x, setting, Weights(weights.weight, bias, a, b, b_bias, magnitude, norm), seed)

    inputs = [x, *(t for t in weights[1:6] if t is not None)]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=False)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize("save", ["min", "full", "lora_fa"])
def test_every_subset_of_gradients(needed, save):
    weights, x = layer(dora=True), double(3, N)
    leaves = dict(zip(("x", "a", "b", "magnitude"), (x, weights.a, weights.b, weights.magnitude), strict=True))
    for (name, leaf), wanted in zip(leaves.items(), needed, strict=True):
        leaf.requires_grad_(wanted and not (name == "a" and save == "lora_fa"))
    weights.bias.requires_grad_(False)
    chosen = [leaf for leaf in leaves.values() if leaf.requires_grad]
    y = run(x, Setting(1.1, 0.0, save), weights)
    assert y.requires_grad == bool(chosen)
    if chosen:
        gradients = torch.autograd.grad(y.sum(), chosen)
        for a, b in zip(gradients, torch.autograd.grad(formula(x, Setting(1.1), weights).sum(), chosen), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("shape", "r"), [((0, N), 2), ((1, N), 2), ((3, N), 1), ((3, N), 7), ((2, 3, N), 2), ((2, 2, 2, N), 2)], ids=str
)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_odd_shapes(shape, r, p):
    weights, x = layer(r=r), double(*shape)
    seed = torch.tensor(8)
    y = run(x, Setting(1.0, p), weights, seed)
    wanted = formula(x, Setting(1.0, p), weights, seed)
    assert y.shape == (*shape[:-1], M_OUT)
    torch.testing.assert_close(y, wanted)
    leaves = [x, weights.a, weights.b]
    gradients = torch.autograd.grad(y.square().sum(), leaves)
    for a, b in zip(gradients, torch.autograd.grad(wanted.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_inputs_and_gradients_need_not_be_contiguous(p):
    weights = layer()
    base = double(N, 3, 2)
    x = base.permute(2, 1, 0)
    seed = torch.tensor(1)
    g = double(M_OUT, 3, 2, grad=False).permute(2, 1, 0)
    before = g.clone()
    y = run(x, Setting(1.3, p), weights, seed)
    gradients = torch.autograd.grad(y, [base, weights.a, weights.b], g)
    wanted = torch.autograd.grad(formula(x, Setting(1.3, p), weights, seed), [base, weights.a, weights.b], g)
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(g, before)


def test_outputs_can_be_changed_in_place():
    weights, x = layer(), double(2, 3, N)
    y = run(x, Setting(1.0), weights)
    y += 1
    y.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_layers_that_share_an_input_give_the_sum_of_their_gradients():
    layers = [layer(m=m, b_bias=m == 3) for m in (4, 2, 3)]
    settings = (Setting(0.5), Setting(1.5, 0.4), Setting(2.0, 0.0, "full"))
    seeds = (None, torch.tensor(4), None)
    x = double(3, N)
    outputs = lora_linears(x, settings, layers, seeds)
    leaves = [x, *(t for w in layers for t in (w.bias, w.a, w.b))]
    gradients = torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves)
    plain = [formula(x, *args) for args in zip(settings, layers, seeds, strict=True)]
    wanted = torch.autograd.grad(sum(y.square().sum() for y in plain), leaves)
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_layer_whose_output_is_not_used_has_no_gradient(dropout):
    layers, x, seeds = [layer(m=m) for m in (4, 2, 3)], double(3, N), [torch.tensor(4) if dropout else None] * 3
    settings = (Setting(0.5, dropout),) * 3
    outputs = lora_linears(x, settings, layers, seeds)
    leaves = [x, *(tensor for w in layers for tensor in (w.bias, w.a, w.b))]
    gradients = torch.autograd.grad(outputs[0].sum() + outputs[2].square().sum(), leaves, allow_unused=True)
    plain = [formula(x, *args) for args in zip(settings, layers, seeds, strict=True)]
    wanted = torch.autograd.grad(plain[0].sum() + plain[2].square().sum(), leaves, allow_unused=True)
    assert [gradient is None for gradient in gradients] == [False] * 4 + [True] * 3 + [False] * 3
    for a, b in zip(gradients, wanted, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dora", [False, True])
def test_products_of_all_layers_at_once_are_those_of_each(dora):
    n, rows = 12, 9
    shapes = [(20, 3, 0.5, "min"), (16, 5, 2.0, "full"), (12, 2, 1.5, "min")]
    weights = [layer(n, m, r, dora=dora) for m, r, _, _ in shapes]
    settings = [Setting(scale, 0.0, save, False, ContractionPath()) for _, _, scale, save in shapes]
    x = double(rows, n)
    leaves = [x] + [tensor for one in weights for tensor in (one.a, one.b, one.magnitude) if tensor is not None]
    upstream = [double(rows, m).detach() for m, _, _, _ in shapes]
    together = lora_linears(x, settings, weights, (None,) * 3)
    apart = [lora_linears(x, (s,), (w,), (None,))[0] for s, w in zip(settings, weights, strict=True)]
    for found, wanted in zip(together, apart, strict=True):
        torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad(outputs, leaves, upstream) for outputs in (together, apart)]
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_second_derivative_is_refused():
    weights, x = layer(), double(2, N)
    (gradient,) = torch.autograd.grad(run(x, Setting(1.0), weights).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_row_of_zeros_under_dora_is_no_nan():
    weights = layer(dora=True)
    weights = weights._replace(norm=weights.norm.clone())
    weights.norm[1] = 0
    x = double(3, N)
    run(x, Setting(1.0), weights).sum().backward()
    for tensor in (x, weights.a, weights.b, weights.magnitude):
        assert torch.isfinite(tensor.grad).all()
    assert weights.magnitude.grad[1] == 0


def test_the_magnitudes_gradient_from_the_output():
    dy, z = double(7, 6, grad=False), double(7, 6, seed=1, grad=False)
    norm, magnitude = (double(6, seed=seed, grad=False).abs() + 1 for seed in (2, 3))
    norm[1], magnitude[2] = 0, 0
    c = dora_factor(magnitude, norm)
    assert c[1] == 1 and c[2] == 0
    _, sums = gradient_of_product(dy, c * z, c)
    wanted = (dy * z).sum(0) / norm
    wanted[1] = wanted[2] = 0
    torch.testing.assert_close(gradient_of_magnitude(sums, magnitude, norm), wanted)


class _Shapes(TorchDispatchMode):
    """Notes the shape of everything that is computed."""

    def __init__(self, *known):
        super().__init__()
        self.seen, self.known = set(), {t.untyped_storage().data_ptr() for t in known if t is not None}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            # views of what was there before are no matrices of their own
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.seen.add(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("variant", [{}, {"dora": True}, {"b_bias": True}])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_no_gradient_of_the_weights_size_is_formed(variant, p):
    n, m, rows = 24, 20, 11
    weights, x = layer(n, m, 3, **variant), double(rows, n)
    y = run(x, Setting(1.0, p), weights, torch.tensor(2))
    with _Shapes(*weights) as shapes:
        y.sum().backward()
    assert (rows, n) in shapes.seen
    assert not {(m, n), (n, m)} & shapes.seen


def test_the_shape_watcher_sees_a_full_gradient():
    weight, x = double(20, 24), double(11, 24)
    y = x @ weight.t()
    with _Shapes() as shapes:
        y.sum().backward()
    assert {(20, 24), (24, 20)} & shapes.seen


@pytest.mark.parametrize("materialize_sum", [False, True])
@pytest.mark.parametrize("save", ["min", "full"])
def test_the_operations_are_those_of_the_formulas(materialize_sum, save):
    rows, n, m, r = 40, 24, 20, 4
    weights, x = layer(n, m, r), double(rows, n)
    path = ContractionPath(materialize_sum, materialize_sum)
    # torch counts addmm, and not addmm in place
    in_place = {torch.ops.aten.addmm_: lambda y, a, b, out_shape=None, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as forward:
        y = run(x, Setting(1.0, 0.0, save, False, path), weights)
    with FlopCounterMode(display=False, custom_mapping=in_place) as backward:
        y.sum().backward()
    assert forward.get_total_flops() == forward_flops(rows, n, m, r, materialize_sum)
    # the sum does without H in forward, so that backward forms it either way
    recompute = save == "min" or materialize_sum
    assert backward.get_total_flops() == backward_flops(rows, n, m, r, materialize_sum, recompute)


def all_paths(rows, n, m, r):
    """Operations of every way to the output and to the three gradients, by hand."""
    product = lambda i, j, k: 2 * i * j * k  # noqa: E731
    forward = {
        "factors": product(rows, n, m) + product(rows, n, r) + product(rows, r, m),
        "sum": product(m, r, n) + product(rows, n, m),
    }
    backward = {}
    for dx, da, db in itertools.product(("factors", "sum"), ("e", "full"), ("h", "full")):
        cost = product(rows, m, n)
        cost += product(m, r, n) if dx == "sum" else product(rows, r, n)
        cost += product(rows, m, r) if dx == "factors" or da == "e" else 0
        cost += product(n, rows, m) if "full" in (da, db) else 0
        cost += product(r, rows, n) if da == "e" else product(r, m, n)
        cost += product(rows, n, r) + product(m, rows, r) if db == "h" else product(m, n, r)
        backward[dx, da, db] = cost
    return forward, backward


def test_the_path_taken_is_the_cheapest_of_all():
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        rows, n, m = (int(2 ** (torch.rand((), generator=generator) * 10 + 3)) for _ in range(3))
        r = 1 + int(torch.randint(0, max(1, min(n, m) // 8), (), generator=generator))
        forward, backward = all_paths(rows, n, m, r)
        path = contraction_path(rows, n, m, r, torch.float32)
        for chosen, costs, best in (
            (forward["sum" if path.forward else "factors"], forward, 0.03),
            (backward["sum" if path.backward else "factors", "e", "h"], backward, 0.03),
        ):
            # a full gradient pays for tiny batches at large ranks only; the rule does not take it
            within = {key: cost for key, cost in costs.items() if "full" not in key}
            assert chosen <= min(within.values()) / (1 - best)
        if rows >= 4 * r:
            assert min(backward.values()) >= 0.97 * min(c for k, c in backward.items() if "full" not in k)


def test_the_sum_wins_where_the_rule_says():
    assert contraction_path(4096, 256, 256, 64, torch.float32) == ContractionPath(True, True)
    assert contraction_path(64, 256, 256, 64, torch.float32) == ContractionPath()
    assert contraction_path(4096, 4096, 4096, 8, torch.float32) == ContractionPath()
    assert contraction_path(4096, 256, 256, 64, torch.bfloat16) == ContractionPath()


@pytest.mark.parametrize(
    ("save", "p", "dora", "wanted"),
    [
        # X of 10 rows and 6 columns; H of 2; the output of 4
        ("min", 0.0, False, lambda x, h, y: x),
        ("min", 0.5, False, lambda x, h, y: x),
        ("full", 0.0, False, lambda x, h, y: x + h),
        ("lora_fa", 0.0, False, lambda x, h, y: h),
        ("lora_fa", 0.5, False, lambda x, h, y: h),
        ("min", 0.0, True, lambda x, h, y: x + y),
        ("full", 0.0, True, lambda x, h, y: x + h + y),
        ("min", 0.5, True, lambda x, h, y: x),
        ("full", 0.5, True, lambda x, h, y: x + h + y),
    ],
)
def test_what_is_kept(save, p, dora, wanted):
    weights = layer(6, 4, 2, bias=False, dora=dora)
    if save == "lora_fa":
        weights.a.requires_grad_(False)
    x = double(10, 6)
    seed = torch.tensor(1)
    found = saved_bytes(
        lambda: run(x, Setting(1.0, p, save), weights, seed), [seed, *(t for t in weights if t is not None)]
    )
    assert found == 8 * wanted(10 * 6, 10 * 2, 10 * 4)


def test_a_shared_input_is_kept_once():
    layers = [layer(6, 4, 2), layer(6, 3, 2)]
    x = double(10, 6)
    parameters = [t for w in layers for t in w if t is not None]
    separate = saved_bytes(lambda: [run(x, Setting(1.0), w) for w in layers], parameters)
    together = saved_bytes(lambda: lora_linears(x, (Setting(1.0),) * 2, layers, (None, None)), parameters)
    assert separate == together == 8 * 60
