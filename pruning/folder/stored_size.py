"""Sizes of what a run stores for its passes: the activations before a block, and the dense outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from leanstep.pruning.measure.activation_cache import find_stages
from leanstep.pruning.measure.batches import as_batches
from leanstep.pruning.measure.metrics import check_runs, values_of


@dataclass(frozen=True)
class Sequences:
    """Numbers of sequences or images by use.

    Attributes:
        scored: for the statistics of a score; 0 where it needs none.
        curves, held_out, judging: for curves, the comparison, and a search.
        tokens: of a sequence; 0 for images.
    """

    scored: int
    curves: int
    held_out: int
    judging: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, scored: bool, data: Any, curves: Any, held_out: Any, judging: Any) -> Sequences:
        """Of tensors [samples, ...]; numbers of other data are 0."""
        numbers = [len(one) if isinstance(one, Tensor) else 0 for one in (data, curves, held_out, judging)]
        is_text = isinstance(data, Tensor) and not data.is_floating_point()
        return cls(numbers[0] if scored else 0, numbers[1], numbers[2], numbers[3], data.shape[1] if is_text else 0)


@dataclass(frozen=True)
class StoredSizes:
    """Sizes of what is cached of one token."""

    width: int
    outputs: int
    blocks: int
    itemsize: int

    def by_phase(self, sequences: Sequences, tokens: int, *, in_files: bool = True) -> dict[str, dict[str, int]]:
        """Bytes that are stored for curves, in the comparison, and in a search.

        In memory, a search caches the inputs of blocks only where these fit; they are not counted here.
        """
        # the next position's are computed while those of the last are there
        numbers = {"curves": sequences.curves, "comparison": sequences.held_out, "search": sequences.judging}
        positions = {phase: 2 * (sequences.scored + count) for phase, count in numbers.items()}
        positions["search"] = (
            max(positions["search"], self.blocks * sequences.judging) if in_files else 2 * sequences.scored
        )
        return {
            phase: {
                "activations before a block": positions[phase] * tokens * self.width * self.itemsize,
                "dense outputs": compared * tokens * self.outputs * 4,
            }
            for phase, compared in numbers.items()
            if compared or phase != "search"
        }


def largest_phase(phases: Iterable[dict[str, int]]) -> dict[str, int]:
    """Bytes by use in the phase that takes most."""
    largest = max(phases, key=lambda uses: sum(uses.values()))
    return {use: size for use, size in largest.items() if size or use == "activations before a block"}


def with_more(phases: Mapping[str, dict[str, int]], more: Mapping[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Bytes by use and phase, with more uses; a phase that is new has those of the curves too."""
    return {
        phase: {**phases.get(phase, phases.get("curves", {})), **more.get(phase, {})} for phase in {**phases, **more}
    }


def scratch_bytes(
    model: nn.Module, sequences: Sequences, data: Any = None, more: Mapping[str, dict[str, int]] | None = None
) -> int:
    """Most bytes in files at one time: of activations and dense outputs, 0 where nothing tells, and ``more`` by phase.

    Runs the model on a sample of ``data``, a tensor, where its configuration does not tell the tokens of one: of
    sounds, and of images without patches.
    """
    config: Any = getattr(model, "config", None)
    tokens = 0 if config is None else sequences.tokens or patch_count(config)
    sizes = StoredSizes(0, 0, 0, 0)
    if tokens:
        head: Any = getattr(model, "get_output_embeddings", lambda: None)()
        text = config.get_text_config()
        sizes = StoredSizes(
            width=getattr(text, "hidden_size", 0),
            outputs=getattr(config, "num_labels", 0) if head is None else head.weight.shape[0],
            blocks=getattr(text, "num_hidden_layers", 0),
            itemsize=next(model.parameters()).element_size(),
        )
    elif isinstance(data, Tensor):
        tokens, sizes = 1, _of_a_sample(model, data)
    phases = sizes.by_phase(sequences, tokens) if tokens else {}
    return max((sum(uses.values()) for uses in with_more(phases, more or {}).values()), default=0)


@torch.no_grad()
def _of_a_sample(model: nn.Module, data: Tensor) -> StoredSizes:
    """Sizes of a sample as of one token: the largest output of a stage in bytes, and the model's output."""
    sample = as_batches(data[:1], model)[0]
    check_runs(model, sample)
    stages, sizes = find_stages(model, sample), [0]

    def measure(_module: nn.Module, _inputs: Any, output: Any) -> None:
        sizes.append(sum(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, Tensor)))

    handles = [stage.register_forward_hook(measure) for _, stage in stages]
    try:
        outputs = values_of(sample.run(model)).numel()
    finally:
        for handle in handles:
            handle.remove()
    return StoredSizes(width=max(sizes), outputs=outputs, blocks=len(stages), itemsize=1)


def patch_count(config: Any) -> int:
    """Tokens of an image; 0 for a model without patches."""
    image, patch = (getattr(config, name, None) for name in ("image_size", "patch_size"))
    return (image // patch) ** 2 + 1 if isinstance(image, int) and isinstance(patch, int) and patch else 0
