"""What pruning a checkpoint takes of memory: no copy of the model, and nothing of more than a block at once."""

import subprocess
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

PEAK = """
import sys
from pathlib import Path
import torch
from leanstep.pruning import prune_checkpoint

def peak():
    # of this process alone, where what resource tells begins with the size of the parent
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

def run(name):
    data = torch.arange(96).view(6, 16) % 64
    settings = {"levels": (0.5,)} if sys.argv[2] == "dp" else {}
    prune_checkpoint(
        Path(sys.argv[1]) / name, Path(sys.argv[1]) / f"{name} {sys.argv[2]}", data[:4], held_out=data[4:],
        curve_data=data[:1], sparsity=0.5, allocation=sys.argv[2], granularity=sys.argv[3], **settings,
    )

torch.set_num_threads(1)
run("small")
before = peak()
run("large")
print(peak() - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    models = tmp_path_factory.mktemp("memory")
    for name, hidden, layers in (("small", 32, 1), ("large", 512, 6)):
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=16,
        )
        LlamaForCausalLM(config).save_pretrained(models / name)
    return models


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("allocation, granularity", [("uniform", "matrix"), ("dp", "block")])
def test_pruning_a_checkpoint_takes_no_copy_of_it(allocation, granularity, folder):
    command = [sys.executable, "-P", "-c", PEAK, str(folder), allocation, granularity]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    size = (folder / "large" / "model.safetensors").stat().st_size
    # the model once, and some times the largest matrix (a copy of all pruned ones, and it is above 3)
    assert grown < 2.7 * size, grown / size
