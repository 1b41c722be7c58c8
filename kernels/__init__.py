"""Operations on tensors and lists of tensors: one function each, on up to three backends.

``reference`` is the definition in plain torch. ``cpp`` is a C++ kernel for the CPU. ``triton`` is a kernel for the GPU.
:func:`use_backend` selects one; ``leanstep info`` prints the backend of each op on this machine, and why it runs.
"""

if __name__ == "kernels":
    # In the root of a clone, Python takes this folder for Hugging Face's package `kernels`, which transformers imports.
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _root = Path(__file__).resolve().parents[1]
    _spec = PathFinder.find_spec(__name__, [entry for entry in sys.path if Path(entry).resolve() != _root])
    if _spec is None or _spec.loader is None:
        raise ModuleNotFoundError("No module named 'kernels' (leanstep's is leanstep.kernels)", name=__name__)
    sys.modules[__name__] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[__name__])

from leanstep.kernels._backend import BackendError, backend_table, use_backend
from leanstep.kernels.fisher.block_inverse_fisher import BlockInverseFisher
from leanstep.kernels.fisher.gradient_window import linear_combination, row_dots
from leanstep.kernels.fisher.inverse_fisher import Coefficients, window_coefficients
from leanstep.kernels.fisher.sparse_window import (
    SparseLayout,
    scatter,
    sparse_layout,
    sparse_linear_combination,
    sparse_row_dots,
    top_k,
)
from leanstep.kernels.lora.norms import lora_norms
from leanstep.kernels.lora.products import lora_down, lora_down_backward, lora_dropout, lora_up_
from leanstep.kernels.lora.scale import lora_scale_, lora_scale_backward
from leanstep.kernels.lora.swiglu import swiglu, swiglu_backward_
from leanstep.kernels.matrices.dense_product import product
from leanstep.kernels.matrices.few_tokens import few_token_linear
from leanstep.kernels.matrices.newton_schulz import COEFFICIENTS, newton_schulz, nuclear_norm
from leanstep.kernels.matrices.sinkhorn import Scales, sinkhorn
from leanstep.kernels.nm.apply import nm_apply
from leanstep.kernels.nm.mask import nm_mask
from leanstep.kernels.nm.matmul import nm_compress, nm_decompress, nm_matmul
from leanstep.kernels.poly.attention import poly_attention
from leanstep.kernels.poly.features import poly_features, poly_features_backward
from leanstep.kernels.sparse.bitmask import bitmask_pack, bitmask_quantize, bitmask_unpack, bitmask_validate
from leanstep.kernels.sparse.linear import bitmask_linear
from leanstep.kernels.steps.common import StepOptions
from leanstep.kernels.steps.lion_int8 import lion_agreement_int8, lion_step_int8
from leanstep.kernels.steps.lion_step import lion_agreement, lion_step
from leanstep.kernels.steps.scaled_step import scaled_step, sinkhorn_step

__all__ = [
    "COEFFICIENTS",
    "BackendError",
    "BlockInverseFisher",
    "Coefficients",
    "Scales",
    "SparseLayout",
    "StepOptions",
    "backend_table",
    "bitmask_linear",
    "bitmask_pack",
    "bitmask_quantize",
    "bitmask_unpack",
    "bitmask_validate",
    "few_token_linear",
    "linear_combination",
    "lion_agreement",
    "lion_agreement_int8",
    "lion_step",
    "lion_step_int8",
    "lora_down",
    "lora_down_backward",
    "lora_dropout",
    "lora_norms",
    "lora_scale_",
    "lora_scale_backward",
    "lora_up_",
    "newton_schulz",
    "nm_apply",
    "nm_compress",
    "nm_decompress",
    "nm_mask",
    "nm_matmul",
    "nuclear_norm",
    "poly_attention",
    "poly_features",
    "poly_features_backward",
    "product",
    "row_dots",
    "scaled_step",
    "scatter",
    "sinkhorn",
    "sinkhorn_step",
    "sparse_layout",
    "sparse_linear_combination",
    "sparse_row_dots",
    "swiglu",
    "swiglu_backward_",
    "top_k",
    "use_backend",
    "window_coefficients",
]
