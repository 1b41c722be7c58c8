"""Pruning of trained models, each layer as far as it hurts least: allocations, scores, and the solver behind them."""

from leanstep.pruning.layers import Layer, as_matrix

__all__ = [
    "Layer",
    "as_matrix",
]
