"""Operations on lists of tensors: one name each, several backends (see ``leanstep.kernels._backend``)."""

from leanstep.kernels._backend import BackendError, backend_table, use_backend
from leanstep.kernels.lion_step import lion_agreement, lion_step
from leanstep.kernels.scaled_step import scaled_step
from leanstep.kernels.sinkhorn import Scales, sinkhorn

__all__ = [
    "BackendError",
    "Scales",
    "backend_table",
    "lion_agreement",
    "lion_step",
    "scaled_step",
    "sinkhorn",
    "use_backend",
]
