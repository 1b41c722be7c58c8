"""Products of dense matrices in fp32 on the CPU, by whichever of torch's two libraries is faster there.

On x86, ``torch.mm`` in fp32 calls MKL. torch also ships oneDNN and calls it for 16-bit products; on an AMD processor
with AVX-512 it is twice as fast as MKL in fp32 (benchmarks/dense_product.py), and :func:`product` calls it there. On
other processors, and for other dtypes and devices, ``torch.mm`` runs.
"""

import functools

import torch
from torch import Tensor

from leanstep.kernels._modes import in_dispatch_mode, is_traced

# with fewer rows, the time of a product is that of reading the other matrix: the same in both libraries
LEAST_ROWS = 8


def product(x: Tensor, w: Tensor, plus: Tensor | None = None) -> Tensor:
    """``x w``, or ``x w + plus``.

    Args:
        x: [M, n]. w: [n, m], often a transposed view. Both of one dtype.
        plus: [m], or [M, m]. The result may be written to the memory of the latter.

    Returns:
        [M, m], dense.

    Notes:
        No gradient is recorded. oneDNN and MKL both sum in fp32, in different orders: results differ in the last bits
        between processors, as they do between versions of either library.
    """
    if runs_on_onednn(x) and x.shape[0] >= LEAST_ROWS and x.numel() and w.numel():
        linear = torch.ops.mkldnn._linear_pointwise
        if plus is None or plus.dim() == 1:
            return linear(x, w.t(), plus, "none", [], "")
        return linear.binary(x, plus, w.t(), None, "add")
    if plus is None:
        return torch.mm(x, w)
    return torch.addmm(plus, x, w) if plus.dim() == 1 else plus.addmm_(x, w)


def runs_on_onednn(x: Tensor) -> bool:
    """Whether :func:`product` calls oneDNN for a matrix."""
    return (
        x.dtype is torch.float32
        and x.device.type == "cpu"
        and not is_traced(x)
        and bool(torch.backends.mkldnn.enabled)
        and why_not_onednn() is None
        # modes that count products or keep them know torch.mm
        and not in_dispatch_mode()
    )


@functools.cache
def why_not_onednn() -> str | None:
    """Why fp32 products on this CPU are ``torch.mm``'s; None where they are oneDNN's."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return "this torch has no oneDNN with linear layers"
    if not torch.backends.mkl.is_available():
        return "torch.mm is not MKL's here"
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
