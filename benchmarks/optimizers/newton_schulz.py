"""Newton-Schulz: bias of the nuclear norm, error against the polar factor, and time beside torch's Muon.

    python benchmarks optimizers/newton_schulz [bias] [error] [time] [--threads 2] [--rounds 7] [--dtype float32]
    python benchmarks optimizers/newton_schulz trained --model FOLDER [--tokens 4096]

``bias``: estimates of the nuclear norm over the exact one, by spectrum, coefficients and dtype. ``error``: distance
of the result from U V^T, and from the polynomial evaluated exactly, by spectrum, coefficients, form and dtype.
``time``: all hidden matrices of LLaMA-60M, through the function that torch.optim.Muon calls and through the ops here,
interleaved in one process; medians, and the smallest of the rounds. Without a name, these three. ``trained``: errors of
the nuclear norm on differences of gradients, of two batches of State of the Union addresses, of a model's folder.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import add_tables, command_line, interleaved_seconds, print_table, start
from models import llama_60m_parameters
from torch import Tensor

from leanstep.kernels import newton_schulz, nuclear_norm

ROWS = 512
SETS = {"jordan": 5, "polar_express": 5, "classic_quintic": 10}
TABLES = ("bias", "error", "time")
PARSER = command_line(
    __doc__,
    dtype=["float32", "bfloat16"],
    threads=0,
    rounds=7,
    model=("", "for the table trained: a folder that transformers opens"),
    tokens=(4096, "tokens of each of the two batches; default: %(default)s"),
)
add_tables(PARSER, *TABLES, "trained")
PARSER.set_defaults(tables=list(TABLES))


def spectra() -> dict[str, Tensor]:
    """Matrices in fp64 by name."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    left, right = torch.linalg.qr(normal(ROWS, ROWS))[0], torch.linalg.qr(normal(2 * ROWS, ROWS))[0]
    k = torch.arange(1, ROWS + 1, dtype=torch.float64)
    values = {
        "1/k": 1 / k,
        "1/k^2": 1 / k**2,
        "exp(-k/10)": torch.exp(-k / 10),
        "condition 1e3": torch.logspace(0, -3, ROWS, dtype=torch.float64),
        "rank 1": (k == 1).double(),
    }
    return {
        "Gaussian 512 x 512": normal(ROWS, ROWS),
        "Gaussian 512 x 1376": normal(ROWS, 1376),
        "rank 8 + 1 % noise": normal(ROWS, 8) @ normal(8, ROWS) + 0.01 * math.sqrt(8) * normal(ROWS, ROWS),
        **{name: left * s @ right.mT for name, s in values.items()},
    }


def bias() -> None:
    """Print estimated over exact nuclear norms."""
    fp32, bf16 = {"dtype": torch.float32}, {"dtype": torch.bfloat16}
    polar, jordan = ({"coefficients": name, "steps": 5} for name in ("polar_express", "jordan"))
    settings = {"default fp32": fp32, "default bf16": bf16, "polar_express 5 fp32": polar | fp32}
    settings |= {"polar_express 5 bf16": polar | bf16, "jordan 5 fp32": jordan | fp32}
    settings |= {name: {"estimator": name} for name in ("sketch", "frobenius")}
    rows = []
    for name, mat in spectra().items():
        exact = float(nuclear_norm([mat], estimator="svd"))
        rows.append([name, *(f"{float(nuclear_norm([mat.float()], **s)) / exact:.3f}" for s in settings.values())])
    print_table(["estimated / exact nuclear norm", *settings], rows)


def error() -> None:
    """Print relative Frobenius distances: from U V^T / from the same steps in fp64."""
    kinds = [(method, dtype) for dtype in (torch.float32, torch.bfloat16) for method in ("standard", "gram")]
    head = ["from U V^T in fp64, then from those steps", "fp64"]
    head += [f"{method} {str(dtype).removeprefix('torch.')}" for method, dtype in kinds]
    rows = []
    for name, mat in spectra().items():
        if name == "rank 1":  # its U V^T is not determined
            continue
        left, _, right = torch.linalg.svd(mat, full_matrices=False)
        for coefficients, steps in SETS.items():
            polynomial: dict[str, Any] = {"steps": steps, "coefficients": coefficients}
            (exact,) = newton_schulz([mat], method="standard", dtype=torch.float64, **polynomial)
            row = [f"{name}, {coefficients} {steps}", f"{float((exact - left @ right).norm() / ROWS**0.5):.2f}"]
            for method, dtype in kinds:
                (result,) = newton_schulz([mat.float()], method=method, dtype=dtype, **polynomial)
                row.append(f"{float((result.double() - exact).norm() / exact.norm()):.1e}")
            rows.append(row)
    print_table(head, rows)


