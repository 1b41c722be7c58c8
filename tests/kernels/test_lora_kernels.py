"""The operations of low-rank adapters: definitions, C++ and Triton kernels."""

import pytest
import torch
from kernel_cases import DTYPES, draw, dtype_name

from leanstep.kernels import (
    BackendError,
    lora_down,
    lora_down_backward,
    lora_dropout,
    lora_norms,
    lora_scale_,
    lora_scale_backward,
    lora_up_,
    swiglu,
    swiglu_backward_,
    use_backend,
)

CPP = (torch.float32, torch.bfloat16)
# rows, columns and rank; few for the interpreter, which is slow
FEW = [(1, 1, 1), (70, 66, 17), (0, 5, 2), (1030, 3, 3)]
SHAPES = [(1, 1, 1), (7, 3, 2), (40, 70, 16), (130, 65, 17), (3, 200, 65), (0, 5, 2), (1030, 5, 3)]


def eps(dtype):
    return torch.finfo(dtype).eps


def test_dropout_keeps_its_share_and_its_mean():
    x = torch.ones(1000, 1000)
    for p in (0.1, 0.5, 0.9):
        y = lora_dropout(x, p, torch.tensor(5))
        kept = float((y != 0).double().mean())
        # five standard deviations of a share of a million draws
        assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / 1e6) ** 0.5
        assert torch.all((y == 0) | (y == y.max()))
        assert y.max() == pytest.approx(1 / (1 - p))
    assert torch.equal(lora_dropout(x, 0.0), x)
    assert not lora_dropout(x, 1.0, torch.tensor(5)).any()


def test_masks_depend_on_all_bits_of_the_seed_and_on_nothing_else():
    x = torch.ones(64, 64)
    masks = [lora_dropout(x, 0.5, torch.tensor(seed)) != 0 for seed in (1, 2, 1 + 2**40, 1)]
    assert torch.equal(masks[0], masks[3])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert 0.4 < float((masks[i] == masks[j]).double().mean()) < 0.6
    # rows, columns and neighbours are not alike
    signs = masks[0].double() * 2 - 1
    for a, b in ((signs[1:], signs[:-1]), (signs[:, 1:], signs[:, :-1])):
        assert abs(float((a * b).mean())) < 0.1


def dropout_case(backend, dtype, p, device="cpu", shapes=SHAPES):
    for rows, n, _ in shapes:
        x = draw(rows, n, dtype=dtype, device=device)
        with use_backend("reference"):
            wanted = lora_dropout(x, p, torch.tensor(77 + 2**35))
        with use_backend(backend):
            found = lora_dropout(x, p, torch.tensor(77 + 2**35))
        assert torch.equal(found, wanted)


def products_case(backend, dtype, p, device="cpu", shapes=SHAPES):
    for rows, n, r in shapes:
        x, a = draw(rows, n, dtype=dtype, device=device), draw(r, n, dtype=dtype, seed=1, device=device)
        e, b = draw(rows, r, dtype=dtype, seed=2, device=device), draw(n, r, dtype=dtype, seed=3, device=device).t()
        y, seed = draw(rows, n, dtype=dtype, seed=4, device=device), torch.tensor(9)
        untouched = [t.clone() for t in (x, a, e, b)]
        kept = lora_dropout(x.double(), p, seed)
        drop = lora_dropout(torch.ones_like(x.double()), p, seed)
        exact = (kept @ a.double().t(), e.double().t() @ kept, y.double() + 0.7 * drop * (e.double() @ b.double()))
        with use_backend(backend):
            found = (lora_down(x, a, p, seed), *lora_down_backward(x, e, a, p, seed))
            alone = lora_down_backward(x, e, None, p, seed)
            up = lora_up_(y, e, b, 0.7, p, seed)
        assert up is y and alone[1] is None
        assert torch.equal(found[0], found[2])
        sizes = (
            kept.abs() @ a.double().abs().t(),
            e.double().abs().t() @ kept.abs(),
            y.double().abs() + drop * (e.double().abs() @ b.double().abs()),
        )
        # roundings to the dtype of input, product and sum, relative to the sum of the terms' sizes
        for result, place in ((found[0], 0), (found[1], 1), (alone[0], 1), (y, 2)):
            size = float(sizes[place].max()) if sizes[place].numel() else 0.0
            torch.testing.assert_close(result.double(), exact[place], rtol=0, atol=3 * eps(dtype) * size + 1e-30)
        assert all(torch.equal(t, before) for t, before in zip((x, a, e, b), untouched, strict=True))


