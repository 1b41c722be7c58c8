"""The C++ kernels: built once, shared by processes, the same on any number of threads, honest when they cannot be."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from leanstep.kernels import StepOptions, lion_step, scaled_step, sinkhorn, sinkhorn_step, use_backend
from leanstep.kernels._backend import choose
from leanstep.kernels.cpp_impl import _build
from leanstep.kernels.steps.common import nonfinite_flags

SCALARS = torch.tensor([0.1, 1.0, 0.9, 0.1, 0.99, 0.01])


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    """An empty cache folder, and no library in memory."""
    monkeypatch.setenv("LEANSTEP_CACHE", str(tmp_path / "cache"))
    for cached in (_build._library, _build._why_it_fails):
        cached.cache_clear()
    yield tmp_path / "cache" / "cpp"
    for cached in (_build._library, _build._why_it_fails):
        cached.cache_clear()


def libraries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_variant_is_built_once_and_found_by_another_process(fresh_cache):
    macros = {"TENSOR": "bf16"}
    _build.library("steps/nonfinite_flags", macros)
    built = libraries(fresh_cache)
    assert len(built) == 1 and built[0].startswith("steps-nonfinite_flags-")
    stamp = (fresh_cache / built[0]).stat().st_mtime_ns
    program = (
        "from leanstep.kernels.cpp_impl import _build; _build.library('steps/nonfinite_flags', {'TENSOR': 'bf16'})"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True, timeout=120)
    assert libraries(fresh_cache) == built
    assert (fresh_cache / built[0]).stat().st_mtime_ns == stamp


def test_processes_that_build_at_one_time_do_not_meet(fresh_cache):
    program = (
        "import torch; from leanstep.kernels.steps.common import nonfinite_flags as f;"
        "assert f([torch.tensor([1.0, float('nan')]), torch.ones(3)]).tolist() == [1, 0]"
    )
    together = [subprocess.Popen([sys.executable, "-P", "-c", program]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in together] == [0, 0, 0]
    assert len(libraries(fresh_cache)) == 1


def test_a_broken_compiler_is_named_and_not_used(fresh_cache, tmp_path, monkeypatch):
    broken = tmp_path / "c++broken"
    broken.write_text("#!/bin/sh\necho 'license expired' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(_build.BuildError, match="license expired"):
        _build.library("steps/nonfinite_flags", {"TENSOR": "float"})
    choice = choose("nonfinite_flags", torch.device("cpu"), torch.float32)
    assert choice.backend == "reference" and "license expired" in choice.reason
    assert not libraries(fresh_cache)


def test_a_read_only_cache_folder_is_replaced(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("LEANSTEP_CACHE", str(file / "inside"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert _build.cache_folder().parent == tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_nonfinite_flags(dtype, value):
    tensors = [torch.randn(70000).to(dtype), torch.randn(0).to(dtype), torch.randn(9, 8)[:, ::3].to(dtype)]
    tensors += [torch.full((5,), torch.finfo(dtype).max, dtype=dtype), torch.randn(40, 30).to(dtype).t()]
    with use_backend("cpp"):
        assert nonfinite_flags(tensors).tolist() == [0, 0, 0, 0, 0]
        for i, position in ((0, (69999,)), (2, (8, 2)), (4, (29, 0))):
            spoiled = [t.clone() for t in tensors]
            spoiled[i][position] = value
            assert nonfinite_flags(spoiled).tolist() == [int(j == i) for j in range(5)]


def test_the_number_of_threads_changes_no_bit():
    """Large matrices are cut by rows and small ones taken whole, by any thread."""
    generator = torch.Generator().manual_seed(0)
    mats = [torch.randn(4096, 1200, generator=generator), *(torch.randn(64, 90, generator=generator) for _ in range(5))]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with use_backend("cpp"):
                scales = sinkhorn(mats, 3)
                param, momentum = mats[0].clone(), torch.zeros_like(mats[0])
                lion_step([param], [mats[0]], [momentum], [], StepOptions(SCALARS))
            results.append([scales.flat_rows, scales.flat_cols, param, momentum])
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


def test_a_large_matrix_has_the_scales_of_the_definition():
    """Shared by the threads, with sums over thousands of rows."""
    mat = torch.randn(5000, 1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 1000)
    with use_backend("reference"):
        want = sinkhorn([mat.double()], 5, end_with_rows=True)
    with use_backend("cpp"):
        got = sinkhorn([mat], 5, end_with_rows=True)
    torch.testing.assert_close(got.rows[0].double(), want.rows[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(got.cols[0].double(), want.cols[0], rtol=1e-5, atol=0)


def test_torch_and_the_kernels_share_one_openmp_runtime():
    """Two runtimes would be two pools of threads."""
    _build.library("steps/nonfinite_flags", {"TENSOR": "float"})
    mapped = {
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "libgomp" in line or "libomp" in line
    }
    assert len(mapped) == 1


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan", "master"])
def test_scales_and_update_in_one_call_have_the_bits_of_two(rounding):
    """Stacks, a matrix that the threads share, one that is not finite, empty ones and strides among them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 90), (3, 8, 20), (2100, 1000), (5, 7), (30, 40)]

    def run(one_call, extra_shapes=()):
        generator.manual_seed(1)
        params = [torch.randn(s, generator=generator).bfloat16() for s in (*shapes, *extra_shapes)]
        mats = [torch.randn(s, generator=generator).bfloat16() for s in (*shapes, *extra_shapes)]
        mats[1][1, 2, 3] = float("nan")
        states = {"kahan": [torch.zeros_like(p) for p in params], "master": [p.float() for p in params]}.get(
            rounding, []
        )
        options = StepOptions(torch.tensor([0.125, 0.75]), rounding)
        if rounding == "stochastic":
            options = options._replace(seeds=torch.arange(len(params)) + 5, offsets=torch.arange(len(params)) * 100)
        with use_backend("cpp"):
            if one_call:
                flags = sinkhorn_step(params, mats, states, options, num_iters=3, end_with_rows=True)
            else:
                scales = sinkhorn(mats, 3, end_with_rows=True)
                flags = scaled_step(params, mats, scales.rows, scales.cols, states, options)
        return [flags, *params, *states]

    for more in ((), ((0, 5), (5, 0))):  # empty ones take the way of two calls
        for one, two in zip(run(True, more), run(False, more), strict=True):
            assert torch.equal(one, two)
    assert run(True)[0].tolist() == [0, 1, 0, 0, 0]
