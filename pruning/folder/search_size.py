"""Estimate what a search on joint distortion takes: pruners and gradients of all matrices, and its passes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from leanstep.pruning.config import PruneConfig
from leanstep.pruning.folder.workload import Shapes, Workload
from leanstep.pruning.score.base import NEEDS

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


def statistics_bytes(shape: Shape, scores: Iterable[str], samples: int) -> int:
    """Bytes of the statistics of a matrix [out, in] for some scores; ``samples`` of the calibration data."""
    (rows, columns), needs = shape, {need for score in scores for need in NEEDS[score]}
    return (
        8 * columns * ("square_sum" in needs)
        + 4 * columns**2 * ("gram" in needs)
        + 8 * min(GRADIENTS, samples) * rows * columns * ("gradients" in needs)
    )


def files_of_all_matrices(
    shapes: Shapes, config: PruneConfig, samples: int, *, searches: bool
) -> dict[str, dict[str, int]]:
    """Bytes by phase and use that files hold of all matrices, where activations are in files.

    Args:
        shapes: of the model.
        config: the settings.
        samples: of the calibration data.
        searches: whether an allocation is refined.
    """
    matrices, itemsize, scores = shapes.matrices, shapes.itemsize, [config.planning_score]
    weights = shapes.pruned
    statistics = {"statistics of all matrices": sum(statistics_bytes(one, scores, samples) for one in matrices)}
    # sums of fp16 gradients are in fp32
    gradients = {"gradients of all matrices": weights * max(4, itemsize)}
    pruned = {"pruned matrices": weights * itemsize} if config.inputs == "dense" else {}
    phases = {"comparison": pruned}
    if config.corrects:
        phases["correction"] = {**statistics, **gradients}
    if searches:
        # as many weights are replaced in an exchange at most
        phases["search"] = {**statistics, **gradients, "replaced weights": weights * itemsize}
    return phases


@dataclass(frozen=True)
class SearchSize:
    """What a search takes; see :class:`leanstep.pruning.measure.joint.JointJudge`.

    Attributes:
        pruners: bytes of those of all matrices, which each process holds.
        gradients: bytes of the sums over all batches, and of the weights that an exchange replaces.
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
    def of(cls, shapes: Shapes, workload: Workload, judging: int) -> SearchSize:
        """Of the matrices of a model; ``judging`` samples judge."""
        blocks, tokens, itemsize, config = shapes.blocks, shapes.tokens, shapes.itemsize, workload.config
        width, outputs, samples = shapes.width, shapes.outputs, workload.samples
        score, ranked = config.planning_score, config.pattern == "unstructured"
        together = max(1, min(config.batch_size, judging // 8))
        inside = max(sum(columns + 2 * rows for rows, columns in block) for block in blocks)
        # inputs of all blocks, activations of one and their gradients, logits and theirs
        values = together * tokens * (len(blocks) * width + 2 * inside + 3 * outputs)
        compared = tokens * outputs if config.metric == "kl_topk" else min(tokens * outputs, _LOGITS_TOGETHER)
        return cls(
            sum(pruner_bytes(m, score, itemsize, samples=samples, ranked=ranked) for m in shapes.matrices),
            shapes.pruned * (itemsize + max(4, itemsize)),
            itemsize * values + _LOGIT_BYTES * compared,
            len(blocks) * -(-judging // workload.processes) * tokens * width * itemsize,
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
