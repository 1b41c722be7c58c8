"""Bytes of bf16 weights plus optimizer state for the LLaMA sizes of the C4 benchmark, from the optimizers' own rules.

    python benchmarks optimizers/state_memory

Nothing is allocated: models are built with fake tensors, and the state is what the optimizer would create for them.
"""

from __future__ import annotations

from common import command_line, print_table
from torch._subclasses.fake_tensor import FakeTensorMode

from leanstep.recipes.check.costs import fake_model, optimizer_state_bytes, unique_bytes
from leanstep.recipes.config.loader import load
from leanstep.recipes.training.build import build_optimizer

PARSER = command_line(__doc__)
SIZES = ("60m", "130m", "350m", "1b")
STATELESS = "{role: embedding, momentum: 0.0}, {role: head, momentum: 0.0}"
ROWS = {
    "AdamW": ("adamw", []),
    "Lion": ("adamw", ["optimizer={name: lion, lr: 1e-4}"]),
    "SinkGD, AdamW on embedding, head, norms": ("sinkgd", []),
    "SinkGD, balanced embedding and head": ("sinkgd", ["optimizer.embeddings=balanced"]),
    "the same without momentum": ("sinkgd", ["optimizer.embeddings=balanced", f"optimizer.groups=[{STATELESS}]"]),
}


def gigabytes(size: str, optimizer: str, overrides: list[str]) -> float:
    """Weights and optimizer state of one recipe."""
    config = load(f"llama-{size}-{optimizer}", overrides)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(config, 32000)
        total = unique_bytes(model.parameters()) + optimizer_state_bytes(build_optimizer(config.optimizer, model))
    return total / 1e9


def main() -> None:
    """Measure, and print the table."""
    PARSER.parse_args()
    rows = ([name, *(f"{gigabytes(size, *row):.2f}" for size in SIZES)] for name, row in ROWS.items())
    print_table(["weights + state, GB", *(f"{size[:-1]}{size[-1].upper()}" for size in SIZES)], rows)
