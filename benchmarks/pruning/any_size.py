"""Peak memory of pruning a checkpoint of 1.1 billion parameters from folder to folder, imports included.

    python benchmarks pruning/any_size FOLDER [--layers 22] [--samples 2] [--tokens 16] [--allocation uniform]
    python benchmarks pruning/any_size FOLDER --allocation dp --curves fisher --tokens 512
    python benchmarks pruning/any_size FOLDER --experts 64 --layers 4

FOLDER gets a LLaMA of random bf16 weights in the shape of TinyLlama, in shards of 500 MB, unless it is there, and is
pruned to half by Wanda into FOLDER-pruned, which is removed. The data is random tokens: how well the model is pruned is
not looked at. With ``--experts`` it is a mixture in the shape of OLMoE, whose experts are stored one by one, and which
transformers joins on loading. The peak is what the system counts as resident, pages of mapped files included.
"""

import json
import multiprocessing
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from common import command_line, peak_memory

PARSER = command_line(
    __doc__, layers=22, samples=2, tokens=16, allocation="uniform", score="wanda", curves=("fisher", "with dp"),
    levels=([0.3, 0.5, 0.7], "with dp"), experts=(0, "of a mixture; 0: a LLaMA"),
)  # fmt: skip
PARSER.add_argument("folder", metavar="FOLDER", type=Path)
_SHARD = 500_000_000


def main() -> None:
    """Make the model if it is not there, prune it, and print the peak."""
    options = PARSER.parse_args()
    if not options.folder.exists():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # whose memory does not count
            pool.submit(make, options.folder, options.layers, options.experts).result()
    import torch

    from leanstep.pruning import prune_checkpoint

    imports, clock, processor = peak_memory(), time.monotonic(), time.process_time()
    data = torch.randint(32000, (options.samples, options.tokens), generator=torch.Generator().manual_seed(0))
    out = options.folder.with_name(f"{options.folder.name}-pruned")
    by_curves = {"curves": options.curves, "levels": options.levels} if options.allocation == "dp" else {}
    result = prune_checkpoint(
        options.folder, out, data, held_out=False, sparsity=0.5, allocation=options.allocation, score=options.score,
        **by_curves,
    )  # fmt: skip
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    sparsity = json.loads((out / "sparsity.json").read_text())["sparsity"]  # result.sparsity would read all weights
    shutil.rmtree(out)
    print(f"weights         {size / 2**30:.2f} GiB, {sparsity:.3f} of {len(result.groups)} matrices zero")
    print(f"peak            {peak_memory() / 2**30:.2f} GiB, {imports / 2**30:.2f} GiB of it before pruning")
    print(f"processor time  {time.process_time() - processor:.0f} s, {time.monotonic() - clock:.0f} s by the clock")


def make(folder: Path, layers: int, experts: int) -> None:
    """Write the model, a shard in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    common = {"hidden_size": 2048, "num_hidden_layers": layers, "dtype": "bfloat16", "max_position_embeddings": 2048}
    if experts:
        config: LlamaConfig | OlmoeConfig = OlmoeConfig(
            vocab_size=50304, intermediate_size=1024, num_attention_heads=16, num_key_value_heads=16,
            num_experts=experts, num_experts_per_tok=8, architectures=["OlmoeForCausalLM"], **common,
        )  # fmt: skip
    else:
        config = LlamaConfig(
            vocab_size=32000, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4,
            architectures=["LlamaForCausalLM"], **common,
        )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = OlmoeForCausalLM(config) if experts else LlamaForCausalLM(config)
    shards: list[dict[str, torch.Size]] = [{}]
    for name, parameter in revert_weight_conversion(model, model.state_dict()).items():
        if 2 * (parameter.numel() + sum(shape.numel() for shape in shards[-1].values())) > _SHARD:
            shards.append({})
        shards[-1][name] = parameter.shape
    weight_map, generator = {}, torch.Generator().manual_seed(0)
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name, shape in shard.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
