"""torch.optim-compatible optimizers, one algorithm per file."""

from leanstep.optimizers._base import NonFiniteGradientError
from leanstep.optimizers.lion import Lion

__all__ = ["Lion", "NonFiniteGradientError"]
