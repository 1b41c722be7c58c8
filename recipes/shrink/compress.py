"""The command ``leanstep compress``: compress a checkpoint to a size, by default into a GGUF file, with a report."""

import argparse
import re
import sys
from collections.abc import Sequence

from leanstep._arguments import OneLineParser, new_folder
from leanstep.pruning.compress.compress import menu_of
from leanstep.pruning.config import ROUNDINGS, PruneConfig
from leanstep.recipes.shrink.prune import data_options, evaluation_options, resource_options, run, search_options

__all__ = ["main"]

_SETTINGS = ("metric", "curves", "minutes", "correction")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``leanstep compress``. Returns 0, 2 after an error message about the input, or 1 about the disk."""
    options = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    options.pattern = menu_of(options.format).pattern
    return run(options)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 90MB or 1.5GB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="leanstep compress",
        description="Compress a checkpoint to a size, each matrix in the bits that hurt least. CHECKPOINT is never "
        "changed.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a Hugging Face folder, or the name of a model on the hub")
    add("--out", required=True, type=new_folder, metavar="DIR", help="the folder to create")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--bytes",
        type=float,
        metavar="F",
        help="size, as a fraction of the weight files: 0.25",
    )
    size.add_argument(
        "--bits-per-weight", type=float, metavar="B", help="mean bits of the matrices, scales included: 4"
    )
    size.add_argument("--size", type=_size, metavar="SIZE", help="size of the file: 90MB, 1.5GB (decimal)")
    add(
        "--format",
        choices=("gguf", "sparse", "dense"),
        default="gguf",
        help="gguf (default): model.gguf, for llama.cpp; sparse: zeros with int8 and int4, for load_sparse; dense: a "
        "folder for transformers with the values of gguf",
    )
    data_options(parser.add_argument_group("calibration data"))
    group = parser.add_argument_group("how many bits each matrix gets")
    PruneConfig.add_options(group, "allocation", only=_SETTINGS)
    search_options(group)
    group.add_argument(
        "--score",
        choices=ROUNDINGS,
        default="gptq",
        help="how to round: errors compensated by the columns that follow (gptq, default), or nearest",
    )
    PruneConfig.add_options(group, "weights", only=("inputs", "include", "exclude"))
    group = parser.add_argument_group("afterwards")
    evaluation_options(group)
    PruneConfig.add_options(group, "afterwards")
    resource_options(parser.add_argument_group("memory, time and output"))
    parser.set_defaults(budget="params", latency_table=None, recover=None, recover_lr=None)
    parser.set_defaults(recover_rank=None, distill=None, nproc=1)
    return parser
