"""Levels of sparse files: codes of 8 or 4 bits for the weights that are not zero, which a bit mask tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from leanstep.pruning.score.base import LayerStatistics
from leanstep.pruning.score.scores import layer_pruner
from leanstep.pruning.score.sparsegpt import SparseGPTPruner
from leanstep.pruning.score.targets import Target
from leanstep.sparsity.inference.matrices import CODES, DTYPE_NAMES, WEIGHT_DTYPES, Form

DENSE = "dense"
# percent of zeros. At as many bytes, codes of fewer bits cost less than more zeros, by a test: so 16 bits have none.
# N:M patterns would save no byte, since a mask has a bit for every weight
_ZEROS = {"int8": (0, 15, 30), "int4": (0, 10, 20, 30, 40, 50, 60, 70, 80)}
CODED = tuple(_ZEROS)
# columns with one scale of int4
_GROUP = 64
# of the largest magnitude, which the largest code stands for
_CLIPPED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)


class Level(NamedTuple):
    """Codes, and the percentage of zeros."""

    codes: str
    zeros: int

    def __str__(self) -> str:
        return f"{self.codes} {self.zeros}%"

    @classmethod
    def parse(cls, name: str) -> Level:
        """The level of a name."""
        codes, _, zeros = name.partition(" ")
        return cls(codes, int(zeros.removesuffix("%")))

    def keep(self, numel: int) -> int:
        """Weights that are not zero."""
        return numel - numel * self.zeros // 100


def sparse_levels(target: Target) -> list[tuple[int, str]]:
    """(bytes, name) of each level of a matrix, in falling order. The first is the matrix as it is.

    Raises:
        ValueError: for a parameter that is no matrix, or of a dtype that sparse files have no codes for.
    """
    weight = target.weight
    dtype, is_transposed = DTYPE_NAMES.get(weight.dtype, str(weight.dtype)), target.layout == "in_out"
    if target.expert is not None or len(target.layer.shape) != 2 or dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"{target.name}: sparse files have codes for matrices of {', '.join(WEIGHT_DTYPES)}, got {dtype} "
            f"{list(target.layer.shape)}{' of a fused expert' * (target.expert is not None)}; exclude it (--exclude)"
        )
    shape = tuple(weight.T.shape if is_transposed else weight.shape)
    sizes = {weight.nbytes: DENSE}
    for codes, shares in _ZEROS.items():
        for zeros in shares:
            level = Level(codes, zeros)
            sizes.setdefault(Form(shape, dtype, codes=codes).size(level.keep(weight.numel())), str(level))
    return [(size, name) for size, name in sorted(sizes.items(), reverse=True) if size <= weight.nbytes]


@dataclass
class Scales:
    """Chooses the scales of a matrix, by which its values are ``code * scale``, a few columns at a time.

    Attributes:
        codes: int8, with a scale for each row of the stored matrix; or int4, with one for 64 of its columns.
        columns: of the matrix [out, in], whose scales are chosen together.
        is_transposed: whether the matrix is stored as [in, out].
    """

    codes: str
    columns: int
    is_transposed: bool
    _chosen: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, codes: str, inputs: int, *, is_transposed: bool) -> Scales:
        """For a matrix with so many inputs."""
        return cls(codes, 1 if is_transposed else _GROUP if codes == "int4" else inputs, is_transposed)

    def scale(self, weight: Tensor, mask: Tensor, precision: Tensor) -> None:
        """See :class:`leanstep.pruning.score.sparsegpt.Rounding`: the clipping of least squared error is taken."""
        weight = weight * mask
        clipped = torch.tensor(_CLIPPED[: 1 if self.codes == "int8" else None])[:, None, None]
        scales = self._share(weight.abs(), torch.amax) * clipped / _most(self.codes)
        scales = scales.to(torch.bfloat16).to(weight) if self.codes == "int4" else scales
        errors = self._share((_nearest(weight, scales, self.codes) - weight).square() * precision, torch.sum)
        self._chosen.append(scales.gather(0, errors.argmin(0, keepdim=True))[0])

    def nearest(self, column: Tensor) -> Tensor:
        """See :class:`leanstep.pruning.score.sparsegpt.Rounding`."""
        return _nearest(column, self._chosen[-1][0], self.codes)

    def tensor(self) -> Tensor:
        """The scales as a file has them: fp32 [rows], or bf16 [rows, ceil(columns / 64)] of the stored matrix."""
        chosen = torch.cat(self._chosen)
        if self.codes == "int8":
            return (chosen[:, 0] if self.is_transposed else chosen[0]).float().contiguous()
        return (chosen[:, ::_GROUP] if self.is_transposed else chosen.T).to(torch.bfloat16).contiguous()

    def _share(self, values: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
        """Values [..., columns, out] reduced over those that share a scale, as [..., 1 or columns, out]."""
        if not self.is_transposed:
            return reduce(values, -2, keepdim=True)
        if self.codes == "int8":
            return reduce(values, -1, keepdim=True).expand(values.shape)
        rows = values.shape[-1]
        groups = reduce(pad(values, (0, -rows % _GROUP)).unflatten(-1, (-1, _GROUP)), -1)
        return groups.repeat_interleave(_GROUP, -1)[..., :rows]


def _most(codes: str) -> int:
    """The largest code."""
    return 2 ** (CODES[codes][2] - 1) - 1


def _nearest(values: Tensor, scales: Tensor, codes: str) -> Tensor:
    most = _most(codes)
    # no negative zeros, which a file would store
    return torch.where(scales == 0, 0.0, (values / scales).round().clamp(-most, most)) * scales + 0.0


def expanded(scales: Tensor, codes: str, shape: Sequence[int], *, is_transposed: bool) -> Tensor:
    """The scale of each weight, fp32 of the shape [out, in], from those of a file."""
    rows, columns = shape[::-1] if is_transposed else shape
    if codes == "int8":
        whole = scales[:, None].expand(rows, columns)
    else:
        whole = scales.float().repeat_interleave(_GROUP, dim=1)[:, :columns]
    return whole.T if is_transposed else whole


def code_matrix(
    weight: Tensor, level: Level, statistics: LayerStatistics, sweeper: SparseGPTPruner | None, *, is_transposed: bool
) -> tuple[Tensor, Tensor]:
    """A matrix at a level: mask, scales and codes are chosen in one sweep, whose errors later columns take up.

    Args:
        weight: [out, in], fp32.
        level: codes and zeros.
        statistics: of the inputs; without a sweeper, Wanda chooses the zeros by them, or by magnitudes without rows.
        sweeper: of the weight; None: nothing is compensated.
        is_transposed: whether the matrix is stored as [in, out].

    Returns:
        the values, fp32 [out, in], and the scales as a file has them.
    """
    scales = Scales.of(level.codes, weight.shape[1], is_transposed=is_transposed)
    keep = level.keep(weight.numel())
    if sweeper is not None:
        current, mask = sweeper.rounded(keep, scales)
    else:
        score = "wanda" if statistics.count and statistics.square_sum is not None else "magnitude"
        current, mask = layer_pruner(weight, score, statistics).prune(keep)
        step = max(scales.columns, _GROUP)
        for start in range(0, weight.shape[1], step):
            columns = slice(start, start + step)
            scales.scale(current[:, columns].T, mask[:, columns].T, torch.ones(()))
    stored = scales.tensor()
    whole = expanded(stored, level.codes, weight.shape, is_transposed=is_transposed)
    return _nearest(current * mask, whole, level.codes), stored


@dataclass(frozen=True)
class OnScales:
    """The constraint of a weight in training that its zeros stay, and its other values are codes times their scales.

    Gradients pass as if nothing were rounded (a straight-through estimator).
    """

    name: str
    stored: Tensor
    mask: Tensor
    scales: Tensor
    is_transposed: bool

    @classmethod
    def of(cls, name: str, stored: Tensor, weight: Tensor, *, is_transposed: bool) -> OnScales:
        """The constraint of a parameter with these scales, as a file has them."""
        shape = weight.T.shape if is_transposed else weight.shape
        scales = expanded(stored, Level.parse(name).codes, shape, is_transposed=is_transposed)
        return cls(name, stored, weight.detach() != 0, scales.T if is_transposed else scales, is_transposed)

    def __call__(self, trained: Tensor) -> Tensor:
        """The weights, rounded; gradients pass where they are not zero."""
        values = _nearest(trained.detach(), self.scales.to(trained), Level.parse(self.name).codes)
        return torch.where(self.mask.to(trained.device), trained + (values - trained.detach()), 0.0)

    @torch.no_grad()
    def write(self, weight: Tensor) -> tuple[str, Tensor]:
        """The level of a matrix and its scales, which its values have."""
        return self.name, self.stored
