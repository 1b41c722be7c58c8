"""What pruning a checkpoint takes of memory: the resident part of its weights, and some times its largest matrix."""

import subprocess
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from leanstep.pruning import Workload, estimate_pruning
from leanstep.pruning.folder.files import open_checkpoint

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
    # without time to prune matrices one by one on held-out data, which takes no more memory than the curves do
    settings = {"levels": (0.5,), "curves": "measured", "minutes": 1e-9} if sys.argv[2] == "dp" else {}
    prune_checkpoint(
        Path(sys.argv[1]) / name, Path(sys.argv[1]) / " ".join([name, *sys.argv[2:]]), data[:4], held_out=data[4:],
        curve_data=data[:1], sparsity=0.5, allocation=sys.argv[2], granularity=sys.argv[3],
        resident=int(sys.argv[4]), **settings,
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
    for name, hidden, layers in (("small", 32, 1), ("large", 256, 24)):
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
@pytest.mark.parametrize("granularity", ["matrix", "block"])
def test_memory_is_bounded_by_a_block_and_not_by_the_model(granularity, folder):
    """The program prunes by uniform sparsity too, to compare with it."""
    command = [sys.executable, "-P", "-c", PEAK, str(folder), "dp", granularity, str(2**20)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    size = (folder / "large" / "model.safetensors").stat().st_size
    # one matrix of a model of 24 blocks and its ranking; or those of one block, about ten times its size (measured 0.4)
    assert grown < 0.6 * size, grown / size


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_experts_that_transformers_joins_are_in_memory_one_layer_at_a_time(tmp_path):
    for name, hidden, layers in (("small", 32, 1), ("large", 192, 16)):
        config = MixtralConfig(
            vocab_size=64,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_local_experts=4,
            max_position_embeddings=16,
        )
        MixtralForCausalLM(config).save_pretrained(tmp_path / name)
    command = [sys.executable, "-P", "-c", PEAK, str(tmp_path), "uniform", "matrix", str(2**20)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    # what is joined, split and written leaves the memory at once (measured 0.3)
    assert grown < 0.6 * size, grown / size


SEARCH = PEAK.replace("curve_data=data[:1],", "curve_data=data[:1], activations=sys.argv[5], **more,").replace(
    "def run(name):",
    """from leanstep.pruning import Refinement
torch.manual_seed(0)
more = {"refine": Refinement(evaluations=1, data=torch.arange(32).view(2, 16) % 64)}
def run(name):""",
)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_of_a_search_in_files_is_bounded_by_a_matrix(folder):
    command = [sys.executable, "-P", "-c", SEARCH, str(folder), "dp", "matrix", str(2**23), "disk"]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    size = (folder / "large" / "model.safetensors").stat().st_size
    # two bounds of 8 MiB, and what a matrix takes (measured 0.46)
    assert grown < 0.6 * size, grown / size
    checkpoint = open_checkpoint(folder / "large")
    workload = {"samples": 4, "curve_samples": 1, "held_out": 2, "tokens": 16, "refine_samples": 2, "resident": 2**23}
    counted = {}
    for activations in ("memory", "disk"):
        estimate = estimate_pruning(checkpoint, folder / "o", Workload(activations=activations, **workload))
        counted[activations] = sum(size for use, size in estimate.memory.items() if use != "libraries")
    # in memory pruners, gradients and replaced weights of all matrices
    assert counted["memory"] > 2.5 * size and 0.9 * grown < counted["disk"] < 0.8 * size, (counted, grown, size)
    assert estimate.disk["gradients of all matrices"] > 0.9 * size < 1.1 * estimate.disk["replaced weights"]
