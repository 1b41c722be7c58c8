"""LANTON as it is written: one matrix or vector at a time, in float64, with singular value decompositions."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def direction(momentum: Tensor, norm: str, scaling: str = "scion") -> Tensor:
    """The point of the unit ball with the largest inner product with the momentum."""
    if norm == "sign":
        return momentum.sign()
    if norm == "vector":
        size = momentum.square().mean().sqrt()
        return momentum / size if size > 0 else torch.zeros_like(momentum)
    left, _, right = torch.linalg.svd(momentum.flatten(1), full_matrices=False)
    return (size_of(momentum, scaling) * left @ right).view_as(momentum)


def size_of(matrix: Tensor, scaling: str = "scion") -> float:
    m, n = matrix.flatten(1).shape
    return math.sqrt(m / n) if scaling == "scion" else 0.2 * math.sqrt(max(m, n))


def dual_norm(gradient: Tensor, norm: str, scaling: str = "scion") -> float:
    """The largest inner product of the gradient with a point of the unit ball."""
    if norm == "sign":
        return gradient.abs().sum().item()
    if norm == "vector":
        return math.sqrt(gradient.numel()) * gradient.norm().item()
    return size_of(gradient, scaling) * torch.linalg.svdvals(gradient.flatten(1)).sum().item()


def own_norm(point: Tensor, norm: str, scaling: str = "scion") -> float:
    """The norm whose unit ball it is."""
    if norm == "sign":
        return point.abs().max().item()
    if norm == "vector":
        return point.square().mean().sqrt().item()
    return torch.linalg.svdvals(point.flatten(1)).max().item() / size_of(point, scaling)


@dataclass
class Formula:
    """The whole rule over named layers; ``norms`` says whose maxima are shared, too."""

    params: list[Tensor]
    norms: list[str]
    lr: float
    betas: tuple[float, float] = (0.95, 0.9)
    alpha: float = 1.0
    weight_decay: float = 0.0
    scaling: str = "scion"
    nesterov: bool = False
    momenta: list[Tensor] = field(init=False)
    previous: list[Tensor | None] = field(init=False)
    noise: list[float | None] = field(init=False)
    factors: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.momenta = [torch.zeros_like(p) for p in self.params]
        self.previous = [None] * len(self.params)
        self.noise = [None] * len(self.params)
        self.factors = [1.0] * len(self.params)

    def step(self, gradients: list[Tensor | None]) -> None:
        beta1, beta2 = self.betas
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            self.momenta[i] = beta1 * self.momenta[i] + (1 - beta1) * gradient
            before = self.previous[i]
            if before is not None:
                dual = dual_norm(gradient - before, self.norms[i], self.scaling)
                self.noise[i] = beta2 * (self.noise[i] or 0.0) + (1 - beta2) * dual**2
            self.previous[i] = gradient.clone()
        a = [None if h is None else self.alpha / math.sqrt(self.alpha**2 + h) for h in self.noise]
        for i, gradient in enumerate(gradients):
            alike = [x for x, norm in zip(a, self.norms, strict=True) if norm == self.norms[i] and x is not None]
            mine = a[i]
            self.factors[i] = 1.0 if mine is None else math.sqrt(mine / max(alike))
            if gradient is None:
                continue
            ahead = beta1 * self.momenta[i] + (1 - beta1) * gradient if self.nesterov else self.momenta[i]
            o = direction(ahead, self.norms[i], self.scaling)
            self.params[i] *= 1 - self.lr * self.weight_decay
            self.params[i] -= self.lr * self.factors[i] * o
