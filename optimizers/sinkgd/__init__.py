"""SinkGD: the gradient, normalized over rows and columns in turn, is the update."""

from leanstep.optimizers.sinkgd.optimizer import SinkGD

__all__ = ["SinkGD"]
