"""Operations of sparse training and inference, counted in three ways: dense, theoretical, and on 2:4 hardware.

A layer that multiplies T tokens by a weight of ``numel`` entries makes ``T * numel`` multiplications and additions in
each of three products: forward, the gradient of its input, and the gradient of its weight. The table gives the factor
of each product. r is the density N/M of the masked weight; it is 1 while alpha > 0, when no weight is exactly 0.

============  =======================  ====================================  ==============
count         forward                  gradient of the input                 of the weight
============  =======================  ====================================  ==============
dense         1                        1                                     1
theoretical   r                        r                                     1
hardware      r if the pattern is 2:4  r if its mask is transposable, too    1
============  =======================  ====================================  ==============

The gradient of the weight is dense in every method that lets pruned weights grow back. Sparse units of GPUs support
only 2:4, and the product with the transposed weight is 2:4 only for transposable masks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from leanstep.sparsity.patterns import NM
from leanstep.sparsity.training.schedules import Schedule

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

    def fractions(self) -> tuple[float, float]:
        """Theoretical and hardware operations as fractions of the dense ones."""
        return self.theoretical / self.dense, self.hardware / self.dense


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
        layers: (number of weights, final pattern) of each sparse layer.
        schedule: pattern and alpha of every step; steps after its end use the last ones.
        steps: optimizer steps of the run.
        tokens: number of vectors that each sparse layer multiplies in a step.
        transposable: whether transposed masks are N:M, too.
    """
    sizes: dict[NM, int] = {}
    for numel, target in layers:
        sizes[target] = sizes.get(target, 0) + numel
    total, theoretical, hardware = dense * steps, 0.0, 0.0
    for target, numel in sizes.items():
        for step in range(steps):
            stage = schedule.at(step, target)
            if stage.alpha == 0:
                saved = 2 * numel * tokens * stage.pattern.sparsity
                # the forward pass, and the gradient of the input with the transposed weight
                theoretical += 2 * saved
                hardware += (1 + transposable) * saved if stage.pattern == NM(2, 4) else 0.0
    return Operations(total, total - theoretical, total - hardware)
