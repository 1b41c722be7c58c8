"""LANTON: steepest descent in each layer's own norm, with smaller steps where the gradient is noisier."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels.matrices.newton_schulz import COEFFICIENTS, ESTIMATORS
from leanstep.optimizers.common.base import LeanOptimizer
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
    names_of,
    settings_of,
    warn_how_auto_routes,
)
from leanstep.optimizers.common.groups import in_pipeline, inside_zero, partial_model
from leanstep.optimizers.common.loading import Loaded
from leanstep.optimizers.common.quantized import scale_key
from leanstep.optimizers.common.sharding import Reducer, Shard, local, locals_of
from leanstep.optimizers.common.state import coded
from leanstep.optimizers.lanton import rule
from leanstep.optimizers.lanton.halves import UNMARKED, MarkedHalves
from leanstep.optimizers.lanton.layers import Form, Layer, LayerStep, form_of, matrix_shape, norm_of, stores_gradient
from leanstep.optimizers.lanton.saved import check_entries, check_half_gradients, reshaped_estimates
from leanstep.optimizers.lanton.state import ENTRIES
from leanstep.optimizers.lanton.step import factors_and_noise, step
from leanstep.optimizers.lanton.variance import VARIANCES

NORMS = ("auto", "rms", "sign", "vector")
NOISES = ("previous", "halves")
SCALINGS = ("scion", "muon")


class LANTON(MarkedHalves, LeanOptimizer):
    r"""LANTON (layer-wise noise-adaptive learning rates with operator norms).

    Start with ``create(model, "lanton")``, which needs no rate; the class has the paper's rule. By it take ``lr`` 2e-2.

    For every matrix or vector p, with gradient G, momentum B, direction O and noise estimate H::

        B = beta1 * B + (1 - beta1) * G
        O = argmax of <B, O> over the unit ball of the layer's norm
        H = beta2 * H + (1 - beta2) * dual_norm(G - G')^2          # G': another gradient of the same layer
        a = alpha / sqrt(alpha^2 + H)
        f = sqrt(a / a_max)                                        # a_max: over all layers with the same norm
        p = p * (1 - lr * weight_decay) - lr * f * radius * O

    :mod:`leanstep.optimizers.lanton.rule` has a function for each line. The update of the least noisy layer of each
    norm has exactly the size ``lr * radius`` in that norm; noisier layers move less. a_max is over all groups and
    includes layers without a gradient at this step. f tends to 1 for large ``alpha``,
    and to (H_min / H)^(1/4) for small ``alpha``. Scaling all gradients by c is equivalent to dividing alpha by c.

    One optimizer serves a whole model. Every group has a ``norm``, which :func:`leanstep.optimizers.param_groups` sets:

    ========  =====================  ==============================  ======================  =====================
    norm      for                    norm of the matrix (m, n)       dual norm               O
    ========  =====================  ==============================  ======================  =====================
    "rms"     hidden matrices        sqrt(n / m) * largest sing. v.  sqrt(m / n) * nuclear   sqrt(m / n) * U V^T
    "sign"    embeddings and heads   largest absolute entry          sum of absolute values  sign(B)
    "vector"  gains, biases          root mean square                sqrt(d) * l2 norm       B / RMS(B)
    ========  =====================  ==============================  ======================  =====================

    "auto" means "rms" for two or more dimensions and "vector" for the rest. It warns once, because embeddings and heads
    belong in groups with "sign". Each matrix of a stack (e, m, n) has its own H and f, and so has each block.
    Convolutions are flattened to (m, rest). :func:`leanstep.kernels.newton_schulz` computes U V^T.

    Args:
        params: parameters, named parameters, or groups.
        lr: the common step size, a number or a one-element tensor.
        betas: (beta1, beta2): the weights of the old B and of the old H. 0.95 is Muon's beta1; beta2 = 0.9 averages H
            over about ten steps.
        alpha: the noise level sqrt(H) at which steps shrink, in units of a gradient's dual norm. If the least noisy
            layer has H = 0, f is 0.84 at sqrt(H) = alpha and 0.32 at 10 alpha. H scales with 1 / batch size, and
            changes with model, loss scale and clipping: choose alpha by :meth:`noise_report`, per group if needed.
            "auto" (experimental): at every step the median of sqrt(H) over the layers that share a maximum; f then
            depends only on ratios of noise. The blocks of a matrix count as one layer together.
        weight_decay: decoupled, multiplied by lr and not by f.
        cautious_decay: no decay for entries whose update and parameter differ in sign (arXiv 2510.12402); those with a
            zero update decay. No gain over no decay was measured (docs/measured/optimizers.md).
        norm: the group's norm; see the table.
        radius: size of the update in the group's norm, in units of lr. Scion uses larger radii for heads than for
            hidden matrices; its normalized sign is radius = 1 / n.
        scaling: factor of "rms". "scion": sqrt(m / n), which bounds the change of the output's root mean square for
            any shape. "muon": 0.2 * sqrt(max(m, n)), as in Moonlight; entries move about as AdamW's, so AdamW's lr and
            decay fit. The dual norm has the same factor.
        nesterov: replace B in O by ``beta1 * B + (1 - beta1) * G``, with the new B.
        variance: "rows": divide the rows of U V^T by the root of their running mean square, and scale the result to its
            old Frobenius norm (NorMuon). None: do not. No gain was measured on the nano LLaMA
            (docs/measured/optimizers.md).
        noise: source of G'. "previous": the previous step's gradient, stored in the state. E H is then twice the
            squared dual norm of one gradient's noise, plus the drift of the true gradient. "halves": the two halves of
            the step's micro-batches, which :meth:`mark_half` separates. H has the same scale but no drift, and no
            gradient is stored between steps.
        noise_adaptive: False: f = 1 and no estimates. This is the base optimizer (Scion or Muon for matrices, plus the
            sign and vector rules), bit-identical to a very large alpha. A step drops G' then; once this is True again,
            a first gradient is only stored.
        noise_every: update H every ``noise_every`` steps, from two consecutive gradients. An estimate costs a fifth
            of an update on a CPU and more than half on a GPU, and H changes slowly.
        ns_coefficients: coefficients of the five Newton-Schulz iterations, which run in bf16 on devices with bf16
            matrix units, else in fp32.
        nuclear: estimator of the nuclear norm; a bias common to all layers cancels in f. "sketch": eigenvalues of half
            the rows, extrapolated; within 3 % on gradients of trained models. "polar": three Newton-Schulz steps, too
            small by up to 44 % there. "auto": "sketch" on a CPU, "polar" elsewhere. "svd": exact and slow. "frobenius":
            the Frobenius norm, a lower bound by up to a factor of sqrt(rank), without matrix products; use it for
            layers of similar shape.
        transposed, flatten, blocks: as for :class:`leanstep.optimizers.SinkGD`. Each block has its own O, H and f, as a
            matrix of its own would; a non-finite gradient leaves the whole parameter unchanged.
        momentum_dtype: dtype of B; None: the parameter's; torch.int8, "fp8": as for :class:`leanstep.optimizers.Lion`.
            O is computed from the stored B.
        noise_dtype: dtype of the stored gradient or half; None: the parameter's. bf16 halves its memory for fp32
            parameters, and adds up to 2^-8 of the gradient to the noise. torch.int8 adds about 2 % of it, "fp8" twice
            that. Halves have the parameter's dtype then.
        rounding, seed, maximize: as for :class:`leanstep.optimizers.Lion`.
        nonfinite: "skip": leave a parameter with a non-finite gradient and its state unchanged, and count it. "raise",
            "pass": as for Lion. A non-finite difference never enters H.
        foreach: None or True: process matrices of one shape in batches. False: one matrix at a time.

    Raises:
        ValueError, TypeError: a setting is out of range; a parameter's shape does not fit its norm; a group with a
            norm is empty; the shards of a matrix have gaps; a loaded state has a removed setting.
        RuntimeError: a gradient is sparse; with noise="halves", :meth:`mark_half` was never called or the step is
            compiled.
        NonFiniteGradientError: a gradient is not finite, with nonfinite="raise".

    Notes:
        A layer has f = 1, and does not enter the maximum, until its first estimate. With "previous" that needs two
        gradients. A gradient of zeros (an expert without tokens), or none, leaves H and G' unchanged.
        State: ``momentum_buffer`` (4 bytes per fp32 parameter) and, with "previous", ``previous_grad`` (4 bytes);
        1.03 bytes each with int8, and ``step``. One pass updates an int8 state in place; differences and directions
        decode a batch at a time to fp32 (see below), and updates of shards that cut rows one layer at a time.
        "halves" needs one more copy of the gradients from mark_half to the step: it saves memory between steps and in
        checkpoints, and none during the second half's backward passes. ``noise`` and ``noise_steps``: one
        number each per matrix. ``variance`` adds ``row_mean_sq``, one number per row; ``rounding`` its state.
        A step allocates differences or directions of a few matrices at a time (64 MB in fp32, or one matrix) and the
        buffers of Newton-Schulz. The maximum needs all gradients before the first update.
        FSDP2: each matrix is gathered on one process, and owners balance the cost. A step takes three all-to-alls
        (differences, momenta, directions) and one all-reduce of four numbers per matrix, for the whole model.
        Replicated parameters need no communication.

    References:
        Hao, Gong, Xu, Wang, Liu, "Noise-Adaptive Layerwise Learning Rates: Accelerating Geometry-Aware Optimization for
        Deep Neural Network Training", arXiv 2510.14009. Base: Pethick, Xie, Antonakopoulos, Zhu, Silveti-Falls, Cevher,
        "Training Deep Learning Models with Norm-Constrained LMOs", arXiv 2502.07529 (Scion); Liu et al., "Muon is
        Scalable for LLM Training", arXiv 2502.16982 (Moonlight's Muon). Rows: Li, Liu, Liang, Chen, Zhao, "NorMuon:
        Making Muon more efficient and scalable", arXiv 2510.05491.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> matrices = [p for p in model.parameters() if p.dim() == 2]
        >>> vectors = [p for p in model.parameters() if p.dim() < 2]
        >>> groups = [{"params": matrices, "norm": "rms"}, {"params": vectors, "norm": "vector"}]
        >>> optimizer = LANTON(groups, lr=1e-2, alpha="auto")
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(3, 4)).square().sum().backward()
        ...     optimizer.step()
        >>> max(row["factor"] for row in optimizer.noise_report("rms"))
        1.0
    """

    _state_entries = ENTRIES
    _group_entries = {"noise_clock": 0, **UNMARKED}
    _older_names = {"half_is": "half_content", "half_seen": "half_marked"}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 5e-3,
        betas: tuple[float, float] = (0.95, 0.9),
        alpha: float | str = 1.0,
        weight_decay: float = 0.0,
        *,
        norm: str = "auto",
        radius: float = 1.0,
        scaling: str = "scion",
        nesterov: bool = False,
        cautious_decay: bool = False,
        variance: str | None = None,
        noise: str = "previous",
        noise_adaptive: bool = True,
        noise_every: int = 1,
        ns_coefficients: str = "jordan",
        nuclear: str = "auto",
        transposed: bool = False,
        flatten: bool = False,
        blocks: int | tuple[int, ...] | None = None,
        momentum_dtype: torch.dtype | str | None = None,
        noise_dtype: torch.dtype | str | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        nonfinite: str = "skip",
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(params, settings_of(locals()))
        auto = [g for g in self.param_groups if g["norm"] == "auto"]
        warn_how_auto_routes(auto, "LANTON", "hidden matrices", "as vectors", "norm='rms'")

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_betas("LANTON", group["betas"])
        alpha = group["alpha"]
        if not isinstance(alpha, str):
            check_number("LANTON", "alpha", alpha, 0.0)
        if alpha != "auto" if isinstance(alpha, str) else alpha == 0:
            raise ValueError(f"Invalid alpha: {alpha!r}; LANTON expects a number above 0, or 'auto'")
        check_number("LANTON", "radius", group["radius"], 0.0)
        for name, choices in (
            ("norm", NORMS), ("scaling", SCALINGS), ("variance", VARIANCES), ("noise", NOISES),
            ("nuclear", ESTIMATORS), ("ns_coefficients", COEFFICIENTS),
        ):  # fmt: skip
            check_choice("LANTON", name, group[name], choices)
        check_count("LANTON", "noise_every", group["noise_every"])
        check_flags("LANTON", group, ("nesterov", "cautious_decay", "noise_adaptive"))
        check_layout("LANTON", group)
        check_blocks("LANTON", group)
        for name in ("momentum_dtype", "noise_dtype"):
            check_dtype("LANTON", name, group[name], codes=True)

    def _check_params(self, group: dict[str, Any], given: dict[str, Any]) -> None:
        super()._check_params(group, given)
        zero = inside_zero()
        if zero and group["noise_adaptive"]:
            raise partial_model("LANTON", "noise_adaptive=True", "ZeroRedundancyOptimizer", "Take noise_adaptive=False")
        if given.get("norm", "auto") != "auto" and not group["params"] and not zero:
            raise ValueError(f"LANTON: a group with norm={given['norm']!r} has no parameter; leave it out")
        for position, param in enumerate(group["params"]):
            norm, dims = norm_of(group, param), param.dim()
            if norm == "vector" and dims > 1:
                advice = "Put it in a group with norm='rms' (hidden matrices) or 'sign' (embeddings, heads)"
            elif norm == "rms" and (dims < 2 or (group["transposed"] and dims > 3)):
                advice = (
                    "Put it in a group with norm='vector', or 'sign', which takes any shape (parameters flattened by a "
                    "sharding engine have lost their rows and have no other rule)"
                )
            else:
                if norm == "rms":
                    check_rows("LANTON", group, position, matrix_shape(group, param.shape)[0])
                continue
            raise ValueError(
                f"LANTON: norm={norm!r} takes {'vectors' if norm == 'vector' else 'matrices'}, got "
                f"{describe(group, position)} of {dims} dimensions. {advice}; leanstep.optimizers.param_groups does so."
            )

    def _takes_flattened(self, group: dict[str, Any]) -> bool:
        return group["norm"] == "sign" and not group["noise_adaptive"]

    def _check_first_step(self, group: dict[str, Any], position: int) -> None:
        super()._check_first_step(group, position)
        if group["noise_adaptive"] and not self.state and in_pipeline(self.param_groups):
            raise partial_model("LANTON", "noise_adaptive=True", "a pipeline", "Take noise_adaptive=False")

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict, with ``noise`` and ``noise_steps`` of a single matrix in shape ().

        In memory they have shape (1,), because torch.compile loses in-place writes to 0-d fp64 inputs on a CPU.
        """
        packed = super().state_dict()
        return {**packed, "state": reshaped_estimates(packed["state"], (1,), ())}

    def _in_memory(self, states: dict[Any, Any], groups: list[dict[str, Any]]) -> dict[Any, Any]:
        return reshaped_estimates(states, (), (1,))

    def _check_shard(self, group: dict[str, Any], position: int, shard: Shard) -> None:
        super()._check_shard(group, position, shard)
        if shard.cuts and shard.ranges is None and norm_of(group, group["params"][position]) == "rms":
            raise ValueError(
                f"LANTON takes matrices whose shards are blocks, got {describe(group, position)} with placements "
                f"{shard.placements}, whose shards have gaps; nothing was changed. Redistribute the parameter, or put "
                "it in a group with norm='sign', whose rule is elementwise."
            )

    def _check_entries(self, group: dict[str, Any]) -> None:
        super()._check_entries(group)
        check_entries(group)

    def _check_loaded_states(self, groups: list[dict[str, Any]], entries: list[Loaded]) -> None:
        check_half_gradients(entries)

    # ---- the step

    def _update_state(self, state: dict[str, Any], group: dict[str, Any], position: int, param: Tensor) -> None:
        had_previous, stores = "previous_grad" in state, stores_gradient(group)
        super()._update_state(state, group, position, param)
        if stores and not had_previous:
            state["noise_steps"].fill_(-1)  # until there is a previous gradient
        elif had_previous and not stores:
            _drop_previous(state)

    def _steps(self) -> list[Reducer[None]]:
        """Return one generator for all groups, because their layers share maxima."""
        for group in self._groups_with_halves():
            self._check_marked(group)
        layers: list[LayerStep] = []
        first_index = 0
        for group in self.param_groups:
            layers += self._layer_steps(group, first_index, layers[-1].rows.stop if layers else 0)
            first_index += len(group["params"])
        return [self._whole_step(layers)]

    def _groups_with_halves(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["noise_adaptive"] and group["noise"] == "halves"]

    def _whole_step(self, layers: list[LayerStep]) -> Reducer[None]:
        yield from step(layers, self._estimated(layers))
        for group in self._groups_with_halves():
            self._delete_halves(group)
        for group in self.param_groups:
            # modulo noise_every, because torch.compile makes a graph for every value
            group["noise_clock"] = (group["noise_clock"] + 1) % group["noise_every"]

    def _layer_steps(self, group: dict[str, Any], first_index: int, row: int) -> list[LayerStep]:
        """Return the parameters of a group that have entries and a gradient, from this row of the step's table on.

        Every ``noise_every``-th step measures. With "previous", the step before it stores its gradient.
        """
        adaptive, previous = group["noise_adaptive"], group["noise"] == "previous"
        measures = adaptive and group["noise_clock"] == (1 % group["noise_every"] if previous else 0)
        stores = adaptive and previous and group["noise_clock"] == 0
        plan, compiles = functools.partial(_plan, group), torch.compiler.is_compiling()
        noise_scale = rule.noise_scale(group["noise"], group["half_fraction"])
        answers = [
            (param, *self._prepared(group, position, first_index + position, plan), first_index + position)
            for position, param in enumerate(group["params"])
            if param.grad is not None
        ]
        weights, grads = locals_of([param for param, *_ in answers]), locals_of([grad for _, grad, *_ in answers])
        layers = []
        for (param, _, state, record, index), weight, grad in zip(answers, weights, grads, strict=True):
            if param.numel() == 0:
                continue
            (form, codes), ranges = record.plan, record.shard.ranges
            blocks = len(form.block_rows)
            here = ranges[0] if form.stacked and ranges else range(form.estimates // blocks)
            rows, held = slice(row, row + form.estimates), slice(row + here.start * blocks, row + here.stop * blocks)
            row = rows.stop
            layers.append(LayerStep(
                group, param, state, form, codes, weight, grad, record.rounding, record.shard, index, rows, held,
                measures=measures and (previous or "half_grad" in state), stores=stores,
                noise_scale=noise_scale, on_host=weight.device.type == "cpu" and not compiles,
            ))  # fmt: skip
        return layers

    def _estimated(self, stepped: Sequence[LayerStep] = ()) -> list[Layer | LayerStep]:
        """Return the parameters with an estimate; those of ``stepped`` as they are there."""
        known = {id(layer.param): layer for layer in stepped}
        return [
            known.get(id(param)) or Layer(group, param, self.state[param], form_of(group, param))
            for group in self.param_groups
            if group["noise_adaptive"]
            for param in group["params"]
            if "noise" in self.state.get(param, {})
        ]

    # ---- reports

    def noise_report(self, norm: str | None = None) -> list[dict[str, Any]]:
        """Return the noise and step size of every layer (reads the device). Use it to choose ``alpha``.

        Args:
            norm: "rms", "sign" or "vector" selects the layers with this norm; None: all layers.

        Returns:
            One dict per vector, matrix, matrix of a stack or block that has had a gradient: ``name``; ``norm``; ``H``
            (None before the first estimate); ``factor`` f; ``lr``, the group's lr times f. Empty with
            ``noise_adaptive=False``.

        Raises:
            ValueError: no parameter has this norm.
        """
        norms = {norm_of(group, param) for group in self.param_groups for param in group["params"]}
        if norm is not None and norm not in norms:
            raise ValueError(f"LANTON: no parameter has norm {norm!r}; this optimizer has {sorted(norms)}")
        layers = self._estimated()
        if not layers:
            return []
        factors, noise, counts = (v.tolist() for v in factors_and_noise(layers, local(layers[0].param).device))
        names = names_of(self.param_groups)
        rows: list[dict[str, Any]] = []
        for layer in layers:
            blocks = len(layer.form.block_rows)
            for k in range(layer.form.estimates):
                i = len(rows)
                which = f"[{k // blocks}]" * layer.form.stacked + f"[{k % blocks}]" * (blocks > 1)
                row = {
                    "name": names[layer.param] + which,
                    "norm": layer.form.norm,
                    "H": noise[i] if counts[i] >= 1 else None,
                    "factor": factors[i],
                    "lr": float(layer.group["lr"]) * factors[i],
                }
                rows.append(row)
        return [row for row in rows if norm in (None, row["norm"])]

    def diagnostics(self) -> dict[str, float]:
        """Return ``noise/NAME`` (H) and ``factor/NAME`` (f) of every parameter with an estimate (reads the device).

        The values of a stack are means over its matrices.
        """
        values: dict[str, list[float]] = {}
        for row in self.noise_report():
            if row["H"] is not None:
                name = row["name"].partition("[")[0]
                values.setdefault(f"noise/{name}", []).append(row["H"])
                values.setdefault(f"factor/{name}", []).append(row["factor"])
        return {key: sum(numbers) / len(numbers) for key, numbers in values.items()}


def _plan(group: dict[str, Any], param: Tensor) -> tuple[Form, list[str]]:
    return form_of(group, param), coded(ENTRIES, group, param)


def _drop_previous(state: dict[str, Any]) -> None:
    """Drop the stored gradient. When gradients are stored again, it would be older than one step."""
    if "previous_grad" in state:
        del state["previous_grad"]
        state.pop(scale_key("previous_grad"), None)
        if "noise_steps" in state:
            state["noise_steps"].clamp_min_(0)  # halves need no previous gradient
