"""The command ``leanstep generate``: continue a prompt with a dense or a sparse checkpoint."""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from leanstep._arguments import OneLineParser, add_device, positive, seed
from leanstep._files import find_model_folder
from leanstep.recipes.evaluate import find_device
from leanstep.recipes.report.progress import refuse_input

if TYPE_CHECKING:
    import torch

LEAST_TEMPERATURE = 1e-6  # logits divided by less become infinite


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``leanstep generate``. Returns 0, or 2 after an error message about the input."""
    options = _parser().parse_args(argv)
    try:
        result = _generate(options)
    except (ValueError, OSError, ImportError) as error:
        return refuse_input(error)
    if options.json:
        print(json.dumps(result))
        return 0
    print(result["prompt"] + result["text"])
    print(f"{result['tokens']} tokens, {result['tokens_per_second']:.1f} a second", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="leanstep generate", description="Continue a prompt with a dense or a sparse checkpoint."
    )
    parser.add_argument("checkpoint", metavar="DIR", help="a Hugging Face folder, sparse or dense, or a run folder")
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue")
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="default 64")
    parser.add_argument(
        "--temperature", type=_temperature, default=0.0, metavar="T", help="0 (default): the likeliest; else sample"
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the samples; default 0")
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if value != 0 and not LEAST_TEMPERATURE <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected 0, or a number from {LEAST_TEMPERATURE:g}, got {text!r}")
    return value


def _generate(options: argparse.Namespace) -> dict[str, Any]:
    folder = find_model_folder(options.checkpoint)
    import torch

    from leanstep.pruning.folder.loading import encoding, open_tokenizer
    from leanstep.recipes.data.tokens import decode_halves

    tokenizer = open_tokenizer(folder)
    device = find_device(options.device)
    model = open_generator(folder, device)
    with encoding(folder):
        inputs = tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False)
    count = inputs["input_ids"].shape[1]
    if not count:
        raise ValueError("the prompt has no tokens; expected a text to continue")
    vocabulary = model.get_input_embeddings().num_embeddings
    if int(inputs["input_ids"].max()) >= vocabulary:
        raise ValueError(
            f"{folder}: its tokenizer has more tokens than the model, which has {vocabulary}; save the tokenizer "
            "that the model was trained with there"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and count + options.max_new_tokens > positions:
        raise ValueError(
            f"the prompt has {count} tokens, {options.max_new_tokens} are asked for, and the model has {positions} "
            "positions; shorten one of them (--max-new-tokens)"
        )
    settings: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "do_sample": options.temperature > 0}
    if options.temperature > 0:
        settings["temperature"] = options.temperature
    if tokenizer.pad_token_id is None:
        settings["pad_token_id"] = tokenizer.eos_token_id or 0
    inputs = inputs.to(device)
    _warm_up(model, inputs, settings)
    torch.manual_seed(options.seed)
    begin = time.perf_counter()
    tokens = model.generate(**inputs, **settings)[0]
    seconds = time.perf_counter() - begin
    _, text = decode_halves(tokenizer, tokens, count)
    made = len(tokens) - count
    facts = {"tokens": made, "seconds": seconds, "tokens_per_second": made / seconds}
    return {"checkpoint": str(folder), "prompt": options.prompt, "text": text, **facts}


def _warm_up(model: Any, inputs: Any, settings: dict[str, Any]) -> None:
    """Generate from the end of the prompt, so that the time measured afterwards does not include compiling kernels."""
    few = {"max_new_tokens": min(2, settings["max_new_tokens"]), "eos_token_id": None}
    model.generate(**{name: tensor[:, -32:] for name, tensor in inputs.items()}, **{**settings, **few})


def open_generator(folder: Any, device: "str | torch.device") -> Any:
    """Open a dense or sparse folder as a language model on a device.

    Raises:
        ValueError: as :func:`leanstep.pruning.folder.loading.open_model`, and for a model that generates no text.
    """
    from leanstep.pruning.folder.loading import open_model

    model = open_model(folder).to(device)
    if not callable(getattr(model, "generate", None)):
        raise ValueError(f"{folder}: {type(model).__name__} does not generate text; expected a language model")
    return model
