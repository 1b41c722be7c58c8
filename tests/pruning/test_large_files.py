"""Weight files larger than the memory: the system maps them, and reading takes the tensors that are read."""

import json
import os
import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from pruned_models import make_llama, save_model, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from leanstep._checkpoint.files import TensorFile, load_tensors
from leanstep._checkpoint.mapped import mapped_storage
from leanstep.pruning.folder.files import open_checkpoint
from leanstep.pruning.folder.loading import load_model

OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
refusing = pytest.mark.skipif(
    not OVERCOMMIT.exists() or OVERCOMMIT.read_text().strip() != "0" or platform.machine() not in ("x86_64", "aarch64"),
    reason="needs Linux's usual rule, which refuses what is larger than the memory",
)


def write_with_a_hole(path, tensors, size):
    """A file of these tensors and of one of zeros, ``hole``, whose bytes take no space on the disk."""
    whole = save(tensors)
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    header["hole"] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [len(data), len(data) + size]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    os.truncate(path, 8 + len(text) + len(data) + size)


def memory():
    sizes = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * sum(int(sizes[name].split()[0]) for name in ("MemTotal", "SwapTotal"))


@refusing
def test_tensors_of_a_file_larger_than_the_memory_may_be_written_to(tmp_path):
    path = tmp_path / "model.safetensors"
    write_with_a_hole(path, {"small": torch.arange(4.0)}, 2 * memory())
    tensors = load_tensors(path)
    assert tensors["hole"][-3:].tolist() == [0, 0, 0] and tensors["hole"].nbytes == 2 * memory()
    for tensor in tensors.values():
        tensor[:2].fill_(7)
    assert load_tensors(path)["small"].tolist() == [0, 1, 2, 3]
    assert not load_tensors(path)["hole"][:4].any()
    # as parameters are once a model is pruned
    assert len(mapped_storage(path, shared=False)) == path.stat().st_size


@refusing
def test_a_model_in_a_file_larger_than_the_memory_is_loaded(tmp_path):
    model = make_llama(1)
    file = save_model(model, tmp_path / "in") / "model.safetensors"
    write_with_a_hole(file, load_file(file), 2 * memory())
    loaded = load_model(open_checkpoint(tmp_path / "in"))
    with torch.no_grad():
        assert torch.equal(loaded(tokens(2)).logits, model(tokens(2)).logits)
        next(loaded.parameters()).zero_()  # stays in memory
    again = load_model(open_checkpoint(tmp_path / "in"))
    assert torch.equal(next(again.parameters()), next(model.parameters()))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on writable memory")
def test_reading_asks_for_no_writable_memory_of_the_size_of_the_file(tmp_path):
    save_model(make_llama(1), tmp_path / "in")
    file = tmp_path / "in/model.safetensors"
    write_with_a_hole(file, load_file(file), 2**30)
    code = """
        import resource, sys
        from pathlib import Path
        from leanstep.pruning.folder.files import open_checkpoint
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        limit = 1024 * int(status["VmData"].split()[0]) + 2**28
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        checkpoint = open_checkpoint(sys.argv[1])
        assert checkpoint.tensor("model.safetensors", "hole").numel() == 2**28
        print(float(checkpoint.tensor("model.safetensors", "lm_head.weight").sum()))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "in")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == float(load_tensors(file)["lm_head.weight"].sum())


DTYPES = "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64"
FLOATS = "float8_e4m3fn float8_e5m2 float8_e8m0fnu float8_e4m3fnuz float8_e5m2fnuz float4_e2m1fn_x2"


@pytest.mark.parametrize("writable", [True, False])
def test_tensors_are_those_of_safetensors(tmp_path, writable):
    path = tmp_path / "x.safetensors"
    random = torch.randint(2, (3, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tensors = {name: random.clone().view(getattr(torch, name)) for name in f"{DTYPES} {FLOATS}".split()}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(3.0), "odd": torch.ones(3, dtype=torch.uint8)}
    save_file(tensors, path, metadata={"a": "b"})
    with TensorFile(path, writable=writable) as file, safe_open(path, "pt") as expected:
        assert file.metadata == {"a": "b"} and file.names == tuple(expected.keys())
        for name in file.names:
            with torch.device("meta"):  # as transformers does while it makes a model
                tensor = file.tensor(name)
            wanted = expected.get_tensor(name)
            assert tensor.device == wanted.device
            assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape) == (tensors[name].dtype, wanted.shape)
            assert torch.equal(*(one.reshape(-1).view(torch.uint8) for one in (tensor, wanted)))
            assert file.dtype(name) == expected.get_slice(name).get_dtype()
    with TensorFile(path) as file, pytest.raises(ValueError, match="is damaged.*no_such"):
        file.tensor("no_such")
