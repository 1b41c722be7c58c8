"""Triton's interpreter without its repeated work (tests/helpers/interpreter_speed.py)."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def _scaled_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for _ in range(3):
        tl.store(y_ptr + offs, _twice(_twice(tl.load(x_ptr + offs, mask=offs < n))), mask=offs < n)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_only_a_launch_patches_the_language(monkeypatch, dtype):
    from triton.runtime import interpreter

    patched = []
    patch = interpreter._patch_builtin
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *args: (patched.append(args[0]), patch(*args)))
    before = {name: vars(tl.tensor)[name] for name in ("__add__", "__getitem__")}
    counts = []
    for programs in (1, 4):  # 6 calls of the device function each
        x, y = torch.arange(10).to(dtype), torch.zeros(10, dtype=dtype)
        patched.clear()
        _scaled_kernel[(programs,)](x, y, 10, BLOCK=16 // programs)
        counts.append(len(patched))
        assert torch.equal(y, 4 * x)
        # the launch takes back what it patched
        assert all(vars(tl.tensor)[name] is value for name, value in before.items())
    assert counts[0] == counts[1] <= 4
