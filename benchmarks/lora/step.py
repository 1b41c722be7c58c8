"""Time of a LoRA step, forward and backward, beside PEFT's and beside the frozen model's.

    python benchmarks lora/step

All models are made from one, live in one process, and take turns in shuffled order; medians are printed, and ratios to
PEFT. The frozen model computes the gradient of its embeddings and nothing else. Needs peft, of the extra ``bench``.
"""

import statistics

import torch
from common import clock_of, command_line, interleaved, print_table, required, start
from models import adapted_llamas, random_llama

from leanstep.kernels.matrices import dense_product

VARIANTS = {"plain": {}, "dropout": {"lora_dropout": 0.1}, "DoRA": {"use_dora": True}}
AIMS = {"fp32": {"plain": 0.93, "dropout": 0.75, "DoRA": 0.60}, "bf16": {"plain": 0.85, "dropout": 0.65, "DoRA": 0.60}}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARSER = command_line(
    __doc__, hidden=512, mlp=1376, layers=4, tokens=1024, rank=16, rounds=9, threads=0,
    blas=(False, "fp32 products by torch.mm, where oneDNN would be faster"), cpu_time=(False, "measure processor time"),
)  # fmt: skip
PARSER.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
PARSER.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)


def main():
    """Print the table."""
    options = start(PARSER)
    if options.blas:
        dense_product.why_not_onednn = lambda: "asked for"
    print(f"peft {required('peft').__version__}, {vars(options)}\n")
    head = ["base", "adapter", "model", "forward ms", "backward ms", "step ms", "÷ frozen", "÷ PEFT", "aim"]
    pairs = [(dtype, variant) for dtype in options.dtypes for variant in options.variants]
    print_table(head, (row for pair in pairs for row in measure(options, *pair)), left=range(3))


def measure(options, dtype, variant):
    """Rows of one kind of adapter."""
    embeddings = torch.randn(1, options.tokens, options.hidden, dtype=DTYPES[dtype])
    llama = random_llama(options.hidden, options.mlp, options.layers, options.tokens, num_attention_heads=8)
    settings = {"lora_alpha": 2 * options.rank, **VARIANTS[variant]}
    runs = {
        name: lambda name=name, model=model: step(model, embeddings, name == "frozen", clock_of(options))
        for name, model in adapted_llamas(llama.model.to(DTYPES[dtype]), options.rank, **settings).items()
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