def timing(dtype: str, rounds: int) -> None:
    """Print medians and least times of the rounds."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    jordan = (3.4445, -4.7750, 2.0315)
    mats = [param.grad for param in llama_60m_parameters(getattr(torch, dtype))[0]]
    runs: dict[str, Callable[[], object]] = {
        "torch.optim._muon": lambda: [_zeropower_via_newtonschulz(m, jordan, 5, 1e-7) for m in mats],
        "newton_schulz": lambda: newton_schulz(mats),
        'newton_schulz "standard"': lambda: newton_schulz(mats, method="standard"),
        "nuclear_norm": lambda: nuclear_norm(mats),
        "nuclear_norm polar_express 5": lambda: nuclear_norm(mats, coefficients="polar_express", steps=5),
        "nuclear_norm sketch": lambda: nuclear_norm(mats, estimator="sketch"),
        "nuclear_norm frobenius": lambda: nuclear_norm(mats, estimator="frobenius"),
    }
    times = interleaved_seconds(runs, rounds)
    base = times["torch.optim._muon"]

    def cells(values: list[float]) -> Iterator[str]:
        for summary in (statistics.median, min):
            yield from (f"{summary(values) * 1e3:.0f}", f"{summary(values) / summary(base):.2f}")

    head = [f"{len(mats)} matrices of LLaMA-60M, {dtype}", "median ms", "÷ Muon's", "least ms", "÷ Muon's"]
    print_table(head, ([name, *cells(values)] for name, values in times.items()))


def gradient_differences(folder: str, tokens: int, length: int = 256) -> list[Tensor]:
    """Differences of the hidden matrices' gradients of two batches of random sequences."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from leanstep.optimizers import param_groups
    from leanstep.recipes.data.sources import sotu_corpus

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False),
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
    )
    text = tokenizer("\n".join(list(sotu_corpus().documents())[-40:]))["input_ids"]
    starts = torch.randint(len(text) - length, (2, tokens // length), generator=torch.Generator().manual_seed(0))
    for sign, batch in zip((1.0, -1.0), starts.tolist(), strict=True):
        for i in range(0, len(batch), 4):
            inputs = torch.tensor([text[start : start + length] for start in batch[i : i + 4]])
            (model(input_ids=inputs, labels=inputs).loss * (sign * len(inputs) / len(batch))).backward()
    groups = [group for group in param_groups(model) if group["name"] == "hidden"]
    return [param.grad for group in groups for _, param in group["params"]]


def trained(folder: str, tokens: int) -> None:
    """Print errors of the estimates on a trained model, in percent of the exact nuclear norm."""
    mats = gradient_differences(folder, tokens)
    exact = nuclear_norm(mats, estimator="svd")
    fp32: dict[str, Any] = {"dtype": torch.float32}
    settings: dict[str, dict[str, Any]] = {name: {"estimator": name} for name in ("sketch", "frobenius")}
    settings |= {"polar": fp32, "polar_express 5": fp32 | {"coefficients": "polar_express", "steps": 5}}
    rows = []
    for name, options in settings.items():
        errors = 100 * (nuclear_norm(mats, **options) / exact - 1)
        middle, spread = float(errors.median()), float(errors.abs().max())
        rows.append([name, f"{errors.mean():+.1f}", f"{middle:+.1f}", f"{spread:.1f}"])
    print_table([f"{len(mats)} differences, {tokens} tokens a batch", "mean %", "median %", "largest %"], rows)


def main() -> None:
    """Print the tables."""
    options = PARSER.parse_args()
    if "trained" in options.tables and not options.model:
        PARSER.error("the table trained needs --model FOLDER")
    options = start(PARSER)
    warnings.simplefilter("ignore")
    runs = {"bias": [bias], "error": [error], "time": [lambda d=d: timing(d, options.rounds) for d in options.dtype]}
    runs["trained"] = [lambda: trained(options.model, options.tokens)]
    for name in options.tables:
        for table in runs[name]:
            print()
            table()
