"""Products of dense matrices: in fp32 on a CPU, by the faster of torch's two libraries.

On x86, ``torch.mm`` in fp32 calls MKL. torch also ships oneDNN, which it calls for 16-bit products. On AMD processors
with AVX-512, oneDNN is twice as fast as MKL in fp32 (benchmarks/lora/dense_product.py), and :func:`product` calls it.
In all other cases :func:`product` calls ``torch.mm``.
"""

import functools

import torch
from torch import Tensor

from leanstep.kernels.op import in_dispatch_mode, is_traced

# with fewer rows, both libraries take the time of reading the other matrix
LEAST_ROWS = 8


def product(x: Tensor, w: Tensor, plus: Tensor | None = None) -> Tensor:
    """``x w``, or ``x w + plus``.

    Args:
        x: [M, n]. w: [n, m], often a transposed view. Both of one dtype.
        plus: [m] or [M, m]. The result may overwrite a ``plus`` of [M, m].

    Returns:
        [M, m], dense.

    Notes:
        Records no gradient. oneDNN and MKL sum in fp32 in different orders, so the last bits depend on the processor.
    """
    if runs_on_onednn(x) and x.shape[0] >= LEAST_ROWS and x.numel() and w.numel():
        linear = torch.ops.mkldnn._linear_pointwise
        if plus is None or plus.dim() == 1:
            # oneDNN reads a bias as if its entries were adjacent
            return linear(x, w.t(), plus if plus is None else plus.contiguous(), "none", [], "")
        return linear.binary(x, plus, w.t(), None, "add")
    if plus is None:
        return torch.mm(x, w)
    return torch.addmm(plus, x, w) if plus.dim() == 1 else plus.addmm_(x, w)


def runs_on_onednn(x: Tensor) -> bool:
    """Whether :func:`product` calls oneDNN for the matrix ``x``."""
    return (
        x.dtype is torch.float32
        and x.device.type == "cpu"
        and not is_traced(x)
        and bool(torch.backends.mkldnn.enabled)
        and why_not_onednn() is None
        # dispatch modes that count or keep products know torch.mm, not oneDNN's op
        and not in_dispatch_mode()
    )


@functools.cache
def why_not_onednn() -> str | None:
    """Say why fp32 products on this CPU run in ``torch.mm``; None if they run in oneDNN."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return "this torch has no oneDNN with linear layers"
    if not torch.backends.mkl.is_available():
        return "torch.mm does not call MKL here"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "no AVX-512"
    if not _vendor().startswith(("AuthenticAMD", "AMD")):
        return "MKL is made for this processor"
    return None


def _vendor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":")[1].strip() for line in file if line.startswith("vendor_id")), "")
    except OSError:
        import platform

        # "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD" on Windows
        return platform.processor().rpartition(", ")[2]
