"""N:M sparsity: patterns, masks, schedules, and weights that train under them."""

from leanstep.sparsity.functional import s_ste_scale, s_ste_weight, sparse_weight
from leanstep.sparsity.masks import flip_rate, is_nm, nm_mask
from leanstep.sparsity.patterns import NM, match_patterns
from leanstep.sparsity.schedules import Schedule, Stage
from leanstep.sparsity.scores import (
    ObsMask,
    magnitude,
    magnitude_times_activation,
    magnitude_times_gradient,
    nm_obs_mask,
)

__all__ = [
    "NM",
    "ObsMask",
    "Schedule",
    "Stage",
    "flip_rate",
    "is_nm",
    "magnitude",
    "magnitude_times_activation",
    "magnitude_times_gradient",
    "match_patterns",
    "nm_mask",
    "nm_obs_mask",
    "s_ste_scale",
    "s_ste_weight",
    "sparse_weight",
]
