"""Count the zeros of a pruned folder that are zeros in a GGUF file made of it.

    python llama.cpp/convert_hf_to_gguf.py runs/smollm2-60 --outtype q8_0 --outfile runs/smollm2-60-q8_0.gguf
    python benchmarks sparsity/gguf_zeros runs/smollm2-60 runs/smollm2-60-q8_0.gguf

The first command is llama.cpp's. Both are opened by transformers (package gguf), which finds the names and the order of
the rows. f16, bf16, Q8_0 and Q4_0 store a zero as zero. Types with an offset per block, such as Q4_1 and Q4_K, store
the nearest of their values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import command_line, required

PARSER = command_line(__doc__)
PARSER.add_argument("folder", type=Path, help="a dense Hugging Face folder with zeros")
PARSER.add_argument("files", type=Path, nargs="+", help="GGUF files of it")


class Zeros(NamedTuple):
    """Zeros in the matrices of a folder, how many of them a file has, and the largest of the others."""

    folder: int
    file: int
    largest: float


def compare(folder: Path, file: Path) -> Zeros:
    """Compare the matrices of the blocks."""
    required("gguf")
    from transformers import AutoModelForCausalLM

    dense: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    other: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
    )
    weights = dict(other.named_parameters())
    zeros = same = 0
    largest = 0.0
    for name, weight in dense.named_parameters():
        if weight.dim() == 2 and ".layers." in name:
            values = weights[name].detach()[weight == 0]
            zeros, same = zeros + values.numel(), same + int((values == 0).sum())
            largest = max(largest, float(values.abs().max())) if values.numel() else largest
    return Zeros(zeros, same, largest)


def main() -> int:
    """Print one line per file; 1 if a file lost zeros."""
    options = PARSER.parse_args()
    results = {file: compare(options.folder, file) for file in options.files}
    for file, zeros in results.items():
        lost = "" if zeros.file == zeros.folder else f"; the largest of the others is {zeros.largest:.1e}"
        print(f"{file.name}: {zeros.file:,} of {zeros.folder:,} zeros are zeros{lost}")
    return int(any(zeros.file < zeros.folder for zeros in results.values()))
