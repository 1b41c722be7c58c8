"""LLaMA-60M trained on a text at hand by AdamW, SinkGD and LANTON: tokens per second and peak memory.

    python benchmarks device/training [--dry-run] [--out FOLDER] [--seconds 300]

The recipes ``llama-60m-*`` with their batches of 131,072 tokens and Python's language reference as the text, read again
and again by a tokenizer of 4,096 tokens: speed and memory are those of the recipes, the losses are not. Each run is a
process of its own and gets an equal share of ``--seconds``; the median of its log leaves out the first lines, in which
kernels are compiled.
"""

from __future__ import annotations

import json
import pydoc_data.topics
import shutil
import statistics
import subprocess
import tempfile
from functools import partial
from pathlib import Path

from common import TRAIN, read_json_lines
from stages import Cases, Row, Stage, run_stage, stage_parser

from leanstep._files import format_bytes, free_bytes

PARSER = stage_parser(__doc__)
TEXT = ["data.source=text", f"data.path={pydoc_data.topics.__file__}", "data.packing=true", "data.val_tokens=10000"]
COMMON = [*TEXT, "eval.every=0", "eval.batches=1", "checkpoint.every=0", "checkpoint.keep_last=1"]
# C4 is a dataset of the hub, in a subset, streamed
C4 = ["data.name=null", "data.subset=null", "data.streaming=false", "data.tokenizer=train:4096"]
FULL = {
    "family": "llama-60m", "optimizers": ("adamw", "sinkgd", "lanton"), "warmup": 3,
    "settings": [*C4, "log.every=2"],
}  # fmt: skip
_TINY = "{hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2}"
DRY = {
    "family": "llama-nano", "optimizers": ("lanton",), "warmup": 1,
    "settings": [f"model={{family: llama, config: {_TINY}}}", "data.tokenizer=train:300", "data.seq_len=32", "steps=4",
                 "log.every=1", "batch={tokens_per_step: 64, micro_batch_size: 2}", "eval.at_start=false",
                 "device=cpu"],
}  # fmt: skip
# a run compiles kernels and reads the text before its first step, and saves after its last
_LEAST_S, _ENDING_S = 30.0, 15.0
_DISK = 2 << 30


def main() -> int:
    """Train, and print the table."""
    return run_stage("training", PARSER, cases_of, FULL, DRY)


def cases_of(stage: Stage) -> Cases:
    """One case per optimizer."""
    names = stage.sizes.optimizers
    return {name: partial(train, stage, name, len(names) - index) for index, name in enumerate(names)}


def train(stage: Stage, optimizer: str, left: int) -> list[Row]:
    """Train for a share of the time that is left to ``left`` runs."""
    seconds = stage.seconds_left() / left - _ENDING_S
    if seconds < _LEAST_S:
        raise RuntimeError(f"{max(seconds, 0):.0f} s are left, expected {_LEAST_S:.0f}; the same command runs it")
    folder = Path(stage.out or tempfile.gettempdir()) / f"training-{optimizer}"
    shutil.rmtree(folder, ignore_errors=True)  # of a killed call
    folder.mkdir(parents=True)
    if free_bytes(folder) < _DISK and not stage.dry_run:
        raise RuntimeError(f"expected {format_bytes(_DISK)} free for a checkpoint; free some, or take another --out")
    out, recipe = folder.absolute() / "run", f"{stage.sizes.family}-{optimizer}"
    settings = [*COMMON, *stage.sizes.settings, f"stop.max_hours={seconds / 3600:.6f}", f"out={out}"]
    result = subprocess.run([*TRAIN, recipe, *settings], capture_output=True, text=True, cwd=folder)
    rows = [row for row in read_json_lines(out / "log.jsonl") if row["kind"] == "train"]
    measured = rows[stage.sizes.warmup :]
    # 143: ended by stop.max_hours
    if result.returncode not in (0, 143) or not measured:
        raise RuntimeError(f"{recipe} exited {result.returncode} after {len(rows)} lines: {result.stderr[-500:]}")
    status = json.loads((out / "status.json").read_text())
    shutil.rmtree(folder)
    return [row_of(recipe, rows, measured, status)]


def row_of(recipe: str, rows: list[Row], measured: list[Row], status: Row) -> Row:
    """Speed and memory of a run, by its log."""
    memory = [row["memory_gib"] for row in measured if "memory_gib" in row]
    return {
        "recipe": recipe,
        "steps": rows[-1]["step"],
        "tokens per second": statistics.median(row["tokens_per_s"] for row in measured),
        "model TFLOP/s": statistics.median(row["tflops"] for row in measured if row["tflops"] is not None),
        "peak GiB": memory[-1] if memory else None,
        "first loss": rows[0]["loss"],
        "last loss": rows[-1]["loss"],
        "ended": status["status"],
    }
