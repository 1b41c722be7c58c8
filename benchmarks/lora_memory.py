"""Bytes that adapters add to what autograd keeps, beside PEFT's.

    python benchmarks/lora_memory.py
    python benchmarks/lora_memory.py --designs

The model is a small LLaMA with adapters on all seven linear layers of each block. Counted are the distinct storages
that autograd saves in one forward pass, parameters left out: the model with adapters minus the frozen model with
gradients of its embeddings. A fused SwiGLU block keeps less than the frozen model's does: numbers can be negative.
Needs peft, of the extra ``bench``.
"""

import argparse
import copy
import sys

import torch
import transformers
from bench_extra import needed

from leanstep.lora import LoraConfig, accelerate_peft, apply_lora, saved_bytes

peft = needed("peft")

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
    parser.add_argument("--designs", action="store_true", help="nothing measured: what published designs keep")
    args = parser.parse_args()
    if args.designs:
        designs(args)
        return
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
    sys.exit(args.check and missed)


def designs(args):
    """Print what published designs keep for backward, in bytes per token and block: from their sources, not measured.

    h and m are the widths of the model and of the MLP, r the rank, attention is not grouped; 16 bits but for PEFT.
    Counted is what the frozen model does not keep anyway: that has the outputs of gate and up, silu(gate), v, and the
    input of o. A fused SwiGLU block does without silu(gate), m, and keeps no input of down.

    Read were, in November 2026: PEFT 0.21; unslothai/unsloth, unsloth/kernels/fast_lora.py (its fast path is for
    adapters without dropout and biases, and knows no DoRA); axolotl-ai-cloud/axolotl, src/axolotl/kernels/lora.py (one
    dropped copy of an input for the layers on it, none for down; DoRA keeps every output before the magnitude). A mask
    of torch's dropout is a byte an entry on GPUs, and an entry of the input's dtype on CPUs.
    """
    h, m, r = args.hidden, args.mlp, args.rank
    inputs, peft_inputs, fused = 2 * (2 * h + m), 6 * h + m, 2 * (2 * h - m)
    rows = (
        ("PEFT, factors in fp32", "every input, in fp32, and its product with A", 4 * peft_inputs + 28 * r, None, None),
        ("PEFT, with dropout", "every dropped input, and a mask", None, 5 * peft_inputs + 28 * r, None),
        ("one function a layer", "every distinct input (here: fused_blocks=False)", inputs, inputs, inputs + 8 * h),
        ("Unsloth", "the inputs of q, k, v and of the MLP", fused, None, None),
        (
            "Axolotl",
            "these, dropped copies, outputs before the magnitude",
            fused,
            fused + 9 * h,
            fused + 10 * h + 4 * m,
        ),
        ("leanstep", "these; masks from seeds; DoRA from the outputs q, k, o, down", fused, fused, fused + 8 * h),
    )
    print(f"\n{vars(args)}\n")
    print("| design | kept beside what the frozen model keeps | plain | dropout | DoRA |")
    print("| --- | --- | ---: | ---: | ---: |")
    for name, what, *sizes in rows:
        print(f"| {name} | {what} | " + " | ".join("" if size is None else f"{size:,}" for size in sizes) + " |")


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
