"""Gradients at the ends of the number range, and faults that must be seen before anything is changed."""

import copy

import pytest
import torch

from leanstep.kernels import sinkhorn, use_backend
from leanstep.optimizers import LANTON, MFAC, Lion, SinkGD, release_gradients

# the note on how bare parameters are routed has tests of its own
pytestmark = pytest.mark.filterwarnings("ignore:SinkGD. .* taken as matrices")


@pytest.mark.parametrize("algorithm", ["sinkgd", "balanced"])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("size", [1e-30, 1e-37, 1.2e-38, 1e-39, 1e-42, 1e30, 1e37])
def test_any_finite_gradient_leaves_finite_weights_and_is_not_counted(size, backend, algorithm):
    param = torch.nn.Parameter(torch.zeros(64, 96))
    param.grad = torch.randn(64, 96)
    param.grad[3] = 0.0
    param.grad[3, 5] = size  # a row that holds one entry
    param.grad[7] *= size  # a row of that size
    optimizer = SinkGD([param], lr=0.1, algorithm=algorithm, nonfinite="skip")
    with use_backend(backend):
        optimizer.step()
    assert torch.isfinite(param).all()
    assert optimizer.nonfinite_count() == 0
    # "balanced" sets rows of at most 1e-3 of the mean norm to 0
    moved = 7 if algorithm == "balanced" and size > 1 else 0
    assert (param[moved] != 0).all()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("shape", [(1, 3), (5, 8), (6, 8), (7, 8), (8, 8), (3, 5, 8)], ids=str)
def test_squares_that_overflow_in_any_number_of_rows(shape, backend):
    param = torch.nn.Parameter(torch.zeros(shape))
    param.grad = torch.randn(shape).sign() * 1.9e19
    optimizer = SinkGD([param], lr=1.0, scale=0.5, algorithm="sinkgd", nonfinite="skip")
    with use_backend(backend):
        optimizer.step()
    torch.testing.assert_close(param.detach(), -0.5 * param.grad.sign())
    assert optimizer.nonfinite_count() == 0


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 4, 3), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("base_width", [None, 3])
def test_stacks_without_entries_are_stepped(shape, backend, base_width):
    params = [torch.nn.Parameter(torch.zeros(shape)), torch.nn.Parameter(torch.zeros(4, 3))]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = SinkGD(params, lr=1.0, scale=0.5, algorithm="sinkgd", base_width=base_width)
    with use_backend(backend):
        optimizer.step()
    torch.testing.assert_close(params[1].detach(), torch.full((4, 3), -0.5))


@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e38])
def test_scales_are_finite_where_shards_of_columns_are_reduced(size):
    mats = [torch.randn(8, 6) * size]
    from leanstep.kernels.matrices.sinkhorn import sinkhorn_of_blocks

    rule = sinkhorn_of_blocks(mats, 3, rows_total=[8], cols_total=[6])
    try:
        while True:
            next(rule)
    except StopIteration as end:
        scales = end.value
    assert torch.isfinite(scales.flat_rows).all() and torch.isfinite(scales.flat_cols).all()
    if size > 1e-40:  # below, the entries have lost their digits
        whole = sinkhorn(mats, 3)
        torch.testing.assert_close(scales.flat_cols, whole.flat_cols, rtol=1e-4, atol=0)


