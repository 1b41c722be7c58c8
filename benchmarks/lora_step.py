"""Time of a LoRA step, forward and backward, beside PEFT's and beside the frozen model's.

    python benchmarks/lora_step.py

All models are made from one, live in one process, and take turns in shuffled order; medians are printed, and ratios to
PEFT. The frozen model computes the gradient of its embeddings and nothing else. Needs peft, of the extra ``bench``.
"""

import statistics
import time
from copy import deepcopy

import torch
from common import command_line, interleaved, print_table, required, start
from models import LINEARS, random_llama

from leanstep.kernels.matrices import dense_product
from leanstep.lora import LoraConfig, accelerate_peft, apply_lora

VARIANTS = {"plain": {}, "dropout": {"lora_dropout": 0.1}, "DoRA": {"use_dora": True}}
AIMS = {"fp32": {"plain": 0.93, "dropout": 0.75, "DoRA": 0.60}, "bf16": {"plain": 0.85, "dropout": 0.65, "DoRA": 0.60}}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARSER = command_line(
    __doc__, hidden=512, mlp=1376, layers=4, tokens=1024, rank=16, rounds=9, threads=0,
    blas=(False, "fp32 products by torch.mm, where oneDNN would be faster"),
)  # fmt: skip
PARSER.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process, for a busy machine")
PARSER.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
PARSER.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)


def main():
    """Print the table."""
    options = start(PARSER)
    peft = required("peft")
    if options.blas:
        dense_product.why_not_onednn = lambda: "asked for"
    print(f"peft {peft.__version__}, {vars(options)}\n")
    head = ["base", "adapter", "model", "forward ms", "backward ms", "step ms", "÷ frozen", "÷ PEFT", "aim"]
    pairs = [(dtype, variant) for dtype in options.dtypes for variant in options.variants]
    print_table(head, (row for pair in pairs for row in measure(options, *pair, peft)), left=range(3))


def measure(options, dtype, variant, peft):
    """Rows of one kind of adapter."""
    embeddings = torch.randn(1, options.tokens, options.hidden, dtype=DTYPES[dtype])
    runs = {
        name: lambda name=name, model=model: step(model, embeddings, name == "frozen", CLOCKS[options.clock])
        for name, model in build(options, DTYPES[dtype], VARIANTS[variant], peft).items()
    }
    times = interleaved(runs, options.rounds)
    totals = {name: [sum(pair) for pair in pairs] for name, pairs in times.items()}
    for name, pairs in times.items():
        parts = [f"{1e3 * statistics.median(values):.1f}" for values in (*zip(*pairs, strict=True), totals[name])]
        # ratios of each round: what slows a round down slows all of its models
        ratios = [
            f"{statistics.median(a / b for a, b in zip(totals[name], totals[other], strict=True)):.2f}"
            for other in ("frozen", "PEFT")
        ]
        yield [dtype, variant, name, *parts, *ratios, AIMS[dtype][variant] if name.startswith("leanstep") else ""]


def build(options, dtype, settings, peft):
    """The models that take turns, by name."""
    base = random_llama(options.hidden, options.mlp, options.layers, options.tokens, num_attention_heads=8)
    base = base.model.to(dtype)
    settings = {"r": options.rank, "lora_alpha": 2 * options.rank, "target_modules": LINEARS, **settings}
    theirs, fast = (peft.get_peft_model(deepcopy(base), peft.LoraConfig(**settings)) for _ in range(2))
    accelerate_peft(fast)
    return {
        "frozen": deepcopy(base).requires_grad_(False),
        "PEFT": theirs,
        "leanstep": apply_lora(deepcopy(base), LoraConfig(**settings)),
        "leanstep, blocks not fused": apply_lora(deepcopy(base), LoraConfig(**settings, fused_blocks=False)),
        "PEFT, accelerated": fast,
    }


def step(model, embeddings, inputs, clock):
    """Seconds of one forward and one backward pass."""
    model.train()
    inputs_embeds = embeddings.detach().requires_grad_(inputs)
    begin = clock()
    output = model(inputs_embeds=inputs_embeds).last_hidden_state
    middle = clock()
    output.float().square().mean().backward()
    end = clock()
    model.zero_grad(set_to_none=True)
    return middle - begin, end - middle


if __name__ == "__main__":
    main()
