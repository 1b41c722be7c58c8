"""Adapter folders: a damaged one is refused and the model left as it was, or loaded whole and finite."""

import copy

import pytest
import torch
from fuzzing import ENTRIES, damaged, fuzz, json_files, judged, plant, safetensors_files, write
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import nn

from leanstep.lora import LoraConfig, apply_lora, load_adapter, save_adapter
from leanstep.lora.peft.files import CONFIG, OLD_WEIGHTS, WEIGHTS


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.second(self.first(x)).relu())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    (root / "outside").mkdir()
    torch.manual_seed(0)
    model = apply_lora(Base(), LoraConfig(r=2, target_modules=["first", "second"], modules_to_save=["head"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save_adapter(model, root / "adapter")
    return root


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


BASE = Base()
INPUTS = torch.linspace(-1, 1, 24).view(3, 8)


def check(folder, source=None):
    """Load the adapter into a fresh model; other numbers in a file without checksums are another adapter."""
    source = source or folder / "adapter"
    model, before = copy.deepcopy(BASE), state_of(BASE)

    def right(model):
        state = state_of(model)
        assert all(bool(value.isfinite().all()) for value in state.values())
        # the base is unchanged, but for the head that the adapter has whole
        assert all(torch.equal(state[name], value) for name, value in before.items() if not name.startswith("head"))
        return equal(state, expected) and torch.equal(model(INPUTS), output)

    expected_model = load_adapter(copy.deepcopy(BASE), folder / "whole")
    expected, output = state_of(expected_model), expected_model(INPUTS)
    read = judged("adapters", lambda: load_adapter(model, source), right, outside=folder / "outside")
    assert read or equal(state_of(model), before), "a refused adapter changed the model"
    return read


@pytest.fixture(scope="module", autouse=True)
def whole(folder):
    (folder / "whole").mkdir()
    for path in (folder / "adapter").iterdir():
        (folder / "whole" / path.name).write_bytes(path.read_bytes())


@given(data=st.data())
@fuzz(150)
def test_damaged_adapters(folder, data):
    name = data.draw(st.sampled_from((CONFIG, WEIGHTS)))
    path = folder / "adapter" / name
    content = path.read_bytes()
    write(path, data.draw(json_files(content) if name == CONFIG else safetensors_files(content)))
    try:
        check(folder)
    finally:
        write(path, content)


DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn)


@given(data=st.data())
@fuzz(80)
def test_other_tensors(folder, data):
    """Swapped, renamed, converted, reshaped, missing and additional tensors."""
    path = folder / "adapter" / WEIGHTS
    content, tensors = path.read_bytes(), load_file(path)
    names = sorted(tensors)
    for _ in range(data.draw(st.integers(1, 3))):
        one, other = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(names))
        action = data.draw(st.sampled_from(("swap", "rename", "dtype", "shape", "value", "drop")))
        if one not in tensors or other not in tensors:
            continue
        if action == "swap":
            tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()
        elif action == "rename":
            end = data.draw(st.sampled_from(("", ".weight", ".original_module.bias", ".default")))
            tensors[other + end] = tensors.pop(one)
        elif action == "dtype":
            dtype = data.draw(st.sampled_from(DTYPES))
            tensors[one] = (tensors[one].real if tensors[one].is_complex() else tensors[one]).to(dtype)
        elif action == "shape":
            shape = data.draw(st.sampled_from(("flat", "cut", "deeper")))
            tensor = tensors[one]
            shapes = {"flat": tensor.flatten(), "cut": tensor.flatten()[:1], "deeper": tensor[None]}
            tensors[one] = shapes[shape].contiguous()
        elif action == "value" and tensors[one].is_floating_point() and tensors[one].numel():
            tensors[one] = tensors[one].float().clone()
            tensors[one].view(-1)[0] = data.draw(st.sampled_from((float("nan"), float("inf"), 1e30, -0.0)))
        else:
            del tensors[one]
    write(path, save(tensors))
    try:
        check(folder)
    finally:
        write(path, content)


@given(data=st.data())
@fuzz(40)
def test_damaged_files_of_torch(folder, data):
    source = folder / "old"
    source.mkdir(exist_ok=True)
    write(source / CONFIG, (folder / "adapter" / CONFIG).read_bytes())
    torch.save(load_file(folder / "adapter" / WEIGHTS), source / "content")
    write(source / OLD_WEIGHTS, data.draw(damaged((source / "content").read_bytes())))
    check(folder, source)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_nothing_but_a_file_is_read(folder, tmp_path, name, entry):
    for source in (folder / "whole").iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    plant(tmp_path / name, entry, tmp_path.with_name("outside"))
    assert not check(folder, tmp_path)
