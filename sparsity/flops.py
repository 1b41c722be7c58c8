"""What sparse training and inference cost in operations: as the literature counts, as hardware can, and dense.

A layer that multiplies T tokens by a weight of ``numel`` entries makes ``T * numel`` multiplications and additions in
each of three products: forward, the gradient of its input, and the gradient of its weight. With density r = N/M of
what the layer computes with (1 as long as alpha > 0, since decayed weights are multiplied like any other):

============  =======================  ====================================  ==============
count         forward                  gradient of the input                 of the weight
============  =======================  ====================================  ==============
dense         1                        1                                     1
theoretical   r                        r                                     1
hardware      r if the pattern is 2:4  r if its mask is transposable, too    1
============  =======================  ====================================  ==============

The gradient of the weight is dense in all methods that let pruned weights grow back. Sparse units of GPUs know 2:4 and
nothing else, and the product with the transposed weight is 2:4 for transposable masks only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from leanstep.sparsity.patterns import NM
from leanstep.sparsity.schedules import Schedule

FORMULA = (
    "dense: 6 N + attention per token; theoretical: sparse weights count N/M forward and in the input's gradient; "
    "hardware: the same for 2:4 only (and transposable masks in the input's gradient)"
)


@dataclass(frozen=True)
class Operations:
    """Floating-point operations (a multiplication and an addition are two), counted three ways."""

    dense: float
    theoretical: float
    hardware: float

    def __add__(self, other: Operations) -> Operations:
        return Operations(
            self.dense + other.dense, self.theoretical + other.theoretical, self.hardware + other.hardware
        )

    def fractions(self) -> tuple[float, float]:
        """Theoretical and hardware operations as parts of the dense ones."""
        return self.theoretical / self.dense, self.hardware / self.dense


def forward_operations(
    dense: float, layers: Iterable[tuple[int, NM]], tokens: float = 1, *, alpha: float = 0.0
) -> Operations:
    """Operations of a forward pass.

    Args:
        dense: operations of the dense forward pass over ``tokens``.
        layers: (entries of the weight, pattern) of each sparse layer.
        tokens: how many vectors each layer multiplies.
        alpha: factor of pruned weights; above 0 all of them are multiplied.
    """
    theoretical = hardware = 0.0
    for numel, pattern in layers:
        saved = 2 * numel * tokens * (pattern.sparsity if alpha == 0 else 0.0)
        theoretical += saved
        hardware += saved if _is_two_four(pattern) else 0.0
    return Operations(dense, dense - theoretical, dense - hardware)


def training_operations(
    dense: float,
    layers: Iterable[tuple[int, NM]],
    schedule: Schedule,
    *,
    steps: int,
    tokens: float,
    transposable: bool = False,
) -> Operations:
    """Operations of a whole run, forward and backward.

    Args:
        dense: operations of a dense step over its ``tokens``.
        layers: (entries of the weight, target pattern) of each sparse layer.
        schedule: which patterns and alpha the steps have; after its end they are the last ones.
        steps: optimizer steps of the run.
        tokens: vectors that each sparse layer multiplies in a step.
        transposable: whether transposed masks are N:M, too.

    Returns:
        :class:`Operations` of all steps.
    """
    theoretical = hardware = 0.0
    sizes: dict[NM, int] = {}
    for numel, target in layers:
        sizes[target] = sizes.get(target, 0) + numel
    for target, numel in sizes.items():
        product = 2 * numel * tokens
        for step in range(steps):
            stage = schedule.at(step, target)
            saved = product * (stage.pattern.sparsity if stage.alpha == 0 else 0.0)
            theoretical += 2 * saved
            if _is_two_four(stage.pattern):
                hardware += saved * (2 if transposable else 1)
    return Operations(dense * steps, dense * steps - theoretical, dense * steps - hardware)


def _is_two_four(pattern: NM) -> bool:
    return (pattern.n, pattern.m) == (2, 4)
