"""N:M sparsity: patterns, masks, schedules, and sparse training."""

from leanstep.sparsity.files import export_compressed, load_compressed
from leanstep.sparsity.functional import s_ste_scale, s_ste_weight, sparse_weight
from leanstep.sparsity.inference import (
    Export,
    FewTokenLinear,
    SparseLinear,
    export_folder,
    load_sparse,
    to_few_token_linear,
)
from leanstep.sparsity.patterns import NM, match_patterns
from leanstep.sparsity.semi_structured import Conversion, to_semi_structured
from leanstep.sparsity.squash import plain_state_dict, squash
from leanstep.sparsity.training.controller import Controller
from leanstep.sparsity.training.masks import is_nm, nm_mask
from leanstep.sparsity.training.schedules import Schedule, Stage
from leanstep.sparsity.training.scores import (
    ObsMask,
    magnitude,
    magnitude_times_activation,
    magnitude_times_gradient,
    nm_obs_mask,
)
from leanstep.sparsity.training.sparsify import sparsify
from leanstep.sparsity.training.transposable import transposable_mask
from leanstep.sparsity.verify import Verification, verify

__all__ = [
    "NM",
    "Controller",
    "Conversion",
    "Export",
    "FewTokenLinear",
    "ObsMask",
    "Schedule",
    "SparseLinear",
    "Stage",
    "Verification",
    "export_compressed",
    "export_folder",
    "is_nm",
    "load_compressed",
    "load_sparse",
    "magnitude",
    "magnitude_times_activation",
    "magnitude_times_gradient",
    "match_patterns",
    "nm_mask",
    "nm_obs_mask",
    "plain_state_dict",
    "s_ste_scale",
    "s_ste_weight",
    "sparse_weight",
    "sparsify",
    "squash",
    "to_few_token_linear",
    "to_semi_structured",
    "transposable_mask",
    "verify",
]