@pytest.mark.parametrize("build", [Lion, SinkGD], ids=["lion", "sinkgd"])
def test_a_sparse_gradient_anywhere_changes_nothing_before_it_raises(build):
    first, second = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4, 4))
    optimizer = build([{"params": [first]}, {"params": [second]}], lr=0.1)
    first.grad = torch.ones(4, 4)
    second.grad = torch.ones(4, 4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert torch.equal(first, torch.ones(4, 4))


@pytest.mark.parametrize("fused", [True, False])
def test_fp32_moments_loaded_beside_bf16_parameters_take_their_dtype_and_step(fused):
    wide = torch.nn.Parameter(torch.randn(16))
    wide.grad = torch.randn(16)
    saved = SinkGD([wide], lr=0.1, algorithm="adamw", fused=fused)
    saved.step()
    narrow = torch.nn.Parameter(wide.detach().to(torch.bfloat16))
    loaded = SinkGD([narrow], lr=0.1, algorithm="adamw", fused=fused)
    control = torch.optim.AdamW([copy.deepcopy(narrow)], lr=0.1, weight_decay=0.0, fused=fused)
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    state = {k: v for k, v in saved.state_dict()["state"][0].items()}
    control.load_state_dict({"state": {0: state}, "param_groups": control.state_dict()["param_groups"]})
    other = control.param_groups[0]["params"][0]
    narrow.grad = torch.randn(16).to(torch.bfloat16)
    other.grad = narrow.grad.clone()
    loaded.step()
    control.step()
    assert loaded.state[narrow]["exp_avg"].dtype == torch.bfloat16
    assert torch.equal(narrow, other)


def test_frozen_parameters_are_passed_over_by_release():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[0].requires_grad_(False)
    optimizer = Lion(model.parameters(), lr=0.1)
    with release_gradients(model, optimizer):
        before = model[1].weight.detach().clone()
        model(torch.randn(2, 4)).sum().backward()
    assert not torch.equal(before, model[1].weight)


@pytest.mark.parametrize(
    ("build", "setting"),
    [(Lion, {"foreach": "yes"}), (Lion, {"maximize": 3}), (Lion, {"cautious": "a"}), (SinkGD, {"nesterov": 1}),
     (SinkGD, {"fused": "yes"}), (SinkGD, {"transposed": None})],
)  # fmt: skip
def test_flags_are_true_or_false(build, setting):
    name = next(iter(setting))
    with pytest.raises(TypeError, match=f"{name} must be True"):
        build([torch.nn.Parameter(torch.zeros(2, 2))], **setting)


STEPS = {
    "Lion": (Lion, {}),
    "SinkGD": (SinkGD, {"algorithm": "sinkgd"}),
    "SinkGD, momentum": (SinkGD, {"algorithm": "sinkgd", "momentum": 0.9}),
    "SinkGD, AdamW": (SinkGD, {"algorithm": "adamw"}),
    "LANTON": (LANTON, {"norm": "rms"}),
    "MFAC": (MFAC, {"window": 2, "damping": 0.1}),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("of_parameter", [False, True])
def test_torchs_negative_bit_does_not_change_the_sign(name, of_parameter):
    """Tensors with this bit have the opposite numbers in memory."""
    cls, settings = STEPS[name]
    weight, grads = torch.randn(8, 12), [torch.randn(8, 12) for _ in range(3)]
    results = []
    for negative in (False, True):
        param = torch._neg_view(-weight) if negative and of_parameter else weight.clone()
        param.requires_grad_()
        assert param.is_neg() == (negative and of_parameter)
        optimizer = cls([param], lr=0.1, **settings)
        for grad in grads:
            param.grad = torch._neg_view(-grad) if negative else grad.clone()
            optimizer.step()
        results.append(param.detach().resolve_neg())
    assert not torch.equal(results[0], weight) and torch.equal(*results)


@pytest.mark.parametrize("name", [name for name in STEPS if name != "SinkGD, momentum"])
def test_the_gradient_of_the_imaginary_part_of_a_conjugate_has_its_sign(name):
    """Autograd leaves it with the negative bit."""
    cls, settings = STEPS[name]
    imaginary = torch.nn.Parameter(torch.full((1, 1), 0.7))
    optimizer = cls([imaginary], lr=0.1, **settings)
    number = torch.complex(torch.full((1, 1), 0.3), imaginary)
    (number.conj() * (1.0 + 2j)).real.sum().backward()
    assert imaginary.grad.is_neg() and imaginary.grad == 2
    optimizer.step()
    assert imaginary < 0.7


@pytest.mark.parametrize("settings", [{}, {"fused": False}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "master"])
def test_adamw_takes_fp32_gradients_of_bf16_parameters(settings, rounding):
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        param = torch.nn.Parameter(torch.linspace(-1, 1, 200).bfloat16())
        param.grad_dtype = dtype
        optimizer = SinkGD([param], lr=0.1, weight_decay=0.1, algorithm="adamw", rounding=rounding, **settings)
        for step in range(3):
            grad = torch.randn(200, generator=torch.Generator().manual_seed(step)).bfloat16()
            param.grad = grad.to(dtype)
            optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("settings", [{}, {"momentum_dtype": torch.int8}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_bad_gradient_skips_all_adamw_parameters_also_one_call_at_a_time(settings, dtype):
    rounding = "master" if dtype == torch.bfloat16 else "nearest"
    results = []
    for foreach in (None, False):
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 512).view(2, 256).to(dtype)) for _ in range(3)]
        optimizer = SinkGD(
            params,
            lr=0.1,
            weight_decay=0.1,
            algorithm="adamw",
            fused=False,
            foreach=foreach,
            rounding=rounding,
            **settings,
        )
        for step in range(4):
            chance = torch.Generator().manual_seed(step)
            before = [param.detach().clone() for param in params]
            for param in params:
                param.grad = torch.randn(param.shape, generator=chance).to(dtype)
            params[1].grad[0, 3] = float("nan") if step == 2 else 1.0
            optimizer.step()
            moved = [not torch.equal(old, param) for old, param in zip(before, params, strict=True)]
            assert moved == [step != 2] * 3
        assert optimizer.nonfinite_count() == 1
        assert all(optimizer.state[param]["step"] == 3 for param in params)
        results.append(torch.stack([param.detach() for param in params]))
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.* are taken as hidden matrices")
@pytest.mark.parametrize("build", [Lion, SinkGD, LANTON, MFAC])
def test_a_parameter_that_becomes_complex_is_refused_and_keeps_its_imaginary_part(build):
    param = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = build([param], lr=0.1)
    param.grad = torch.randn(4, 4)
    optimizer.step()
    param.data = torch.complex(param.data, torch.ones(4, 4))
    param.grad = torch.ones_like(param)
    before = param.detach().clone()
    with pytest.raises(ValueError, match=r"\(4, 4\) is complex \(torch.complex64\); expected a real floating dtype"):
        optimizer.step()
    assert torch.equal(param.detach(), before)
