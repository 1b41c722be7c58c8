"""Pruning of trained models, each layer as far as it hurts least: allocations, scores, and the solver behind them."""

from leanstep.pruning.curves import Curve, level_grid, nm_levels
from leanstep.pruning.knapsack import InfeasibleBudget, KnapsackTable, solve_knapsack, solve_lagrange
from leanstep.pruning.layers import Layer, as_matrix
from leanstep.pruning.pruner import LayerPruner, Pruned
from leanstep.pruning.scores import layer_pruner
from leanstep.pruning.statistics import LayerStatistics

__all__ = [
    "Curve",
    "InfeasibleBudget",
    "KnapsackTable",
    "Layer",
    "LayerPruner",
    "LayerStatistics",
    "Pruned",
    "as_matrix",
    "layer_pruner",
    "level_grid",
    "nm_levels",
    "solve_knapsack",
    "solve_lagrange",
]
