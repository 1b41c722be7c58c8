"""Memory and time of pretraining LLaMAs of 60M to 1B, by what ``leanstep check`` computes.

    python benchmarks recipes/sizes [--write]

``--write`` puts the table into docs/choose.md. No weight is allocated.
"""

from pathlib import Path

from common import command_line
from comparison.tables import write_block

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


def main() -> None:
    """Print the table, or write it into its page."""
    if PARSER.parse_args().write:
        print(write_block("sizes", table(), Path(__file__).parents[2]))
    else:
        print(table())
