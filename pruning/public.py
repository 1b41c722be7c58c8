"""The public names of :mod:`leanstep.pruning`, which loads this file when the first of them is used."""

from leanstep._processes import Processes
from leanstep.pruning.allocate.allocation import allocate, allocations_along
from leanstep.pruning.allocate.budgets import Budget
from leanstep.pruning.allocate.closed_form import atp_betas, outlier_ratio, snap
from leanstep.pruning.allocate.knapsack import InfeasibleBudget, KnapsackTable, solve_knapsack
from leanstep.pruning.allocate.latency import LatencyTable
from leanstep.pruning.allocate.levels import level_grid, nm_levels
from leanstep.pruning.compress.checkpoint import compress_checkpoint
from leanstep.pruning.compress.compress import Size, compress
from leanstep.pruning.config import Execution, PruneConfig, Refinement
from leanstep.pruning.cost import Workload
from leanstep.pruning.folder.estimate import Estimate, estimate_pruning
from leanstep.pruning.folder.recovery import recover_checkpoint
from leanstep.pruning.folder.run import prune_checkpoint
from leanstep.pruning.folder.text import CalibrationText
from leanstep.pruning.measure.curves import Curve
from leanstep.pruning.measure.measure import measure_curves
from leanstep.pruning.prune import prune
from leanstep.pruning.result import Allocation, PruneResult
from leanstep.pruning.score.base import LayerPruner, LayerStatistics, Pruned
from leanstep.pruning.score.scores import layer_pruner
from leanstep.pruning.score.targets import Layer, Target, as_matrix, find_targets
from leanstep.pruning.training.finetune import (
    GradualPruner,
    MaskKeeper,
    gradual_sparsity,
    iterative_sparsities,
    keep_masks,
    prune_iteratively,
    renew_batch_norms,
)
from leanstep.pruning.training.recovery import Recovery, RecoveryResult, recover

__all__ = [
    "Allocation",
    "Budget",
    "CalibrationText",
    "Curve",
    "Estimate",
    "Execution",
    "GradualPruner",
    "InfeasibleBudget",
    "KnapsackTable",
    "LatencyTable",
    "Layer",
    "LayerPruner",
    "LayerStatistics",
    "MaskKeeper",
    "Processes",
    "PruneConfig",
    "PruneResult",
    "Pruned",
    "Recovery",
    "RecoveryResult",
    "Refinement",
    "Size",
    "Target",
    "Workload",
    "allocate",
    "allocations_along",
    "as_matrix",
    "atp_betas",
    "compress",
    "compress_checkpoint",
    "estimate_pruning",
    "find_targets",
    "gradual_sparsity",
    "iterative_sparsities",
    "keep_masks",
    "layer_pruner",
    "level_grid",
    "measure_curves",
    "nm_levels",
    "outlier_ratio",
    "prune",
    "prune_checkpoint",
    "prune_iteratively",
    "recover",
    "recover_checkpoint",
    "renew_batch_norms",
    "snap",
    "solve_knapsack",
]
