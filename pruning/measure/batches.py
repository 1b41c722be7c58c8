"""Calibration data: batches in one form."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass.

    Attributes:
        args, kwargs: arguments of the model.
        mask: bool [batch, tokens], True where a token counts; None: all tokens count.
        labels: int64 targets, [batch] or [batch, tokens]; or None.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    mask: Tensor | None = None
    labels: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of samples."""
        return next(tensor for tensor in (*self.args, *self.kwargs.values()) if isinstance(tensor, Tensor)).shape[0]

    def run(self, model: nn.Module) -> Any:
        """The model's output."""
        return model(*self.args, **self.kwargs)

    def sample(self, index: int) -> Batch:
        """One sample alone, as a batch."""
        size = self.size

        def pick(value: Any) -> Any:
            split = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size
            return value[index : index + 1] if split else value

        kwargs = {name: pick(value) for name, value in self.kwargs.items()}
        return Batch(tuple(map(pick, self.args)), kwargs, pick(self.mask), pick(self.labels))


def as_batches(data: Any, model: nn.Module, *, batch_size: int = 8, what: str = "data") -> list[Batch]:
    """Batches on the model's device from a tensor of samples, or from an iterable of batches such as a DataLoader.

    Args:
        data: int64 [samples, tokens] of token numbers; floating [samples, ...] such as images; or batches: mappings
            (the model's keyword arguments, ``labels`` for the metric, ``attention_mask`` of the tokens that count),
            tuples (inputs, labels), or tensors.
        model: determines the device, and the dtype of floating inputs.
        batch_size: samples per batch, if ``data`` is a tensor.
        what: name of the data in error messages.

    Raises:
        ValueError: for no data, a batch size below 1, or images for a language model.
        TypeError: for batches of another kind.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(data, Tensor):
        given: Iterable[Any] = data.split(batch_size) if len(data) else ()
    elif isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise TypeError(f"{what}: expected a tensor of samples or an iterable of batches, got {type(data).__name__}")
    else:
        given = data
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    dtype = torch.float32 if parameter is None else parameter.dtype
    batches = [batch if isinstance(batch, Batch) else _as_batch(batch, model, device, dtype, what) for batch in given]
    if not batches:
        raise ValueError(f"{what}: expected at least one batch, got none")
    return batches


def _as_batch(batch: Any, model: nn.Module, device: torch.device, dtype: torch.dtype, what: str) -> Batch:
    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    options = {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", None) is not None else {}
    if isinstance(batch, Tensor):
        if options and batch.is_floating_point():
            raise ValueError(f"{what}: {type(model).__name__} takes token numbers, got {batch.dtype} as for images")
        labels = batch.to(device) if not batch.is_floating_point() and batch.dim() == 2 else None
        if options:
            return Batch((), {"input_ids": move(batch), **options}, labels=labels)
        if _is_transformers(model) and batch.is_floating_point():
            return Batch((), {str(model.main_input_name): move(batch)})
        return Batch((move(batch),), labels=labels)
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        inputs = _as_batch(batch[0], model, device, dtype, what)
        labels = batch[1].to(device) if len(batch) > 1 else inputs.labels
        return Batch(inputs.args, inputs.kwargs, labels=labels)
    if isinstance(batch, Mapping) and any(isinstance(value, Tensor) for value in batch.values()):
        kwargs = {str(name): move(value) for name, value in batch.items()}
        labels = kwargs.pop("labels", None)
        if labels is None and "input_ids" in kwargs:
            labels = kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        return Batch((), {**kwargs, **options}, None if mask is None else mask.bool(), labels)
    raise TypeError(
        f"{what}: expected batches that are tensors, (inputs, labels) or mappings, got {type(batch).__name__}"
    )


def _is_transformers(model: nn.Module) -> bool:
    return hasattr(model, "config") and isinstance(getattr(model, "main_input_name", None), str)


def batches_hash(batches: Sequence[Batch]) -> str:
    """Hash of all tensors and values of the batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for value in (*batch.args, *(batch.kwargs[name] for name in sorted(batch.kwargs)), batch.mask, batch.labels):
            if isinstance(value, Tensor):
                digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            else:
                digest.update(repr(value).encode())
    return digest.hexdigest()
