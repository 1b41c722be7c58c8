"""LANTON: steps in each layer's norm, smaller where gradients are noisier."""

from leanstep.optimizers.lanton.optimizer import LANTON

__all__ = ["LANTON"]
