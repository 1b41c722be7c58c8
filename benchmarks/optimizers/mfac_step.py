"""The arithmetic of an M-FAC step against its floor, two reads of the window, and against the published recursion.

    python benchmarks optimizers/mfac_step [--rows 64 256 1024] [--columns 1000000] [--dtype float32] [--device cuda]

A step here is what M-FAC adds to a gradient: store it as a row of the window [m, d], form its row of the Gram matrix,
solve the m x m system in float64, and combine the rows. The window is cut into the blocks that a small transformer's
parameters would make of it. "floor" is two products of the window's bytes, taken as an fp32 matrix, with a vector.
The published dynamic recursion (arXiv 2107.03356) is run as plain torch in fp32: the same two products with the window,
then m sequential steps. "S-MFAC" is the same step on sparse rows, one entry in a hundred, in bf16. All of them run once
a round, in shuffled order; medians.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import torch
from common import command_line, interleaved_medians, print_table, start

from leanstep.kernels import (
    linear_combination,
    row_dots,
    scatter,
    sparse_layout,
    sparse_linear_combination,
    sparse_row_dots,
    top_k,
    window_coefficients,
)
from leanstep.kernels.reference.fisher.inverse_fisher import dynamic_recursion

PARSER = command_line(
    __doc__, rows=[64, 256, 1024], columns=[100_000, 1_000_000], dtype=["float32", "bfloat16"], device="cpu",
    threads=0, rounds=9,
)  # fmt: skip
DAMPING = 1e-5


def block_sizes(columns: int) -> list[int]:
    """Parameter sizes of a transformer scaled to so many elements: nine matrices in ten, vectors, and what is left."""
    width = max(8, int((columns / 100) ** 0.5) // 8 * 8)
    sizes: list[int] = []
    while sum(sizes) + 12 * width * width + 4 * width <= columns:
        sizes += [3 * width * width, width * width, 4 * width * width, 4 * width * width, *[width] * 4]
    return [*sizes, columns - sum(sizes)]


class Dense:
    """A full window, its Gram matrix, and a step on it in three parts."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        sizes = block_sizes(columns)
        self.windows = [torch.randn(rows, n, device=device).to(dtype) for n in sizes]
        self.gradients = [torch.randn(n, device=device) for n in sizes]
        self.gram = torch.stack([row_dots(self.windows, [w[i] for w in self.windows]) for i in range(rows)])
        self.index, self.rows = rows - 1, rows

    def dots(self) -> None:
        """Store the gradient, always in one row: repeated rows would need another way to solve."""
        newest = [w[self.index] for w in self.windows]
        torch._foreach_copy_(newest, self.gradients)
        row = row_dots(self.windows, newest)
        self.gram[self.index] = row
        self.gram[:, self.index] = row

    def solve(self) -> None:
        """Coefficients of the rows."""
        self.coefficients, _ = window_coefficients(self.gram, DAMPING, self.rows, self.index)

    def combine(self) -> None:
        """The preconditioned gradient."""
        self.update = linear_combination(self.windows, self.coefficients)


class Published:
    """The dynamic recursion in fp32, on a window of one block, as torch computes it."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.window = torch.randn(rows, columns, device=device)
        self.gradient = torch.randn(columns, device=device)
        self.gram = self.window @ self.window.T
        self.index, self.rows = rows - 1, rows

    def step(self) -> None:
        """Store, recurse, combine."""
        self.window[self.index] = self.gradient
        row = self.window @ self.gradient
        self.gram[self.index] = row
        self.gram[:, self.index] = row
        coefficients = dynamic_recursion(self.gram, DAMPING).coefficients(row)
        self.update = self.gradient / DAMPING - self.window.T @ coefficients


class Sparse:
    """A full window of sparse rows."""

    def __init__(self, rows: int, columns: int, device: torch.device, density: float = 0.01) -> None:
        self.layouts = [sparse_layout(n, density) for n in block_sizes(columns)]
        self.gradients = [torch.randn(s.numel, device=device) for s in self.layouts]
        # four rows, repeated: filling the window is not timed
        pairs = zip(self.gradients, self.layouts, strict=True)
        entries = [[top_k(torch.randn_like(g), layout) for _ in range(4)] for g, layout in pairs]
        self.values = [torch.stack([v for v, _ in block] * (rows // 4)) for block in entries]
        self.indices = [torch.stack([i for _, i in block] * (rows // 4)) for block in entries]
        self.gram = torch.eye(rows, dtype=torch.float64, device=device)
        self.index, self.rows = rows - 1, rows

    def step(self) -> None:
        """Find the largest entries, store, solve with a regular matrix (the rows repeat), combine."""
        newest = []
        blocks = zip(self.gradients, self.layouts, self.values, self.indices, strict=True)
        for gradient, layout, values, indices in blocks:
            values[self.index], indices[self.index] = top_k(gradient, layout)
            newest.append(scatter(values[self.index], indices[self.index], layout))
        sparse_row_dots(self.values, self.indices, newest, self.layouts)
        coefficients, _ = window_coefficients(self.gram, DAMPING, self.rows, self.index)
        self.update = sparse_linear_combination(self.values, self.indices, coefficients, self.layouts)


def candidates(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], object]]:
    """name -> a timed call."""
    dense = Dense(rows, columns, dtype, device)

    # the fastest read that torch has, faster than a sum: the same bytes as an fp32 matrix, times a vector
    words = [w.view(-1)[: w.numel() // 8192 * 8192].view(torch.float32).view(-1, 4096) for w in dense.windows]
    ones = torch.ones(4096, device=device)

    runs: dict[str, Callable[[], object]] = {
        "floor: two reads": lambda: [torch.mv(matrix, ones) for _ in range(2) for matrix in words],
        "step": lambda: (dense.dots(), dense.solve(), dense.combine()),
        "- store and dots": dense.dots,
        "- solve": dense.solve,
        "- combination": dense.combine,
    }
    if dtype == torch.float32:
        runs["published recursion, plain torch"] = Published(rows, columns, device).step
        if rows % 4 == 0:
            runs["S-MFAC, density 0.01, bf16"] = Sparse(rows, columns, device).step
    return runs


def measure(rows: int, columns: int, dtype: torch.dtype, device: torch.device, rounds: int) -> None:
    """Print one table."""
    medians = interleaved_medians(candidates(rows, columns, dtype, device), rounds)
    floor = medians["floor: two reads"]
    size = rows * columns * dtype.itemsize
    speed = f"{size / 1e9:.2f} GB, read at {2 * size / floor / 1e9:.1f} GB/s"
    print(f"\nm = {rows}, d = {columns}, {str(dtype).removeprefix('torch.')}: {speed}\n")
    cells = ([name, f"{value * 1e3:.2f}", f"{value / floor:.2f}"] for name, value in medians.items())
    print_table(["", "median ms", "x floor"], cells)


def main() -> None:
    """Measure, and print the table."""
    options = start(PARSER)
    warnings.simplefilter("ignore")
    for dtype, columns, rows in itertools.product(options.dtype, options.columns, options.rows):
        measure(rows, columns, getattr(torch, dtype), torch.device(options.device), options.rounds)
