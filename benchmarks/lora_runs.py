"""Fine-tuning a pretrained checkpoint by adapters on another text, with three optimizers on the factors.

    leanstep train llama-nano-sinkgd
    python benchmarks/lora_runs.py --base runs/llama-nano-sinkgd/final --out runs/lora [key=value ...]

The recipe llama-nano-lora reads Python's language reference, once with every optimizer and learning rate; finished
runs are not repeated. The table has the loss on the last 20,000 tokens of the text. Then the adapter of the best run
of every optimizer is opened in peft, and its loss stands beside that of the merged model in the same folder. Needs
peft, of the extra ``bench``.
"""

import argparse
import json
import pydoc_data.topics
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from bench_extra import needed
from transformers import AutoModelForCausalLM, AutoTokenizer

peft = needed("peft")

# powers of two
RATES = {"adamw": (4e-3, 8e-3, 1.6e-2), "sinkgd": (2e-2, 4e-2, 8e-2), "lanton": (1e-2, 2e-2, 4e-2)}
LENGTH, HELD_OUT = 256, 20000


def main():
    """Run, print, open in peft."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="the pretrained model, a Hugging Face folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--optimizers", nargs="+", default=list(RATES), choices=RATES)
    args, extra = parser.parse_known_args()
    warnings.simplefilter("ignore")
    losses = {(name, rate): run(args, name, rate, extra) for name in args.optimizers for rate in RATES[name]}
    print("| optimizer | lr | " + " | ".join(f"step {step}" for step in next(iter(losses.values()))) + " |")
    print("| --- | ---: |" + " ---: |" * len(next(iter(losses.values()))))
    for (name, rate), found in losses.items():
        print(f"| {name} | {rate:g} | " + " | ".join(f"{loss:.4f}" for loss in found.values()) + " |")
    print("\n| best run | merged model | adapter in peft |\n| --- | ---: | ---: |")
    for name in args.optimizers:
        rate = min(RATES[name], key=lambda rate: list(losses[name, rate].values())[-1])
        merged, opened = both(args.base, folder(args, name, rate) / "final")
        print(f"| {name}, lr {rate:g} | {merged:.6f} | {opened:.6f} |")


def folder(args, name, rate):
    """Where a run is."""
    return args.out / f"{name}-{rate:g}"


def run(args, name, rate, extra):
    """Validation losses of a run, by step."""
    out = folder(args, name, rate)
    status = out / "status.json"
    if not (status.exists() and json.loads(status.read_text())["status"] == "done"):
        command = [sys.executable, "-m", "leanstep", "train", "llama-nano-lora", f"out={out}"]
        command += [f"model.init_from={args.base}", f"data.tokenizer={args.base}"]
        command += [f"data.path={pydoc_data.topics.__file__}", f"optimizer.name={name}", f"optimizer.lr={rate:g}"]
        subprocess.run([*command, *extra], stdout=subprocess.DEVNULL, check=True)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "eval"}


@torch.no_grad()
def both(base, final):
    """Losses of the merged model and of the base with the adapter, as peft opens it, on the same text."""
    tokens = AutoTokenizer.from_pretrained(final)(Path(pydoc_data.topics.__file__).read_text())["input_ids"]
    rows = torch.tensor(tokens[-HELD_OUT:][: HELD_OUT // LENGTH * LENGTH]).view(-1, LENGTH)
    merged = AutoModelForCausalLM.from_pretrained(final)
    opened = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), final / "adapter")
    return [
        sum(m.eval()(row[None], labels=row[None]).loss.item() for row in rows) / len(rows) for m in (merged, opened)
    ]


if __name__ == "__main__":
    main()
