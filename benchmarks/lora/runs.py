"""Fine-tuning a pretrained checkpoint by adapters on another text, with three optimizers on the factors.

    leanstep train llama-nano-sinkgd
    python benchmarks lora/runs --base runs/llama-nano-sinkgd/final --out runs/lora [key=value ...]

The recipe llama-nano-lora reads Python's language reference, once with every optimizer and learning rate; finished
runs are not repeated. The table has the loss on the last 20,000 tokens of the text. Then the adapter of the best run
of every optimizer is opened in peft, and its loss stands beside that of the merged model in the same folder. Needs
peft, of the extra ``bench``.
"""

import pydoc_data.topics
from pathlib import Path

import torch
from common import command_line, print_table, read_json_lines, required, train_once
from transformers import AutoModelForCausalLM, AutoTokenizer

# powers of two
RATES = {"adamw": (4e-3, 8e-3, 1.6e-2), "sinkgd": (2e-2, 4e-2, 8e-2), "lanton": (1e-2, 2e-2, 4e-2)}
LENGTH, HELD_OUT = 256, 20000
PARSER = command_line(__doc__)
PARSER.add_argument("--base", type=Path, required=True, help="the pretrained model, a Hugging Face folder")
PARSER.add_argument("--out", type=Path, required=True)
PARSER.add_argument("--optimizers", nargs="+", default=list(RATES), choices=RATES)
PARSER.add_argument("settings", nargs="*", metavar="key=value", help="settings of every run")


def main():
    """Run, print, open in peft."""
    options = PARSER.parse_intermixed_args()
    required("peft")
    losses = {(name, rate): run(options, name, rate) for name in options.optimizers for rate in RATES[name]}
    head = ["optimizer", "lr", *(f"step {step}" for step in next(iter(losses.values())))]
    print_table(
        head, ([name, f"{rate:g}", *(f"{x:.4f}" for x in row.values())] for (name, rate), row in losses.items())
    )
    best = {name: min(RATES[name], key=lambda rate: [*losses[name, rate].values()][-1]) for name in options.optimizers}
    print()
    print_table(
        ["best run", "merged model", "adapter in peft"],
        ([f"{name}, lr {rate:g}", *final_losses(options.base, options.out / f"{name}-{rate:g}" / "final")]
         for name, rate in best.items()),
    )  # fmt: skip


def run(options, name, rate):
    """Validation losses of a run, by step."""
    out = options.out / f"{name}-{rate:g}"
    settings = [f"model.init_from={options.base}", f"data.tokenizer={options.base}"]
    settings += [f"data.path={pydoc_data.topics.__file__}", f"optimizer.name={name}", f"optimizer.lr={rate:g}"]
    train_once("llama-nano-lora", out, [*settings, *options.settings])
    return {row["step"]: row["loss"] for row in read_json_lines(out / "log.jsonl") if row["kind"] == "eval"}


@torch.no_grad()
def final_losses(base, final):
    """Losses, on the same text, of the merged model and of the base with the adapter, as peft opens it."""
    tokens = AutoTokenizer.from_pretrained(final)(Path(pydoc_data.topics.__file__).read_text())["input_ids"]
    rows = torch.tensor(tokens[-HELD_OUT:][: HELD_OUT // LENGTH * LENGTH]).view(-1, LENGTH)
    merged = AutoModelForCausalLM.from_pretrained(final)
    opened = required("peft").PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), final / "adapter")
    for model in (merged, opened):
        yield f"{sum(model.eval()(row[None], labels=row[None]).loss.item() for row in rows) / len(rows):.6f}"
