"""The command ``leanstep bench``: speed and memory of checkpoints that generate, measured in turns in one process."""

import argparse
import gc
import inspect
import json
import os
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from leanstep._arguments import OneLineParser, add_device, positive
from leanstep._files import find_model_folder, format_bytes, one_line, table_lines, write_text
from leanstep._pages.charts import Quantity, bars
from leanstep.recipes.evaluate import find_device
from leanstep.recipes.generate import open_generator
from leanstep.recipes.report.progress import ProgressBar, refuse_input

EQUAL = 0.05  # difference of two speeds that turns measure as often as not
WRAPPED = 105  # characters of a line in the picture


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``leanstep bench``. Returns 0, or 2 after an error message about the input."""
    options = _parser().parse_args(argv)
    try:
        with ProgressBar() as bar:
            result = _bench(options, bar)
    except (ValueError, OSError, ImportError) as error:
        return refuse_input(error)
    print(json.dumps(result, indent=2) if options.json else _table(result))
    if options.picture:
        try:
            write_text(options.picture, _picture(result))
        except OSError as error:
            print(f"error: the picture was not written: {one_line(error)}", file=sys.stderr)
            return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="leanstep bench",
        description="Tokens per second of the prompt and of generation, memory and file size, measured in turns.",
    )
    parser.add_argument("checkpoint", metavar="DIR", help="a Hugging Face folder, sparse or dense, or a run folder")
    parser.add_argument("--against", action="append", default=[], metavar="DIR", help="another folder; may be repeated")
    parser.add_argument("--prompt-tokens", type=positive, default=128, metavar="N", help="default 128")
    parser.add_argument("--new-tokens", type=positive, default=64, metavar="N", help="default 64")
    parser.add_argument("--batch-size", type=positive, default=1, metavar="N", help="sequences at once; default 1")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="turns; default 5")
    parser.add_argument("--threads", type=positive, metavar="N", help="of torch; default: as torch sets it")
    add_device(parser)
    parser.add_argument("--picture", type=_svg, metavar="FILE", help="draw the table as bars into FILE, an .svg")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with every time")
    return parser


def _svg(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".svg" or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be the path of an .svg file, got {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {str(path.parent)!r} is not there; create it first")
    return path


def _bench(options: argparse.Namespace, bar: ProgressBar) -> dict[str, Any]:
    folders = [find_model_folder(folder) for folder in (options.checkpoint, *options.against)]
    import torch

    options.device = str(find_device(options.device))
    from leanstep.sparsity.inference.linear import why_slow

    if options.threads:
        torch.set_num_threads(options.threads)
    rows: list[tuple[dict[str, Any], Any, dict[str, list[float]]]] = []
    turns = (1 + options.repeats) * len(folders)
    for folder in folders:
        bar(0, 0, "model")
        # the first opening imports code and starts threads, whose memory is not the model's
        open_generator(folder, options.device)
        before = _resident()
        model = open_generator(folder, options.device)
        _check_positions(model, options)
        row: dict[str, Any] = {"folder": str(folder), "dtype": str(model.dtype).removeprefix("torch.")}
        row["file_bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        row["weight_bytes"] = _weight_bytes(model)
        row["resident_bytes"] = _resident() - before
        row["dense_bytes"] = row["weight_bytes"] - _sparse_bytes(model)
        row["why_slow"] = why_slow(model)
        # the first turn warms up
        bar(len(rows), turns, "turns")
        _turn(model, options)
        rows.append((row, model, {"prompt": [], "generation": []}))
    for turn in range(options.repeats):
        for index, (_, model, times) in enumerate(rows):
            bar((1 + turn) * len(rows) + index, turns, "turns")
            for kind, elapsed in _turn(model, options).items():
                times[kind].append(elapsed)
    tokens = {"prompt": options.prompt_tokens, "generation": options.new_tokens}
    for row, _, times in rows:
        for kind, seconds in times.items():
            row[f"{kind}_seconds"] = seconds
            row[f"{kind}_tokens_per_second"] = options.batch_size * tokens[kind] / statistics.median(seconds)
    settings = {"prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens, "repeats": options.repeats}
    machine = {"batch_size": options.batch_size, "device": options.device, "threads": torch.get_num_threads()}
    return {**settings, **machine, "load": os.getloadavg()[0], "checkpoints": [row for row, _, _ in rows]}


def _check_positions(model: Any, options: argparse.Namespace) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # generation begins with one token of the prompt
    needed = max(options.prompt_tokens, 1 + options.new_tokens)
    if isinstance(positions, int) and needed > positions:
        raise ValueError(
            f"sequences of {needed} tokens are asked for and the model has {positions} positions; set --prompt-tokens "
            "or --new-tokens lower"
        )


def _turn(model: Any, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of one forward pass over the prompt, and of the new tokens after its last token."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (options.batch_size, options.prompt_tokens)
    tokens = torch.randint(model.config.get_text_config().vocab_size, shape, generator=generator).to(options.device)
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": options.new_tokens}
    # generation computes the logits of the last position alone, where the architecture can
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.inference_mode():
        prompt = _seconds(lambda: model(tokens, **last), options.device)
        generation = _seconds(lambda: model.generate(tokens[:, -1:], **settings), options.device)
    return {"prompt": prompt, "generation": generation}


def _seconds(call: Callable[[], Any], device: str) -> float:
    import torch

    begin = time.perf_counter()
    call()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begin


def _weight_bytes(model: Any) -> int:
    """Bytes of parameters and buffers, shared ones once. Reads every page, so that mapped files become resident."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    for tensor in tensors.values():
        tensor.detach().count_nonzero()
    return sum(tensor.nbytes for tensor in tensors.values())


