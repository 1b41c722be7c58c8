"""What a score needs to know of a matrix besides its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# fields of LayerStatistics by score
NEEDS: dict[str, tuple[str, ...]] = {
    "magnitude": (),
    "wanda": ("square_sum",),
    "sparsegpt": ("gram",),
    "mfac": ("gradients",),
}


@dataclass
class LayerStatistics:
    """Sums over the inputs of a matrix [out, in] on calibration data, or gradients of it.

    Attributes:
        count: inputs added, that is, tokens.
        square_sum: fp64 [in], sum of x_j^2, 8 bytes per input; None where it is not wanted.
        gram: fp32 [in, in], sum of x x^T; None where it is not wanted.
        gradients: [m, out * in], floating: a gradient per sample or mini-batch, each [out, in] flattened.
    """

    count: int = 0
    square_sum: Tensor | None = None
    gram: Tensor | None = None
    gradients: Tensor | None = None

    @classmethod
    def for_score(cls, score: str, in_features: int, device: torch.device | str = "cpu") -> LayerStatistics:
        """Empty sums, of the kinds that a score needs.

        Raises:
            ValueError: for an unknown score.
        """
        if score not in NEEDS:
            raise ValueError(f"score must be one of {', '.join(NEEDS)}, got {score!r}")
        return cls.empty(NEEDS[score], in_features, device)

    @classmethod
    def empty(cls, fields: Sequence[str], in_features: int, device: torch.device | str = "cpu") -> LayerStatistics:
        """Zero sums for ``square_sum`` and ``gram``, where ``fields`` name them."""
        statistics = cls()
        if "square_sum" in fields:
            statistics.square_sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        if "gram" in fields:
            statistics.gram = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        return statistics

    @torch.no_grad()
    def add(self, inputs: Tensor) -> None:
        """Add inputs [..., in]: squares in fp32, summed in the dtypes described above."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).to(torch.float32)
        self.count += len(rows)
        if self.square_sum is not None:
            self.square_sum += rows.square().sum(dim=0, dtype=self.square_sum.dtype).to(self.square_sum.device)
        if self.gram is not None:
            self.gram.addmm_(rows.T.to(self.gram.device), rows.to(self.gram.device))

    def permuted(self, columns: Tensor) -> LayerStatistics:
        """The same for a matrix whose columns are taken in another order (int64 [in])."""
        gradients = self.gradients
        if gradients is not None:
            gradients = gradients.unflatten(1, (-1, len(columns)))[:, :, columns].flatten(1)
        return LayerStatistics(
            self.count,
            None if self.square_sum is None else self.square_sum[columns],
            None if self.gram is None else self.gram[columns][:, columns],
            gradients,
        )
