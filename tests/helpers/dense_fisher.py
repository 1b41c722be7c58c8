"""M-FAC as a dense matrix in float64: what the optimizer is compared with."""

from typing import Any

import torch
from torch import Tensor


def flatten(tensors: list[Tensor]) -> Tensor:
    """All elements behind one another, in float64."""
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


class DenseFisher:
    """The last ``window`` rows, and F = (damping + shrinkage * tr(G^T G / n) / (n d)) I + G^T G / s of them."""

    def __init__(self, window: int, damping: float, scaling: str = "window", shrinkage: float = 1.0) -> None:
        self.window, self.damping, self.scaling, self.shrinkage = window, damping, scaling, shrinkage
        self.rows: list[Tensor] = []

    def insert(self, row: Tensor) -> None:
        self.rows = [*self.rows, row.double()][-self.window :]

    def matrix(self) -> Tensor:
        stacked = torch.stack(self.rows)
        count = self.window if self.scaling == "window" else len(self.rows)
        moments = stacked.T @ stacked
        mean_eigenvalue = torch.linalg.eigvalsh(moments / len(self.rows)).mean()
        damping = self.damping + self.shrinkage * mean_eigenvalue / len(self.rows)
        return damping * torch.eye(stacked.shape[1], dtype=torch.float64) + moments / count

    def solve(self, vector: Tensor) -> Tensor:
        return torch.linalg.solve(self.matrix(), vector.double())

    def update(self, row: Tensor) -> Tensor:
        """F^-1 of a row that has just entered."""
        self.insert(row)
        return self.solve(row)


def slow_rows(m: int, d: int, change: float) -> Tensor:
    """fp32 gradients [m, d] of length 1 that change slowly, as full-batch ones do: one direction, small differences."""
    chance = torch.Generator().manual_seed(11)
    rows = torch.randn(d, generator=chance) + change * torch.randn(m, d, generator=chance)
    return rows / rows.norm(dim=1, keepdim=True)


def newest_preconditioned(rows: Tensor, damping: float, denominator: float, newest: int = -1) -> Tensor:
    """F^-1 of one of the rows, in float64 by singular values: nothing is squared, so that small differences stay."""
    left, sizes, right = torch.linalg.svd(rows.double(), full_matrices=False)
    return (left[newest] * sizes / (damping + sizes.square() / denominator)) @ right


def stored_rows(optimizer: Any, params: list[Tensor]) -> Tensor:
    """The rows of M-FAC's window as it stores them, [window, elements of all parameters], in float64."""
    blocks = []
    for param in params:
        state = optimizer.state[param]
        if "window" in state:
            rows = state["window"].double()
        else:
            rows = torch.zeros(len(state["window_values"]), *param.shape, dtype=torch.float64)
            rows.scatter_(-1, state["window_indices"].view(torch.int16).long(), state["window_values"].double())
        blocks.append(rows.flatten(1))
    return torch.cat(blocks, dim=1)


def new_params(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=chance, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def set_grads(params: list[Tensor], step: int, size: float = 1.0) -> Tensor:
    """Normal gradients with a common part, so that rows are correlated; returns them flat."""
    chance = torch.Generator().manual_seed(100 + step)
    common = torch.Generator().manual_seed(7)
    for param in params:
        grad = torch.randn(param.shape, generator=chance, dtype=torch.float64)
        grad = size * (grad + torch.randn(param.shape, generator=common, dtype=torch.float64))
        param.grad = grad.to(param.dtype)
    return flatten([p.grad for p in params])


def moved(params: list[Tensor], before: Tensor, lr: float) -> Tensor:
    """The update that a step with ``lr`` and no decay has made."""
    return (before - flatten(params)) / lr


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def step_and_compare(optimizer: Any, params: list[Tensor], expected: Tensor, lr: float) -> float:
    """Make a step; the relative difference between its update and the expected one."""
    before = flatten(params)
    optimizer.step()
    return relative(moved(params, before, lr), expected)
