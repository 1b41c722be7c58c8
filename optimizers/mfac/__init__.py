"""M-FAC: the gradient times the inverse of an empirical Fisher matrix of recent gradients."""

from leanstep.optimizers.mfac.optimizer import MFAC

__all__ = ["MFAC"]
