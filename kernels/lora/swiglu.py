"""The gated activation of a SwiGLU block. The backward pass computes it again instead of storing it."""

import torch
from torch import Tensor

from leanstep.kernels._backend import choose
from leanstep.kernels.cpp_impl._build import TYPES, call
from leanstep.kernels.op import EVERYWHERE, declare, is_traced, triton_module
from leanstep.kernels.reference.lora import swiglu as reference

declare("lora_swiglu", EVERYWHERE)


def swiglu(e: Tensor, u: Tensor) -> Tensor:
    """``silu(e) * u`` with ``silu(e) = e / (1 + exp(-e))``, elementwise, in fp32 (fp64 for fp64), rounded once.

    Args:
        e, u: one shape and floating dtype; not written. No gradient is recorded.

    Raises:
        ValueError: for shapes or dtypes that differ.
        BackendError: the requested backend cannot run here.

    Notes:
        Reads both inputs and writes the result once.
    """
    _check("swiglu", e, u)
    backend = _backend(e)
    if backend == "reference":
        return reference.swiglu(e, u)
    e, u = e.detach().contiguous(), u.detach().contiguous()
    if backend == "triton":
        return triton_module(__name__).swiglu(e, u)
    out = torch.empty_like(e)
    call("lora/swiglu", "swiglu", {"VALUE": TYPES[e.dtype]}, e.numel(), e, u, out)
    return out


def swiglu_backward_(grad: Tensor, e: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of e and u from ``grad``, the gradient of ``silu(e) * u``; and ``silu(e) * u`` itself.

    With s = 1 / (1 + exp(-e))::

        de = grad u s (1 + e (1 - s))        du = grad e s

    Args:
        grad: row-major; overwritten with du.
        e, u: of grad's shape and floating dtype; not written.

    Returns:
        (silu(e) * u, de, du); du is ``grad``.

    Raises:
        ValueError: as :func:`swiglu`, and for a grad that is not row-major.
        BackendError: as :func:`swiglu`.

    Notes:
        Reads the three inputs once and writes the three results once.
    """
    _check("swiglu_backward_", e, u, grad)
    if not grad.is_contiguous():
        raise ValueError(
            f"swiglu_backward_: expected a row-major grad, got strides {grad.stride()}; call grad.contiguous()"
        )
    backend = _backend(e)
    if backend == "reference":
        return reference.swiglu_backward_(grad, e, u)
    e, u = e.detach().contiguous(), u.detach().contiguous()
    torch.autograd.graph.increment_version(grad)  # kernels do not
    if backend == "triton":
        return triton_module(__name__).swiglu_backward_(grad, e, u)
    out, de = torch.empty_like(e), torch.empty_like(e)
    call("lora/swiglu", "swiglu_backward", {"VALUE": TYPES[e.dtype]}, e.numel(), grad, e, u, out, de)
    return out, de, grad


def _backend(e: Tensor) -> str:
    # torch.compile fuses plain torch
    return "reference" if is_traced(e) or not e.numel() else choose("lora_swiglu", e.device, e.dtype).backend


def _check(name: str, e: Tensor, *others: Tensor) -> None:
    for other in others:
        if other.shape != e.shape or other.dtype != e.dtype or not e.is_floating_point():
            raise ValueError(
                f"{name}: expected tensors of one shape and floating dtype, got {tuple(e.shape)} of {e.dtype} and "
                f"{tuple(other.shape)} of {other.dtype}"
            )
