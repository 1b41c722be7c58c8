"""Time of a LoRA step, forward and backward, beside PEFT's and beside the frozen model's.

    python benchmarks/lora_step.py

All models are made from one, stand in one process, and take turns; medians are printed, and ratios to PEFT. The frozen
model computes the gradient of its embeddings and nothing else. Needs peft, of the extra ``bench``.
"""

import argparse
import copy
import statistics
import time

import torch
import transformers
from bench_extra import needed

from leanstep.kernels.matrices import dense_product
from leanstep.lora import LoraConfig, accelerate_peft, apply_lora

peft = needed("peft")

VARIANTS = {"plain": {}, "dropout": {"lora_dropout": 0.1}, "DoRA": {"use_dora": True}}
AIMS = {
    ("fp32", "plain"): 0.93,
    ("fp32", "dropout"): 0.75,
    ("fp32", "DoRA"): 0.60,
    ("bf16", "plain"): 0.85,
    ("bf16", "dropout"): 0.65,
    ("bf16", "DoRA"): 0.60,
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main():
    """Print one table per dtype and kind of adapter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--mlp", type=int, default=1376)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process, for a busy machine")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--blas", action="store_true", help="fp32 products by torch.mm, where oneDNN would be faster")
    args = parser.parse_args()
    if args.blas:
        dense_product.why_not_onednn = lambda: "asked for"
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"peft {peft.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, {vars(args)}\n")
    print("| base | adapter | model | forward ms | backward ms | step ms | ÷ frozen | ÷ PEFT | aim |")
    print("| --- | --- | --- |" + " ---: |" * 6)
    for dtype in args.dtypes:
        for variant in args.variants:
            table(args, dtype, variant)


def table(args, dtype, variant):
    """Rows of one kind of adapter."""
    models = build(args, DTYPES[dtype], VARIANTS[variant])
    times = {name: ([], []) for name in models}
    embeddings = torch.randn(1, args.tokens, args.hidden, dtype=DTYPES[dtype])
    names = list(models)
    for turn in range(args.rounds + 1):
        # each comes after each, whose memory it finds
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            model = models[name]
            forward, backward = step(model, embeddings, inputs=name == "frozen", clock=CLOCKS[args.clock])
            if turn:
                times[name][0].append(forward)
                times[name][1].append(backward)
    totals = {name: [f + b for f, b in zip(*pair, strict=True)] for name, pair in times.items()}

    def ratio(name, other):
        # of each round: what slows a round down slows all of its models
        return statistics.median(a / b for a, b in zip(totals[name], totals[other], strict=True))

    for name, (forward, backward) in times.items():
        aim = AIMS.get((dtype, variant), "") if name.startswith("leanstep") else ""
        cells = " | ".join(f"{statistics.median(values):.1f}" for values in (forward, backward, totals[name]))
        ratios = f"{ratio(name, 'frozen'):.2f} | {ratio(name, 'PEFT'):.2f}"
        print(f"| {dtype} | {variant} | {name} | {cells} | {ratios} | {aim} |", flush=True)


def build(args, dtype, settings):
    """The models that take turns, by name."""
    config = transformers.LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.mlp, num_hidden_layers=args.layers, num_attention_heads=8,
        vocab_size=512, max_position_embeddings=args.tokens, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaModel(config).to(dtype)
    common = {"r": args.rank, "lora_alpha": 2 * args.rank, "target_modules": TARGETS, **settings}

    def with_peft():
        return peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**common))

    fast = with_peft()
    accelerate_peft(fast)
    return {
        "frozen": copy.deepcopy(base).requires_grad_(False),
        "PEFT": with_peft(),
        "leanstep": apply_lora(copy.deepcopy(base), LoraConfig(**common)),
        "leanstep, blocks not fused": apply_lora(copy.deepcopy(base), LoraConfig(**common, fused_blocks=False)),
        "PEFT, accelerated": fast,
    }


def step(model, embeddings, inputs, clock):
    """Milliseconds of one forward and one backward pass."""
    model.train()
    inputs_embeds = embeddings.detach().requires_grad_(inputs)
    start = clock()
    output = model(inputs_embeds=inputs_embeds).last_hidden_state
    middle = clock()
    output.float().square().mean().backward()
    end = clock()
    model.zero_grad(set_to_none=True)
    return (middle - start) * 1e3, (end - middle) * 1e3


if __name__ == "__main__":
    main()
