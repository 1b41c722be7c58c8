"""Write a folder of a 1.1B LLaMA with random weights and zeros, to measure speed and memory on.

    python benchmarks sparsity/random_llama runs/llama-1b-60 --tokenizer runs/smollm2 [--sparsity 0.6]

The shape is TinyLlama's: 22 layers of width 2048, MLPs of 5632, 32 heads, 4 of them for keys and values. Vocabulary and
tokenizer come from another folder, because converters need one. A zero has the same chance everywhere in the matrices
of the blocks; the speed of generation depends on no value.
"""

from __future__ import annotations

from pathlib import Path

import torch
from common import DTYPES, command_line

PARSER = command_line(__doc__, sparsity=(0.0, "fraction of zeros; default: %(default)s"), layers=22)
PARSER.add_argument("folder", type=Path, help="the folder to create")
PARSER.add_argument("--tokenizer", type=Path, required=True, help="a folder with a tokenizer")
PARSER.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of the weights; default: %(default)s")


@torch.no_grad()
def main() -> None:
    """Make the folder."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    options = PARSER.parse_args()
    if options.folder.exists():
        raise SystemExit(f"{options.folder} exists")
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer, trust_remote_code=False)
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=2048, intermediate_size=5632, num_hidden_layers=options.layers, **heads,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, dtype=options.dtype,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, options.dtype))
    model = LlamaForCausalLM(config)
    for parameter in model.model.layers.parameters():
        if parameter.dim() == 2:
            parameter.masked_fill_(torch.rand(parameter.shape, dtype=torch.float32) < options.sparsity, 0.0)
    model.save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)
    print(f"{options.folder}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
