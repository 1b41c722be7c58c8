"""Optimizers with the interface of torch.optim."""

from leanstep.optimizers.common.base import NonFiniteGradientError
from leanstep.optimizers.create import create, from_parameters
from leanstep.optimizers.gradient_release import GradientRelease, release_gradients
from leanstep.optimizers.lanton.optimizer import LANTON
from leanstep.optimizers.lion import Lion
from leanstep.optimizers.mfac.optimizer import MFAC
from leanstep.optimizers.param_groups import ParamGroups, param_groups
from leanstep.optimizers.rates.search import LearningRates, find_lr
from leanstep.optimizers.sinkgd.optimizer import SinkGD

__all__ = [
    "LANTON",
    "MFAC",
    "GradientRelease",
    "LearningRates",
    "Lion",
    "NonFiniteGradientError",
    "ParamGroups",
    "SinkGD",
    "create",
    "find_lr",
    "from_parameters",
    "param_groups",
    "release_gradients",
]
