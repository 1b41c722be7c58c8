"""What people ask of a sparse run: how sparse each layer is, whether masks settle, what pruning leaves, and noise."""

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
    """The last measurement of a layer: 0-d tensors on its device, which nobody waits for until they are read."""

    flip_rate: Tensor | None = None
    gradient_noise: Tensor | None = None

    def see_no_change(self, layer: SparseLayer) -> None:
        """A step that left the mask as it was."""
        self.flip_rate = torch.zeros((), device=layer.transform.mask.device)

    def see_masks(self, layer: SparseLayer, before: Tensor, after: Tensor) -> None:
        """Compare a new mask with the one before."""
        flips = sharding.total((before ^ after).sum(dtype=torch.float32), layer.weight)
        self.flip_rate = flips / layer.transform.mask.numel()

    def see_gradient(self, layer: SparseLayer) -> None:
        """Look at the gradient that a step is about to use."""
        if layer.weight.grad is None:
            return
        gradient, _, mask = sharding.local_parts(layer)
        squares = gradient.float().square()
        kept = torch.where(mask, squares, 0.0).sum()
        parts = sharding.total(torch.stack([squares.sum(), kept]), layer.weight)
        self.gradient_noise = (1 - parts[1] / parts[0].clamp_min(torch.finfo(torch.float32).tiny)).clamp(0, 1)


def layer_rows(controller: Controller) -> list[dict[str, Any]]:
    """One row for each sparse layer of a controller.

    * ``layer``, ``target``: its name and pattern. ``pattern``, ``alpha``, ``phase``: where the schedule has it now.
    * ``sparsity``: fraction of exact zeros in what the layer computes with; 0 as long as pruned weights only decay.
    * ``kept_magnitude``: sum of the magnitudes of kept weights over that of all.
    * ``flip_rate``: fraction of the mask's entries that the last measured step changed (a weight that takes the place
      of another changes two).
    * ``gradient_noise``: part of the squared norm of the last measured gradient that lies on pruned entries, before
      SR-STE's term: what updates weights that the forward pass does not use. The part of pruned entries in number,
      ``1 - N/M``, is what a gradient blind to the mask has. With ``grad_flow="fixed"`` it is 0.

    The last two are None until a step was measured (``measure_every``).
    """
    numbers: list[Tensor] = []
    for layer in controller.layers:
        found = controller.measured.get(layer.name)
        numbers.append(_numbers(layer, found))
    # one wait for all layers
    values = torch.stack([number.to(numbers[0].device) for number in numbers]).tolist()
    rows = []
    for layer, (kept, magnitude, flips, noise) in zip(controller.layers, values, strict=True):
        stage = controller.stage(layer)
        rows.append(
            {
                "layer": layer.name,
                "target": str(layer.target),
                "pattern": str(layer.transform.pattern),
                "phase": stage.phase,
                "alpha": stage.alpha,
                "sparsity": 1 - kept if stage.alpha == 0 else 0.0,
                "kept_magnitude": magnitude,
                "flip_rate": None if flips < 0 else flips,
                "gradient_noise": None if noise < 0 else noise,
                "weights": layer.transform.mask.numel(),
            }
        )
    return rows


def summary(controller: Controller) -> dict[str, float]:
    """Numbers for a log: ``sparsity/all`` over all sparse layers, ``alpha/TARGET``, and ``WHAT/LAYER`` for the rest.

    WHAT is ``sparsity``, ``flip_rate``, ``kept_magnitude`` and ``gradient_noise`` of :func:`layer_rows`.
    """
    rows = layer_rows(controller)
    zeros = sum(row["sparsity"] * row["weights"] for row in rows)
    found = {"sparsity/all": zeros / sum(row["weights"] for row in rows)}
    found |= {f"alpha/{row['target']}": row["alpha"] for row in rows}
    for what in ("sparsity", "flip_rate", "kept_magnitude", "gradient_noise"):
        found |= {f"{what}/{row['layer']}": row[what] for row in rows if row[what] is not None}
    return found


@torch.no_grad()
def _numbers(layer: SparseLayer, found: Measurement | None) -> Tensor:
    """Kept entries and kept magnitude as fractions, flip rate and gradient noise or -1; fp64 [4]."""
    weight, mask = layer.weight, sharding.local_mask(layer)
    magnitude = local_part(weight.detach()).abs()
    kept, everything = torch.where(mask, magnitude, 0).sum(dtype=torch.float64), magnitude.sum(dtype=torch.float64)
    parts = sharding.total(torch.stack([mask.sum(dtype=torch.float64), kept, everything]), weight)
    unknown = torch.full((), -1.0, dtype=torch.float64, device=parts.device)
    flips = noise = unknown
    if found is not None:
        flips = unknown if found.flip_rate is None else found.flip_rate.double()
        noise = unknown if found.gradient_noise is None else found.gradient_noise.double()
    share = torch.where(parts[2] > 0, parts[1] / parts[2], torch.ones_like(parts[1]))
    return torch.stack([parts[0] / layer.transform.mask.numel(), share, flips, noise])
