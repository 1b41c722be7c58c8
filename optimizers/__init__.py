"""torch.optim-compatible optimizers, one algorithm per file."""

from leanstep.optimizers._base import NonFiniteGradientError
from leanstep.optimizers.lanton import LANTON
from leanstep.optimizers.lion import Lion
from leanstep.optimizers.mfac import MFAC
from leanstep.optimizers.param_groups import ParamGroups, param_groups
from leanstep.optimizers.release import GradientRelease, release_gradients
from leanstep.optimizers.sinkgd import SinkGD

__all__ = [
    "LANTON",
    "MFAC",
    "GradientRelease",
    "Lion",
    "NonFiniteGradientError",
    "ParamGroups",
    "SinkGD",
    "param_groups",
    "release_gradients",
]
