"""`python benchmarks device/ttir` gives a launch the memory behind its tables, and finds a planted fault."""

import importlib
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture
def ttir(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from device import ttir

    return ttir


@pytest.mark.parametrize("found", ["none", "0.0.1"])
def test_another_version_is_named_and_nothing_is_executed(ttir, found, monkeypatch, capsys):
    def version(_):
        if found == "none":
            raise PackageNotFoundError
        return found

    monkeypatch.setattr(ttir, "version", version)
    monkeypatch.setattr("sys.argv", ["ttir"])
    assert ttir.main() == 2
    assert f"expected ttsem 0.1.0, found {found}" in capsys.readouterr().out


def test_a_table_means_the_storages_of_tensors_that_were_asked_for_their_address(ttir):
    tables = ttir.Tables()
    x, y, argument = torch.zeros(6), torch.zeros(4), torch.zeros(3)
    first, second = (tables.data_ptr(tensor) for tensor in (x[2:], y))
    tables.data_ptr(argument)
    table = torch.tensor([first, second + 4, argument.data_ptr(), 6])
    bound = {"table": table, "argument": argument, "size": 6}
    tables.read(SimpleNamespace(bound=bound, bases={"argument": argument.data_ptr()}))
    assert tables.storages == {(x.data_ptr(), 24), (y.data_ptr(), 16)}


def test_the_code_of_a_kernel_is_right_and_a_store_without_its_mask_is_found(ttir, tmp_path, monkeypatch):
    pytest.importorskip("ttsem")
    from device.planted import FAULTS
    from planted import planted

    assert ttir.executed("swiglu")[1:] == [2, "right", ""]
    swiglu = importlib.import_module("leanstep.kernels.triton_impl.lora.swiglu")
    changed = planted(swiglu, *FAULTS["mask of a store dropped"], 0, tmp_path)
    monkeypatch.setattr(swiglu, "swiglu_kernel", changed.swiglu_kernel)
    kernel, _, verdict, reason = ttir.executed("swiglu")
    assert (kernel, verdict) == ("swiglu_kernel", "wrong") and "past the end of the tensor" in reason
