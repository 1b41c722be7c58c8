"""Newton-Schulz: bias of the nuclear norm, error against the polar factor, and time beside torch's Muon.

    python benchmarks/newton_schulz.py [bias] [error] [time] [--threads 2] [--rounds 7] [--dtype float32 bfloat16]

``bias``: estimates of the nuclear norm over the exact one, by spectrum, coefficients and dtype. ``error``: distance
of the result from U V^T, and from the polynomial evaluated exactly, by spectrum, coefficients, form and dtype.
``time``: all hidden matrices of LLaMA-60M, through the function that torch.optim.Muon calls and through the ops here,
interleaved in one process; medians, and the smallest of the rounds. Without a name, all three.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from optimizer_step import llama_60m, machine
from torch import Tensor

from leanstep.kernels import newton_schulz, nuclear_norm

ROWS = 512
SETS = {"jordan": 5, "polar_express": 5, "classic_quintic": 10}


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


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] + ["---:"] * (len(head) - 1), *rows])


def bias() -> str:
    """Estimated over exact nuclear norm."""
    estimators: dict[str, Callable[[Tensor], Tensor]] = {
        "default fp32": lambda m: nuclear_norm([m], dtype=torch.float32),
        "default bf16": lambda m: nuclear_norm([m], dtype=torch.bfloat16),
        "polar_express 5 fp32": lambda m: nuclear_norm([m], coefficients="polar_express", steps=5, dtype=torch.float32),
        "polar_express 5 bf16": lambda m: nuclear_norm(
            [m], coefficients="polar_express", steps=5, dtype=torch.bfloat16
        ),
        "jordan 5 fp32": lambda m: nuclear_norm([m], coefficients="jordan", steps=5, dtype=torch.float32),
        "frobenius": lambda m: nuclear_norm([m], estimator="frobenius"),
    }
    rows = []
    for name, mat in spectra().items():
        exact = float(nuclear_norm([mat], estimator="svd"))
        rows.append([name, *(f"{float(f(mat.float())) / exact:.3f}" for f in estimators.values())])
    return table(["estimated / exact nuclear norm", *estimators], rows)


def polynomial(mat: Tensor, coefficients: str, steps: int) -> Tensor:
    """The steps in fp64, standard form."""
    return newton_schulz([mat], coefficients=coefficients, steps=steps, method="standard", dtype=torch.float64)[0]


def error() -> str:
    """Relative Frobenius distances: from U V^T / from the same steps in fp64."""
    kinds = [(method, dtype) for dtype in (torch.float32, torch.bfloat16) for method in ("standard", "gram")]
    head = ["from U V^T in fp64, then from those steps", "fp64"]
    head += [f"{method} {str(dtype).removeprefix('torch.')}" for method, dtype in kinds]
    rows = []
    for name, mat in spectra().items():
        if name == "rank 1":  # its U V^T is not determined
            continue
        left, _, right = torch.linalg.svd(mat, full_matrices=False)
        for coefficients, steps in SETS.items():
            exact = polynomial(mat, coefficients, steps)
            row = [f"{name}, {coefficients} {steps}", f"{float((exact - left @ right).norm() / ROWS**0.5):.2f}"]
            for method, dtype in kinds:
                options = {"steps": steps, "coefficients": coefficients, "method": method, "dtype": dtype}
                (found,) = newton_schulz([mat.float()], **options)
                row.append(f"{float((found.double() - exact).norm() / exact.norm()):.1e}")
            rows.append(row)
    return table(head, rows)


def timing(dtype: torch.dtype, rounds: int) -> str:
    """Medians over the rounds, in shuffled order."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    jordan = (3.4445, -4.7750, 2.0315)
    generator = torch.Generator().manual_seed(0)
    shapes = [shape for role, shape in llama_60m() if role == "hidden"]
    mats = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    runs: dict[str, Callable[[], object]] = {
        "torch.optim._muon": lambda: [_zeropower_via_newtonschulz(m, jordan, 5, 1e-7) for m in mats],
        "newton_schulz": lambda: newton_schulz(mats),
        'newton_schulz "standard"': lambda: newton_schulz(mats, method="standard"),
        "nuclear_norm": lambda: nuclear_norm(mats),
        "nuclear_norm polar_express 5": lambda: nuclear_norm(mats, coefficients="polar_express", steps=5),
        "nuclear_norm frobenius": lambda: nuclear_norm(mats, estimator="frobenius"),
    }
    order, times = list(runs), {name: [] for name in runs}
    for run in runs.values():
        run()
    shuffle = random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            begin = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - begin)
    base = times["torch.optim._muon"]
    rows = [
        [
            name,
            f"{statistics.median(values) * 1e3:.0f}",
            f"{statistics.median(values) / statistics.median(base):.2f}",
            f"{min(values) * 1e3:.0f}",
            f"{min(values) / min(base):.2f}",
        ]
        for name, values in times.items()
    ]
    kind = str(dtype).removeprefix("torch.")
    return table([f"{len(mats)} matrices of LLaMA-60M, {kind}", "median ms", "÷ Muon's", "least ms", "÷ Muon's"], rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=["bias", "error", "time"], default=["bias", "error", "time"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    print(machine())
    for part in options.parts:
        if part == "time":
            for name in options.dtype:
                print("\n" + timing(getattr(torch, name), options.rounds), flush=True)
        else:
            print("\n" + {"bias": bias, "error": error}[part](), flush=True)


if __name__ == "__main__":
    main()
