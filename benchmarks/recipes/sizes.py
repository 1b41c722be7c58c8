"""Memory and time of pretraining LLaMAs of 60M to 1B, and memory of tuning 7B, by what ``leanstep check`` computes.

    python benchmarks recipes/sizes [--write]

``--write`` puts the tables into docs/choose.md. No weight is allocated.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from common import command_line
from comparison.tables import markdown, write_block
from transformers import LlamaConfig

from leanstep.recipes.check.costs import estimate, flops_per_token, meta_model, peak_flops
from leanstep.recipes.config.loader import load
from leanstep.recipes.config.schema import RunConfig

SIZES = ("60m", "130m", "350m", "1b")
# name, overrides of the recipe
OPTIMIZERS = {
    "AdamW": ["optimizer={name: adamw, lr: 1e-3}"],
    "Lion": ["optimizer={name: lion, lr: 1e-4}"],
    "Muon": ["optimizer={name: muon, lr: 1e-2}"],
    "LANTON": ["optimizer={name: lanton, lr: 1e-2}"],
    "SinkGD": ["optimizer={name: sinkgd, lr: 1e-2}"],
    "SinkGD, gradients released": ["optimizer={name: sinkgd, lr: 1e-2}", "release_gradients=true"],
    "SinkGD balanced, gradients released": [
        "optimizer={name: sinkgd, lr: 1e-2, embeddings: balanced}",
        "release_gradients=true",
    ],
}
# overrides of smollm-chat-lora
TUNED = {
    "all weights, AdamW": ["lora=null"],
    "all weights, SinkGD, gradients released": ["lora=null", *OPTIMIZERS["SinkGD, gradients released"]],
    "LoRA of rank 16, AdamW": [],
    "the same on 8 bits": ["lora.quantize_base=int8"],
    "the same on 4 bits": ["lora.quantize_base=nf4"],
}
VOCABULARY = 32_000
# of the data sheet's peak, a share that is common in training
SHARE = 0.4
PARSER = command_line(__doc__, write=(False, "put the table into docs/choose.md"))


def config_of(size: str, optimizer: str) -> RunConfig:
    """The recipe of a size with 16-bit weights, 4 sequences of 1,024 tokens a pass and recomputed activations."""
    same = ["precision=bf16-pure", "data.seq_len=1024", "batch.micro_batch_size=4", "batch.tokens_per_step=4096"]
    same += ["activation_checkpointing=true", "model.config.max_position_embeddings=1024"]
    return load(f"llama-{size}-adamw", [*same, *OPTIMIZERS[optimizer]])


def gigabytes(size: str, optimizer: str) -> str:
    """Peak of one process, GB = 10^9 bytes."""
    return f"{estimate(config_of(size, optimizer), VOCABULARY).peak / 1e9:.1f}"


def hours(size: str) -> tuple[str, str]:
    """Tokens of the recipe, and the hours that they take an H100 at :data:`SHARE` of its peak."""
    recipe, peak = load(f"llama-{size}-adamw"), peak_flops("NVIDIA H100", "bf16")
    assert peak is not None
    tokens = recipe.steps * recipe.batch.tokens_per_step
    operations = tokens * flops_per_token(meta_model(recipe, VOCABULARY), recipe.data.seq_len)
    return f"{tokens / 1e9:.1f}", f"{operations / (SHARE * peak) / 3600:.1f}"


def table() -> str:
    """The table of the page."""
    head = "| | " + " | ".join(size.replace("m", "M").replace("b", "B") for size in SIZES) + " |"
    lines = [
        "`python benchmarks recipes/sizes`: GB = 10^9 bytes at the peak of a step, by `leanstep check`, with its",
        "margin of a tenth, for bf16 weights and state, recomputed activations, 4 sequences of 1,024 tokens:",
        "",
        head,
        "| --- |" + " ---: |" * len(SIZES),
    ]
    lines += [f"| {name} | " + " | ".join(gigabytes(size, name) for size in SIZES) + " |" for name in OPTIMIZERS]
    tokens, times = zip(*map(hours, SIZES), strict=True)
    lines.append("| tokens of the recipe, billions | " + " | ".join(tokens) + " |")
    lines.append(f"| hours for them on an H100 at {SHARE:.0%} of its peak: arithmetic | " + " | ".join(times) + " |")
    return "\n".join(lines)


def tuned(names: tuple[str, ...] = tuple(TUNED)) -> str:
    """The table of fine-tuning a LLaMA of 7B on a GPU."""
    lines = [
        "`python benchmarks recipes/sizes`: GB as above, for `smollm-chat-lora` on the first LLaMA of 7B, weights and",
        "state in bf16, recomputed activations, 1 sequence of 1,024 tokens. On a GPU the merged model is in the host's",
        "memory:",
    ]
    with TemporaryDirectory() as folder:
        LlamaConfig().save_pretrained(folder)
        same = [f"model.init_from={folder}", "precision=bf16-pure", "data.seq_len=1024", "batch.micro_batch_size=1"]
        same += ["activation_checkpointing=true"]
        rows = []
        for name in names:
            memory = estimate(load("smollm-chat-lora", [*same, *TUNED[name]]), VOCABULARY)
            on_gpu = replace(memory, merged=0, merged_in_host=memory.merged)
            merged = f"{memory.merged / 1e9:.1f}" if memory.merged else "–"
            rows.append([name, f"{on_gpu.peak / 1e9:.1f}", merged])
    return "\n".join([*lines, "", markdown(["", "GPU", "merged model"], rows)])


def main() -> None:
    """Print the tables, or write them into their page."""
    write = PARSER.parse_args().write
    for name, text in (("sizes", table()), ("tuned", tuned())):
        print(write_block(name, text, Path(__file__).parents[2]) if write else text)