def scale_case(backend, dtype, device="cpu", shapes=SHAPES):
    for rows, m, _ in [*shapes, (300, 129, 1)]:
        y, g = draw(rows, m, dtype=dtype, device=device), draw(rows, m, dtype=dtype, seed=1, device=device)
        c, bias = draw(m, seed=2, device=device), draw(m, dtype=dtype, seed=3, device=device)
        strided = draw(m, 2, dtype=dtype, seed=4, device=device)[:, 0]
        results = []
        for name in ("reference", backend):
            with use_backend(name):
                scaled = (lora_scale_(y.clone(), c, added) for added in (None, bias, strided, strided[:1].expand(m)))
                results.append((*scaled, *lora_scale_backward(g, y, c)))
                results[-1] += lora_scale_backward(g, None, c)[:1]
                own = g.clone()
                over = lora_scale_backward(own, y, c, in_place=True)
                assert over[0] is own or not own.numel()
                results[-1] += over
        for found, wanted in zip(*results, strict=True):
            assert found.dtype == wanted.dtype
            torch.testing.assert_close(found, wanted, rtol=4 * eps(dtype), atol=1e-4)


def norms_case(backend, dtype, device="cpu", shapes=SHAPES):
    for m, n, r in [*shapes, (70, 128, 17), (100, 64, 1)]:
        # entries apart by factors of up to a thousand, which a product of 8 bits would not survive
        spread = draw(r, n, seed=4, device=device).mul_(2.3).exp_()
        w, a = draw(m, n, dtype=dtype, device=device), draw(r, n, seed=1, device=device) * spread
        b = draw(m, r, seed=2, device=device)
        if r == 1:
            # of a single product, the third part of A shows
            w[:, 1:], a[:, 1:] = 0, 0
        squares = w.float().square().sum(1)
        untouched = [t.clone() for t in (w, a, b, squares)]
        with use_backend(backend):
            found = lora_norms(w, a, b, 0.7, squares)
        exact = (w.double() + 0.7 * b.double() @ a.double()).norm(dim=1)
        assert found.dtype == torch.float32
        # of the squares that are summed, whose terms may cancel
        sizes = (w.double().abs() + 0.7 * b.double().abs() @ a.double().abs()).norm(dim=1).square()
        error = ((found.double().square() - exact.square()) / sizes.clamp(min=1e-30)).abs()
        assert not m or float(error.max()) < (5e-7 if r == 1 else 1e-6)
        assert all(torch.equal(t, before) for t, before in zip((w, a, b, squares), untouched, strict=True))


