"""Speed, memory and perplexity of sparse checkpoints that generate, beside dense and quantised ones.

    python benchmarks pruning/smollm2 runs/smollm2 --dtype bfloat16
    python benchmarks pruning/sparsegpt runs/smollm2 runs/smollm2-60 --sparsity 0.6
    leanstep export runs/smollm2-60 --format sparse --out runs/smollm2-60-sparse
    python benchmarks sparsity/generation bf16=runs/smollm2 fp32=runs/smollm2@float32 int8=runs/smollm2@int8-dynamic \\
        sparse=runs/smollm2-60-sparse Q8_0=runs/smollm2-q8_0.gguf --title smollm2 --perplexity --cpu-time --threads 1
    python benchmarks sparsity/generation --report docs/results/generation.jsonl [--write]

Every argument is ``NAME=PATH`` or ``NAME=PATH@VARIANT``: a folder that transformers opens, dense or sparse, or a GGUF
file for llama.cpp (package llama-cpp-python). A variant opens a dense folder in another dtype, with torch's dynamic
int8 quantisation, or with our loop over dense weights (``few-token-linear``). All are open in one process and take
turns: a turn generates the likeliest tokens after one token, with a cache. The first is the baseline of the ratios.
Resident memory is what the process grew by when the model alone was opened and had generated two tokens. Perplexity
(``--perplexity``) is that of the newest addresses of the State of the Union (package sotu), in sequences of 512 tokens
of the baseline's tokenizer, alike for all.

A call adds one line to the results file, under a title. ``--report`` prints one table per title: the models of all its
calls. ``--cpu-time`` counts processor time, for a machine that others use; then tokens per second are of that time.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from common import append_json_line, clock_of, command_line, interleaved_seconds, machine_line
from generation.engines import Spec, Transformers, file_bytes, open_engine, resident_bytes
from generation.tables import tables, write

ROOT = Path(__file__).parents[2]
SEQUENCE = 512
PARSER = command_line(
    __doc__, title=("", "what the calls of one table share"), new_tokens=(128, "of a turn; default: %(default)s"),
    rounds=(5, "turns of every model; default: %(default)s"), threads=(1, "default: %(default)s"),
    perplexity=(False, "measure it too"), sequences=(8, "of perplexity; default: %(default)s"),
    cpu_time=(False, "measure processor time"), out=Path("docs/results/generation.jsonl"),
    write=(False, "with --report: write the tables into docs/"),
)  # fmt: skip
PARSER.add_argument("models", nargs="*", type=Spec.parse, metavar="NAME=PATH[@VARIANT]")
PARSER.add_argument("--report", type=Path, help="a file of results whose tables to print")


def sequences(folder: Path, count: int) -> list[list[int]]:
    """The first tokens of the newest addresses, which pruning does not calibrate with."""
    from transformers import AutoTokenizer

    from leanstep.recipes.data.sources import sotu_corpus, split_newest

    _, newest = split_newest(tuple(sotu_corpus().documents()))
    tokens = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)("\n".join(newest), verbose=False)[
        "input_ids"
    ]
    if len(tokens) < count * SEQUENCE:
        raise SystemExit(f"--sequences: expected at most {len(tokens) // SEQUENCE}, got {count}")
    return [tokens[index * SEQUENCE : (index + 1) * SEQUENCE] for index in range(count)]


def alone(spec: Spec, threads: int, texts: list[list[int]]) -> dict[str, Any]:
    """Bytes, zeros and perplexity of a model.

    No other one is open: opening a large one may take the pages of mapped files from the others.
    """
    before = resident_bytes()
    engine = open_engine(spec, threads)
    engine.generate(2)
    row: dict[str, Any] = {"name": spec.name, "file_bytes": file_bytes(spec)}
    row["zeros"] = engine.zeros() if isinstance(engine, Transformers) else None
    row["resident_bytes"] = resident_bytes() - before
    if texts:
        losses = torch.cat([engine.losses(text) for text in texts]).double()
        row["perplexity"] = math.exp(losses.mean())
    return row


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Open each model alone, for its memory and perplexity; then open all, and time them in turns."""
    torch.set_num_threads(options.threads)
    texts = sequences(options.models[0].path, options.sequences) if options.perplexity else []
    # code that is loaded on first use is no model's memory
    open_engine(options.models[0], options.threads).generate(2)
    rows = []
    for spec in options.models:
        rows.append(alone(spec, options.threads, texts))
        print(f"{rows[-1]}", flush=True)
    engines = {spec.name: open_engine(spec, options.threads) for spec in options.models}
    for engine in engines.values():
        engine.generate(2)
    runs = {name: lambda engine=engine: engine.generate(options.new_tokens) for name, engine in engines.items()}
    seconds = interleaved_seconds(runs, options.rounds, clock_of(options), warmup=0)
    for row in rows:
        row["seconds"] = [round(value, 4) for value in seconds[row["name"]]]
        row["tokens_per_second"] = options.new_tokens / statistics.median(seconds[row["name"]])
    settings = {name: getattr(options, name) for name in ("title", "new_tokens", "rounds", "cpu_time")}
    settings |= {"tokens": sum(map(len, texts)), "machine": machine_line(), "load": round(os.getloadavg()[0], 1)}
    return {**settings, "models": rows}


def main() -> int:
    """Measure, or read a file; print the tables."""
    options = PARSER.parse_args()
    if options.report is None:
        names = [spec.name for spec in options.models]
        if not names or len(set(names)) < len(names) or not options.title:
            PARSER.error("expected models of different names and a --title")
        # torch warns that its int8 quantisation moves to another package
        warnings.simplefilter("ignore")
        append_json_line(options.out, measure(options))
    path = options.report or options.out
    if not path.exists():
        PARSER.error(f"--report: expected a file of results, {path} is none")
    for text in tables(path).values():
        print(f"{text}\n")
    if options.write:
        write(path, ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
