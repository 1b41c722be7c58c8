"""M-FAC: the update is the gradient times the inverse of an empirical Fisher matrix of the last m gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels.steps.common import compute_dtype
from leanstep.optimizers.common.base import LeanOptimizer
from leanstep.optimizers.common.checks import check_rounding
from leanstep.optimizers.common.rounding import effective, init_rounding
from leanstep.optimizers.common.sharding import Steps, new_state
from leanstep.optimizers.mfac import apply as _mfac_apply
from leanstep.optimizers.mfac.columns import columns_of
from leanstep.optimizers.mfac.damping import damping_at
from leanstep.optimizers.mfac.memory import check_memory, state_bytes_of
from leanstep.optimizers.mfac.scopes import FIGURES, Member, Scope, init_home, init_window, scope_key, shared_settings
from leanstep.optimizers.mfac.settings import check_loaded, check_masks, check_settings


class MFAC(LeanOptimizer):
    r"""M-FAC (matrix-free approximate curvature): natural-gradient steps from a window of gradients.

    G holds the last ``window`` gradients of a scope as rows, n of them so far. With s = ``window`` (or n, see
    ``scaling``) and the newest gradient g::

        F = damping * I + G^T G / s
        u = F^-1 g = G^T c,    c = (damping * I + G G^T / s)^-1 e_newest
        v = momentum * v + (1 - momentum) * u
        p = p * (1 - lr * weight_decay) - lr * v

    F is never formed: G G^T (n x n, fp64) is kept up to date, one row a step, and the small system is solved by
    Cholesky. A step reads the window twice. As ``damping`` grows, the step tends to SGD's with lr / damping.

    Args:
        params: parameters, named parameters, or groups.
        lr: step size, a number or a one-element tensor.
        window: m, the number of gradients kept; memory is m values per parameter.
        damping: lambda > 0, in units of a squared gradient. 1e-4 to 1e-7 are usual; tune it together with lr.
        scaling: s: "window" (m from the first step, as published: effective steps shrink while the window fills) or
            "count" (n).
        scope: whose gradients make one window: "model" (all groups' parameters), "group" (one a group), "layer" (the
            parameters of a module, by their names; single parameters without names), or an int (blocks of that many
            consecutive elements inside every parameter). Costs m^2 * 8 bytes and a system of m each.
        storage: of rows: "fp32", "bf16", "fp16" (with one fp32 scale a row) or "fp64". None: fp32 (fp64 for fp64
            parameters), bf16 with compression "topk". G G^T, g and the combination all use the rows as stored.
        compression: None; "topk": keep the ``density`` share of largest entries of every row of a matrix, as 16-bit
            places and bf16 values, and feed the rest back into the next gradient (S-MFAC); "lowrank": keep matrices as
            products of rank ``rank``, with error feedback. Vectors are kept whole.
        density: of "topk". At 1 the window is the dense one, bit for bit with the same storage.
        rank: of "lowrank".
        momentum: weight of the old average; 0 keeps none.
        momentum_on: "update": average u, as published; "gradient": u = F^-1 of the average of the window's gradients,
            weighted (1 - momentum) * momentum**age (no state; gradients that have left the window have left it).
        weight_decay: see ``decay``.
        decay: "decoupled": ``p *= 1 - lr * weight_decay``, out of the window; "coupled": ``weight_decay * p`` is added
            to the gradient and so enters the window, as in the published code.
        damping_schedule: None; (curve, steps, last) from ``damping`` to ``last``, with a curve "linear", "quadratic",
            "circular", "sigmoid" or "exponential"; or ("lr", rate): damping * lr / rate, which keeps lr / damping.
        warmup_steps: while the window holds fewer rows, u = g: plain SGD with lr.
        max_update_norm: trust region: u is shortened to this L2 norm over its scope (before momentum and lr).
        precondition: what F^-1 is applied to: "row" (g as stored) or "gradient" (g as it came, by Woodbury's identity;
            one more read of the window, and the subtraction there loses |g|^2 / (s * damping) times the precision).
        precondition_every: solve at every k-th step; between, u = g * (g.u / g.g) of the last solution.
        window_every: every k-th gradient enters the window; the others are preconditioned as with "gradient".
        sparse: weights that are exactly zero now (at construction, or when their group is added) stay out of the window
            and are never changed.
        masks: of a group: bool tensors, True where a weight takes part, for every parameter; None: all. What ``sparse``
            finds is combined with it. Weights that leanstep.sparsity masks are not zero in the optimizer's eyes, which
            has the dense ones: give ``controller.masks_of(params)``.
        shard_window: with replicated parameters (DistributedDataParallel): each process keeps the columns of its part
            of dimension 0 of every parameter; updates are gathered. Parameters sharded by FSDP2 need no switch.
        rounding, seed, maximize, foreach: as for :class:`leanstep.optimizers.Lion`.
        nonfinite: "skip": a scope with a non-finite gradient (or one whose squared norm is beyond fp32) is left alone,
            with its window, and the tensors are counted; "raise": before anything is changed; "pass": the window is
            left alone, and the weights move by lr * g. No non-finite gradient enters a window.

    Raises:
        ValueError, TypeError: settings out of range, or different in groups of one scope; a window for which the device
            has no room (with the numbers, and what smaller forms take).
        ValueError: from ``load_state_dict``, for a state saved with another window or form, or with parameters of other
            names or shapes in their places; nothing is changed.
        RuntimeError: a sparse gradient.
        NonFiniteGradientError: see ``nonfinite``.

    Notes:
        State: of every parameter ``window`` [m, ...] (4 bytes * m a value in fp32); with "topk" ``window_values``,
        ``window_indices`` [m, rows, k] and ``error`` (about 4 * density * m + 4 bytes a value); with "lowrank"
        ``window_left``, ``window_right``, ``basis``, ``error``; ``momentum_buffer`` (fp32) and ``mask`` where asked
        for. The first parameter of a scope holds ``gram`` [blocks, m, m] in fp64, ``counts`` (steps, rows) on the host,
        ``figures``, and ``window_scale`` for fp16. All of it is saved: a resumed run goes on bit for bit.
        A parameter without a gradient has a row of zeros at that step and is not moved; a scope without any gradient
        takes no step. Parameters added later (``add_param_group``) join the scope they belong to with rows of zeros, as
        if their gradients had been zero so far.
        A failed factorization is repeated with 1e-12 of the mean diagonal added, then ten times as much up to 5 times,
        then solved by eigenvalues; :meth:`diagnostics` counts both.
        A step waits for the device once, to know whether the gradient was finite (and once more on a GPU for the
        factorization).
        FSDP2: the window is cut as its parameter is, over columns; a step sends one all-reduce of n + 1 numbers and a
        flag per tensor for all scopes (fp16: one more of the rows' largest entries; ``precondition="gradient"``: one
        more). "topk" needs parameters cut along dimension 0, "lowrank" whole ones.

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
        momentum_on: str = "update",
        weight_decay: float = 0.0,
        decay: str = "decoupled",
        damping_schedule: Sequence[Any] | None = None,
        warmup_steps: int = 0,
        max_update_norm: float | None = None,
        precondition: str = "row",
        precondition_every: int = 1,
        window_every: int = 1,
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
            "momentum_on": momentum_on,
            "weight_decay": weight_decay,
            "decay": decay,
            "damping_schedule": None if damping_schedule is None else list(damping_schedule),
            "warmup_steps": warmup_steps,
            "max_update_norm": max_update_norm,
            "precondition": precondition,
            "precondition_every": precondition_every,
            "window_every": window_every,
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
                given = group["masks"] or [None] * len(group["params"])
                group["masks"] = [_nonzero(p, mask) for p, mask in zip(group["params"], given, strict=True)]
            check_memory(self.param_groups, state_bytes_of(self._states()))
        except ValueError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state with its windows; see the class for what is refused."""
        self._refuse_foreign(state_dict)
        check_loaded(self.param_groups, state_dict)
        super().load_state_dict(state_dict)
        for state in self._states():
            if "counts" in state:  # torch puts all state beside the parameter
                state["counts"] = state["counts"].cpu()

    def diagnostics(self) -> dict[str, float]:
        """Figures of the last step, over all scopes (reads the device).

        Returns:
            ``window_rows``: rows in use (of the fullest scope); ``damping``; ``update_norm``: L2 norm of all u, before
            momentum and lr; ``decrease``: g . u; ``jittered``, ``eigen``: factorizations so far that needed a larger
            diagonal, or eigenvalues; ``clipped``: updates so far that ``max_update_norm`` shortened; ``nonfinite``:
            gradients refused so far.
        """
        homes = [state for state in self._states() if "gram" in state]
        figures = torch.zeros(len(FIGURES), dtype=torch.float64)
        for home in homes:
            kept = home["figures"].cpu()
            total = kept.sum(dim=0)
            total[FIGURES.index("norm")] = kept[:, FIGURES.index("norm")].square().sum()
            figures += total
        values = dict(zip(FIGURES, figures.tolist(), strict=True))
        counts = max((tuple(home["counts"].tolist()) for home in homes), default=(0, 0))
        group = self.param_groups[0]
        return {
            "window_rows": float(min(counts[1], group["window"])),
            "damping": damping_at(group, max(counts[0] - 1, 0), group["lr"]),
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
        if group["momentum"] and group["momentum_on"] == "update" and "momentum_buffer" not in state:
            state["momentum_buffer"] = new_state(param, compute_dtype(param.dtype))
        masks = group["masks"]
        if masks is not None and masks[position] is not None:
            state["mask"] = masks[position]
            masks[position] = None  # kept once
        init_rounding(state, param, effective("MFAC", group, position, param))
        return state

    def _init_group(self) -> None:
        super()._init_group()
        self._scopes(self._gradients())

    def _gradients(self) -> dict[Tensor, Tensor]:
        """The gradients of the parameters that have one. Refuses sparse ones."""
        return {param: grad for group in self.param_groups for _, param, grad in self._with_gradient(group)}

    def _scopes(self, gradients: dict[Tensor, Tensor]) -> list[Scope]:
        """The scopes that have a gradient, with all members that have state; what they keep is created."""
        members: dict[Any, list[Member]] = {}
        index = 0
        for number, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                grad = gradients.get(param)
                if param in self.state or grad is not None:
                    state = self._init_state(group, position, param)
                    columns = columns_of(param, spread=group["shard_window"])
                    member = Member(group, position, index, param, grad, state, columns)
                    if param.numel():  # nothing can be learnt of what is empty, and it would take steps of its own
                        members.setdefault(scope_key(group, number, position, index), []).append(member)
                index += 1
        scopes = []
        for found in members.values():
            if all(m.grad is None for m in found):
                continue
            settings = shared_settings([m.group for m in found])
            home = next((m.state for m in found if "gram" in m.state), None)
            if home is None:
                home = found[0].state
                init_home(home, found[0].param, settings)
            scopes.append(Scope(found, settings, home))
        return scopes

    def _steps(self) -> list[Steps[None]]:
        scopes = self._scopes(self._gradients())
        return [_mfac_apply.step(scopes)] if scopes else []


def _nonzero(param: Tensor, mask: Tensor | None) -> Tensor:
    found = param.detach() != 0
    return found if mask is None else found & mask
