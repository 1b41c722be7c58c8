"""torch.optim-compatible optimizers, one algorithm per file."""

from leanstep.optimizers._base import NonFiniteGradientError
from leanstep.optimizers.lion import Lion
from leanstep.optimizers.sinkgd import SinkGD

__all__ = ["Lion", "NonFiniteGradientError", "SinkGD"]
