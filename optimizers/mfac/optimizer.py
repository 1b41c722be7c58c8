"""M-FAC: the update is the gradient times the inverse of an empirical Fisher matrix of the last m gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels.steps.common import compute_dtype
from leanstep.optimizers.common.base import LeanOptimizer
from leanstep.optimizers.common.checks import check_rounding
from leanstep.optimizers.common.loading import refuse_foreign
from leanstep.optimizers.common.rounding import effective, init_rounding
from leanstep.optimizers.common.sharding import Steps, new_state
from leanstep.optimizers.mfac import rule
from leanstep.optimizers.mfac.direction import STATS
from leanstep.optimizers.mfac.memory import check_memory
from leanstep.optimizers.mfac.scopes import (
    Member,
    Scope,
    init_scope_state,
    init_window,
    scope_key,
    shared_settings,
    step_scopes,
)
from leanstep.optimizers.mfac.settings import check_loaded, check_masks, check_settings, upgraded
from leanstep.optimizers.mfac.window import columns_of


class MFAC(LeanOptimizer):
    r"""M-FAC (matrix-free approximate curvature): natural-gradient steps from a window of gradients.

    G holds the last ``window`` gradients of a scope as rows, n of them so far. With s = ``window`` (or n, see
    ``scaling``) and the newest gradient g::

        F = damping * I + G^T G / s
        c = (damping * I + G G^T / s)^-1 e_newest
        u = F^-1 g = G^T c
        v = momentum * v + (1 - momentum) * u
        p = p * (1 - lr * weight_decay) - lr * v

    F is never formed. G G^T (n x n, fp64) gets one new row a step, and the small system is solved by Cholesky. A step
    reads the window twice. As ``damping`` grows, the step tends to SGD's with lr / damping. The formulas as functions:
    :mod:`leanstep.optimizers.mfac.rule`.

    Args:
        params: parameters, named parameters, or groups.
        lr: step size, a number or a one-element tensor.
        window: m, the number of gradients in the window; it takes m values per parameter.
        damping: > 0, in units of a squared gradient. 1e-4 to 1e-7 are usual; tune it together with lr.
        scaling: s. "window": m from the first step, as published; effective steps shrink while the window fills.
            "count": n.
        scope: which gradients share a window: "model" (those of all groups), "group" (one window a group), "layer"
            (the parameters of a module, by their names; single parameters without names), or an int (blocks of that
            many consecutive elements inside every parameter). Each window has a Gram matrix of 8 m^2 bytes and a
            system of size m.
        storage: dtype of rows: "fp32", "bf16", "fp16" (with one fp32 scale a row) or "fp64". None: fp32 (fp64 for fp64
            parameters), bf16 with compression "topk". G G^T, g and the combination all use the rows as stored.
        compression: None; "topk" (S-MFAC): store the ``density`` share of largest entries of every row of a matrix, as
            16-bit indices and bf16 values, and add the rest to the next gradient; "lowrank": store matrices as
            products of rank ``rank``, with the same error feedback. Vectors are stored whole.
        density: of "topk". At 1 the window is the dense one, bit for bit with the same storage.
        rank: of "lowrank".
        momentum: weight of the old average of updates; 0 keeps no buffer.
        weight_decay: see ``decay``.
        decay: "decoupled": ``p *= 1 - lr * weight_decay``, outside the window. "coupled": ``weight_decay * p`` is added
            to the gradient and so enters the window, as in the published code.
        damping_schedule: None; (curve, steps, last): from ``damping`` to ``last`` in so many steps, with a curve of
            "linear", "quadratic", "circular", "sigmoid" or "exponential"; or ("lr", rate): damping * lr / rate, which
            keeps lr / damping constant.
        max_update_norm: trust region: a longer u is shortened to this L2 norm over its scope, before momentum and lr.
        sparse: weights that are exactly zero now (at construction, or when their group is added) stay out of the window
            and are never changed.
        masks: a group's bool tensors, one per parameter, True where a weight takes part. None: all do. Combined with
            ``sparse``. Weights that leanstep.sparsity masks are not zero for the optimizer, which has the dense ones:
            pass ``controller.masks_of(params)``.
        shard_window: for replicated parameters (DistributedDataParallel): each process stores the columns of its part
            of dimension 0 of every parameter, and updates are gathered. Parameters sharded by FSDP2 need no switch.
        rounding, seed, maximize: as for :class:`leanstep.optimizers.Lion`.
        foreach: None or True: updates are written in one call for a device and dtype; False: one tensor at a time.
        nonfinite: what to do with a scope that has a non-finite gradient (or one whose squared norm is beyond fp64).
            "skip": leave its weights and window unchanged, and count its tensors. "raise": raise before anything is
            changed. "pass": leave the window unchanged and move the weights by lr * g. No such gradient enters a
            window.

    Raises:
        ValueError, TypeError: settings out of range, or different in groups of one scope; a window for which the device
            has no room (with the numbers, and what smaller forms take).
        ValueError: from ``load_state_dict``, for a state saved with another window or form, or with parameters of other
            names or shapes; nothing is changed.
        RuntimeError: a sparse gradient.
        NonFiniteGradientError: see ``nonfinite``.

    Notes:
        State of every parameter: ``window`` [m, ...] (4 m bytes a value in fp32); with "topk" ``window_values``,
        ``window_indices`` [m, rows, k] and ``error`` (about 4 * density * m + 4 bytes a value); with "lowrank"
        ``window_left``, ``window_right``, ``basis`` and ``error``; ``momentum_buffer`` (fp32) with momentum; ``mask``
        with masks. The first parameter of a scope also holds ``gram`` [blocks, m, m] in fp64, ``counters`` (steps,
        rows) on the host, ``stats``, and ``window_scale`` for fp16. All of it is saved: a resumed run continues bit for
        bit.

        A parameter without a gradient has a row of zeros at that step and is not moved; a scope without any gradient
        takes no step. Parameters added later (``add_param_group``) join their scope with rows of zeros, as if their
        gradients had been zero so far.

        Dots and combinations of rows are summed in fp64, so that gradients that change slowly (large batches, small
        data) are told apart. A system that Cholesky does not solve accurately is solved again with 1e-12 of the mean
        diagonal added, then ten times as much up to 5 times, then by eigenvalues; :meth:`diagnostics` counts both.

        A step waits for the device once, to learn whether the gradient was finite (on a GPU once more, for the
        factorization).

        FSDP2: the window is cut as its parameter is, over columns. A step sends one all-reduce of n + 1 numbers and a
        flag per tensor for all scopes (fp16: one more of the rows' largest entries). "topk" needs parameters cut along
        dimension 0, "lowrank" whole ones.

    References:
        Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
        arXiv 2107.03356; code: github.com/IST-DASLab/M-FAC. Modoranu, Kalinov, Kurtic, Frantar, Alistarh, "Error
        Feedback Can Accurately Compress Preconditioners", arXiv 2306.06098 (S-MFAC and the low-rank form; damping
        schedules).

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = MFAC(model.parameters(), lr=1e-2, window=8, damping=1e-3)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    _shaped_state = ("momentum_buffer",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        window: int = 1024,
        damping: float = 1e-5,
        *,
        scaling: str = "window",
        scope: str | int = "model",
        storage: str | None = None,
        compression: str | None = None,
        density: float = 0.01,
        rank: int = 4,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decay: str = "decoupled",
        damping_schedule: Sequence[Any] | None = None,
        max_update_norm: float | None = None,
        sparse: bool = False,
        masks: Sequence[Tensor | None] | None = None,
        shard_window: bool = False,
        rounding: str = "nearest",
        seed: int = 0,
        nonfinite: str = "skip",
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        if masks is not None:
            raise ValueError("MFAC: masks belong to a group: MFAC([{'params': [...], 'masks': [...]}])")
        defaults = {
            "lr": lr,
            "window": window,
            "damping": damping,
            "scaling": scaling,
            "scope": scope,
            "storage": storage,
            "compression": compression,
            "density": density,
            "rank": rank,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "decay": decay,
            "damping_schedule": None if damping_schedule is None else list(damping_schedule),
            "max_update_norm": max_update_norm,
            "sparse": sparse,
            "masks": None,
            "shard_window": shard_window,
            "rounding": rounding,
            "seed": seed,
            "nonfinite": nonfinite,
            "maximize": maximize,
            "foreach": foreach,
        }
        self._check_group(defaults)
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_settings(group)
        check_rounding("MFAC", group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters join the scopes they belong to, with rows of zeros. See the class.

        Raises:
            ValueError: as the constructor does; the group is not added then.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_masks(group)
            together = [g for g in self.param_groups if g["scope"] == group["scope"] != "group"]
            if not isinstance(group["scope"], int):
                shared_settings(together or [group])
            if group["sparse"]:
                masks = group["masks"] or [None] * len(group["params"])
                group["masks"] = [_nonzero(p, mask) for p, mask in zip(group["params"], masks, strict=True)]
            check_memory(self.param_groups, self._states())
        except ValueError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state with its windows, also one that an older version saved; see the class for what is refused."""
        refuse_foreign(self, state_dict)
        state_dict = upgraded(state_dict)
        check_loaded(self.param_groups, state_dict)
        super().load_state_dict(state_dict)

    def _stays_on_cpu(self, key: str) -> bool:
        return key == "counters"

    def diagnostics(self) -> dict[str, float]:
        """Stats of the last step, over all scopes (reads the device).

        Returns:
            ``window_rows``: rows in use (of the fullest scope); ``damping``; ``update_norm``: L2 norm of all u, before
            momentum and lr; ``decrease``: g . u; ``jittered``, ``eigen``: factorizations so far that needed a larger
            diagonal, or eigenvalues; ``clipped``: updates so far that ``max_update_norm`` shortened; ``nonfinite``:
            gradients refused so far.
        """
        states = [state for state in self._states() if "gram" in state]
        totals = torch.zeros(len(STATS), dtype=torch.float64)
        for state in states:
            stats = state["stats"].cpu()
            total = stats.sum(dim=0)
            total[STATS.index("norm")] = stats[:, STATS.index("norm")].square().sum()
            totals += total
        values = dict(zip(STATS, totals.tolist(), strict=True))
        steps, rows = max((tuple(state["counters"].tolist()) for state in states), default=(0, 0))
        group = self.param_groups[0]
        return {
            "window_rows": float(min(rows, group["window"])),
            "damping": rule.damping_at(group["damping"], group["damping_schedule"], max(steps - 1, 0), group["lr"]),
            "update_norm": values["norm"] ** 0.5,
            "decrease": values["decrease"],
            "jittered": values["jittered"],
            "eigen": values["eigen"],
            "clipped": values["clipped"],
            "nonfinite": float(self.nonfinite_count()),
        }

    def _states(self) -> list[dict[str, Any]]:
        """The states of the parameters; hooks may have left other things beside them."""
        return [self.state[p] for group in self.param_groups for p in group["params"] if p in self.state]

    def _init_state(self, group: dict[str, Any], position: int, param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        init_window(state, param, group)
        if group["momentum"] and "momentum_buffer" not in state:
            state["momentum_buffer"] = new_state(param, compute_dtype(param.dtype))
        masks = group["masks"]
        if masks is not None and masks[position] is not None:
            state["mask"] = masks[position]
            masks[position] = None  # the state has it
        init_rounding(state, param, effective("MFAC", group, position, param))
        return state

    def _init_group(self) -> None:
        super()._init_group()
        self._scopes(self._gradients())

    def _gradients(self) -> dict[Tensor, Tensor]:
        """The gradients of the parameters that have one. Refuses sparse ones."""
        return {param: grad for group in self.param_groups for _, param, grad in self._with_gradient(group)}

    def _scopes(self, gradients: dict[Tensor, Tensor]) -> list[Scope]:
        """The scopes that have a gradient, with all members that have state; missing state is created."""
        scopes: dict[Any, list[Member]] = {}
        index = 0
        for number, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                grad = gradients.get(param)
                if param in self.state or grad is not None:
                    state = self._init_state(group, position, param)
                    columns = columns_of(param, spread=group["shard_window"])
                    member = Member(group, position, index, param, grad, state, columns)
                    if param.numel():  # an empty parameter teaches nothing, and would take steps of its own
                        scopes.setdefault(scope_key(group, number, position, index), []).append(member)
                index += 1
        return [self._scope(members) for members in scopes.values() if any(m.grad is not None for m in members)]

    def _scope(self, members: list[Member]) -> Scope:
        settings = shared_settings([m.group for m in members])
        scope_state = next((m.state for m in members if "gram" in m.state), None)
        if scope_state is None:
            scope_state = members[0].state
            init_scope_state(scope_state, members[0].param, settings)
        return Scope(members, settings, scope_state)

    def _steps(self) -> list[Steps[None]]:
        scopes = self._scopes(self._gradients())
        return [step_scopes(scopes)] if scopes else []


def _nonzero(param: Tensor, mask: Tensor | None) -> Tensor:
    nonzero = param.detach() != 0
    return nonzero if mask is None else nonzero & mask
