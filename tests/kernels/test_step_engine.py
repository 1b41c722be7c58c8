"""A new elementwise rule is a definition, a declaration and a tile: here sign descent, p <- p - lr * sign(g)."""

import sys
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from leanstep.kernels import BackendError, StepOptions, use_backend
from leanstep.kernels._backend import OPS, Support
from leanstep.kernels.steps.engine import declare_step
from leanstep.kernels.triton_impl._common import TL_DTYPE, load_tile, round_to, to_float
from leanstep.kernels.triton_impl.steps.engine import Table, over_elements, program_of

BLOCK = 16


def definition(tensors, options):
    param, grad = tensors
    param.copy_(param.to(options.scalars.dtype) - options.scalars[0] * grad.sign())
    return (~torch.isfinite(grad)).any()


@triton.jit
def tile(pointers, offs, mask, lr, _, META: tl.constexpr):
    g = to_float(load_tile(pointers[1] + offs, mask))
    sign = tl.where(g > 0, 1.0, 0.0) - tl.where(g < 0, 1.0, 0.0)
    p = to_float(load_tile(pointers[0] + offs, mask)) - lr * sign
    tl.store(pointers[0] + offs, round_to(p, META[0]), mask=mask)
    return (~(tl.abs(g) < float("inf"))).to(tl.int32)


@triton.jit
def kernel(rows, programs, scalars, flags, P: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr):
    row, start, count, i = program_of(rows, programs, 2, 1, 2 * BLOCK)
    DTYPES: tl.constexpr = (P, G)
    META: tl.constexpr = (P,)
    if over_elements(tile, row, start, count, tl.load(scalars), (), DTYPES, META, False, BLOCK) != 0:
        tl.store(flags + i, 1)


def launcher(lists, options):
    flags = torch.zeros(len(lists[0]), dtype=torch.int32)
    table = Table(options.scalars.device)
    for p, g in zip(*lists, strict=True):
        table.add((p.dtype, g.dtype), (table.staging.write(p), table.staging.read(g)), 2 * BLOCK)
    for dtypes, launch in table.launches(kernel):
        launch(options.scalars, flags, *(TL_DTYPE[d] for d in dtypes), BLOCK=BLOCK)
    return flags


sign_step = declare_step(
    "leanstep.kernels.steps.toy",
    "toy_sign_step",
    lists="params! grads",
    floats=2,
    options=("scalars",),
    result=torch.int32,
    cpp=lambda *_: None,
    definition=definition,
)


@pytest.fixture
def declared(monkeypatch):
    monkeypatch.setitem(OPS, "toy_sign_step", Support(("reference", "triton")))
    monkeypatch.setitem(sys.modules, "leanstep.kernels.triton_impl.steps.toy", SimpleNamespace(toy_sign_step=launcher))


def problem():
    chance = torch.Generator().manual_seed(0)
    shapes = ((), (0, 3), (5,), (7, 33), (2, 3, 40))
    params, grads = ([torch.randn(s, generator=chance).bfloat16() for s in shapes] for _ in range(2))
    params[3] = params[3].t().contiguous().t()
    grads[4][1, 2, 3] = float("inf")
    return [params, [g.float() for g in grads]], StepOptions(torch.tensor([0.25]))


@pytest.mark.interpret
def test_the_tile_has_the_bits_of_the_definition(declared):
    (params, grads), options = problem()
    wanted = [p.clone() for p in params]
    for pair in zip(wanted, grads, strict=True):
        definition(pair, options)
    assert launcher([params, grads], options).tolist() == [0, 0, 0, 0, 1]
    assert all(torch.equal(*pair) for pair in zip(params, wanted, strict=True))


def test_a_declared_step_runs_eagerly_and_compiled_and_says_what_is_wrong(declared):
    lists, options = problem()
    version = lists[0][4]._version
    assert sign_step(lists, options).tolist() == [0, 0, 0, 0, 1] and lists[0][4]._version > version
    compiled = torch.compile(lambda *given: sign_step(given, options), backend="aot_eager", fullgraph=True)
    assert compiled(*lists).tolist() == [0, 0, 0, 0, 1]
    torch.library.opcheck(torch.ops.leanstep.toy_sign_step.default, (*lists, options.scalars))
    assert sign_step([[], []], options).shape == (0,)
    with pytest.raises(
        ValueError, match=r"toy_sign_step: expected tensors of one shape at index 0, got \(2,\), \(3,\)"
    ):
        sign_step([[torch.zeros(2)], [torch.zeros(3)]], options)
    with use_backend("triton"), pytest.raises(BackendError, match="toy_sign_step"):
        sign_step(lists, options)