def swiglu_case(backend, dtype, device="cpu"):
    for shape in [(1,), (7, 3), (0, 4), (3, 1000), (2049,)]:
        g, e, u = (draw(*shape, dtype=dtype, seed=i, device=device).mul_(3) for i in range(3))
        edges = torch.tensor([-200.0, -88.0, 0.0, 30.0, 200.0, -1e-30, -6e4, -1e38, -3e38, -torch.inf], device=device)
        if backend == "triton":  # numpy warns of infinity times zero in the interpreter
            edges = edges[edges.to(dtype).isfinite()]
        if e.numel() > len(edges):
            e.view(-1)[: len(edges)] = edges.to(dtype)
        wide = [t.double().requires_grad_() for t in (e, u)]
        exact = torch.nn.functional.silu(wide[0]) * wide[1]
        gradients = torch.autograd.grad(exact, wide, g.double())
        with use_backend(backend):
            out = swiglu(e, u)
            again, de, du = swiglu_backward_(g, e, u)
            assert du is g
        for found, wanted in ((out, exact), (again, exact), (de, gradients[0]), (du, gradients[1])):
            # half a unit of rounding to the dtype, and a few of the fp32 arithmetic
            torch.testing.assert_close(found.double(), wanted.detach(), rtol=6 * eps(dtype), atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", CPP, ids=dtype_name)
def test_cpp(dtype, p, dirty_memory):
    dropout_case("cpp", dtype, p)
    products_case("cpp", dtype, p)


@pytest.mark.parametrize("dtype", CPP, ids=dtype_name)
def test_cpp_scale_and_swiglu(dtype, dirty_memory):
    scale_case("cpp", dtype)
    swiglu_case("cpp", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_reference(dtype):
    products_case("reference", dtype, 0.3)
    norms_case("reference", dtype)
    swiglu_case("reference", dtype)


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_triton_in_the_interpreter(dtype):
    dropout_case("triton", dtype, 0.3, shapes=FEW)
    products_case("triton", dtype, 0.3, shapes=FEW)
    scale_case("triton", dtype, shapes=FEW)
    norms_case("triton", dtype, shapes=FEW)
    swiglu_case("triton", dtype)


@pytest.mark.slow
@pytest.mark.interpret
def test_triton_takes_more_rows_than_one_grid(monkeypatch):
    from leanstep.kernels.triton_impl.lora import scale

    monkeypatch.setattr(scale, "MOST_PROGRAMS", 2)
    scale_case("triton", torch.float32, shapes=[(70, 66, 17), (1030, 3, 3)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_triton_on_a_device(dtype):
    dropout_case("triton", dtype, 0.3, "cuda")
    products_case("triton", dtype, 0.3, "cuda")
    scale_case("triton", dtype, "cuda")
    norms_case("triton", dtype, "cuda")
    swiglu_case("triton", dtype, "cuda")


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(
    "write",
    [
        lambda y: lora_scale_(y, torch.ones(5)),
        lambda y: lora_scale_backward(y, None, torch.ones(5), in_place=True),
        lambda y: lora_up_(y, torch.ones(4, 2), torch.ones(2, 5), 1.0),
        lambda y: lora_up_(y, torch.ones(4, 2), torch.ones(2, 5), 1.0, 0.5, torch.tensor(3)),
        lambda y: swiglu_backward_(y, torch.ones(4, 5), torch.ones(4, 5)),
    ],
    ids=["scale", "scale backward", "up", "up with dropout", "swiglu backward"],
)
def test_autograd_sees_what_is_written_in_place(backend, write):
    x = torch.ones(4, 5, requires_grad=True)
    saved = x.exp()  # whose gradient reads it
    with use_backend(backend):
        write(saved.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_results_do_not_depend_on_the_number_of_threads():
    x, c = draw(500, 300), draw(300, seed=1)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(
            (lora_dropout(x, 0.4, torch.tensor(1)), *lora_scale_backward(x, x, c), *swiglu_backward_(x.clone(), x, x))
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_index_counts_beyond_32_bits():
    from leanstep.kernels.reference.lora.products import seed_key
    from leanstep.kernels.reference.rounding import hash32

    high = hash32(torch.tensor([0, 1]), 0)
    assert int(high[0]) == 0 and int(high[1]) != 0
    # the key of a seed is the definition's hash
    for seed in (0, 1, 2**31, 2**62 - 1):
        wanted = hash32(torch.tensor(seed), hash32(torch.tensor(seed >> 32), 0))
        assert seed_key(seed) == int(wanted)


def test_cpp_takes_chunks_of_any_number():
    from leanstep.kernels.cpp_impl.lora import products as cpp
    from leanstep.kernels.reference.lora import products as reference

    # more rows than a piece has, and a last piece that is not whole
    x, a, e, b = draw(1100, 500), draw(4, 500, seed=1), draw(1100, 4, seed=2), draw(4, 500, seed=3)
    assert len(cpp._chunks(x)) > 2
    torch.testing.assert_close(cpp.lora_down(x, a, 0.3, 5), reference.lora_down(x, a, 0.3, 5), rtol=1e-4, atol=1e-4)
    for found, wanted in zip(
        cpp.lora_down_backward(x, e, a, 0.3, 5), reference.lora_down_backward(x, e, a, 0.3, 5), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    found, wanted = x.clone(), x.clone()
    cpp.lora_up_(found, e, b, 0.5, 0.3, 5)
    reference.lora_up_(wanted, e, b, 0.5, 0.3, 5)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_piece_across_an_index_of_32_bits():
    from leanstep.kernels.cpp_impl.lora import products as cpp
    from leanstep.kernels.reference.lora.products import seed_key, threshold
    from leanstep.kernels.reference.rounding import hash32

    first, size, p, seed = 2**32 - 700, 20000, 0.4, 11
    out = torch.empty(size)
    cpp._call("dropout", torch.ones(size), out, first, p, seed)
    index = torch.arange(first, first + size)
    hashed = hash32(index, seed_key(seed) ^ hash32(index >> 32, 0)).to(torch.int64) & 0xFFFFFFFF
    assert torch.equal(out > 0, hashed >= threshold(p))


def test_what_is_refused():
    x, seed = torch.ones(4, 3), torch.tensor(1)
    with pytest.raises(ValueError, match=r"lora_down: expected matrices that match, got \(4, 3\) and \(2, 4\)"):
        lora_down(x, torch.ones(2, 4))
    with pytest.raises(ValueError, match="of one floating dtype, got torch.float32 and torch.float64"):
        lora_down(x, torch.ones(2, 3).double())
    with pytest.raises(ValueError, match=r"expected a probability p in \[0, 1\], got 1.5"):
        lora_dropout(x, 1.5, seed)
    with pytest.raises(ValueError, match="dropout with p = 0.5 needs a seed"):
        lora_dropout(x, 0.5)
    with pytest.raises(ValueError, match="expected a row-major y where p > 0"):
        lora_up_(torch.ones(3, 4).t(), torch.ones(4, 2), torch.ones(2, 3), 1.0, 0.5, seed)
    with pytest.raises(ValueError, match="swiglu: expected tensors of one shape"):
        swiglu(x, torch.ones(4, 4))
    with pytest.raises(ValueError, match="lora_scale_: expected a matrix and torch.float32 factors"):
        lora_scale_(x, torch.ones(4))
    with pytest.raises(ValueError, match="lora_scale_: expected a bias"):
        lora_scale_(x, torch.ones(3), torch.ones(3).bfloat16())
    with pytest.raises(ValueError, match="lora_scale_backward: expected g and y alike"):
        lora_scale_backward(x, torch.ones(4, 4), torch.ones(3))
    with use_backend("cpp"), pytest.raises(BackendError, match="take fp32 and bf16, not float16"):
        lora_dropout(x.half(), 0.5, seed)


@pytest.mark.parametrize("p", [0.3])
def test_the_registered_operations_are_whole(p):
    x, a, e, seed = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2), torch.tensor(3)
    operations = torch.ops.leanstep
    for layout in (x, x.t(), x[:0].t()):
        torch.library.opcheck(operations.lora_dropout.default, (layout, p, seed))
    torch.library.opcheck(operations.lora_down.default, (x, a, p, seed))
    torch.library.opcheck(operations.lora_down_backward.default, (x, e, a, p, seed))
    torch.library.opcheck(operations.lora_up_.default, (torch.randn(6, 5), e, a, 0.5, p, seed))
