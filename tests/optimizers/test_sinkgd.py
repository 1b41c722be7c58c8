"""SinkGD against its formula, its invariances, its fallback and its routing."""

import copy
import io
import math
import warnings

import pytest
import torch
from optimizer_cases import fill_grads, run
from torch.utils._python_dispatch import TorchDispatchMode

from leanstep.optimizers import SinkGD

# the note on how bare parameters are routed has tests of its own
pytestmark = pytest.mark.filterwarnings("ignore:SinkGD. .* taken as matrices")


def literal(gradient: torch.Tensor, iterations: int) -> torch.Tensor:
    """SR-Sinkhorn as printed (arXiv 2502.06742): rows to norm sqrt(n), then columns to norm sqrt(m); in fp64."""
    x = gradient.double().clone()
    m, n = x.shape
    for _ in range(iterations):
        for i in range(m):
            if x[i].any():
                x[i] = math.sqrt(n) * x[i] / x[i].norm()
        for j in range(n):
            if x[:, j].any():
                x[:, j] = math.sqrt(m) * x[:, j] / x[:, j].norm()
    return x


class CountProducts(TorchDispatchMode):
    """Counts matrix products while it is entered."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket in (torch.ops.aten.mv, torch.ops.aten.mm, torch.ops.aten.bmm)
        return func(*args, **(kwargs or {}))


def matrix(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_one_step(weight_decay, lr):
    param = matrix(7, 130)
    before = param.detach().double()
    optimizer = SinkGD([param], lr=lr, scale=0.2, weight_decay=weight_decay)
    fill_grads([param], 0)
    optimizer.step()
    update = literal(param.grad, 5)
    expected = before * (1 - 0.1 * 0.2 * weight_decay) - 0.1 * 0.2 * update
    torch.testing.assert_close(param.double(), expected, rtol=1e-6, atol=1e-7)
    if not weight_decay:
        rms = (param.double() - before).square().mean().sqrt()
        torch.testing.assert_close(rms, torch.tensor(0.02, dtype=torch.float64), rtol=1e-5, atol=0)
    assert not optimizer.state[param]
    assert optimizer.state_bytes() == 0


def test_stacks_and_convolutions():
    """Experts (e, out, in) are matrices of their own; a convolution is one matrix (out, rest)."""
    stack, kernel = matrix(3, 4, 6), matrix(4, 2, 3, 3)
    old_stack, old_kernel = stack.detach().double(), kernel.detach().double()
    optimizer = SinkGD([stack, kernel], lr=1.0, scale=1.0)
    fill_grads([stack, kernel], 0)
    stack.grad[1] *= 1e3
    optimizer.step()
    expected = torch.stack([literal(g, 5) for g in stack.grad])
    torch.testing.assert_close(old_stack - stack.double(), expected, rtol=1e-5, atol=1e-5)
    expected = literal(kernel.grad.flatten(1), 5).view_as(kernel)
    torch.testing.assert_close(old_kernel - kernel.double(), expected, rtol=1e-5, atol=1e-5)


VARIANTS = (
    {},
    {"momentum": 0.9, "rounding": "kahan"},
    {"momentum": 0.9, "momentum_order": "post", "base_width": 4, "rounding": "master"},
    {"spectral": "muon"},
    {"foreach": False, "rounding": "stochastic"},
)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_dimensional_convolutions_are_matrices_with_flatten(options, strided, dtype):
    """(out, in, width) steps as the matrix (out, in * width) does, not as a stack of `out` small ones."""
    flat = matrix(6, 15, dtype=dtype)
    kernel = flat.detach().clone().view(6, 5, 3)
    if strided:
        kernel = kernel.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    kernel.requires_grad_()
    a = SinkGD([flat], lr=0.1, scale=1.0, **options)
    b = SinkGD([kernel], lr=0.1, scale=1.0, flatten=True, **options)
    for step in range(3):
        fill_grads([flat], step)
        kernel.grad = flat.grad.clone().view_as(kernel)
        a.step()
        b.step()
    torch.testing.assert_close(kernel.flatten(1), flat, rtol=1e-6, atol=1e-7)
    for key, kept in a.state[flat].items():
        other = b.state[kernel][key]
        torch.testing.assert_close(other.flatten(1) if other.dim() == 3 else other, kept, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="choose one"):
        SinkGD([kernel], flatten=True, transposed=True)


@pytest.mark.parametrize("power", [-40, -7, 5, 40])
def test_the_size_of_the_gradient_does_not_matter(power):
    """Clipping and loss scaling change nothing: for powers of two, not one bit."""
    one, other = matrix(9, 70), matrix(9, 70)
    for param, factor in ((one, 1.0), (other, 2.0**power)):
        optimizer = SinkGD([param])
        fill_grads([param], 0)
        param.grad.mul_(factor)
        optimizer.step()
    assert torch.equal(one, other)
    clipped = matrix(9, 70)
    optimizer = SinkGD([clipped])
    fill_grads([clipped], 0)
    torch.nn.utils.clip_grad_norm_([clipped], 1e-3)
    optimizer.step()
    torch.testing.assert_close(clipped, one, rtol=1e-6, atol=1e-8)


def test_accumulation_of_micro_batches_is_one_batch():
    x, y = torch.randn(8, 6), torch.randn(8, 5)
    results = []
    for parts in (1, 4):
        param = matrix(5, 6)
        optimizer = SinkGD([param])
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            ((a @ param.T - b).square().mean() / parts).backward()
        optimizer.step()
        results.append(param)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_before(nesterov):
    param = matrix(6, 8)
    expected, buffer = param.detach().double(), torch.zeros(6, 8, dtype=torch.float64)
    optimizer = SinkGD([param], lr=0.1, scale=0.5, momentum=0.9, nesterov=nesterov)
    for step in range(4):
        run(optimizer, [param], range(step, step + 1))
        gradient = param.grad.double()
        buffer = 0.9 * buffer + 0.1 * gradient
        look = 0.9 * buffer + 0.1 * gradient if nesterov else buffer
        expected = expected - 0.05 * literal(look, 5)
    torch.testing.assert_close(param.double(), expected, rtol=1e-5, atol=1e-6)


def test_momentum_after():
    param = matrix(6, 8)
    expected, buffer = param.detach().double(), torch.zeros(6, 8, dtype=torch.float64)
    optimizer = SinkGD([param], lr=0.1, scale=0.5, momentum=0.9, momentum_order="post")
    for step in range(4):
        run(optimizer, [param], range(step, step + 1))
        buffer = 0.9 * buffer + 0.1 * literal(param.grad, 5)
        expected = expected - 0.05 * buffer
    torch.testing.assert_close(param.double(), expected, rtol=1e-5, atol=1e-6)


def test_balanced_rows_have_one_size_and_quiet_rows_stand_still():
    """Rows of an embedding that were barely seen are dropped; every other row moves by exactly lr * scale, in RMS."""
    param = matrix(20, 16)
    before = param.detach().clone()
    optimizer = SinkGD([{"params": [param], "algorithm": "balanced"}], lr=1.0, scale=0.5)
    fill_grads([param], 0)
    param.grad[3] *= 1e-4
    param.grad[7] = 0
    param.grad[9] *= 1e3
    param.grad[9] /= 1e3
    optimizer.step()
    moved = before - param.detach()
    assert not moved[3].any() and not moved[7].any()
    others = [i for i in range(20) if i not in (3, 7)]
    rms = moved[others].square().mean(dim=1).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, 0.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("spectral", ["unit", "muon"])
def test_spectral_pins_the_operator_norm(spectral):
    param = matrix(24, 10)
    optimizer = SinkGD([param], lr=1.0, scale=1.0, spectral=spectral)
    chance = torch.Generator().manual_seed(0)
    base = torch.randn(24, 10, generator=chance)
    for _ in range(6):
        before = param.detach().clone()
        param.grad = base + 0.02 * torch.randn(24, 10, generator=chance)
        optimizer.step()
    norm = torch.linalg.matrix_norm(before - param.detach(), ord=2)
    target = 1.0 if spectral == "unit" else math.sqrt(24 / 10)
    assert 1.0 <= norm / target + 1e-5 < 1.05  # a power iteration finds the norm from below


@pytest.mark.parametrize("gradients", ["Gaussian", "rank 1", "rank 4", "alternating columns"])
def test_spectral_bounds_the_step_where_gradients_have_nothing_in_common(gradients):
    """The vector of an older gradient may be orthogonal to all of this one."""
    param = matrix(64, 48)
    optimizer = SinkGD([param], lr=1.0, scale=1.0, spectral="unit")
    chance = torch.Generator().manual_seed(1)
    for step in range(8):
        before = param.detach().clone()
        rank = {"rank 1": 1, "rank 4": 4}.get(gradients, 64)
        param.grad = torch.randn(64, rank, generator=chance) @ torch.randn(rank, 48, generator=chance)
        if gradients == "alternating columns":
            param.grad[:, slice(0, 24) if step % 2 else slice(24, 48)] = 0
        optimizer.step()
        norm = torch.linalg.matrix_norm(before - param.detach(), ord=2)
        assert 1.0 - 1e-5 <= norm < 1.5
        assert gradients != "rank 1" or norm == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("first", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("stacked", [False, True])
def test_spectral_warms_up_at_the_first_usable_gradient(first, stacked):
    """The second step is the same whether the first gradient was useless or there was none."""
    shape = (3, 24, 10) if stacked else (24, 10)
    moved = []
    for useless in (True, False):
        param = matrix(*shape)
        optimizer = SinkGD([param], lr=1.0, scale=1.0, spectral="unit")
        if useless:
            param.grad = torch.full(shape, first)
            optimizer.step()
            assert not optimizer.state[param]["power_warm"]
            buffer = io.BytesIO()
            torch.save(optimizer.state_dict(), buffer)
            buffer.seek(0)
            optimizer.load_state_dict(torch.load(buffer))
        before = param.detach().clone()
        fill_grads([param], 0)
        optimizer.step()
        assert optimizer.state[param]["power_warm"]
        moved.append(before - param.detach())
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=1e-6)
    norms = torch.linalg.matrix_norm(moved[0], ord=2)
    assert norms.min() > 0.999 and norms.max() < 1.02


def test_a_loaded_state_knows_itself_which_matrices_are_cold():
    """A checkpoint of several processes has the flag of one, which may have other matrices of the stack."""
    param = matrix(3, 24, 10)
    optimizer = SinkGD([param], lr=1.0, scale=1.0, spectral="unit")
    for idle in ([1], []):
        fill_grads([param], 0)
        param.grad[idle] = 0
        optimizer.step()
        state = copy.deepcopy(optimizer.state_dict())
        warm = state["state"][0]["power_warm"]
        assert bool(warm) == (not idle)
        state["state"][0]["power_warm"] = ~warm
        optimizer.load_state_dict(state)
        assert optimizer.state[param]["power_warm"] == warm


def test_every_expert_of_a_stack_warms_up_at_its_own_first_gradient():
    """An expert that saw no token at first is pinned at its first gradient as the others were."""
    param = matrix(3, 24, 10)
    optimizer = SinkGD([param], lr=1.0, scale=1.0, spectral="unit")
    for step, idle in enumerate(([1, 2], [2], [], [])):
        fill_grads([param], 0)
        param.grad[idle] = 0
        before = param.detach().clone()
        optimizer.step()
        norms = torch.linalg.matrix_norm(before - param.detach(), ord=2)
        assert optimizer.state[param]["power_warm"] == (step >= 2)
        busy = [i for i in range(3) if i not in idle]
        assert norms[busy].min() > 0.999 and norms.max() < 1.02
        assert not norms[idle].any()


def test_a_warm_step_has_three_power_iterations():
    """Each is one product with the update and one with its transpose; the first step has twenty."""
    param = matrix(24, 10)
    optimizer = SinkGD([param], spectral="unit")
    products = []
    for step in range(2):
        fill_grads([param], step)
        with CountProducts() as count:
            optimizer.step()
        products.append(count.products)
    assert products == [40, 6]


def test_base_width_shrinks_the_step():
    wide, plain = matrix(4, 32), matrix(4, 32)
    before = wide.detach().clone()
    for param, width in ((wide, 8), (plain, None)):
        optimizer = SinkGD([param], base_width=width)
        run(optimizer, [param], range(1))
    torch.testing.assert_close(before - wide, (before - plain) / 4, rtol=1e-4, atol=2.0**-22)


def test_a_step_on_the_host_moves_to_the_device_of_the_fused_kernel(monkeypatch):
    """A group was stepped with fused=False or foreach=True before, whose step counts are on the CPU."""
    monkeypatch.setattr("leanstep.optimizers.sinkgd.state.uses_fused", lambda param, group: group["fused"])
    param = torch.zeros(3, device="meta", requires_grad=True)
    param.grad = torch.zeros(3, device="meta")
    optimizer = SinkGD([param], algorithm="adamw")
    for fused, device in ((False, "cpu"), (True, "meta")):
        optimizer.param_groups[0]["fused"] = fused
        optimizer._init_group()
        assert optimizer.state[param]["step"].device.type == device


@pytest.mark.gpu
def test_the_fused_kernel_can_be_chosen_after_a_step():
    param = torch.nn.Parameter(torch.ones(5, device="cuda"))
    optimizer = SinkGD([{"params": [param], "algorithm": "adamw"}], fused=False)
    for fused in (False, None, True):
        optimizer.param_groups[0]["fused"] = fused
        param.grad = torch.randn_like(param)
        optimizer.step()
    assert optimizer.state[param]["step"].item() == 3


@pytest.mark.parametrize("fused", [True, False, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fallback_is_torch_adamw_bit_for_bit(fused, dtype):
    shapes = ((7,), (130,), (), (9, 20))
    ours, theirs = ([matrix(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)] for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    a = SinkGD([{"params": ours, "algorithm": "adamw"}], **settings, fused=fused)
    # None is torch's fused kernel where it has one
    b = torch.optim.AdamW(theirs, **settings, fused=True if fused is None else fused)
    for step in range(6):
        for optimizer, params in ((a, ours), (b, theirs)):
            fill_grads(params, step)
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(a.state[p][key], b.state[q][key])
    b.load_state_dict({"state": a.state_dict()["state"], "param_groups": b.state_dict()["param_groups"]})


def test_bare_parameters_are_routed_by_dimension_and_it_is_said_once():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    with pytest.warns(UserWarning, match="1 parameters .* matrices, 3 others go to AdamW"):
        optimizer = SinkGD(model.parameters())
    run(optimizer, list(model.parameters()), range(1))
    assert [len(optimizer.state[p]) for p in model.parameters()] == [0, 3, 3, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, list(model.parameters()), range(1, 2))
        SinkGD([model[0].weight], algorithm="sinkgd")
        SinkGD([model[0].bias])
        groups = [{"params": [model[0].weight], "algorithm": "balanced"}, {"params": [model[0].bias]}]
        SinkGD(groups)


def test_bare_matrices_alone_are_said_to_be_taken_too():
    """An embedding and a head among them would go unnoticed."""
    model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False))
    with pytest.warns(UserWarning, match="SinkGD: 2 parameters .* taken as matrices. Embeddings and heads") as said:
        SinkGD(model.parameters())
    assert len(said) == 1 and "AdamW" not in str(said[0].message)
    assert said[0].filename == __file__


@pytest.mark.parametrize("algorithm", ["sinkgd", "balanced"])
def test_a_vector_is_no_matrix(algorithm):
    with pytest.raises(ValueError, match=r"bias \(7,\).*adamw"):
        SinkGD([{"params": [("bias", matrix(7))], "algorithm": algorithm}])
    optimizer = SinkGD([matrix(3, 4)])
    with pytest.raises(ValueError, match="flattened"):
        optimizer.add_param_group({"params": [matrix(7)], "algorithm": algorithm})
    assert len(optimizer.param_groups) == 1


@pytest.mark.slow
def test_small_updates_of_bf16_matrices():
    """Steps of 1e-4 from 1: plain bf16 loses them all; stochastic rounding keeps the mean, master and Kahan the sum."""
    ends = {}
    for rounding in ("nearest", "stochastic", "kahan", "master", "split"):
        param = torch.ones(64, 128, dtype=torch.bfloat16, requires_grad=True)
        optimizer = SinkGD([("weight", param)], lr=1e-3, scale=0.1, rounding=rounding)
        param.grad = torch.ones_like(param)  # a constant matrix: the update is 1 everywhere
        for _ in range(100):
            optimizer.step()
        ends[rounding] = optimizer.full_precision_state_dict()["weight"]
    assert torch.equal(ends["nearest"], torch.ones(64, 128))
    deviation = 2**-8 * math.sqrt(100 * 0.25) / math.sqrt(64 * 128)
    assert abs(ends["stochastic"].mean().item() - 0.99) < 3 * deviation
    torch.testing.assert_close(ends["master"], torch.full((64, 128), 0.99), rtol=0, atol=1e-5)
    torch.testing.assert_close(ends["kahan"], torch.full((64, 128), 0.99), rtol=0, atol=1e-4)
    torch.testing.assert_close(ends["split"], torch.full((64, 128), 0.99), rtol=0, atol=1e-3)


def test_a_power_vector_survives_that_spectral_is_switched_off():
    params = [matrix(4, 6), matrix(3)]
    optimizer = SinkGD(params, spectral="unit")
    run(optimizer, params, range(2))
    optimizer.param_groups[0]["spectral"] = None
    resumed = SinkGD([p.detach().clone().requires_grad_() for p in params])
    resumed.load_state_dict(optimizer.state_dict())
    (loaded,) = [s["power_vector"] for s in resumed.state.values() if "power_vector" in s]
    assert torch.equal(loaded, optimizer.state[params[0]]["power_vector"])


@pytest.mark.parametrize(
    "options", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"algorithm": "balanced"}], ids=str
)
def test_few_copies_of_gradients_exist_at_a_time(monkeypatch, options):
    """A step of many matrices has averages of a bounded size in memory, or of the largest matrix."""
    from leanstep.optimizers.sinkgd import blocks
    from leanstep.optimizers.sinkgd import step as module

    monkeypatch.setattr(blocks, "_ENTRIES_TOGETHER", 512)
    counts = []
    for name in ("scaled_step", "sinkhorn_step"):
        step = getattr(module, name)

        def counted(targets, matrices, *args, step=step, **settings):
            counts.append(len(matrices))
            return step(targets, matrices, *args, **settings)

        monkeypatch.setattr(module, name, counted)
    sizes = [(30, 20), (16, 16), (16, 16), (1, 8), (30, 20)]
    params = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
    optimizer = SinkGD(params, **{"algorithm": "sinkgd", **options})
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert counts == [1, 2, 1, 1]
