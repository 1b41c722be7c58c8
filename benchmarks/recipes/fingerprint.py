"""Losses and hashes of every nano recipe after a few steps: whether a change of the code changed a single bit.

    python benchmarks recipes/fingerprint --out runs/before.json        # on the old code
    python benchmarks recipes/fingerprint --compare runs/before.json    # on the new code: 1 if they differ

Each recipe trains ``--steps`` steps on one process from its own seed. The fingerprint holds every logged loss, the
validation loss, a SHA-256 of the final weights, and a SHA-256 of the optimizer's state tensors in the order of the
parameters and of the sorted keys. Key names are not hashed: a renamed key with the same content is no change.
"""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from common import TRAIN, command_line, read_json_lines
from models import digest, tensors_of
from safetensors.torch import load_file

RECIPES = [
    "llama-nano-sinkgd",  # first: llama-nano-lora starts from its result
    *(f"llama-nano-{name}" for name in ("adamw", "lanton", "lion", "lora", "sparse-1of16")),
    *(f"gpt-nano-{name}" for name in ("adamw", "lion", "mfac", "sinkgd")),
]
PARSER = command_line(__doc__, steps=30, recipes=RECIPES)
PARSER.add_argument("--out", type=Path, help="write the fingerprints to this file")
PARSER.add_argument("--compare", type=Path, help="a file of an earlier call")


def fingerprint(recipe: str, steps: int, folder: Path) -> dict[str, object]:
    """Train a recipe in ``folder`` and read its losses, weights and optimizer state."""
    out = folder / "runs" / recipe
    settings = [f"steps={steps}", f"eval.every={steps}", "log.every=1", f"checkpoint.every={steps}", f"out={out}"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    subprocess.run([*TRAIN, recipe, *settings], cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=True)
    checkpoint = max((out / "checkpoints").glob("step-*"))
    state = torch.load(checkpoint / "trainer" / "optimizer.bin", weights_only=True, map_location="cpu")
    return {
        "losses": [row["loss"] for row in read_json_lines(out / "log.jsonl") if "loss" in row],
        "val_loss": json.loads((out / "status.json").read_text())["val_loss"],
        "weights": digest(weight for _, weight in sorted(load_file(out / "final" / "model.safetensors").items())),
        "state": digest(tensors_of(state["state"])),
    }


def main() -> int:
    """Print the fingerprints, and where they differ from those of a file."""
    options = PARSER.parse_args()
    prints = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(pydoc_data.topics.__file__, folder / "other.txt")
        for recipe in options.recipes:
            prints[recipe] = fingerprint(recipe, options.steps, folder)
            print(f"{recipe:24} {prints[recipe]['val_loss']:.6f} {prints[recipe]['weights']} {prints[recipe]['state']}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(prints, indent=1))
    if options.compare is None:
        return 0
    before = json.loads(options.compare.read_text())
    different = [name for name, value in prints.items() if before.get(name) != value]
    print(f"different: {', '.join(different)}" if different else f"the same bits as {options.compare}")
    return 1 if different else 0
