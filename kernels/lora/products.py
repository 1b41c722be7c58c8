"""The r-wide products of a low-rank adapter. A hash of the seed computes the dropout mask, which is never stored."""

from typing import Any

import torch
from torch import Tensor

from leanstep.kernels.cpp_impl.lora import products as cpp_products
from leanstep.kernels.matrices.dense_product import product
from leanstep.kernels.op import EVERYWHERE, implementation, in_dispatch_mode, is_traced, op
from leanstep.kernels.reference.lora import products as reference

# A seed is a 0-d int64 tensor on the CPU. A Python number would become a constant of a compiled program; reading a GPU
# tensor would wait for the device.


def lora_dropout(x: Tensor, p: float, seed: Tensor | None = None) -> Tensor:
    """``x / (1 - p)`` where a hash of the element's index and the seed is at least ``p * 2**32``, else 0.

    Args:
        x: [M, n], floating; not written. p, seed: as in :func:`lora_down`.

    Returns:
        A new row-major tensor of x's shape and dtype; x itself for p = 0.

    Raises:
        ValueError, BackendError: as :func:`lora_down`.
    """
    _check("lora_dropout", x, x, p, seed, True)
    if p == 0:
        return x
    assert seed is not None
    return _dropout(x, p, seed)


def lora_down(x: Tensor, a: Tensor, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """``H = dropout(x) a^T``.

    Args:
        x: [M, n], floating; not written.
        a: [r, n] of x's dtype.
        p: probability that an element of x is dropped; the others are multiplied by 1 / (1 - p).
        seed: int64, 0-d, on the CPU; needed where p > 0. Element i (row-major) is dropped if a hash of i and the seed
            is below ``p * 2**32``: the same elements on every backend and device.

    Returns:
        [M, r] of x's dtype; products are summed in fp32 (fp64 for fp64).

    Raises:
        ValueError: for shapes and dtypes that do not match, p outside [0, 1], or no seed where one is needed.
        BackendError: the requested backend cannot run here.

    Notes:
        The Triton kernel reads x once and applies dropout as it reads. Other backends store dropout(x) for the product.
    """
    _check("lora_down", x, a, p, seed, x.shape[1:] == a.shape[1:])
    if p == 0:
        return product(x, a.t())
    assert seed is not None
    return _down(x, a, p, seed)


def lora_down_backward(
    x: Tensor, e: Tensor, a: Tensor | None = None, p: float = 0.0, seed: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """``e^T dropout(x)``, the gradient of a; with ``a`` [r, n], also ``H = dropout(x) a^T``.

    Args:
        x: [M, n]. e: [M, r]. p, seed: as in :func:`lora_down`.

    Returns:
        ([r, n], [M, r] or None), of x's dtype.

    Raises:
        ValueError, BackendError: as :func:`lora_down`.
    """
    fits = x.shape[:1] == e.shape[:1] and (a is None or a.shape[1:] == x.shape[1:])
    _check("lora_down_backward", x, e, p, seed, fits)
    if p == 0:
        return product(e.t(), x), None if a is None else product(x, a.t())
    assert seed is not None
    gradient, h = _down_backward(x, e, a, p, seed)
    return gradient, None if a is None else h


def lora_up_(y: Tensor, h: Tensor, b: Tensor, scale: float, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """``y += dropout(scale h b)``, in place; returns y.

    Args:
        y: [M, m], row-major; written.
        h: [M, r]. b: [r, m], often a transposed view. Both of y's dtype.
        scale: factor of the product.
        p, seed: as in :func:`lora_down`, for an x of y's shape.

    Raises:
        ValueError, BackendError: as :func:`lora_down`.

    Notes:
        Reads and writes y once. Without dropout it is one BLAS call. With dropout, a CPU stores the product [M, m] (in
        fp32 a megabyte at a time); the Triton kernel does not store it.
    """
    fits = y.shape[:1] == h.shape[:1] and h.shape[1:] == b.shape[:1] and y.shape[1:] == b.shape[1:]
    _check("lora_up_", y, h, p, seed, fits)
    if p > 0 and not y.is_contiguous():
        raise ValueError(f"lora_up_: expected a row-major y where p > 0, got strides {y.stride()}; call y.contiguous()")
    if p == 0:
        return y.addmm_(h, b, alpha=scale)
    assert seed is not None
    _up(y, h, b, scale, p, seed)
    return y


def _is_seen(x: Tensor, *_: Any) -> bool:
    """Whether a tracer or a dispatch mode has to see the op."""
    return is_traced(x) or in_dispatch_mode()


def _check(name: str, x: Tensor, other: Tensor, p: float, seed: Tensor | None, fits: bool) -> None:
    if x.dim() != 2 or other.dim() != 2 or not fits:
        raise ValueError(f"{name}: expected matrices that match, got {tuple(x.shape)} and {tuple(other.shape)}")
    if x.dtype != other.dtype or not x.is_floating_point():
        raise ValueError(f"{name}: expected matrices of one floating dtype, got {x.dtype} and {other.dtype}")
    if not 0 <= p <= 1:
        raise ValueError(f"{name}: expected a probability p in [0, 1], got {p}")
    if p > 0 and (seed is None or seed.device.type != "cpu" or seed.numel() != 1):
        raise ValueError(f"{name}: dropout with p = {p} needs a seed, one int64 on the CPU, got {seed}")


def _module(name: str, x: Tensor) -> Any:
    return implementation(name, x, reference, __name__, cpp_products)


@op("lora_dropout", EVERYWHERE, fake=lambda x, p, seed: x.new_empty(x.shape), traced=_is_seen)
@torch.no_grad()
def _dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return _module("lora_dropout", x).dropout(x.contiguous(), p, int(seed)) if x.numel() else x.new_empty(x.shape)


@op("lora_down", EVERYWHERE, fake=lambda x, a, p, seed: x.new_empty(x.shape[0], a.shape[0]), traced=_is_seen)
@torch.no_grad()
def _down(x: Tensor, a: Tensor, p: float, seed: Tensor) -> Tensor:
    if not x.numel():
        return x.new_zeros(x.shape[0], a.shape[0])
    module = _module("lora_down", x)
    return module.lora_down(x.contiguous(), a, p, int(seed))


def _fake_down_backward(x, e, a, p, seed):
    return x.new_empty(e.shape[1], x.shape[1]), x.new_empty(x.shape[0], 0 if a is None else len(a))


@op("lora_down_backward", EVERYWHERE, fake=_fake_down_backward, traced=_is_seen)
@torch.no_grad()
def _down_backward(x: Tensor, e: Tensor, a: Tensor | None, p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    if not x.numel():
        return x.new_zeros(e.shape[1], x.shape[1]), x.new_zeros(x.shape[0], 0 if a is None else a.shape[0])
    module = _module("lora_down_backward", x)
    gradient, h = module.lora_down_backward(x.contiguous(), e, a, p, int(seed))
    return gradient, x.new_empty(x.shape[0], 0) if h is None else h


@op("lora_up_", EVERYWHERE, mutates=["y"], traced=_is_seen)
@torch.no_grad()
def _up(y: Tensor, h: Tensor, b: Tensor, scale: float, p: float, seed: Tensor) -> None:
    if y.numel():
        _module("lora_up", y).lora_up_(y, h, b, scale, p, int(seed))
