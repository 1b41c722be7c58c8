"""Linear layers of few tokens: generation reads every weight once for each token."""

import torch
from torch import Tensor, nn

from leanstep.kernels._backend import Support, choose, requested_backend
from leanstep.kernels.cpp_impl._build import SPARSE_TYPES
from leanstep.kernels.cpp_impl.sparse import linear as cpp
from leanstep.kernels.op import declare, in_dispatch_mode, is_traced

_LOOP = Support(("reference", "cpp"), SPARSE_TYPES, "sparse/dense", is_optional=True, instructions=cpp.instructions)
declare("few_token_linear", _LOOP)


def few_token_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias``, as torch.nn.functional.linear, by a faster loop for up to 8 tokens on a CPU.

    Args:
        x: [..., in], floating; not written.
        weight: [out, in] of x's dtype. bias: [out] of that dtype, or None.

    Returns:
        [..., out] of x's dtype.

    Raises:
        RuntimeError: from torch, for shapes, dtypes or devices that do not match.

    Notes:
        On a processor with AVX-512 VBMI2 and BF16, the loop runs for up to 8 tokens in bf16 (one with AMX, whose
        products of more are faster), and on AMD's also in fp32; with AVX2 in bf16 for 2**20 weights and more; where
        autograd records nothing and torch.compile does not trace. ``use_backend("cpp")`` asks for it with any processor
        and number of tokens, and fp16, too. The loop reads the weight once per 8 tokens, computes in fp32 and rounds
        once. Else torch runs. bf16 dot products of a CPU take subnormals for zero. See benchmarks/sparsity/bitmask.
    """
    if not _runs_loop(x, weight, bias):
        return nn.functional.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return cpp.dense_linear(flat, weight, bias).view(*x.shape[:-1], weight.shape[0])


def _runs_loop(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the loop computes this product as torch does, and is the faster one or asked for."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if any(is_traced(tensor) or tensor.dtype is not x.dtype or tensor.device != x.device for tensor in tensors):
        return False
    # a kernel reads memory, where numbers of such a view have the other sign
    if any(tensor.is_neg() for tensor in tensors):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    if x.device.type != "cpu" or x.dtype not in SPARSE_TYPES or in_dispatch_mode() or torch.is_autocast_enabled("cpu"):
        return False
    # torch says what is wrong with other shapes
    fits = weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == weight.shape[1] and weight.is_contiguous()
    if not fits or not x.numel() or not weight.shape[0] or (bias is not None and bias.shape != (weight.shape[0],)):
        return False
    if requested_backend() == "auto" and not cpp.is_faster_than_torch(x, weight):
        return False
    return choose("few_token_linear", x.device, x.dtype).backend == "cpp"
