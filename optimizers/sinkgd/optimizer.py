"""SinkGD: the gradient, normalized over rows and columns alternately, is the update. No state for matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leanstep.optimizers.common.base import GradientAverage, LeanOptimizer
from leanstep.optimizers.common.checks import (
    check_betas,
    check_blocks,
    check_choice,
    check_count,
    check_dtype,
    check_flags,
    check_layout,
    check_number,
    check_rows,
    describe,
    settings_of,
    warn_how_auto_routes,
)
from leanstep.optimizers.common.column_shards import cuts_rows
from leanstep.optimizers.common.loading import Loaded
from leanstep.optimizers.common.matrices import matrix_shape, oriented, sides_of
from leanstep.optimizers.common.sharding import Reducer, Shard, shard_of
from leanstep.optimizers.common.state import coded
from leanstep.optimizers.sinkgd.adamw import step_adamw
from leanstep.optimizers.sinkgd.spectral import find_warm
from leanstep.optimizers.sinkgd.state import ENTRIES, algorithm_of
from leanstep.optimizers.sinkgd.step import step_matrices

CHOICES = {
    "algorithm": ("auto", "sinkgd", "balanced", "adamw"),
    "momentum_order": ("pre", "post"),
    "spectral": (None, "unit", "muon"),
}


class SinkGD(LeanOptimizer):
    r"""SinkGD: stateless descent along the square-root Sinkhorn normalization of the gradient.

    Start with ``create(model, "sinkgd")``, whose rate follows from the model. The class's is that of a width of 128.

    For a matrix G (m, n), rows first::

        X = G                                          with momentum: see below
        X[i, :] = sqrt(n) * X[i, :] / ||X[i, :]||      every row,        num_iters
        X[:, j] = sqrt(m) * X[:, j] / ||X[:, j]||      every column,     times
        p = p * (1 - lr * scale * weight_decay) - lr * scale * X

    X has the signs of G and root mean square 1, so the update has root mean square ``lr * scale`` for any gradient
    norm. Clipping by norm and loss scaling therefore have no effect on these parameters.

    Options change X before normalization (the first two) or after it, in this order::

        M = momentum * M + (1 - momentum) * G;  X = M                  momentum
        X = momentum * M + (1 - momentum) * G                          nesterov
        X = X / ||X||_operator                                         spectral="unit"
        X = X * sqrt(m / n) / ||X||_operator                           spectral="muon"
        X = X * base_width / n                                         base_width, without spectral

    ``leanstep/optimizers/sinkgd/rule.py`` has the formulas as functions; that of base_width is in ``step.py``.

    One optimizer serves a whole model. Every group has an ``algorithm``:

    * "sinkgd": the rule above. A stack (e, m, n) is normalized matrix by matrix. Four and more dimensions are flattened
      to (m, rest); with ``flatten`` three are, too.
    * "balanced": for embeddings and heads. "sinkgd" with nesterov and a final normalization of the rows, which gives
      every token an update of the same norm. Before normalization, rows below 1e-3 of the mean norm are set to 0:
      those of tokens that were barely seen. State: half of AdamW's, or none with ``momentum=0``.
    * "adamw": bit-identical to ``torch.optim.AdamW(fused=True)`` with the group's lr, betas, eps and weight_decay.
      Other values of ``fused`` and ``foreach`` select torch's other implementations, whose last bits differ.
    * "auto": "sinkgd" for two and more dimensions, "adamw" for the rest. Warns once, because it normalizes embeddings
      and heads, too. :func:`leanstep.optimizers.param_groups` makes better groups.

    Args:
        params: parameters, named parameters, or groups.
        lr: step size (eta in the paper), a number or a one-element tensor. AdamW parameters do not use ``scale``.
        scale: multiplier of lr (alpha in the paper), published as 0.05 with lr 0.02. 1 suits an lr tuned for AdamW, and
            0.28 with ``momentum=0.9``: ``like_adamw`` of :func:`leanstep.optimizers.create`.
        num_iters: L, the number of (row, column) iterations.
        weight_decay: decoupled. Multiplied by lr * scale for normalized parameters, by lr for AdamW's.
        momentum: weight of the old M; 0: no momentum and no state.
        momentum_order: "pre": normalize the momentum. "post": average the normalized gradients.
        nesterov: average M with G once more (see above).
        base_width: multiply X by base_width / n, which transfers lr from width base_width to width n. Excludes
            ``spectral``.
        spectral: scale X to operator norm 1 ("unit") or sqrt(m / n) ("muon"); None: do not. With "unit" the update has
            operator norm lr * scale. Power iteration estimates the norm from below: 20 iterations at a matrix's first
            finite nonzero gradient, then the larger of one from the last vector and two from a fixed one. So the norm
            is met to 5 % where gradients change slowly, and exceeded by up to a half where each has nothing
            in common with the last. State: n values per matrix. Steps wait for the device until all matrices of a
            parameter have had such a gradient.
        cautious_decay: no decay for entries whose update and parameter differ in sign (arXiv 2510.12402), also of
            AdamW's parameters; those with a zero update decay. A 16-bit parameter of AdamW with rounding="nearest" is
            rounded after the decay and after the step, as by torch's AdamW without ``fused``. No gain was measured
            (docs/measured/optimizers.md).
        betas, eps: for AdamW.
        fused: for AdamW; None: if torch has a fused kernel for the device.
        foreach: None or True: one call for all tensors of a device and dtype. False: one call per tensor.
        transposed: the group's matrices are stored (in, out), as in transformers' ``Conv1D`` (GPT-2), or (e, in, out).
            They are normalized as (out, in). :func:`leanstep.optimizers.param_groups` sets it.
        flatten: the group's tensors of three dimensions are matrices (m, rest), not stacks, as in one-dimensional
            convolutions. :func:`leanstep.optimizers.param_groups` sets it.
        blocks: the rows of the group's matrices (out, in) are several matrices, each normalized by itself. An int:
            blocks of so many rows. A tuple: the rows of every block. Without meaning for AdamW's parameters.
            :func:`leanstep.optimizers.param_groups` sets it for heads and fused weights, with ``split``.
        momentum_dtype: as for :class:`leanstep.optimizers.Lion`. torch.int8 stores AdamW's two moments in 8 bits, too
            ("fp8": the first in this format, the second as with int8),
            and its step is then not torch's: both are rounded stochastically, the second one without bias and never to
            0. The root of the second moment differs by 8 % (standard deviation) from that of AdamW. Other dtypes do not
            change AdamW's moments. Momenta of 8 bits of a group with ``blocks``, and of shards that cut rows, are in
            fp32 for the time of the step.
        rounding, seed, maximize: as for :class:`leanstep.optimizers.Lion`.
        nonfinite: "skip": do not update a matrix with a non-finite gradient, and count it; with momentum, the whole
            stack that has it. One non-finite gradient skips all AdamW parameters of its group, device and dtype.
            "raise", "pass": as for Lion.

    Raises:
        ValueError, TypeError: a setting is out of range; a vector is in a group whose algorithm takes matrices.
        RuntimeError: a gradient is sparse.
        NonFiniteGradientError: a gradient is not finite, with nonfinite="raise".

    Notes:
        State: none for matrices without options; AdamW's moments for the rest (8 bytes per fp32 parameter, 2.06 with
        int8). Options add ``momentum_buffer``,
        ``power_vector`` and ``power_warm``, and the state of ``rounding``, as for Lion. A step allocates one
        fp32 matrix on a CPU, and partial column sums on a GPU. ``momentum`` and "balanced" add the averages of
        the largest matrix, or 64 MB of them where matrices are smaller; of all sharded matrices together.
        Sharded matrices (FSDP2, tensor parallelism, both) are not gathered. An iteration reduces column sums over each
        mesh dimension that shards rows, and row sums over each that shards columns; these also need one all-reduce of
        the rows' largest entries. All matrices of the model share the all-reduces. ``spectral`` needs whole columns.
        ``torch.compile`` of the step makes one graph.
        Wrapper tensor classes, such as quantized weights, are updated on a plain copy and written back.
        The implementation stores row and column scales and does not rewrite X, which is equivalent to the paper's form.

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

    _state_entries = ENTRIES
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
        base_width: int | None = None,
        spectral: str | None = None,
        cautious_decay: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        fused: bool | None = None,
        algorithm: str = "auto",
        transposed: bool = False,
        flatten: bool = False,
        blocks: int | tuple[int, ...] | None = None,
        rounding: str = "nearest",
        momentum_dtype: torch.dtype | str | None = None,
        seed: int = 0,
        nonfinite: str = "skip",
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(params, settings_of(locals()))
        auto = [g for g in self.param_groups if g["algorithm"] == "auto"]
        warn_how_auto_routes(auto, "SinkGD", "matrices", "go to AdamW", "algorithm='sinkgd'")

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for name, key in (("scale", "scale"), ("epsilon value", "eps")):
            check_number("SinkGD", name, group[key], 0.0)
        check_number("SinkGD", "momentum", group["momentum"], 0.0, 1.0, open_high=True)
        check_betas("SinkGD", group["betas"])
        for name, choices in CHOICES.items():
            check_choice("SinkGD", name, group[name], choices)
        check_flags("SinkGD", group, ("nesterov", "cautious_decay"), ("fused",))
        check_layout("SinkGD", group)
        check_blocks("SinkGD", group)
        if group["blocks"] is not None and group["spectral"] is not None:
            raise ValueError("SinkGD: spectral scales whole matrices; leave it None in groups with blocks")
        check_count("SinkGD", "num_iters", group["num_iters"])
        check_dtype("SinkGD", "momentum_dtype", group["momentum_dtype"], codes=True)
        if group["base_width"] is not None:
            check_number("SinkGD", "base_width", group["base_width"], 1)
            if group["spectral"] is not None:
                raise ValueError(
                    f"SinkGD: base_width and spectral={group['spectral']!r} both set the size of the update; choose one"
                )
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError("SinkGD: nesterov needs momentum > 0")
        if group["fused"] and group["foreach"]:
            raise RuntimeError("SinkGD: `fused` and `foreach` cannot be True together")

    def _check_params(self, group: dict[str, Any], given: dict[str, Any]) -> None:
        super()._check_params(group, given)
        for position, param in enumerate(group["params"]):
            if algorithm_of(group, param) == "adamw":
                continue
            most = 2 if group["algorithm"] == "balanced" else 3 if group["transposed"] else param.dim()
            if not 2 <= param.dim() <= most:
                raise ValueError(
                    f"SinkGD: algorithm={group['algorithm']!r} takes matrices, got {describe(group, position)} of "
                    f"{param.dim()} dimensions. Put it in a group with algorithm='adamw'; "
                    "leanstep.optimizers.param_groups does so. "
                    "(Parameters flattened by a sharding engine have lost their rows and cannot be normalized.)"
                )
            if group["blocks"] is not None:
                whole = oriented(Shard(param.shape), group["transposed"], group["flatten"])
                check_rows("SinkGD", group, position, matrix_shape(whole)[0])

    def _check_loaded_states(self, groups: list[dict[str, Any]], entries: list[Loaded]) -> None:
        for entry in entries:
            find_warm(entry.state)

    def _takes_flattened(self, group: dict[str, Any]) -> bool:
        return group["algorithm"] == "adamw"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fill in settings that an older state does not have, and convert step counts to tensors."""
        super().__setstate__(state)
        for entry in self.state.values():  # hooks may add other values
            if isinstance(entry, dict) and "step" in entry and not torch.is_tensor(entry["step"]):
                entry["step"] = torch.tensor(float(entry["step"]), dtype=torch.float32, device="cpu")

    def _check_shard(self, group: dict[str, Any], position: int, shard: Shard) -> None:
        super()._check_shard(group, position, shard)
        if algorithm_of(group, group["params"][position]) == "adamw":
            return
        if group["blocks"] is not None and shard.ranges is None:
            raise ValueError(
                f"SinkGD: blocks need shards without gaps, got {describe(group, position)} with placements "
                f"{shard.placements}; nothing was changed. Redistribute the parameter, or put it in a group without "
                "blocks."
            )
        if group["spectral"] and sides_of(oriented(shard, group["transposed"], group["flatten"])).columns:
            raise ValueError(
                f"SinkGD: spectral={group['spectral']!r} takes matrices with unsharded columns, got "
                f"{describe(group, position)} with placements {shard.placements}; nothing was changed. Put the "
                "parameter in a group with spectral=None, or shard its rows alone."
            )

    def _group_steps(
        self, group: dict[str, Any], first_index: int, only: Sequence[int] | None = None
    ) -> list[Reducer[None]]:
        batches = self._batches(group, first_index, only, lambda param: _rule_of(group, param), _is_adamw)
        return [
            step_adamw(batch, int8=name.startswith("adamw int8"))
            if _is_adamw(name)
            else step_matrices(batch, balanced=name.startswith("balanced"), wide=name.endswith("wide"))
            for name, batch in batches
        ]

    def _gradient_average(self, group: dict[str, Any], param: Tensor) -> GradientAverage | str:
        algorithm = algorithm_of(group, param)
        if algorithm == "adamw":
            return "has the square of the gradient (algorithm='adamw')"
        if not group["momentum"]:
            return "has no momentum (momentum=0)"
        if algorithm == "balanced" or group["nesterov"]:
            return "uses the gradient beside the momentum (Nesterov)"
        if group["momentum_order"] == "post":
            return "normalizes the gradient before the momentum (momentum_order='post')"
        if coded(ENTRIES, group, param):
            return "would round its momentum of 8 bits in every pass"
        return GradientAverage("momentum_buffer", group["momentum"])


def _rule_of(group: dict[str, Any], param: Tensor) -> str:
    """Return the algorithm, with " int8" for AdamW's moments and " wide" for momenta that kernels do not decode."""
    algorithm = algorithm_of(group, param)
    if not coded(ENTRIES, group, param):
        return algorithm
    cut = cuts_rows(shard_of(param))
    if algorithm == "adamw":
        return "adamw int8 columns" if cut else "adamw int8"
    return f"{algorithm} wide" if cut or group["blocks"] is not None else algorithm


def _is_adamw(rule: str) -> bool:
    return rule.startswith("adamw")
