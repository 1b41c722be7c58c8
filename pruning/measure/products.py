"""Compute a model's products in another dtype than its weights', where the processor is faster in that."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from leanstep._torch import device_of, uses_instructions

PRODUCTS = ("auto", "stored", "bf16")

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_FUNCTIONS = frozenset(
    (
        *(F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention),
        *(torch.conv1d, torch.conv2d, torch.conv3d, torch.einsum, torch.addmm, torch.baddbmm),
        *(torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm),
        *(Tensor.__matmul__, Tensor.__rmatmul__, Tensor.addmm, Tensor.baddbmm),
        *(
            getattr(module, name)
            for module, name in ((F, "grouped_mm"), (torch, "_grouped_mm"))
            if hasattr(module, name)
        ),
    )
)


def product_dtype(stored: torch.dtype, products: str = "auto", device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype of products with weights of a dtype.

    Args:
        stored: the weights' dtype.
        products: ``stored``; ``bf16``; or ``auto``: ``stored``, except on a CPU whose products of that 16-bit dtype are
            slow. There, fp16 is computed in bf16 if the CPU is fast in that, and otherwise either in fp32.
            fp32 stays fp32, even where bf16 is faster: bf16 rounds inputs by up to 2^-8, which changes results.
        device: that computes.

    Raises:
        ValueError: for another value of ``products``.
    """
    if products not in PRODUCTS:
        raise ValueError(f"products must be one of {', '.join(PRODUCTS)}, got {products!r}")
    if products == "bf16":
        return torch.bfloat16
    is_slow = stored in (torch.float16, torch.bfloat16) and not _is_fast(stored)
    if products == "stored" or torch.device(device).type != "cpu" or not is_slow:
        return stored
    return torch.bfloat16 if _is_fast(torch.bfloat16) else torch.float32


def stored_dtype(model: nn.Module) -> torch.dtype:
    """The floating dtype of most of a model's weights; fp32 for a model without any."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def products_note(model: nn.Module) -> str:
    """A line about products in another dtype than the weights', inside :func:`products_in`; "" for the same."""
    dtype, stored = products_of(model), stored_dtype(model)
    return dtype and f"products were computed in {dtype}, weights and activations are {_NAMES.get(stored, stored)}"


def products_of(model: nn.Module, products: str = "auto") -> str:
    """The dtype of products, such as "bf16", in the context that the model is in, or in one with ``products``; "" for
    the weights' own.
    """
    if model not in _MODES:
        with products_in(model, products):
            return products_of(model)
    mode = _MODES[model]
    return "" if mode is None else _NAMES[mode.dtype]


@contextmanager
def products_in(model: nn.Module, products: str = "auto") -> Iterator[None]:
    """Context manager: passes of a model by :meth:`Batch.run` have their products in :func:`product_dtype`.

    Inputs of a product are converted, and its output is converted back: all other operations and the dtypes of
    activations stay the same. A context inside another one of the same model changes nothing.

    Notes:
        Memory: one matrix in the other dtype at a time; with gradients, those that autograd keeps.
    """
    stored = stored_dtype(model)
    dtype = product_dtype(stored, products, device_of(model))
    if model in _MODES:
        yield
        return
    mode = None if dtype == stored else _ProductsIn(stored, dtype)
    _MODES[model] = mode
    try:
        with nullcontext() if mode is None else mode:
            yield
    finally:
        del _MODES[model]


@contextmanager
def computing_products(model: nn.Module) -> Iterator[None]:
    """Context manager: a forward pass of the model, with its products in the dtype of :func:`products_in`."""
    mode = _MODES.get(model)
    if mode is None or mode.is_active:
        yield
        return
    mode.is_active = True
    try:
        yield
    finally:
        mode.is_active = False


@contextmanager
def computing_products_again(model: nn.Module) -> Iterator[None]:
    """Context manager: as :func:`computing_products`, in a backward pass, which runs without torch's function modes."""
    mode = _MODES.get(model)
    if mode is None:
        yield
        return
    with _ProductsIn(mode.stored, mode.dtype) as again:
        again.is_active = True
        yield


class _ProductsIn(TorchFunctionMode):
    """Converts the arguments of products that have one dtype to another, and the outputs back, while it is active."""

    def __init__(self, stored: torch.dtype, dtype: torch.dtype) -> None:
        super().__init__()
        self.stored, self.dtype, self.is_active = stored, dtype, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.is_active or func not in _FUNCTIONS:
            return func(*args, **(kwargs or {}))
        output = func(*_converted(args, self.stored, self.dtype), **_converted(kwargs or {}, self.stored, self.dtype))
        return _converted(output, self.dtype, self.stored)


def _converted(values: Any, source: torch.dtype, target: torch.dtype) -> Any:
    return tree_map(lambda leaf: leaf.to(target) if isinstance(leaf, Tensor) and leaf.dtype == source else leaf, values)


def _is_fast(dtype: torch.dtype) -> bool:
    """Whether torch's CPU products of a 16-bit dtype run on instructions for it."""
    if dtype == torch.bfloat16 and platform.machine() in ("x86_64", "AMD64"):
        # oneDNN takes bf16 with AVX-512 alone, too, at a quarter of the speed of fp32
        return uses_instructions("avx512_bf16") or uses_instructions("amx_tile")
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    supported = getattr(torch.ops.mkldnn, name, None)
    return True if supported is None else bool(supported())


# of models that are inside the context of products_in; None where products have the weights' dtype
_MODES: WeakKeyDictionary[nn.Module, _ProductsIn | None] = WeakKeyDictionary()


def rounding_unit(model: nn.Module, products: str = "auto") -> float:
    """Largest relative step between activations, or between inputs of products: 2^-7 for bf16, 0 for fp32 and fp64.

    ``products`` is as for :func:`products_of`.
    """
    dtypes = [stored_dtype(model), *([torch.bfloat16] if products_of(model, products) == "bf16" else [])]
    return max((torch.finfo(dtype).eps for dtype in dtypes if dtype.itemsize < 4), default=0.0)
