"""Measure what pruning each matrix does to the model's output."""

from leanstep.pruning.measure.measure import measure_curves

__all__ = ["measure_curves"]
