"""Statistics of a sparse run: each layer's sparsity, unpruned magnitude, flip rate and gradient noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leanstep._torch import local_part
from leanstep.sparsity import sharding

if TYPE_CHECKING:
    from leanstep.sparsity.controller import Controller
    from leanstep.sparsity.modules import SparseLayer


@dataclass
class Measurement:
    """The last measurement of a layer: 0-d tensors on its device, so recording does not wait for the device."""

    flip_rate: Tensor | None = None
    gradient_noise: Tensor | None = None

    def record_no_change(self, layer: SparseLayer) -> None:
        """Record a step that did not change the mask."""
        self.flip_rate = torch.zeros((), device=layer.transform.mask.device)

    def record_masks(self, layer: SparseLayer, before: Tensor, after: Tensor) -> None:
        """Record the flip rate between two masks."""
        flips = sharding.total((before ^ after).sum(dtype=torch.float32), layer.weight)
        self.flip_rate = flips / layer.transform.mask.numel()

    def record_gradient(self, layer: SparseLayer) -> None:
        """Record the noise of the gradient that a step is about to use."""
        if layer.weight.grad is None:
            return
        gradient, _, mask = sharding.local_parts(layer)
        squares = gradient.float().square()
        sums = torch.stack([squares.sum(), torch.where(mask, squares, 0.0).sum()])
        total, unpruned = sharding.total(sums, layer.weight)
        self.gradient_noise = (1 - unpruned / total.clamp_min(torch.finfo(torch.float32).tiny)).clamp(0, 1)


def layer_rows(controller: Controller) -> list[dict[str, Any]]:
    """One row for each sparse layer of a controller.

    * ``layer``, ``target``: name and final pattern. ``pattern``, ``alpha``, ``phase``: the schedule's current values.
    * ``sparsity``: fraction of exact zeros in the masked weight; 0 while pruned weights only decay.
    * ``kept_magnitude``: sum of the unpruned weights' magnitudes, divided by the sum of all magnitudes.
    * ``flip_rate``: fraction of mask entries that the last measured step changed (a swap changes two).
    * ``gradient_noise``: fraction of the last measured gradient's squared norm that falls on pruned entries, before
      SR-STE's term. It updates weights that the forward pass does not use. It is ``1 - N/M`` for a gradient independent
      of the mask, and 0 with ``grad_flow="fixed"``.

    The last two are None before the first measurement (``measure_every``).
    """
    numbers = [_numbers(layer, controller.measured.get(layer.name)) for layer in controller.layers]
    # wait for the device once for all layers
    values = torch.stack([number.to(numbers[0].device) for number in numbers]).tolist()
    rows = []
    for layer, (density, magnitude, flips, noise) in zip(controller.layers, values, strict=True):
        stage = controller.stage(layer)
        rows.append(
            {
                "layer": layer.name,
                "target": str(layer.target),
                "pattern": str(layer.transform.pattern),
                "phase": stage.phase,
                "alpha": stage.alpha,
                "sparsity": 1 - density if stage.alpha == 0 else 0.0,
                "kept_magnitude": magnitude,
                "flip_rate": None if flips < 0 else flips,
                "gradient_noise": None if noise < 0 else noise,
                "weights": layer.transform.mask.numel(),
            }
        )
    return rows


def summary(controller: Controller) -> dict[str, float]:
    """Numbers for a log: ``sparsity/all`` over all sparse layers, ``alpha/TARGET``, and ``WHAT/LAYER``.

    WHAT is ``sparsity``, ``flip_rate``, ``kept_magnitude`` and ``gradient_noise`` of :func:`layer_rows`.
    """
    rows = layer_rows(controller)
    zeros = sum(row["sparsity"] * row["weights"] for row in rows)
    numbers = {"sparsity/all": zeros / sum(row["weights"] for row in rows)}
    numbers |= {f"alpha/{row['target']}": row["alpha"] for row in rows}
    for what in ("sparsity", "flip_rate", "kept_magnitude", "gradient_noise"):
        numbers |= {f"{what}/{row['layer']}": row[what] for row in rows if row[what] is not None}
    return numbers


@torch.no_grad()
def _numbers(layer: SparseLayer, measured: Measurement | None) -> Tensor:
    """Density, ``kept_magnitude``, flip rate and gradient noise (-1 if unknown): fp64 [4]."""
    weight, mask = layer.weight, sharding.local_mask(layer)
    magnitude = local_part(weight.detach()).abs()
    sums = torch.stack([t.sum(dtype=torch.float64) for t in (mask, torch.where(mask, magnitude, 0), magnitude)])
    count, kept_magnitude, total_magnitude = sharding.total(sums, weight)
    unknown = torch.full((), -1.0, dtype=torch.float64, device=sums.device)
    measured = measured or Measurement()
    flips, noise = (unknown if t is None else t.double() for t in (measured.flip_rate, measured.gradient_noise))
    fraction = torch.where(total_magnitude > 0, kept_magnitude / total_magnitude, torch.ones_like(kept_magnitude))
    return torch.stack([count / layer.transform.mask.numel(), fraction, flips, noise])
