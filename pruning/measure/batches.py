"""Calibration data: batches in one form."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from leanstep._torch import device_of, output_head
from leanstep.pruning.measure.products import computing_products


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass.

    Attributes:
        args, kwargs: arguments of the model.
        mask: bool [batch, tokens], True where a token of the output counts; None: all tokens count.
        labels: int64 targets, [batch] or [batch, tokens]; or None. Output t is compared with label t + 1, so that the
            labels of a language model are its input tokens, those of its decoder if it has one.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    mask: Tensor | None = None
    labels: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of samples."""
        return next(self._tensors()).shape[0]

    @property
    def numel(self) -> int:
        """Elements of its largest input."""
        return max(tensor.numel() for tensor in self._tensors())

    @property
    def is_floating_point(self) -> bool:
        """Whether an input is of floating point, as images are."""
        return any(tensor.is_floating_point() for tensor in self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        return (tensor for tensor in (*self.args, *self.kwargs.values()) if isinstance(tensor, Tensor))

    def run(self, model: nn.Module) -> Any:
        """The model's output."""
        with computing_products(model):
            return model(*self.args, **self.kwargs)

    def sample(self, index: int) -> Batch:
        """One sample alone, as a batch."""
        return self.samples(index, index + 1)

    def samples(self, begin: int, end: int) -> Batch:
        """The samples of a range, as a batch."""
        size = self.size

        def pick(value: Any) -> Any:
            split = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size
            return value[begin:end] if split else value

        kwargs = {name: pick(value) for name, value in self.kwargs.items()}
        return Batch(tuple(map(pick, self.args)), kwargs, pick(self.mask), pick(self.labels))


def as_batches(data: Any, model: nn.Module, *, batch_size: int = 8, what: str = "data") -> list[Batch]:
    """Batches on the model's device, from a tensor of samples or an iterable of batches such as a DataLoader.

    Args:
        data: int64 [samples, tokens] of token numbers; floating [samples, ...] such as images; or batches: mappings
            (the model's keyword arguments, ``labels`` for the metric, ``attention_mask`` of the tokens that count),
            tuples (inputs, labels), or tensors. The encoder of an encoder-decoder reads the first half of every
            sequence of tokens, and its decoder the second. A mapping for one has ``decoder_input_ids`` or ``labels``.
        model: determines the device, and the dtype of floating inputs.
        batch_size: samples per batch, if ``data`` is a tensor.
        what: name of the data in error messages.

    Raises:
        ValueError: for no data, a batch size below 1, images for a language model, tokens for a model that takes
            something else, or an encoder-decoder's batch without inputs for the decoder.
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
    device = device_of(model)
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
        _check_kind(batch, model, what)
        if _is_encoder_decoder(model) and not batch.is_floating_point():
            half = batch.shape[1] // 2
            batch = {"input_ids": batch[:, :half], "labels": batch[:, half:]}
            return _as_batch(batch, model, device, dtype, what)
        labels = move(batch) if not batch.is_floating_point() and batch.dim() == 2 and _predicts_next(model) else None
        if _is_transformers(model):
            return Batch((), {str(model.main_input_name): move(batch), **options}, labels=labels)
        return Batch((move(batch),), labels=labels)
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        inputs = _as_batch(batch[0], model, device, dtype, what)
        labels = batch[1].to(device) if len(batch) > 1 else inputs.labels
        return Batch(inputs.args, inputs.kwargs, labels=labels)
    if isinstance(batch, Mapping) and any(isinstance(value, Tensor) for value in batch.values()):
        kwargs = {str(name): move(value) for name, value in batch.items()}
        labels = kwargs.pop("labels", None)
        if _is_encoder_decoder(model):
            return _with_decoder(Batch((), {**kwargs, **options}, labels=labels), model, what)
        if labels is None and "input_ids" in kwargs and _predicts_next(model):
            labels = kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        return Batch((), {**kwargs, **options}, None if mask is None else mask.bool(), labels)
    raise TypeError(
        f"{what}: expected batches that are tensors, (inputs, labels) or mappings, got {type(batch).__name__}"
    )


def _is_transformers(model: nn.Module) -> bool:
    return hasattr(model, "config") and isinstance(getattr(model, "main_input_name", None), str)


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _check_kind(data: Tensor, model: nn.Module, what: str) -> None:
    """Raise ValueError for a tensor of another kind than the main input of a model of transformers."""
    if not _is_transformers(model):
        return
    name, model_name = str(model.main_input_name), type(model).__name__
    if data.is_floating_point() and name == "input_ids":
        raise ValueError(f"{what}: {model_name} takes token numbers, got {data.dtype} as for images; give it text")
    if not data.is_floating_point() and name != "input_ids":
        raise ValueError(
            f"{what}: {model_name} takes {name}, got token numbers of {data.dtype}; give it a floating tensor of these"
        )
    if data.is_floating_point() and _is_encoder_decoder(model):
        raise ValueError(
            f"{what}: {model_name} has a decoder: expected batches that are mappings with {name} and decoder_input_ids "
            "(or labels), got a tensor. Python takes such batches, the command does not"
        )


def _predicts_next(model: nn.Module) -> bool:
    """Whether an output for a token predicts the next one. Models of transformers that fill in masks do not."""
    if not _is_transformers(model):
        return True
    from transformers.models.auto import modeling_auto as auto

    name = type(model).__name__
    fills_in = name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    return output_head(model) is not None and not (
        fills_in and name not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    )


def _with_decoder(batch: Batch, model: nn.Module, what: str) -> Batch:
    """The batch of an encoder-decoder, with inputs, mask and labels of its decoder."""
    kwargs, labels = dict(batch.kwargs), batch.labels
    mask = kwargs.get("decoder_attention_mask")
    if "decoder_input_ids" not in kwargs:
        if labels is None:
            raise ValueError(
                f"{what}: {type(model).__name__} has a decoder: expected decoder_input_ids or labels in every batch, "
                f"got {', '.join(kwargs)}"
            )
        # a model without values has batches without values, which have no -100 to look for
        if mask is None and not labels.is_meta and bool((labels == -100).any()):
            mask = labels != -100
        kwargs["decoder_input_ids"] = _shifted(labels, model)
    return Batch((), kwargs, None if mask is None else mask.bool(), kwargs["decoder_input_ids"])


def _shifted(labels: Tensor, model: nn.Module) -> Tensor:
    """Inputs of a decoder that is to predict ``labels``: its first token, then all labels but the last."""
    config: Any = model.config
    decoder = config.get_text_config(decoder=True)
    start, begin, pad = (
        getattr(part, f"{name}_token_id", None)
        for part, name in ((config, "decoder_start"), (decoder, "bos"), (decoder, "pad"))
    )
    shifted = labels.roll(1, dims=1)
    shifted[:, 0] = next(token for token in (start, begin, pad, 0) if token is not None)
    return shifted.masked_fill(shifted == -100, pad or 0)


def first_samples(batches: Sequence[Batch], count: int) -> list[Batch]:
    """The first samples of batches, in batches as they are but for the last one."""
    first: list[Batch] = []
    for batch in batches:
        if count <= 0:
            break
        first.append(batch if batch.size <= count else batch.samples(0, count))
        count -= batch.size
    return first


# arguments whose names are not in the hash of a batch, so that files of earlier versions stay valid
_UNNAMED = ("input_ids", "decoder_input_ids", "pixel_values", "attention_mask", "use_cache")


def batches_hash(batches: Sequence[Batch]) -> str:
    """Hash of all tensors and values of the batches, and of the names of their arguments."""
    digest = hashlib.sha256()
    for batch in batches:
        named = sorted(batch.kwargs.items())
        for name, value in (*(("", arg) for arg in batch.args), *named, ("", batch.mask), ("", batch.labels)):
            if name not in _UNNAMED:
                digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                digest.update(repr(value).encode())
    return digest.hexdigest()


def without_cache(batch: Batch, model: nn.Module) -> Batch:
    """A batch of which a model stores no keys and values: a block that is computed again would add its own twice."""
    config: Any = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    if get_text_config is None or getattr(get_text_config(), "use_cache", None) is None:
        return batch
    return replace(batch, kwargs={"use_cache": False, **batch.kwargs})


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Context manager: removes hooks at the end; ``handles`` may register them as it is read."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager: eval mode without gradients; restores the modes of all modules on exit."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
