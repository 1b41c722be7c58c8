"""Adapters that three optimizers trained, opened in peft, beside the merged models in the same folders.

    leanstep train llama-nano-sinkgd
    python benchmarks lora/runs --base runs/llama-nano-sinkgd/final --out runs/lora [key=value ...]

The recipe llama-nano-lora reads Python's language reference, once with every optimizer; finished runs are not repeated.
The table has the losses of the merged model and of the base with the adapter, on the last 20,000 tokens of the text.
Which optimizer reaches which loss is the question of ``python benchmarks optimizers/compare --size nano-lora``, which
tunes them. Needs peft, of the extra ``bench``.
"""

import pydoc_data.topics
from pathlib import Path

import torch
from common import command_line, print_table, required, train_once
from transformers import AutoModelForCausalLM, AutoTokenizer

RATES = {"adamw": 8e-3, "sinkgd": 8e-2, "lanton": 1e-2}
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
    print_table(
        ["run", "merged model", "adapter in peft"],
        ([f"{name}, lr {RATES[name]:g}", *final_losses(options.base, train(options, name))]
         for name in options.optimizers),
    )  # fmt: skip


def train(options, name):
    """Train with an optimizer; returns the folder of the final model."""
    out = options.out / name
    settings = [f"model.init_from={options.base}", f"data.tokenizer={options.base}"]
    settings += [f"data.path={pydoc_data.topics.__file__}", f"optimizer.name={name}", f"optimizer.lr={RATES[name]:g}"]
    train_once("llama-nano-lora", out, [*settings, *options.settings])
    return out / "final"


@torch.no_grad()
def final_losses(base, final):
    """Losses, on the same text, of the merged model and of the base with the adapter, as peft opens it."""
    tokens = AutoTokenizer.from_pretrained(final, trust_remote_code=False)(
        Path(pydoc_data.topics.__file__).read_text()
    )["input_ids"]
    rows = torch.tensor(tokens[-HELD_OUT:][: HELD_OUT // LENGTH * LENGTH]).view(-1, LENGTH)
    merged = AutoModelForCausalLM.from_pretrained(final, trust_remote_code=False)
    opened = required("peft").PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False), final / "adapter"
    )
    for model in (merged, opened):
        yield f"{sum(model.eval()(row[None], labels=row[None]).loss.item() for row in rows) / len(rows):.6f}"
