"""SinkGD: the gradient, normalized over rows and columns alternately, is the update. No state for matrices."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels import Scales, scaled_step, sinkhorn_step
from leanstep.kernels.steps.common import nonfinite_flags
from leanstep.optimizers.common.base import Batch, LeanOptimizer, count_nonfinite
from leanstep.optimizers.common.checks import (
    check_betas,
    check_choice,
    check_dtype,
    check_flags,
    check_number,
    describe,
    holds_factors,
)
from leanstep.optimizers.common.matrices import as_matrices, matrix_shape, oriented, write_back
from leanstep.optimizers.common.rounding import effective, init_rounding
from leanstep.optimizers.common.sharding import Shard, Steps, all_reduce_flags, local, new_state
from leanstep.optimizers.sinkgd import rule
from leanstep.optimizers.sinkgd.adamw import init_adamw, step_adamw
from leanstep.optimizers.sinkgd.sharded import all_reduce_row_norms, normalize
from leanstep.optimizers.sinkgd.spectral import init_power_vector, pin_operator_norms

ALGORITHMS = ("auto", "sinkgd", "balanced", "adamw")
MOMENTUM_ORDERS = ("pre", "post")
SPECTRAL = (None, "unit", "muon")


class SinkGD(LeanOptimizer):
    r"""SinkGD: stateless descent along the square-root Sinkhorn normalization of the gradient.

    For a matrix G (m, n), rows first::

        X = G                                          with momentum: see below
        X[i, :] = sqrt(n) * X[i, :] / ||X[i, :]||      every row,        num_iters
        X[:, j] = sqrt(m) * X[:, j] / ||X[:, j]||      every column,     times
        p = p * (1 - lr * scale * weight_decay) - lr * scale * X

    X keeps the signs of G and has root mean square 1, so ``lr * scale`` is the root mean square of the update, whatever
    the size of the gradient: clipping by norm and loss scaling change nothing for these tensors.

    Options change X before or after it is normalized, in this order::

        M = momentum * M + (1 - momentum) * G;  X = M                  momentum
        X = momentum * M + (1 - momentum) * G                          nesterov
        X[i, :] = 0 where ||X[i, :]|| <= row_mask_tau * mean norm      row_mask_tau
        X = X * base_width / n                                         base_width
        X = X * sqrt(m / n) / ||X||_operator                           spectral="muon"

    These formulas are the functions of ``leanstep/optimizers/sinkgd/rule.py``, in this order.

    One object serves a whole model. Every group has an ``algorithm``:

    * "sinkgd": the rule above, for matrices (m, n), for stacks of matrices (e, m, n) one by one, and for tensors of
      four and more dimensions flattened to (m, rest); with ``flatten`` also those of three.
    * "balanced": for embeddings and heads. Like "sinkgd" with nesterov, and with one more step over the rows at the
      end, so that every token's update has the same size. It replaces AdamW there at half its state, or none with
      ``momentum=0``.
    * "adamw": ``torch.optim.AdamW(fused=True)``, bit for bit, with the group's lr, betas, eps and weight_decay. Other
      values of ``fused`` and ``foreach`` select torch's other loops, whose last bits differ.
    * "auto": "sinkgd" for two and more dimensions, "adamw" for the rest. A warning says so once, because embeddings
      and heads belong elsewhere. :func:`leanstep.optimizers.param_groups` makes better groups.

    Args:
        params: parameters, named parameters, or groups.
        lr: global step size eta, a number or a one-element tensor. AdamW groups use it without ``scale``.
        scale: alpha; 0.05 with lr 0.02 is the published pair, 0.2 suits an lr tuned for AdamW.
        num_iters: L, the number of (row, column) iterations.
        weight_decay: decoupled; multiplied by lr * scale for normalized tensors, by lr for AdamW's.
        momentum: weight of the old buffer; 0 keeps no state.
        momentum_order: "pre": normalize the momentum; "post": average the normalized gradients.
        nesterov: look ahead by one gradient (see above).
        row_mask_tau: drop rows whose norm is at most this times the mean row norm; 0 drops none.
        base_width: shrink X by base_width / n, to carry lr from one width to another.
        spectral: hold the operator norm of X near 1 ("unit") or sqrt(m / n) ("muon"); None leaves it. With "unit",
            lr * scale is the operator norm of the update. The norm is estimated from below, by one power iteration a
            step, carried on from the last step (20 at a matrix's first finite gradient that is not zero). State: n
            values. A step waits for the device until all matrices of a tensor have had such a gradient.
        betas, eps: for AdamW.
        fused: for AdamW; None: wherever torch has a fused kernel.
        foreach: None or True: one call for all tensors of a device and dtype; False: one tensor at a time.
        transposed: True for a group whose matrices are stored (in, out), as transformers' ``Conv1D`` stores GPT-2's,
            or stacked (e, in, out). They are normalized as (out, in). :func:`leanstep.optimizers.param_groups` sets it.
        flatten: True for a group whose tensors of three dimensions are one matrix (m, rest) each instead of a stack,
            as the weights of one-dimensional convolutions. :func:`leanstep.optimizers.param_groups` sets it.
        rounding, momentum_dtype, seed, maximize: as for :class:`leanstep.optimizers.Lion`.
        nonfinite: "skip": leave a matrix with a non-finite gradient unchanged, and count it. AdamW's tensors of one
            dtype and device are skipped together (one by one with ``foreach=False``). "raise" and "pass": as for Lion.

    Raises:
        ValueError, TypeError: settings out of range; a vector in a group whose algorithm takes matrices.
        RuntimeError: a sparse gradient.
        NonFiniteGradientError: see ``nonfinite``.

    Notes:
        State: none for matrices (``momentum_buffer``, ``power_vector`` and ``power_warm``, ``step``,
        ``kahan_compensation`` or ``master_param`` only where an option needs them); AdamW's for the rest. Extra memory
        of a step: on a CPU one fp32 matrix; on a GPU partial column sums. Rows sharded by FSDP2: one all-reduce of all
        column sums per iteration for the whole model, in which the flags of AdamW's check travel too; no matrix is
        gathered. Columns sharded: row sums instead, and one more for the rows' largest entries.
        ``torch.compile`` of the step makes one graph.
        Parameters of other tensor classes, such as quantized weights, are stepped on a plain copy and written back.
        Differs from the paper only in form: it keeps row and column scales instead of rewriting X.

    References:
        Scetbon, Ma, Gong, Meeds, "Gradient Multi-Normalization for Stateless and Scalable LLM Training",
        arXiv 2502.06742 (SR-Sinkhorn and SinkGD).

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> groups = [{"params": [p for p in model.parameters() if p.dim() == 2], "algorithm": "sinkgd"},
        ...           {"params": [p for p in model.parameters() if p.dim() < 2], "algorithm": "adamw", "lr": 1e-3}]
        >>> optimizer = SinkGD(groups, lr=2e-2)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    _shaped_state = ("momentum_buffer", "exp_avg", "exp_avg_sq")
    _separable = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-2,
        scale: float = 0.05,
        num_iters: int = 5,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.0,
        momentum_order: str = "pre",
        nesterov: bool = False,
        row_mask_tau: float = 0.0,
        base_width: int | None = None,
        spectral: str | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        fused: bool | None = None,
        algorithm: str = "auto",
        transposed: bool = False,
        flatten: bool = False,
        rounding: str = "nearest",
        momentum_dtype: torch.dtype | None = None,
        seed: int = 0,
        nonfinite: str = "skip",
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = dict(
            lr=lr, scale=scale, num_iters=num_iters, weight_decay=weight_decay, momentum=momentum,
            momentum_order=momentum_order, nesterov=nesterov, row_mask_tau=row_mask_tau, base_width=base_width,
            spectral=spectral, betas=betas, eps=eps, fused=fused, algorithm=algorithm, transposed=transposed,
            flatten=flatten, rounding=rounding, momentum_dtype=momentum_dtype, seed=seed, nonfinite=nonfinite,
            maximize=maximize, foreach=foreach,
        )  # fmt: skip
        super().__init__(params, defaults)
        _say_how_auto_routes(self.param_groups)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_number("SinkGD", "scale", group["scale"], 0.0)
        check_number("SinkGD", "momentum", group["momentum"], 0.0, 1.0, open_high=True)
        check_number("SinkGD", "row_mask_tau", group["row_mask_tau"], 0.0)
        check_number("SinkGD", "epsilon value", group["eps"], 0.0)
        check_betas("SinkGD", group["betas"])
        check_choice("SinkGD", "momentum_order", group["momentum_order"], MOMENTUM_ORDERS)
        check_choice("SinkGD", "algorithm", group["algorithm"], ALGORITHMS)
        check_choice("SinkGD", "spectral", group["spectral"], SPECTRAL)
        check_flags("SinkGD", group, ("nesterov", "transposed", "flatten"), ("fused",))
        check_dtype("SinkGD", "momentum_dtype", group["momentum_dtype"])
        iters = group["num_iters"]
        if isinstance(iters, bool) or not isinstance(iters, int) or iters < 1:
            raise ValueError(f"Invalid num_iters: {iters!r}; SinkGD expects an int of at least 1")
        if group["base_width"] is not None:
            check_number("SinkGD", "base_width", group["base_width"], 1)
            if group["spectral"] == "muon":
                raise ValueError("SinkGD: base_width and spectral='muon' both correct for width; choose one")
        if group["transposed"] and group["flatten"]:
            raise ValueError(
                "SinkGD: transposed is for matrices and stacks of them, flatten for convolutions; choose one"
            )
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError("SinkGD: nesterov needs momentum > 0")
        if group["fused"] and group["foreach"]:
            raise RuntimeError("SinkGD: `fused` and `foreach` cannot be True together")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; a vector in a group whose algorithm takes matrices is an error."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for position, param in enumerate(group["params"]):
            if algorithm_of(group, param) == "adamw":
                continue
            most = 2 if group["algorithm"] == "balanced" else 3 if group["transposed"] else param.dim()
            if not 2 <= param.dim() <= most:
                name = describe(group, position)
                self.param_groups.pop()
                raise ValueError(
                    f"SinkGD: algorithm={group['algorithm']!r} takes matrices, got {name} of {param.dim()} dimensions. "
                    "Put it in a group with algorithm='adamw'; leanstep.optimizers.param_groups does so. "
                    "(Parameters flattened by a sharding engine have lost their rows and cannot be normalized.)"
                )

    def _keeps_dtype(self, group: dict[str, Any], param: Tensor, key: str) -> bool:
        """False for AdamW's moments without rounding: torch's own step wants them in the parameter's dtype."""
        plain = group["rounding"] == "nearest" or param.dtype in (torch.float32, torch.float64)
        return not (plain and key in ("exp_avg", "exp_avg_sq"))

    def _stays_on_cpu(self, key: str) -> bool:
        return key == "power_warm"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fill in settings that an older state does not have; step counts become tensors."""
        super().__setstate__(state)
        for entry in self.state.values():  # hooks may have added values that are no states
            if isinstance(entry, dict) and "step" in entry and not torch.is_tensor(entry["step"]):
                entry["step"] = torch.tensor(float(entry["step"]), dtype=torch.float32)

    def _init_state(self, group: dict[str, Any], position: int, param: Tensor) -> dict[str, Any]:
        # an entry even where it stays empty: torch.distributed.checkpoint takes a missing one for a lost one
        state = self.state[param]
        rounding = effective("SinkGD", group, position, param)
        if algorithm_of(group, param) == "adamw":
            init_adamw(state, param, group, rounding)
        elif group["momentum"] and "momentum_buffer" not in state:
            state["momentum_buffer"] = new_state(param, group["momentum_dtype"])
        if group["spectral"] and algorithm_of(group, param) != "adamw":
            init_power_vector(state, param, group)
        init_rounding(state, param, rounding)
        return state

    def _group_steps(self, group: dict[str, Any], first_index: int, only: int | None = None) -> list[Steps[None]]:
        batches = self._batches(group, first_index, only, lambda param: algorithm_of(group, param))
        return [
            step_adamw(batch) if algorithm == "adamw" else _step(batch, balanced=algorithm == "balanced")
            for algorithm, batch in batches
        ]


def _step(batch: Batch, *, balanced: bool) -> Steps[None]:
    """Update matrices of one device and dtype by the rule, in the docstring's order; parameters and state in place."""
    group, states = batch.group, batch.states
    transposed, flatten, momentum = group["transposed"], group["flatten"], group["momentum"]
    shards = [oriented(s, transposed, flatten) for s in batch.shards]
    sides = [_sharded_side(s) for s in shards]
    matrices = [as_matrices(local(g), transposed, flatten) for g in batch.grads]
    if group["maximize"]:
        matrices = [-g for g in matrices]
    after = group["momentum_order"] == "post" and not balanced
    bad = None
    if momentum:
        if group["nonfinite"] == "skip":
            bad = nonfinite_flags(matrices)
            yield from all_reduce_flags(bad, shards)
        if not after:
            matrices = _average(matrices, batch, bad, nesterov=balanced or group["nesterov"])
    if group["row_mask_tau"] > 0:
        norms = [rule.row_norms(g) for g in matrices]
        totals = [n.sum(dim=-1, keepdim=True) for n in norms]
        if any(sides):
            yield from all_reduce_row_norms(norms, totals, shards, sides)
        matrices = [
            rule.mask_rows(g, norm, total, matrix_shape(shard)[0], group["row_mask_tau"])
            for g, norm, total, shard in zip(matrices, norms, totals, shards, strict=True)
        ]
    if not (momentum or group["spectral"] or transposed or group["base_width"] or any(sides)):
        _write(batch, matrices, None, end_with_rows=balanced)
        return
    if any(sides):
        scales = yield from normalize(matrices, shards, sides, group["num_iters"], end_with_rows=balanced)
    else:
        scales = rule.normalize(matrices, group["num_iters"], end_with_rows=balanced)
    if group["spectral"] is not None:
        yield from pin_operator_norms(matrices, scales, states, shards, sides, group["spectral"])
    if group["base_width"] is not None:
        for rows, shard in zip(scales.rows, shards, strict=True):
            rows.mul_(group["base_width"] / matrix_shape(shard)[1])
    if bad is not None:
        for cols, flag in zip(scales.cols, bad, strict=True):
            cols.masked_fill_(flag > 0, math.nan)
    if momentum and after:
        normalized = [rule.scaled(*each) for each in zip(matrices, scales.rows, scales.cols, strict=True)]
        matrices = _average(normalized, batch, bad, nesterov=group["nesterov"])
        _reset(scales)
    if transposed:
        matrices, scales = [g.mT for g in matrices], _transposed(scales)
    _write(batch, matrices, scales, end_with_rows=balanced)


def _sharded_side(shard: Shard) -> str | None:
    """Return by what the matrices of a parameter are sharded: "rows", "columns", or None if each is whole.

    Raises:
        ValueError: for matrices sharded along both dimensions, or in strides.
    """
    if not shard.groups:
        return None
    if shard.dim is None:
        raise ValueError(
            f"SinkGD takes matrices that are whole or sharded along one dimension over one mesh dimension "
            f"(fully_shard's way); got placements {shard.placements} for shape {tuple(shard.shape)}. Put this "
            "parameter in a group with algorithm='adamw', or shard it by fully_shard alone."
        )
    if len(shard.shape) == 3:  # a stack of matrices
        return (None, "rows", "columns")[shard.dim]
    return "columns" if shard.dim else "rows"


def _average(matrices: list[Tensor], batch: Batch, bad: Tensor | None, *, nesterov: bool) -> list[Tensor]:
    """Update the momenta, except where ``bad`` says that a matrix is not finite; return them before rounding."""
    group, averages = batch.group, []
    for i, (matrix, state) in enumerate(zip(matrices, batch.states, strict=True)):
        stored = local(state["momentum_buffer"])
        buffer = as_matrices(stored, group["transposed"], group["flatten"])
        average = rule.momentum_average(buffer, matrix, group["momentum"])
        if bad is not None:
            average = torch.where(bad[i] > 0, buffer.to(average.dtype), average)
        stored.copy_(average.mT if group["transposed"] else average.view_as(stored))
        averages.append(rule.momentum_average(average, matrix, group["momentum"]) if nesterov else average)
    return averages


def _reset(scales: Scales) -> None:
    """Set all scales to 1, for matrices that are normalized already; NaN marks matrices that are not finite."""
    for rows, cols in zip(scales.rows, scales.cols, strict=True):
        bad = torch.isnan(cols).any(dim=-1, keepdim=True)
        rows.fill_(1.0)
        cols.copy_(torch.where(bad, math.nan, torch.ones_like(cols)))


def _transposed(scales: Scales) -> Scales:
    """Scales of the transposed matrices. A matrix that is not finite has NaN in all its columns: they keep that."""
    for rows, cols in zip(scales.rows, scales.cols, strict=True):
        rows.masked_fill_(torch.isnan(cols).any(dim=-1, keepdim=True), math.nan)
    return Scales(scales.cols, scales.rows, scales.flat_cols, scales.flat_rows)


def _write(batch: Batch, matrices: list[Tensor], scales: Scales | None, *, end_with_rows: bool) -> None:
    """p = p * (1 - lr * scale * weight_decay) - lr * scale * X; counts matrices that are not finite.

    ``scales``: None where X is still to be found: normalization and update are then one pass over memory.
    """
    group = batch.group
    weights = [local(p) for p in batch.params]
    scalars = rule.step_scalars(group["lr"], group["scale"], group["weight_decay"], weights[0])
    options = batch.options(scalars)

    def step(targets: list[Tensor], rounding_state: list[Tensor]) -> Tensor:
        if scales is not None:
            return scaled_step(targets, matrices, scales.rows, scales.cols, rounding_state, options)
        iterations = {"num_iters": group["num_iters"], "end_with_rows": end_with_rows}
        return sinkhorn_step(targets, matrices, rounding_state, options, **iterations)

    flags = write_back(step, weights, batch.rounding_state(), [not group["flatten"]] * len(weights))
    count_nonfinite(group, flags)


def algorithm_of(group: dict[str, Any], param: Tensor) -> str:
    """The rule that a group applies to a parameter."""
    if group["algorithm"] != "auto":
        return group["algorithm"]
    return "sinkgd" if param.dim() >= 2 else "adamw"


def _say_how_auto_routes(groups: list[dict[str, Any]]) -> None:
    auto = [p for group in groups if group["algorithm"] == "auto" and not holds_factors(group) for p in group["params"]]
    matrices = sum(p.dim() >= 2 for p in auto)
    if matrices:
        rest = len(auto) - matrices
        warnings.warn(
            f"SinkGD: {matrices} parameters of two or more dimensions are taken as matrices"
            f"{f', {rest} others go to AdamW' if rest else ''}. Embeddings and heads are matrices here too: "
            "leanstep.optimizers.param_groups(model) routes them by module; algorithm='sinkgd' means them all.",
            stacklevel=3,
        )
