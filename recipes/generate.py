"""The command ``leanstep generate``: continue a prompt with a dense or a sparse checkpoint, or talk to it."""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanstep._arguments import OneLineParser, add_device, positive, whole
from leanstep.recipes.evaluate import find_device, find_model, open_language_model
from leanstep.recipes.report.progress import refuse_input

if TYPE_CHECKING:
    import torch

LEAST_TEMPERATURE = 1e-6  # logits divided by less become infinite


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``leanstep generate``. Returns 0, or 2 after an error message about the input."""
    parser = _parser()
    options = parser.parse_intermixed_args(argv)  # the prompt may follow an option
    if not options.chat and (options.prompt is None or options.system is not None):
        parser.error("expected a PROMPT, or --chat" if options.prompt is None else "--system is for --chat")
    try:
        result = _chat(options) if options.chat else _generate(options)
    except (ValueError, OSError, ImportError) as error:
        return refuse_input(error)
    if options.json:
        print(json.dumps(result))
    elif not options.chat:
        print(result["prompt"] + result["text"])
        print(f"{result['tokens']} tokens, {result['tokens_per_second']:.1f} a second", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="leanstep generate", description="Continue a prompt with a dense or a sparse checkpoint, or talk to it."
    )
    parser.add_argument(
        "checkpoint", metavar="DIR", help="a Hugging Face folder, dense, sparse or an adapter, or of a run"
    )
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="the text to continue; with --chat the only turn (default: read turns)",
    )
    parser.add_argument("--chat", action="store_true", help="answer by the tokenizer's chat template; Ctrl-D ends")
    parser.add_argument("--system", metavar="TEXT", help="the conversation's system message")
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="default 64; of an answer 512")
    parser.add_argument(
        "--temperature", type=_temperature, default=0.0, metavar="T", help="0 (default): the likeliest; else sample"
    )
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="of the samples; default 0")
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


class Generator:
    """A checkpoint with its tokenizer, and how the options of the command continue a text with it.

    Raises ValueError for a folder without a tokenizer, or whose model generates no text.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder, adapter = find_model(options.checkpoint)  # a mistyped one is refused before torch is imported
        from leanstep.pruning.folder.loading import open_tokenizer
        from leanstep.recipes.data.hub import cached_if_unreachable

        self.device = find_device(options.device)
        with cached_if_unreachable(self.folder):
            self.tokenizer: Any = open_tokenizer(self.folder)
            self.model = open_generator(self.folder, self.device, adapter)
        self.positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.settings: dict[str, Any] = {"do_sample": options.temperature > 0}
        if options.temperature > 0:
            self.settings["temperature"] = options.temperature
        if self.tokenizer.pad_token_id is None:
            self.settings["pad_token_id"] = self.tokenizer.eos_token_id or 0

    def encode(self, text: str, **options: Any) -> Any:
        """Tokenise a text. Raises ValueError for no tokens, or for one that the model does not have."""
        from leanstep.pruning.folder.loading import encoding

        with encoding(self.folder):
            inputs = self.tokenizer(text, return_tensors="pt", return_token_type_ids=False, **options)
        if not inputs["input_ids"].shape[1]:
            raise ValueError("the prompt has no tokens; expected a text to continue")
        vocabulary = self.model.get_input_embeddings().num_embeddings
        if int(inputs["input_ids"].max()) >= vocabulary:
            raise ValueError(
                f"{self.folder}: its tokenizer has more tokens than the model, which has {vocabulary}; save the "
                "tokenizer that the model was trained with there"
            )
        return inputs.to(self.device)


def _generate(options: argparse.Namespace) -> dict[str, Any]:
    generator = Generator(options)
    import torch

    from leanstep.recipes.data.tokens import decode_halves

    inputs, new = generator.encode(options.prompt), options.max_new_tokens or 64
    count = inputs["input_ids"].shape[1]
    if isinstance(generator.positions, int) and count + new > generator.positions:
        raise ValueError(
            f"the prompt has {count} tokens, {new} are asked for, and the model has {generator.positions} "
            "positions; shorten one of them (--max-new-tokens)"
        )
    settings = {**generator.settings, "max_new_tokens": new}
    _warm_up(generator.model, inputs, settings)
    torch.manual_seed(options.seed)
    begin = time.perf_counter()
    tokens = generator.model.generate(**inputs, **settings)[0]
    seconds = time.perf_counter() - begin
    _, text = decode_halves(generator.tokenizer, tokens, count)
    made = len(tokens) - count
    facts = {"tokens": made, "seconds": seconds, "tokens_per_second": made / seconds}
    return {"checkpoint": str(generator.folder), "prompt": options.prompt, "text": text, **facts}


def _chat(options: argparse.Namespace) -> dict[str, Any]:
    """Answer PROMPT, or every line of standard input, and print each answer while it is made."""
    generator = Generator(options)
    import torch
    from transformers import TextStreamer

    from leanstep.recipes.data.chat import render_talk, stop_tokens

    tokenizer = generator.tokenizer
    if not tokenizer.chat_template:
        raise ValueError(f"{generator.folder}: its tokenizer has no chat template; leave --chat out to continue a text")
    torch.manual_seed(options.seed)
    settings = {**generator.settings, "eos_token_id": stop_tokens(generator.model, tokenizer)}
    if not options.json:
        settings["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages = [] if options.system is None else [{"role": "system", "content": options.system}]
    for turn in _turns() if options.prompt is None else [options.prompt]:
        messages.append({"role": "user", "content": turn})
        inputs = generator.encode(render_talk(tokenizer, messages, asks=True), add_special_tokens=False)
        count, new = inputs["input_ids"].shape[1], options.max_new_tokens or 512
        if isinstance(generator.positions, int):
            new = min(new, generator.positions - count)
        if new < 1:
            raise ValueError(
                f"the conversation has {count} tokens and the model {generator.positions} positions; begin a new one"
            )
        tokens = generator.model.generate(**inputs, **settings, max_new_tokens=new)[0, count:]
        messages.append({"role": "assistant", "content": tokenizer.decode(tokens, skip_special_tokens=True).strip()})
    return {"checkpoint": str(generator.folder), "messages": messages}


def _turns() -> Iterator[str]:
    """The lines that are not blank, asked for on a terminal."""
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    with suppress(ImportError):
        import readline  # noqa: F401, which lets `input` edit lines
    with suppress(EOFError):
        while True:
            if turn := input("> ").strip():
                yield turn


def _warm_up(model: Any, inputs: Any, settings: dict[str, Any]) -> None:
    """Generate from the end of the prompt, so that the time measured afterwards does not include compiling kernels."""
    few = {"max_new_tokens": min(2, settings["max_new_tokens"]), "eos_token_id": None}
    model.generate(**{name: tensor[:, -32:] for name, tensor in inputs.items()}, **{**settings, **few})


def open_generator(folder: Any, device: "str | torch.device", adapter: Path | None = None) -> Any:
    """Open a dense or sparse folder as a language model on a device, with an adapter of leanstep or PEFT.

    Raises:
        ValueError: as :func:`leanstep.pruning.folder.loading.open_model`, for a model that generates no text, and for
            an adapter of another base.
    """
    model = open_language_model(folder, adapter).to(device)
    if not callable(getattr(model, "generate", None)):
        raise ValueError(f"{folder}: {type(model).__name__} does not generate text; expected a language model")
    return model
