"""Which backend runs, why, and what happens when the one asked for cannot."""

import threading

import pytest
import torch

from leanstep.kernels import BackendError, StepOptions, backend_table, lion_step, newton_schulz, sinkhorn, use_backend
from leanstep.kernels._backend import OPS, Support, choose
from leanstep.kernels.cpp_impl._build import group_by_dtypes, is_dense, same_layout
from leanstep.kernels.op import op
from leanstep.optimizers import SinkGD


def lion_arguments(dtype=torch.float32):
    tensors = [[torch.ones(4, dtype=dtype)] for _ in range(3)]
    scalars = torch.tensor([0.1, 1.0, 0.9, 0.1, 0.99, 0.01], dtype=torch.float64 if dtype == torch.float64 else None)
    return *tensors, [], StepOptions(scalars)


def test_blocks_nest_and_reset():
    cpu = torch.device("cpu")
    with use_backend("reference"):
        assert choose("lion_step", cpu) == ("reference", "asked for with use_backend")
        with use_backend("cpp"):
            assert choose("lion_step", cpu).backend == "cpp"
        assert choose("lion_step", cpu).backend == "reference"
        with pytest.raises(KeyError), use_backend("auto"):
            raise KeyError
        assert choose("lion_step", cpu).backend == "reference"
        # another thread has not asked for anything
        seen = []
        thread = threading.Thread(target=lambda: seen.append(choose("lion_step", cpu).reason))
        thread.start()
        thread.join()
        assert seen != ["asked for with use_backend"]
    assert choose("lion_step", cpu).reason != "asked for with use_backend"


@pytest.mark.parametrize("name", ["cuda", "compiled"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match=f"'reference', 'cpp', 'triton'.*got '{name}'"), use_backend(name):
        pass


def test_a_backend_that_an_op_does_not_have_is_refused():
    with use_backend("cpp"), pytest.raises(BackendError, match="newton_schulz has no cpp implementation"):
        newton_schulz([torch.ones(2, 2)])


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    args = lion_arguments()
    with use_backend("triton"):
        with pytest.raises(BackendError, match="lion_step.*'triton'.*cpu.*GPU"):
            lion_step(*args)
        with pytest.raises(BackendError, match="sinkhorn.*GPU"):
            sinkhorn([torch.ones(2, 2)], 1)
    assert torch.equal(args[0][0], torch.ones(4))
    monkeypatch.setattr("leanstep.kernels._backend.has_triton", lambda: False)
    with use_backend("triton"), pytest.raises(BackendError, match="not installed"):
        lion_step(*args)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_whole_step_runs_on_one_backend(backend):
    """Parts of it that are torch's own on most backends do not stand in the way."""
    params = [torch.nn.Parameter(torch.ones(8, 4)), torch.nn.Parameter(torch.ones(4))]
    groups = [{"params": [p], "algorithm": a} for p, a in zip(params, ("sinkgd", "adamw"), strict=True)]
    optimizer = SinkGD(groups, lr=1e-2)
    for p in params:
        p.grad = torch.ones_like(p)
    with use_backend(backend):
        optimizer.step()
        assert choose("adamw_step", torch.device("cpu")).backend == ("cpp" if backend == "cpp" else "reference")
    assert all((p < 1).all() for p in params)


def test_without_a_compiler_the_definition_runs(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    for name, device, backend, reason in backend_table():
        if device != "cpu":
            continue
        products = name in ("newton_schulz", "nuclear_norm", "lora_norms")  # they need no compiler
        assert backend == "reference" and ("BLAS" if products else "no C++ compiler") in reason
    args = lion_arguments()
    lion_step(*args)
    assert torch.equal(args[0][0], torch.full((4,), 0.9))
    with use_backend("cpp"), pytest.raises(BackendError, match="no C\\+\\+ compiler"):
        lion_step(*args)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert choose("lion_step", torch.device("cpu")).backend == "reference"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_list_with_a_float64_tensor_runs_the_definition(device):
    for dtypes in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        assert choose("sinkhorn", torch.device(device), *dtypes).reason.startswith("float64 is for checking")


def test_the_table_covers_every_op():
    assert {"lion_step", "row_dots", "lora_up", "lora_swiglu", "few_token_linear", "sinkhorn"} < set(OPS)
    assert {row[0] for row in backend_table()} == set(OPS) and all(reason for *_, reason in backend_table())
    assert choose("lion_step", torch.device("cpu"), torch.float64).backend == "reference"


def test_an_op_is_said_once(monkeypatch):
    """A new one in a few lines: its row of the table, its schema, and the versions of what it writes."""
    monkeypatch.setattr("leanstep.kernels.op.OPS", rows := {})

    @op("toy_axpy_", Support(("reference",)), mutates=["y"])
    def axpy_(a: float, x: torch.Tensor, y: torch.Tensor) -> None:
        y.numpy()[:] += a * x.numpy()  # as a kernel writes

    x, y = torch.ones(3), torch.zeros(3)
    version = y._version
    axpy_(2.0, x, y)
    assert y.tolist() == [2.0] * 3 and y._version > version and rows == {"toy_axpy": (("reference",), *Support()[1:])}
    torch.compile(axpy_, backend="aot_eager", fullgraph=True)(2.0, x, y)
    assert y.tolist() == [4.0] * 3
    torch.library.opcheck(torch.ops.leanstep.toy_axpy_.default, (2.0, x, y))


def test_layouts():
    x = torch.zeros(4, 6)
    assert is_dense(x) and is_dense(x.t()) and is_dense(torch.zeros(())) and is_dense(torch.zeros(3, 1, 2).mT)
    assert not is_dense(x[:, ::2]) and not is_dense(x[:, :3]) and not is_dense(torch.zeros(1, 6).expand(4, 6))
    y, z = torch.zeros(4, 6), torch.zeros(6, 4).t()
    assert same_layout([x, y])
    assert not same_layout([x, z])
    assert same_layout([z, torch.zeros(6, 4).t()])


def test_groups_by_dtypes():
    low, wide = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    lists = [[wide, low, wide, wide], [wide, wide, low, wide]]
    assert group_by_dtypes(lists, [True, True, True, True]) == [[0, 3], [1], [2]]
    assert group_by_dtypes(lists, [False, True, False, True]) == [[1], [3]]
