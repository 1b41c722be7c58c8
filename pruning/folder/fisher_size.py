"""Estimate what Fisher curves take: passes over the data, and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from leanstep.pruning.measure.fisher import COLLECTED_BYTES, DRAWS, ROWS, SAMPLE_DRAWS, runs_within
from leanstep.pruning.measure.metrics import ROOTS_TOGETHER

# bytes of each root that is computed together with others
_ROOT_BYTES = 30


@dataclass(frozen=True)
class FisherSize:
    """What Fisher curves take; see :class:`leanstep.pruning.measure.fisher.SecondOrder`.

    Attributes:
        passes: forward and backward passes over the data, one for each portion of the matrices.
        collected: bytes of x and g, or of the gradients of samples, at the same time.
        graph: bytes of a pass of one sample.
    """

    passes: int
    collected: int
    graph: int

    @classmethod
    def of(
        cls,
        blocks: Sequence[Sequence[tuple[int, int]]],
        *,
        samples: int,
        tokens: int,
        width: int,
        outputs: int,
        itemsize: int,
        one_output: bool,
        recomputed: bool = True,
    ) -> FisherSize:
        """Of matrices [out, in] by block, in bytes of ``itemsize`` for a value; ``one_output`` for each sample.

        Without ``recomputed``, the activations of all blocks are stored.
        """

        def values(rows: int, columns: int) -> int:
            if one_output:
                return min(SAMPLE_DRAWS, outputs) * samples * rows * columns
            return min(ROWS, samples * tokens) * (columns + DRAWS * rows)

        sizes = [itemsize * sum(values(*matrix) for matrix in block) for block in blocks]
        portions = runs_within(sizes, max(COLLECTED_BYTES, 2 * max(sizes)))
        largest = max(portions, key=lambda portion: sum(sizes[number] for number in portion))
        collected = sum(sizes[number] for number in largest)
        inside = max(sum(columns + 2 * rows for rows, columns in block) for block in blocks)
        gradients = max(sum(rows for number in portion for rows, _ in blocks[number]) for portion in portions)
        stored = 2 * inside * (1 if recomputed else len(blocks))
        values_of_pass = tokens * (len(blocks) * width + stored + gradients * 3 // 2 + 4 * outputs)
        graph = itemsize * values_of_pass + _ROOT_BYTES * min(tokens * outputs, ROOTS_TOGETHER)
        return cls(len(portions), collected, graph)
