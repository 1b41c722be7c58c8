"""M-FAC: the update is the gradient times the inverse of an empirical Fisher matrix of the last m gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanstep.optimizers.common.base import LeanOptimizer
from leanstep.optimizers.common.checks import describe, settings_of
from leanstep.optimizers.common.groups import in_pipeline, inside_zero, partial_model
from leanstep.optimizers.common.loading import Loaded
from leanstep.optimizers.common.sharding import Reducer, Shard, first_index, shard_of
from leanstep.optimizers.common.state import update_state
from leanstep.optimizers.mfac import saved
from leanstep.optimizers.mfac.compressed import SparseRows, lead_of
from leanstep.optimizers.mfac.direction import STATS
from leanstep.optimizers.mfac.memory import check_memory
from leanstep.optimizers.mfac.scopes import Scope, ScopeParam, move_scope_state, scope_key, shared_settings, step_scopes
from leanstep.optimizers.mfac.settings import check_masks, check_settings
from leanstep.optimizers.mfac.state import ENTRIES, SCOPE, has_window
from leanstep.optimizers.mfac.window import columns_of, mask_like


class MFAC(LeanOptimizer):
    r"""M-FAC (matrix-free approximate curvature): natural-gradient steps from a window of gradients.

    Start with ``lr`` 1e-3 and tune it with ``damping``, in factors of ten. No rate of AdamW's carries over. With a
    damping of 1e-4 and a window of 256, searches with S-MFAC on the three language models of docs/measured/losses.md
    chose 7.5e-4 to 1.2e-2 for hidden matrices, and 3e-3 to 1.2e-2 for the rest. It ended far behind AdamW, tuned too.

    The rows of G are the last n gradients of a scope of d weights, n <= ``window``. With s = ``window`` (or n, see
    ``scaling``) and the newest gradient g::

        a = damping + shrinkage * tr(G G^T) / (n^2 d)
        F = a * I + G^T G / s
        c = (a * I + G G^T / s)^-1 e_newest
        u = F^-1 g = G^T c
        v = momentum * v + (1 - momentum) * u
        p = p * (1 - lr * weight_decay) - lr * v

    F is never formed. A step adds one row to G G^T (n x n, fp64), solves the small system by Cholesky, and reads the
    window twice. For large ``damping`` the step tends to SGD's with lr / damping. :mod:`leanstep.optimizers.mfac.rule`
    has a function for each formula.

    Args:
        params: parameters, named parameters, or groups.
        lr: step size, a number or a one-element tensor.
        window: m, the number of gradients in the window, which takes m values per weight.
        damping: > 0, in units of a squared gradient, usually 1e-7 to 1e-4. Tune it together with lr.
        scaling: "window": s = m from the first step, as published; effective steps shrink while the window fills.
            "count": s = n.
        shrinkage: >= 0. In a direction that no row has, F is only the damping, and the step is lr / damping times the
            gradient: on small problems it diverges. The mean eigenvalue of G^T G / n, divided by n, is therefore added
            to the damping, ``shrinkage`` times. It fades as the window fills, and is negligible beside the damping for
            millions of weights. 0: as published.
        scope: which gradients share a window. "model": all. "group": one window per group. "layer": one per module,
            by the parameters' names, or one per parameter without names. An int: one per block of that many
            consecutive elements of a parameter. A window has a Gram matrix of 8 m^2 bytes and a system of size m.
        storage: dtype of rows: "fp32", "bf16" or "fp64". None: bf16 with "topk", else fp64 for fp64 parameters and fp32
            for others. G G^T, g and u all use the stored rows.
        compression: None: dense rows. "topk" (S-MFAC): store only the largest entries of every row of a matrix, with
            16-bit indices, and add the compression error to the next gradient. Vectors are stored uncompressed.
        density: fraction of entries that "topk" stores. 1 is bit-identical to dense rows of the same storage.
        momentum: weight of the old v; 0: no buffer.
        weight_decay: see ``decay``.
        decay: "decoupled": ``p *= 1 - lr * weight_decay``, outside the window. "coupled": add ``weight_decay * p`` to
            the gradient before it enters the window, as in the published code.
        sparse: exclude weights that are exactly zero when their group is added. They stay out of the window, do not
            count in d, and never change.
        rounding, seed, maximize: as for :class:`leanstep.optimizers.Lion`.
        foreach: None or True: write updates with one call per device and dtype. False: one call per tensor.
        nonfinite: how to treat a scope with a non-finite gradient, or one whose squared norm overflows fp64. "skip":
            leave weights and window unchanged, and count its tensors. "raise": raise before any update. "pass": leave
            the window unchanged, and step with u = g.

    Raises:
        ValueError, TypeError: a setting is out of range, or differs between groups of one scope; the device lacks the
            memory for the window (the message has the sizes, and those of smaller settings).
        ValueError: from ``load_state_dict``: the state has another window, compression or storage, or parameters of
            other names or shapes. Nothing is changed.
        RuntimeError: a gradient is sparse.
        NonFiniteGradientError: a gradient is not finite, with nonfinite="raise".

    Notes:
        State per parameter: ``window`` [m, ...] (4 m bytes per weight in fp32). "topk": ``window_values``,
        ``window_indices`` [m, rows, k] and ``error`` (about 4 * density * m + 4 bytes per weight). Options add
        ``momentum_buffer`` (fp32) and ``mask``.
        The state of a scope's first trained parameter also has ``gram`` [blocks, m, m] in fp64, ``counters`` (steps,
        rows) on the CPU, and ``stats``. A resumed run continues bit-identically.

        A parameter without a gradient gets a row of zeros and does not move. A scope without any gradient takes no
        step. Parameters added later (``add_param_group``) join their scope with rows of zeros.

        Dots and combinations of rows are summed in fp64, which tells slowly changing gradients (large batches, small
        data) apart. If Cholesky is inaccurate, it is repeated with 1e-12 of the mean diagonal added, then with ten
        times as much up to 5 times; then the system is solved by eigenvalues. :meth:`diagnostics` counts both.

        A step waits for the device once, to check that the gradient is finite; on a GPU once more, to factorize.

        Sharded parameters have windows with the same shards. A step needs one all-reduce per mesh dimension, of n + 1
        numbers per Gram matrix (n + 2 with ``sparse``) and a flag per tensor, for all scopes. "topk" needs unsharded
        rows, a scope of blocks shards along dimension 0.

    References:
        Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
        arXiv 2107.03356; code: github.com/IST-DASLab/M-FAC. Modoranu, Kalinov, Kurtic, Frantar, Alistarh, "Error
        Feedback Can Accurately Compress Preconditioners", arXiv 2306.06098 (S-MFAC).

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = MFAC(model.parameters(), lr=1e-2, window=8, damping=1e-3)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    _state_entries = ENTRIES
    _drop_state = "optimizer.state.clear(), because parameters share a window"
    _group_entries = {"masks": None}  # of sparse groups: a bool tensor for every parameter
    _older_names = {"figures": "stats", "counts": "counters"}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        window: int = 1024,
        damping: float = 1e-5,
        *,
        scaling: str = "window",
        shrinkage: float = 1.0,
        scope: str | int = "model",
        storage: str | None = None,
        compression: str | None = None,
        density: float = 0.01,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decay: str = "decoupled",
        sparse: bool = False,
        rounding: str = "nearest",
        seed: int = 0,
        nonfinite: str = "skip",
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(params, settings_of(locals()))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_settings(group)

    def _check_params(self, group: dict[str, Any], given: dict[str, Any]) -> None:
        super()._check_params(group, given)
        self._check_scope(self.param_groups, group)
        if group["scope"] in ("model", "group") and inside_zero():
            advice = "Take scope='layer' or an int"
            raise partial_model("MFAC", f"scope={group['scope']!r}", "ZeroRedundancyOptimizer", advice)
        if group["sparse"]:
            group["masks"] = [p.detach() != 0 for p in group["params"]]
        check_memory(self.param_groups, self._states())

    def _takes_flattened(self, group: dict[str, Any]) -> bool:
        return False

    def _check_first_step(self, group: dict[str, Any], position: int) -> None:
        super()._check_first_step(group, position)
        if group["scope"] == "model" and not self.state and in_pipeline(self.param_groups):
            advice = "Take scope='group' (one window per group and stage), 'layer' or an int"
            raise partial_model("MFAC", "scope='model'", "a pipeline", advice)

    def _check_fit(self, groups: list[dict[str, Any]], group: dict[str, Any]) -> None:
        super()._check_params(group, {})
        self._check_scope(groups, group)

    def _check_shard(self, group: dict[str, Any], position: int, shard: Shard) -> None:
        super()._check_shard(group, position, shard)
        cuts_rows = any(cut.dim >= len(lead_of(shard.shape)) for cut in shard.cuts)
        if cuts_rows and SparseRows.accepts(group["params"][position], group):
            needs = "compression='topk' stores the largest of every row, and takes parameters with unsharded rows"
        elif isinstance(group["scope"], int) and first_index(shard) is None:
            needs = f"scope={group['scope']} takes parameters whose shards are ranges of elements"
        else:
            return
        raise ValueError(
            f"MFAC: {needs}, got {describe(group, position)} with placements {shard.placements}; nothing was changed. "
            "Shard it along its first dimension alone (fully_shard does), or use scope='layer' and compression=None."
        )

    @staticmethod
    def _check_scope(groups: list[dict[str, Any]], group: dict[str, Any]) -> None:
        check_masks(group)
        if not isinstance(group["scope"], int):
            shared_settings([g for g in groups if g["scope"] == group["scope"] != "group"] or [group])

    def _check_loaded_groups(self, groups: list[dict[str, Any]]) -> None:
        saved.check_loaded(self.param_groups, groups)

    def _in_memory(self, states: dict[Any, Any], groups: list[dict[str, Any]]) -> dict[Any, Any]:
        saved.in_wide_storage(states, groups)
        return states

    def _check_loaded_states(self, groups: list[dict[str, Any]], entries: list[Loaded]) -> None:
        saved.check_loaded_states(groups, entries)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict; masks are in the states, and in ``masks`` of groups only before the first step.

        All tensors are on their parameter's device: ``torch.distributed.checkpoint`` loads no state on two devices.
        """
        packed = super().state_dict()
        for key, state in packed["state"].items():
            if isinstance(state, dict) and "gram" in state:  # hooks may add other values
                packed["state"][key] = {**state, "counters": state["counters"].to(state["gram"].device)}
        for group in packed["param_groups"]:
            if group.get("masks") is not None:
                stored = ["mask" in packed["state"].get(key, {}) for key in group["params"]]
                group["masks"] = [None if s else mask for s, mask in zip(stored, group["masks"], strict=True)]
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as the other optimizers do; see there.

        Groups have the loaded masks, too, so that excluded weights stay excluded when ``optimizer.state`` is cleared.

        Raises:
            ValueError: the state does not fit; see the class. Nothing is changed.
        """
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            masks = group["masks"] or [None] * len(group["params"])
            states = [self.state.get(param, {}) for param in group["params"]]
            masks = [state.get("mask", mask) for state, mask in zip(states, masks, strict=True)]
            group["masks"] = masks if any(mask is not None for mask in masks) else None
        self._note_settings()

    def diagnostics(self) -> dict[str, float]:
        """Return statistics over all scopes (reads the device).

        Returns:
            Of the last step: ``window_rows``, n (of the fullest scope); ``damping``, without the shrinkage;
            ``update_norm``, the L2 norm of all u before momentum and lr; ``decrease``, g . u. Counts of all steps:
            ``jittered`` and ``eigen``, systems that needed a larger diagonal or eigenvalues; ``nonfinite``, see
            :meth:`nonfinite_count`.
        """
        states = [state for state in self._states() if "gram" in state]
        totals = torch.zeros(len(STATS), dtype=torch.float64, device="cpu")
        for state in states:
            stats = state["stats"].cpu().clone()
            stats[:, STATS.index("norm")].square_()
            totals += stats.sum(dim=0)
        values = dict(zip(STATS, totals.tolist(), strict=True))
        rows = max((int(state["counters"][1]) for state in states), default=0)
        group = self.param_groups[0]
        return {
            "window_rows": float(min(rows, group["window"])),
            "damping": group["damping"],
            "update_norm": values["norm"] ** 0.5,
            **{name: values[name] for name in ("decrease", "jittered", "eigen")},
            "nonfinite": float(self.nonfinite_count()),
        }

    def _states(self) -> list[dict[str, Any]]:
        """Return the states of the parameters, without other values that hooks may add."""
        return [self.state[p] for group in self.param_groups for p in group["params"] if p in self.state]

    def _update_state(self, state: dict[str, Any], group: dict[str, Any], position: int, param: Tensor) -> None:
        formed = group
        if has_window(state):  # whose format stays when ``compression`` was changed
            formed = {**group, "compression": "topk" if SparseRows.key in state else None}
        super()._update_state(state, formed, position, param)
        mask = None if group["masks"] is None else group["masks"][position]
        if mask is not None and state.get("mask") is not mask:
            check_masks(group)
            state["mask"] = placed = mask_like(mask, param)
            if placed is not mask:
                group["masks"] = [placed if i == position else other for i, other in enumerate(group["masks"])]

    def _init_group(self) -> None:
        super()._init_group()
        self._scopes()

    def _state_of(
        self, group: dict[str, Any], position: int, param: Tensor, *, checked: bool = False
    ) -> dict[str, Any]:
        if param in self.state and not has_window(self.state[param]):  # it holds the state of its scope alone
            self._check_first_step(group, position)
        return super()._state_of(group, position, param, checked=checked)

    def _scopes(self) -> list[Scope]:
        scopes: dict[Any, list[ScopeParam]] = {}
        members: dict[Any, list[Tensor]] = {}
        index = 0
        for group_index, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                entry, key = None, scope_key(group, group_index, position, index)
                if param.numel():  # a scope of empty parameters would count steps
                    members.setdefault(key, []).append(param)
                if param.grad is not None:
                    if group["masks"] is not None:  # no setting: nothing tells that they were replaced
                        self._records.pop(index, None)
                    grad, state, record = self._prepared(group, position, index, columns_of)
                    entry = ScopeParam(group, position, index, param, grad, state, record.plan, record.shard)
                elif has_window(self.state.get(param, {})):
                    state = self._state_of(group, position, param)
                    entry = ScopeParam(group, position, index, param, None, state, columns_of(param), shard_of(param))
                if entry is not None and param.numel():
                    scopes.setdefault(key, []).append(entry)
                index += 1
        return [self._scope(e, members[key]) for key, e in scopes.items() if any(one.grad is not None for one in e)]

    def _scope(self, entries: list[ScopeParam], params: list[Tensor]) -> Scope:
        """Return a scope of all ``params``. The first one that is trained holds its state, whichever has gradients.

        Loading by ``torch.distributed.checkpoint`` expects the entries of a new optimizer, which has all gradients.
        """
        settings = shared_settings([e.group for e in entries])
        holder = next((p for p in params if p.requires_grad), entries[0].param)
        scope_state = self.state[holder]
        if "gram" not in scope_state:
            other = next((self.state[p] for p in params if "gram" in self.state.get(p, {})), None)
            if other is None:
                update_state(SCOPE, scope_state, settings, holder, unused=True)
            else:  # from an older state, or parameters were frozen or trained since
                move_scope_state(other, scope_state, holder)
        return Scope(entries, settings, scope_state)

    def _steps(self) -> list[Reducer[None]]:
        scopes = self._scopes()
        return [step_scopes(scopes)] if scopes else []
