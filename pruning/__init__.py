"""Pruning of trained models, each layer as far as it hurts least: allocations, scores, and the solver behind them."""

from leanstep.pruning.allocation import Allocation, allocate, allocations_along, snap
from leanstep.pruning.budgets import Budget
from leanstep.pruning.curves import Curve, level_grid, nm_levels
from leanstep.pruning.densities import atp_betas, outlier_ratio
from leanstep.pruning.knapsack import InfeasibleBudget, KnapsackTable, solve_knapsack, solve_lagrange
from leanstep.pruning.layers import Layer, as_matrix
from leanstep.pruning.pruner import LayerPruner, Pruned
from leanstep.pruning.scores import layer_pruner
from leanstep.pruning.statistics import LayerStatistics

__all__ = [
    "Allocation",
    "Budget",
    "Curve",
    "InfeasibleBudget",
    "KnapsackTable",
    "Layer",
    "LayerPruner",
    "LayerStatistics",
    "Pruned",
    "allocate",
    "allocations_along",
    "as_matrix",
    "atp_betas",
    "layer_pruner",
    "level_grid",
    "nm_levels",
    "outlier_ratio",
    "snap",
    "solve_knapsack",
    "solve_lagrange",
]