def _sparse_bytes(model: Any) -> int:
    from leanstep.sparsity.inference.linear import SparseLinear

    layers = (layer for layer in model.modules() if isinstance(layer, SparseLinear))
    return sum(part.nbytes for layer in layers for part in layer.buffers(recurse=False))


def _resident() -> int:
    """Bytes of this process in memory, those of mapped files included."""
    import psutil

    gc.collect()
    return int(psutil.Process().memory_info().rss)


def _names(result: dict[str, Any]) -> list[str]:
    """Return the last parts of the folders' paths, as many as tell them apart."""
    paths = [Path(row["folder"]).absolute().parts for row in result["checkpoints"]]
    lengths = range(1, max(map(len, paths)) + 1)
    length = next(n for n in lengths if len({path[-n:] for path in paths}) == len(set(paths)))
    return [str(Path(*path[-length:])) for path in paths]


def _table(result: dict[str, Any]) -> str:
    rows = [("FOLDER", "DTYPE", "FILES", "WEIGHTS", "RESIDENT", "PROMPT/S", "NEW/S", "RATIO")]
    last = result["checkpoints"][-1]["generation_tokens_per_second"]
    for name, row in zip(_names(result), result["checkpoints"], strict=True):
        sizes = (format_bytes(row[key]) for key in ("file_bytes", "weight_bytes", "resident_bytes"))
        prompt, generation = row["prompt_tokens_per_second"], row["generation_tokens_per_second"]
        rows.append((name, row["dtype"], *sizes, f"{prompt:.1f}", f"{generation:.1f}", f"{generation / last:.2f}"))
    ratio = "ratio: new tokens per second beside those of the last row"
    return "\n".join([*table_lines(rows), *_notes(result), ratio, *_verdict(result)])


def _verdict(result: dict[str, Any]) -> list[str]:
    """Sentences on speed and memory of the first folder beside each of the others, and why sparse weights are slow."""
    (name, *others), (row, *rest) = _names(result), result["checkpoints"]
    lines = []
    for other, beside in zip(others, rest, strict=True):
        speed = row["generation_tokens_per_second"] / beside["generation_tokens_per_second"]
        kind = "about as fast as" if abs(speed - 1) < EQUAL else "faster than" if speed > 1 else "slower than"
        memory = row["weight_bytes"] / beside["weight_bytes"]
        lines.append(
            f"{name} generates {kind} {other}: {speed:.2f} times its speed, with {memory:.2f} of its bytes in memory."
        )
        if "about" not in kind and (why := (row if speed < 1 else beside)["why_slow"]) is not None:
            lines[-1] += f" Why: {why}."
        if speed < 1 - EQUAL and result["load"] > (os.cpu_count() or 1):
            lines[-1] += f" Other work kept this machine busy (load {result['load']:.1f}), too."
    if others and row["dense_bytes"] < row["weight_bytes"]:
        lines.append(
            f"{row['dense_bytes'] / row['weight_bytes']:.0%} of the bytes of {name}'s weights are dense, as embeddings "
            "are, and save nothing."
        )
    return lines


def _picture(result: dict[str, Any]) -> str:
    quantities = [
        _quantity(result, "New tokens per second", "generation_tokens_per_second", "{:.1f}".format),
        _quantity(result, "Tokens per second of the prompt", "prompt_tokens_per_second", "{:.1f}".format),
        _quantity(result, "Resident memory", "resident_bytes", format_bytes),
        _quantity(result, "Weight files", "file_bytes", format_bytes),
    ]
    notes = [line for text in [*_notes(result), *_verdict(result)] for line in textwrap.wrap(text, WRAPPED)]
    return bars(_names(result), quantities, title="leanstep bench", notes=notes)


def _quantity(result: dict[str, Any], title: str, key: str, text: Callable[[float], str]) -> Quantity:
    # resident memory can fall while a model loads, where the process gives other memory back
    values = [max(0.0, row[key]) for row in result["checkpoints"]]
    return Quantity(title, values, [text(value) for value in values])


def _notes(result: dict[str, Any]) -> list[str]:
    return [
        f"tokens per second: medians of {result['repeats']} turns, batch {result['batch_size']}",
        f"a prompt of {result['prompt_tokens']} tokens; {result['new_tokens']} new ones after a prompt of 1",
        f"{result['device']}, {result['threads']} threads, load {result['load']:.1f}",
    ]
