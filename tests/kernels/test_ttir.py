"""The rung "ttir" of the audit gives a launch the memory behind its tables, and finds a planted fault."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from planted import planted

from leanstep.kernels.triton_impl._checks import execution
from leanstep.kernels.triton_impl._checks.operations import MODULES, OPERATIONS

pytest.importorskip("triton")


def test_every_operation_runs_the_kernels_of_one_module():
    assert sorted(name for names in MODULES.values() for name in names) == sorted(OPERATIONS)


def test_a_table_means_the_storages_of_tensors_that_were_asked_for_their_address():
    tables = execution.Tables()
    x, y, argument = torch.zeros(6), torch.zeros(4), torch.zeros(3)
    first, second = (tables.data_ptr(tensor) for tensor in (x[2:], y))
    tables.data_ptr(argument)
    table = torch.tensor([first, second + 4, argument.data_ptr(), 6])
    bound = {"table": table, "argument": argument, "size": 6}
    tables.read(SimpleNamespace(bound=bound, bases={"argument": argument.data_ptr()}))
    assert tables.storages == {(x.data_ptr(), 24), (y.data_ptr(), 16)}


def test_the_code_of_a_kernel_is_right_and_a_store_without_its_mask_is_found(tmp_path, monkeypatch):
    pytest.importorskip("ttsem")
    answer = torch.cuda.is_available
    verdicts = [(proof.kernel, proof.label, proof.verdict) for proof in execution.execute("swiglu", "sm_90")]
    assert verdicts == [(f"swiglu_{name}kernel", "bfloat16", "right") for name in ("", "backward_")]
    swiglu = importlib.import_module("leanstep.kernels.triton_impl.lora.swiglu")
    assert torch.cuda.is_available is answer  # ttsem's is gone
    changed = planted(swiglu, r"(tl\.store\([^\n]*), mask=[^\n]*\)\n", r"\1)\n", 0, tmp_path)
    monkeypatch.setattr(swiglu, "swiglu_kernel", changed.swiglu_kernel)
    (proof,) = execution.execute("swiglu", "sm_90")
    assert (proof.kernel, proof.verdict) == ("swiglu_kernel", "wrong") and "past the end of the tensor" in proof.reason
