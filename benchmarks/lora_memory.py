"""Bytes that adapters add to what autograd keeps, beside PEFT's.

    python -P benchmarks/lora_memory.py

The model is a small LLaMA with adapters on all seven linear layers of each block. Counted are the distinct storages
that autograd saves in one forward pass, parameters left out: the model with adapters minus the frozen model with
gradients of its embeddings. A fused SwiGLU block keeps less than the frozen model's does: numbers can be negative.
Needs peft (pip install 'leanstep[bench]').
"""

import argparse
import copy
import sys

import peft
import torch
import transformers

from leanstep.lora import LoraConfig, accelerate_peft, apply_lora, saved_bytes

VARIANTS = {
    "plain": {},
    "dropout": {"lora_dropout": 0.1},
    "DoRA": {"use_dora": True},
    "DoRA, dropout": {"use_dora": True, "lora_dropout": 0.1},
}
AIMS = {("bf16", "plain"): 0.30, ("bf16", "dropout"): 0.17, ("bf16", "DoRA"): 0.20, ("fp32", "plain"): 1.0}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--mlp", type=int, default=352)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--check", action="store_true", help="exit with 1 where an aim is missed")
    args = parser.parse_args()
    print(f"peft {peft.__version__}, torch {torch.__version__}, {vars(args)}; MB = 10^6 bytes\n")
    head = ("PEFT", "leanstep", "with fused blocks", "PEFT, accelerated")
    print("| base | adapter | " + " | ".join(head) + " | ratio, unfused | ratio, fused | aim |")
    print("| --- | --- |" + " ---: |" * (len(head) + 3))
    missed = False
    for dtype in DTYPES:
        for variant, settings in VARIANTS.items():
            found = measure(args, DTYPES[dtype], settings)
            aim = AIMS.get((dtype, variant))
            ratio = found[1] / found[0]
            missed |= aim is not None and ratio > aim
            cells = " | ".join(f"{value / 1e6:.2f}" for value in found)
            print(f"| {dtype} | {variant} | {cells} | {ratio:.2f} | {found[2] / found[0]:.2f} | {aim or ''} |")
    designs(args)
    sys.exit(args.check and missed)


def designs(args):
    """What published designs keep for backward by their documentation, in bytes per token and block; not measured.

    h and m are the widths of the model and of the MLP, r the rank; all in 16 bits but what is said to be fp32. Nothing
    here is the frozen model's: a fused SwiGLU block does without silu(gate) and without the input of down.
    """
    h, m, r = args.hidden, args.mlp, args.rank
    rows = (
        (
            "PEFT, factors in fp32",
            "an fp32 copy of each layer's input, and its products with A",
            4 * (6 * h + m + 7 * r),
        ),
        ("PEFT, with dropout", "besides, the dropped copy in its place and a mask, a byte an entry", 5 * (6 * h + m)),
        (
            "one function per layer",
            "each distinct input once, in 16 bits (leanstep without fused blocks)",
            2 * (2 * h + m),
        ),
        ("Unsloth", "inputs of the QKV and MLP functions; without dropout and biases only", 2 * (2 * h - m)),
        ("Axolotl's kernels", "the same; with dropout (one mask for sharing layers), biases and DoRA", 2 * (2 * h - m)),
        ("leanstep", "the same; a mask for each layer, from its seed; DoRA from its output", 2 * (2 * h - m)),
    )
    print("\n| design | kept beside what the frozen model keeps | bytes per token and block |\n| --- | --- | ---: |")
    for name, what, size in rows:
        print(f"| {name} | {what} | {size:,} |")


def measure(args, dtype, settings):
    """Added bytes for PEFT, apply_lora without and with fused blocks, and accelerate_peft."""
    config = transformers.LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.mlp, num_hidden_layers=args.layers, num_attention_heads=4,
        vocab_size=512, max_position_embeddings=args.tokens, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config).to(dtype)
    tokens = torch.randint(0, 512, (1, args.tokens))
    frozen = count(copy.deepcopy(base).requires_grad_(False), tokens, inputs=True)
    common = {"r": args.rank, "target_modules": TARGETS, **settings}

    def with_peft():
        return peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**common))

    def ours(fused):
        return apply_lora(copy.deepcopy(base), LoraConfig(**common, fused_blocks=fused))

    fast = with_peft()
    accelerate_peft(fast)
    models = (with_peft(), ours(False), ours(True), fast)
    return [count(model, tokens) - frozen for model in models]


def count(model, tokens, inputs=False):
    """Bytes saved by one forward pass of the decoder, in training."""
    model.train()
    decoder = model.base_model.model.model if isinstance(model, peft.PeftModel) else model.model
    embeddings = decoder.embed_tokens(tokens).detach().requires_grad_(inputs)
    return saved_bytes(lambda: decoder(inputs_embeds=embeddings).last_hidden_state, model.parameters())


if __name__ == "__main__":
    main()
