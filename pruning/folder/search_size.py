"""Estimate what a search on joint distortion takes: pruners and gradients of all matrices, and its passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

# samples whose gradients score="mfac" collects, and weights in a block of its Fisher matrix
GRADIENTS, _FISHER_BLOCK = 128, 128
# bytes of each logit whose divergence is computed again together with others, and their number for the KL
_LOGIT_BYTES, _LOGITS_TOGETHER = 40, 1 << 19
# part of the free memory for the inputs of blocks
_CACHED = 0.25

Shape = tuple[int, int]


def pruner_bytes(shape: Shape, score: str, itemsize: int, *, samples: int, ranked: bool = True) -> int:
    """Bytes that a pruner holds between two levels: its matrix [out, in], the order of the weights, and factors.

    Args:
        shape: of the matrix.
        score: of :func:`leanstep.pruning.layer_pruner`.
        itemsize: bytes of a weight.
        samples: of the calibration data.
        ranked: False for N:M levels, whose scores are computed for each.
    """
    rows, columns = shape
    wide = 4 if itemsize < 4 else 0  # fp32 beside the matrix
    # by weight, and by pair of inputs
    weight, pair = itemsize, 0
    if score in ("magnitude", "wanda"):
        narrow = 2 if columns < 2**15 else 4
        weight += (narrow if score == "wanda" else 4) if ranked else 0
    elif score == "sparsegpt":
        weight, pair = weight + wide, 4
    elif score == "alps":  # a pruner of SparseGPT, the Gram matrix, its eigenvectors, and the scaled weights
        weight, pair = weight + 2 * wide + 4, 12
    else:  # gradients in fp32, the factors of the Fisher matrix in fp64, its inverse's diagonal, and the order
        drawn = min(GRADIENTS, samples)
        factors = 8 * drawn**2 // _FISHER_BLOCK if drawn < _FISHER_BLOCK else 8 * _FISHER_BLOCK
        weight += wide + 4 * drawn + factors + 8 + (4 if ranked else 0)
    return rows * columns * weight + columns**2 * pair


@dataclass(frozen=True)
class SearchSize:
    """What a search takes; see :class:`leanstep.pruning.measure.joint.JointJudge`.

    Attributes:
        pruners: bytes of those of all matrices, which each process holds.
        gradients: bytes of the sums over all batches, and of the gradients of one.
        graph: bytes of a forward and backward pass of one batch.
        inputs: bytes of the cached inputs of all blocks, as far as the free memory allows.
        batch_size: samples in a pass.
    """

    pruners: int
    gradients: int
    graph: int
    inputs: int
    batch_size: int

    @classmethod
    def of(
        cls,
        blocks: Sequence[Sequence[Shape]],
        *,
        score: str,
        metric: str | None,
        judging: int,
        samples: int,
        batch_size: int,
        tokens: int,
        width: int,
        outputs: int,
        itemsize: int,
        ranked: bool = True,
        processes: int = 1,
    ) -> SearchSize:
        """Of matrices [out, in] by block, in bytes of ``itemsize`` for a value; ``judging`` samples judge."""
        matrices = [matrix for block in blocks for matrix in block]
        together = max(1, min(batch_size, judging // 8))
        inside = max(sum(columns + 2 * rows for rows, columns in block) for block in blocks)
        # inputs of all blocks, activations of one and their gradients, logits and theirs
        values = together * tokens * (len(blocks) * width + 2 * inside + 3 * outputs)
        compared = tokens * outputs if metric == "kl_topk" else min(tokens * outputs, _LOGITS_TOGETHER)
        return cls(
            sum(pruner_bytes(m, score, itemsize, samples=samples, ranked=ranked) for m in matrices),
            sum(rows * columns for rows, columns in matrices) * (itemsize + max(4, itemsize)),
            itemsize * values + _LOGIT_BYTES * compared,
            len(blocks) * -(-judging // processes) * tokens * width * itemsize,
            together,
        )

    @property
    def uses(self) -> dict[str, int]:
        """Bytes by use, besides a pass."""
        return {
            "pruners of all matrices": self.pruners,
            "gradients of all matrices": self.gradients,
            "inputs of blocks": self.inputs,
        }

    def within(self, free: int | None) -> SearchSize:
        """With the inputs that fit into a quarter of the free memory; none if that is not known."""
        return replace(self, inputs=int(min(self.inputs, _CACHED * max(0, free or 0))))
