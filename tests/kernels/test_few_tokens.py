"""Linear layers of few tokens: torch's results, by a loop where that is faster."""

from types import SimpleNamespace

import pytest
import torch
from emulated import compute_with
from kernel_cases import bits_equal, dtype_name

from leanstep.kernels import few_token_linear, use_backend
from leanstep.kernels.cpp_impl._build import why_not_cpp
from leanstep.kernels.cpp_impl.sparse import linear as cpp
from leanstep.kernels.matrices import few_tokens
from leanstep.sparsity import to_few_token_linear

needs_cpp = pytest.mark.skipif(why_not_cpp() is not None, reason=f"needs the C++ kernels: {why_not_cpp()}")


@needs_cpp
@pytest.mark.parametrize("instructions", cpp.INSTRUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
def test_products_against_float64(dtype, instructions, dirty_memory, monkeypatch):
    """Rows that end inside a vector, rows shorter than one, and tiles of 1 to 8 tokens."""
    compute_with(instructions, monkeypatch)
    for columns in (5, 64, 333, 1024):
        weight, bias = torch.randn(37, columns).to(dtype), torch.randn(37).to(dtype)
        for tokens in (1, 2, 3, 8, 11):
            x = torch.randn(tokens, columns).to(dtype)
            for b in (None, bias):
                with use_backend("cpp"):
                    product = few_token_linear(x, weight, b)
                exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
                if b is not None:
                    exact, size = exact + b.double(), size + b.double().abs()
                # rounded once to the dtype, after fp32 sums
                bound = torch.finfo(dtype).eps / 2 * exact.abs() * 1.01 + 1e-6 * size + torch.finfo(dtype).tiny
                assert product.dtype == dtype and product.shape == exact.shape
                assert ((product.double() - exact).abs() <= bound).all()


@needs_cpp
def test_the_loop_runs_for_one_token_of_bf16_and_torch_for_all_else(monkeypatch):
    calls = []
    loop = cpp.dense_linear
    monkeypatch.setattr(cpp, "dense_linear", lambda *arguments: calls.append(1) or loop(*arguments))
    monkeypatch.setattr(cpp, "is_faster_than_torch", lambda x, _: x.dtype is torch.bfloat16 and x.numel() == 96)
    weight, x = torch.randn(40, 96).bfloat16(), torch.randn(1, 1, 96).bfloat16()
    assert few_token_linear(x, weight).shape == (1, 1, 40) and len(calls) == 1
    parameter = torch.nn.Parameter(weight)
    with torch.no_grad():
        few_token_linear(x, parameter)
    assert len(calls) == 2
    compiled = torch.compile(few_token_linear, fullgraph=True, backend="eager")
    for product in (
        lambda: few_token_linear(x.expand(2, 1, 96), weight),
        lambda: few_token_linear(x.float(), weight.float()),
        lambda: few_token_linear(x, torch.randn(96, 40).bfloat16().t()),
        lambda: few_token_linear(x, parameter),
        lambda: compiled(x, weight),
    ):
        assert product().shape[-1] == 40 and len(calls) == 2
    with use_backend("reference"):
        bits_equal(few_token_linear(x, weight), torch.nn.functional.linear(x, weight))
    with torch.autocast("cpu"):
        assert few_token_linear(x.float(), weight.float()).dtype is torch.bfloat16
    assert len(calls) == 2
    few_token_linear(x, parameter).float().sum().backward()
    assert parameter.grad.abs().sum() > 0


@needs_cpp
@pytest.mark.parametrize(
    "run",
    [
        lambda layer, x: torch.jit.trace(layer, torch.zeros_like(x))(x),
        lambda layer, x: torch.fx.symbolic_trace(layer)(x),
        lambda layer, x: torch.export.export(layer, (torch.zeros_like(x),)).module()(x),
        lambda layer, x: torch.func.vmap(layer)(x),
        lambda layer, x: torch.func.jvp(layer, (x,), (x,))[0],
        lambda layer, x: layer(torch._neg_view(-x)),
    ],
    ids=["jit", "fx", "export", "vmap", "jvp", "negative"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@torch.no_grad()
def test_what_reads_no_memory_or_records_is_torchs(run, monkeypatch):
    """A recorded call must be a graph of torch's operations, not the numbers of one example."""
    monkeypatch.setattr(cpp, "is_faster_than_torch", lambda x, _: x.dtype is torch.bfloat16)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32)).bfloat16()
    x = torch.randn(1, 64).bfloat16()
    expected = model(x)
    to_few_token_linear(model)
    torch.testing.assert_close(run(model, x), expected, rtol=0.02, atol=0.02)


def test_torch_says_what_is_wrong():
    x, weight = torch.ones(1, 8).bfloat16(), torch.ones(3, 8).bfloat16()
    for arguments in ((x[:, :5], weight), (x.float(), weight), (x, weight, torch.ones(5).bfloat16())):
        with pytest.raises(RuntimeError) as raised:
            torch.nn.functional.linear(*arguments)
        with pytest.raises(RuntimeError) as ours:
            few_token_linear(*arguments)
        assert str(ours.value) == str(raised.value)
    assert not few_tokens._runs_loop(x[:0], weight, None)


@needs_cpp
def test_where_the_loop_is_taken_to_be_faster(monkeypatch):
    instructions, amx, mkl, weight = [cpp.BF16], [False], [None], torch.empty(2**13, 64)
    monkeypatch.setattr(cpp, "library", lambda *_: SimpleNamespace(instructions=lambda: instructions[0]))
    monkeypatch.setattr(cpp, "why_not_onednn", lambda: mkl[0])
    monkeypatch.setattr(cpp, "uses_instructions", lambda _: amx[0])

    def faster(dtype):
        x = torch.ones(9, 64, dtype=dtype)
        return [tokens for tokens in (1, 2, 8, 9) if cpp.is_faster_than_torch(x[:tokens], weight)]

    assert [faster(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16)] == [[1, 2, 8], [1, 2, 8], []]
    amx[0], mkl[0] = True, "MKL is made for this processor"
    assert [faster(dtype) for dtype in (torch.bfloat16, torch.float32)] == [[1], []]
    instructions[0] = cpp.AVX512
    assert not faster(torch.bfloat16)
    instructions[0], amx[0], mkl[0] = cpp.AVX2, False, None
    assert [faster(dtype) for dtype in (torch.bfloat16, torch.float32)] == [[], []]
    weight = torch.empty(2**14, 64)
    assert [faster(dtype) for dtype in (torch.bfloat16, torch.float32)] == [[1, 2, 8], []]
