"""Bytes that adapters add to what autograd keeps, beside PEFT's.

    python benchmarks lora/memory
    python benchmarks lora/memory --designs

The model is a small LLaMA with adapters on all seven linear layers of each block. Counted are the distinct storages
that autograd saves in one forward pass, parameters left out: the model with adapters minus the frozen model with
gradients of its embeddings. A fused SwiGLU block keeps less than the frozen model does: numbers can be negative.
Needs peft, of the extra ``bench``.
"""

import torch
from common import command_line, print_table, required
from models import adapted_llamas, random_llama

from leanstep.lora import saved_bytes

VARIANTS = {
    "plain": {},
    "dropout": {"lora_dropout": 0.1},
    "DoRA": {"use_dora": True},
    "DoRA, dropout": {"use_dora": True, "lora_dropout": 0.1},
}
LEANSTEP = ["leanstep, blocks not fused", "leanstep"]
MODELS = ["PEFT", *LEANSTEP, "PEFT, accelerated"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PARSER = command_line(
    __doc__, hidden=128, mlp=352, layers=2, tokens=512, rank=8,
    designs=(False, "nothing measured: what published designs keep"),
)  # fmt: skip


def main():
    """Print the table of measured bytes."""
    options = PARSER.parse_args()
    if options.designs:
        print_designs(options)
        return
    print(f"peft {required('peft').__version__}, torch {torch.__version__}, {vars(options)}; MB = 10^6 bytes\n")

    def rows():
        for dtype in DTYPES:
            for variant, settings in VARIANTS.items():
                sizes = measure(options, DTYPES[dtype], settings)
                ratios = (sizes[name] / sizes["PEFT"] for name in LEANSTEP)
                yield dtype, variant, *(f"{sizes[name] / 1e6:.2f}" for name in MODELS), *map("{:.2f}".format, ratios)

    print_table(["base", "adapter", *MODELS, *(f"{name} ÷ PEFT" for name in LEANSTEP)], rows(), left=(0, 1))


def print_designs(options):
    """Print what published designs keep for backward, in bytes per token and block: from their sources, not measured.

    h and m are the widths of the model and of the MLP, r is the rank, attention is not grouped; 16 bits except PEFT.
    Only what the frozen model does not keep is counted. It keeps the outputs of gate and up, silu(gate), v, and the
    input of o. A fused SwiGLU block saves silu(gate), of size m, and keeps no input of down.

    Sources, as of November 2026: PEFT 0.21; unslothai/unsloth, unsloth/kernels/fast_lora.py (its fast path is for
    adapters without dropout and biases, and knows no DoRA); axolotl-ai-cloud/axolotl, src/axolotl/kernels/lora.py (one
    dropped copy of an input for the layers on it, none for down; DoRA keeps every output before the magnitude). A mask
    of torch's dropout takes a byte per entry on GPUs, and an entry of the input's dtype on CPUs.
    """
    h, m, r = options.hidden, options.mlp, options.rank
    inputs, peft_inputs, fused = 2 * (2 * h + m), 6 * h + m, 2 * (2 * h - m)
    axolotl = (fused, fused + 9 * h, fused + 10 * h + 4 * m)
    rows = (
        ("PEFT, factors in fp32", "every input, in fp32, and its product with A", 4 * peft_inputs + 28 * r, None, None),
        ("PEFT, with dropout", "every dropped input, and a mask", None, 5 * peft_inputs + 28 * r, None),
        ("one function a layer", "every distinct input (here: fused_blocks=False)", inputs, inputs, inputs + 8 * h),
        ("Unsloth", "the inputs of q, k, v and of the MLP", fused, None, None),
        ("Axolotl", "these, dropped copies, outputs before the magnitude", *axolotl),
        ("leanstep", "these; masks from seeds; DoRA from the outputs q, k, o, down", fused, fused, fused + 8 * h),
    )
    print(f"\n{vars(options)}\n")
    head = ["design", "kept beside what the frozen model keeps", "plain", "dropout", "DoRA"]
    print_table(head, ([f"{x:,}" if isinstance(x, int) else x for x in row] for row in rows), left=(0, 1))


def measure(options, dtype, settings):
    """Added bytes by model."""
    base = random_llama(options.hidden, options.mlp, options.layers, options.tokens).to(dtype)
    tokens = torch.randint(0, 512, (1, options.tokens))
    models = adapted_llamas(base, options.rank, **settings)
    frozen = count(models.pop("frozen").model, tokens, inputs=True)
    decoders = {name: model.base_model.model.model if "PEFT" in name else model.model for name, model in models.items()}
    return {name: count(decoder, tokens) - frozen for name, decoder in decoders.items()}


def count(decoder, tokens, inputs=False):
    """Bytes saved by one forward pass of the decoder, in training."""
    decoder.train()
    embeddings = decoder.embed_tokens(tokens).detach().requires_grad_(inputs)
    return saved_bytes(lambda: decoder(inputs_embeds=embeddings).last_hidden_state, decoder.parameters())
