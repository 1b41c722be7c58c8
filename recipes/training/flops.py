"""Floating-point operations of a model, by formula, and what a device can do at most: together the utilisation.

The formula is :data:`FORMULA`, after appendix B of A. Chowdhery et al., "PaLM: Scaling Language Modeling with
Pathways", arXiv:2204.02311: each weight takes part in one multiplication and one addition for a token forward and in
two of each backward, and attention multiplies queries with keys and its weights with values. Recomputed activations,
norms, activation functions and the optimizer are left out, so that the number says how fast the model was trained and
not how busy the device was.
"""

import torch

__all__ = ["FORMULA", "flops_per_token", "peak_flops"]

FORMULA = (
    "6 N + 12 L h s per token: N weights without lookup tables (a tied table counts as the head), L layers, h heads x "
    "their width, s tokens in a sequence, padding included"
)

# Dense 16-bit tensor-core TFLOP/s with fp32 accumulation from the makers' data sheets, by a part of the device's name;
# the first that fits counts. Data sheets that give the rate with sparsity are halved.
_PEAK_TFLOPS = (
    ("H100 PCIe", 756),
    ("H100 NVL", 835),
    ("H100", 989),
    ("H200", 989),
    ("A100", 312),
    ("L40S", 362),
    ("L4", 121),
    ("RTX 4090", 165),
    ("MI300X", 1307),
)


def flops_per_token(model: torch.nn.Module, seq_len: int) -> int:
    """Operations of forward and backward for one token of a sequence of ``seq_len``: :data:`FORMULA`.

    Call it before the model is sharded. Without ``num_hidden_layers`` and the like in its configuration, attention is
    left out.
    """
    from leanstep.optimizers.param_groups import parameter_roles

    roles = parameter_roles(model)
    head = model.get_output_embeddings()
    tied = None if head is None else head.weight
    weights = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if roles[name] not in ("embedding", "position") or parameter is tied
    )
    sizes = model.config.get_text_config()
    layers, heads = (getattr(sizes, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    if layers is None or heads is None:
        return 6 * weights
    width = heads * (getattr(sizes, "head_dim", None) or sizes.hidden_size // heads)
    return 6 * weights + 12 * layers * width * seq_len


def peak_flops(device_name: str, precision: str) -> float | None:
    """Most operations per second of a device by its name, in 16-bit precisions; None for a CPU and where unknown."""
    # a slice of a device has a part of its peak, and fp32's depends on whether TF32 is allowed
    if precision == "fp32" or " MIG " in device_name:
        return None
    return next((1e12 * peak for name, peak in _PEAK_TFLOPS if name in device_name.split("(")[-1]), None)
