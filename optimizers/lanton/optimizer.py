"""LANTON: steepest descent in each layer's own norm, with smaller steps where the gradient is noisier."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels.matrices.newton_schulz import COEFFICIENTS, ESTIMATORS
from leanstep.optimizers.common.base import (
    LeanOptimizer,
    check_betas,
    check_choice,
    check_dtype,
    check_flags,
    check_number,
    describe,
    holds_factors,
    local,
    new_state,
)
from leanstep.optimizers.common.rounding import check_rounding, effective, init_rounding
from leanstep.optimizers.common.sharding import Steps, offsets_of, shard_of
from leanstep.optimizers.lanton import halves as _lanton_halves
from leanstep.optimizers.lanton import step as _lanton
from leanstep.optimizers.lanton.matrices import units_of
from leanstep.optimizers.lanton.noise import Layer, init_noise, report
from leanstep.optimizers.lanton.routing import is_due, maximum_of, norm_of
from leanstep.optimizers.lanton.update import Member

ALPHAS = ("auto",)
NORMS = ("auto", "rms", "sign", "vector")
NOISES = ("previous", "halves")
GROUPINGS = ("norm", "role", "shape")
SCALINGS = ("scion", "muon")
DECAY_RATES = ("group", "layer")


class LANTON(LeanOptimizer):
    r"""LANTON (layer-wise noise-adaptive learning rates with operator norms).

    For every matrix or vector, with momentum B, direction O and noise estimate H::

        B = beta1 * B + (1 - beta1) * G
        O = argmax of <B, O> over the unit ball of the layer's norm
        H = beta2 * H + (1 - beta2) * dual_norm(G - G')^2          # G' another gradient of the same layer
        a = alpha / sqrt(alpha^2 + H)
        f = sqrt(a / a_max)                                        # a_max of all layers with the same norm
        p = p * (1 - lr * weight_decay) - lr * f * radius * O

    The least noisy layer of each norm moves by ``lr * radius`` exactly, in its norm; the others by less. With a large
    ``alpha`` every f is 1, with a small one f is (H_min / H)^(1/4). To multiply all gradients by c is to divide alpha
    by c.

    One object serves a whole model. Every group has a ``norm``; :func:`leanstep.optimizers.param_groups` sets it:

    ========  =====================  ==============================  ======================  =====================
    norm      for                    norm of the matrix (m, n)       dual norm               O
    ========  =====================  ==============================  ======================  =====================
    "rms"     hidden matrices        sqrt(n / m) * largest sing. v.  sqrt(m / n) * nuclear   sqrt(m / n) * U V^T
    "sign"    embeddings and heads   largest entry                   sum of entries' sizes   sign(B)
    "vector"  gains, biases          root mean square                sqrt(d) * l2 norm       B / RMS(B)
    ========  =====================  ==============================  ======================  =====================

    "auto" is "rms" for two and more dimensions and "vector" for the rest; said once in a warning, because embeddings
    and heads belong elsewhere. Stacks (e, m, n) are e matrices, each with its own H and f, as if they were e
    parameters: experts differ in noise as layers do. Convolutions are flattened to (m, rest). U V^T comes from
    Newton-Schulz (:func:`leanstep.kernels.matrices.newton_schulz`).

    Args:
        params: parameters, named parameters, or groups.
        lr: the common step size eta, a number or a one-element tensor.
        betas: (beta1, beta2), of the momentum and of H. 0.95 is Muon's; 0.9 averages over ten steps.
        alpha: where noise begins to count: beside a layer without noise, one with sqrt(H) = alpha has f = 0.84, one
            with ten times that 0.32. In units of the dual norm of a gradient, which change with model, batch size (H
            goes with 1 / batch), loss scale and clipping: look at :meth:`noise_report` and tune it, per group if need
            be. "auto" (experimental): the median of sqrt(H) over the layers of one maximum, at every step; f then
            depends on ratios of noise alone.
        weight_decay: decoupled; see ``decay_rate``.
        norm: of the group, see above.
        radius: size of the update in the group's norm, in units of lr. Scion takes other radii for heads than for
            hidden matrices; its normalised sign is radius = 1 / n.
        scaling: of "rms". "scion": as in the table, a bound on how far a matrix moves its output's root mean square,
            whatever its shape. "muon": 0.2 * sqrt(max(m, n)) instead of sqrt(m / n), Moonlight's, by which entries
            move about as AdamW's do, so that its lr and decay can be kept. The dual norm has the same factor.
        nesterov: the direction of ``beta1 * B + (1 - beta1) * G`` with the new B. Off: the rule above.
        noise: where G' comes from. "previous": the gradient of the step before, kept in the state; E H is then twice
            the dual norm's square of one gradient's noise, and what the true gradient moved. "halves": the two halves
            of the step's own micro-batches, told apart by :meth:`mark_half`, on the same scale; no drift, and nothing
            kept between steps.
        noise_adaptive: False: f = 1 and nothing is estimated: the base optimizer (Scion's or Muon's rule for matrices,
            sign and vector rules), bit for bit what a very large alpha gives.
        noise_every: H takes in one difference every so many steps, of two gradients that follow one another. 1: every
            step. An estimate costs more than half of what an update costs, and H changes slowly.
        grouping: who shares a maximum. "norm": all layers of a norm in the whole optimizer, over all its groups, also
            those without a gradient at this step, as the paper speaks of "layers associated with the same norm".
            "role": those in groups of one ``name``. "shape": those of one shape: at equal noise in every entry the
            dual norm grows with the matrix, so that under "norm" a layer can be slowed for its shape alone.
        bias_correction: divide H by 1 - beta2^(estimates). Off: H starts small, and factors near 1.
        decay_rate: what multiplies ``weight_decay``. "group": lr, so that noise changes steps and not the decay.
            "layer": lr * f, so that every layer keeps its balance of decay and step, and its norm stays within
            radius / weight_decay.
        ns_steps, ns_coefficients, ns_dtype: of Newton-Schulz. Jordan's five steps, as Muon; None: bf16 where the
            device has matrix units for it.
        nuclear: estimate of the nuclear norm: "polar" (by ``nuclear_steps`` of Newton-Schulz with
            ``nuclear_coefficients``; what bias all layers share cancels in f), "svd" (exact, slow), or "frobenius" (a
            lower bound without any product, low by up to the square root of the rank: for layers of like shape).
        transposed: of a group whose matrices are stored (in, out), as transformers' ``Conv1D`` stores GPT-2's.
            :func:`leanstep.optimizers.param_groups` sets it, and ``flatten``.
        flatten: of a group whose tensors of three dimensions are no stacks but one matrix (m, rest) each, as the
            weights of one-dimensional convolutions.
        momentum_dtype: of B; None is the parameter's. The direction is taken of B as it is stored.
        noise_dtype: of the kept gradient or half; None is the parameter's. bf16 halves it for fp32 parameters, and
            adds up to 2^-9 of the gradient to the noise.
        rounding, seed, maximize: as for :class:`leanstep.optimizers.Lion`.
        nonfinite: "skip": a tensor with a non-finite gradient is left alone with all its state, and counted; "raise"
            and "pass" as for Lion. A difference that is not finite never enters H.
        foreach: None or True: matrices of one shape at once; False: the definition, a matrix at a time.

    Raises:
        ValueError, TypeError: settings out of range; a vector in a group of matrices or a matrix in one of vectors; a
            group with a norm and without parameters; matrices that are sharded along several dimensions.
        RuntimeError: a sparse gradient; noise="halves" without any :meth:`mark_half` so far, or in a compiled step.
        NonFiniteGradientError: see ``nonfinite``.

    Notes:
        The first step has no difference, and f = 1; so has any layer until its first estimate, and it has no part in
        the maximum. A layer without a gradient, or with one of zeros (an expert without tokens), keeps H and G'.
        State: ``momentum_buffer`` and, for "previous", ``previous_grad``: 8 bytes per fp32 parameter, 4 with "halves"
        (which needs one more copy of the gradients from mark_half to the step); ``noise`` and ``noise_steps``, one
        number each per matrix; ``kahan_compensation``, ``master_param`` or ``step`` where ``rounding`` needs them.
        Extra memory of a step: differences or directions of a few matrices at a time (64 MB in fp32, or one matrix),
        and what Newton-Schulz takes. The maximum forces two passes: no parameter can be stepped before all gradients
        are there.
        Sharded by FSDP2: every matrix is brought whole to one process, the work spread by operations; in all three
        all-to-alls (differences, momenta, directions) and one all-reduce of four numbers a matrix, for the whole
        model. Nothing is sent for replicated parameters.

    References:
        Hao, Gong, Xu, Wang, Liu, "Noise-Adaptive Layerwise Learning Rates: Accelerating Geometry-Aware Optimization for
        Deep Neural Network Training", arXiv 2510.14009. Base: Pethick, Xie, Antonakopoulos, Zhu, Silveti-Falls, Cevher,
        "Training Deep Learning Models with Norm-Constrained LMOs", arXiv 2502.07529 (Scion); Liu et al., "Muon is
        Scalable for LLM Training", arXiv 2502.16982 (Moonlight's Muon).

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
        noise: str = "previous",
        noise_adaptive: bool = True,
        noise_every: int = 1,
        grouping: str = "norm",
        bias_correction: bool = False,
        decay_rate: str = "group",
        ns_steps: int = 5,
        ns_coefficients: str = "jordan",
        ns_dtype: torch.dtype | None = None,
        nuclear: str = "polar",
        nuclear_steps: int = 3,
        nuclear_coefficients: str = "nuclear",
        transposed: bool = False,
        flatten: bool = False,
        momentum_dtype: torch.dtype | None = None,
        noise_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        nonfinite: str = "skip",
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "weight_decay": weight_decay,
            "norm": norm,
            "radius": radius,
            "scaling": scaling,
            "nesterov": nesterov,
            "noise": noise,
            "noise_adaptive": noise_adaptive,
            "noise_every": noise_every,
            "grouping": grouping,
            "bias_correction": bias_correction,
            "decay_rate": decay_rate,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "ns_dtype": ns_dtype,
            "nuclear": nuclear,
            "nuclear_steps": nuclear_steps,
            "nuclear_coefficients": nuclear_coefficients,
            "transposed": transposed,
            "flatten": flatten,
            "momentum_dtype": momentum_dtype,
            "noise_dtype": noise_dtype,
            "rounding": rounding,
            "seed": seed,
            "nonfinite": nonfinite,
            "maximize": maximize,
            "foreach": foreach,
        }
        self._check_group(defaults)
        super().__init__(params, defaults)
        _say_how_auto_routes(self.param_groups)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_betas("LANTON", group["betas"])
        if isinstance(group["alpha"], str) and group["alpha"] not in ALPHAS:
            raise ValueError(f"Invalid alpha: {group['alpha']!r}; LANTON expects a number above 0, or 'auto'")
        if group["alpha"] != "auto":
            check_number("LANTON", "alpha", group["alpha"], 0.0)
            if not group["alpha"] > 0:
                raise ValueError(f"Invalid alpha: {group['alpha']}; LANTON expects a number above 0, or 'auto'")
        check_number("LANTON", "radius", group["radius"], 0.0)
        for name, choices in (
            ("norm", NORMS), ("scaling", SCALINGS), ("noise", NOISES), ("grouping", GROUPINGS),
            ("decay_rate", DECAY_RATES), ("nuclear", ESTIMATORS), ("ns_coefficients", COEFFICIENTS),
            ("nuclear_coefficients", COEFFICIENTS),
        ):  # fmt: skip
            check_choice("LANTON", name, group[name], choices)
        for name in ("noise_every", "ns_steps", "nuclear_steps"):
            value = group[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Invalid {name}: {value!r}; LANTON expects an int of at least 1")
        check_flags("LANTON", group, ("nesterov", "noise_adaptive", "bias_correction", "transposed", "flatten"))
        check_rounding("LANTON", group)
        if group["transposed"] and group["flatten"]:
            raise ValueError(
                "LANTON: transposed is for matrices and stacks of them, flatten for convolutions; choose one"
            )
        for name in ("momentum_dtype", "noise_dtype", "ns_dtype"):
            check_dtype("LANTON", name, group[name])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; what its norm is not made for is an error that names it."""
        if isinstance(param_group, dict):
            # in every group from the start: torch.distributed.checkpoint reads the keys of a fresh optimizer
            param_group = {"noise_clock": 0, **_lanton_halves.NOTHING, **param_group}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_members(group, param_group)
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_members(self, group: dict[str, Any], given: dict[str, Any]) -> None:
        if given.get("norm", "auto") != "auto" and not group["params"]:
            raise ValueError(f"LANTON: a group with norm={given['norm']!r} has no parameter; leave it out")
        if group["grouping"] == "role" and not group.get("name"):
            raise ValueError(
                "LANTON: grouping='role' needs groups with a name; leanstep.optimizers.param_groups makes them"
            )
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
                continue
            raise ValueError(
                f"LANTON: norm={norm!r} takes {'vectors' if norm == 'vector' else 'matrices'}, got "
                f"{describe(group, position)} of {dims} dimensions. {advice}; leanstep.optimizers.param_groups does so."
            )

    # ---- the step

    def _init_state(self, group: dict[str, Any], position: int, param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = new_state(param, group["momentum_dtype"])
        init_rounding(state, param, effective("LANTON", group, position, param))
        if group["noise_adaptive"]:
            init_noise(state, group, norm_of(group, param), param)
            if group["noise"] == "previous" and "previous_grad" not in state:
                state["previous_grad"] = new_state(param, group["noise_dtype"])
                state["noise_steps"].fill_(-1)
        return state

    def _steps(self) -> list[Steps[None]]:
        """One rule for all groups: their layers share maxima."""
        for group in self.param_groups:
            _lanton_halves.check_marked(group)
        members: list[Member] = []
        first_index = 0
        for group in self.param_groups:
            members += self._members(group, first_index)
            first_index += len(group["params"])
        layers = self._layers()
        places = {layer.param: place for place, layer in enumerate(layers)}
        members = [m._replace(layer=places.get(m.param, -1)) for m in members]
        # what cannot be done is said before anything is changed
        units_of([m for m in members if m.norm == "rms"])
        if any(m.rounding == "stochastic" for m in members):
            offsets_of([m.shard for m in members if m.rounding == "stochastic"], local(members[0].param).device)
        return [self._whole_step(members, layers)]

    def _whole_step(self, members: list[Member], layers: list[Layer]) -> Steps[None]:
        yield from _lanton.step(members, layers)
        for group in self.param_groups:
            _lanton_halves.forget(group, self.state)
            # kept below noise_every: torch.compile makes a graph for every value
            group["noise_clock"] = (group["noise_clock"] + 1) % group["noise_every"]

    def _members(self, group: dict[str, Any], first_index: int) -> Iterator[Member]:
        """The parameters of a group that have a gradient, with their state."""
        due = is_due(group)
        for position, param, grad in self._with_gradient(group):
            state = self._init_state(group, position, param)
            previous = group["noise"] == "previous"
            yield Member(
                group,
                param,
                grad,
                state,
                norm_of(group, param),
                effective("LANTON", group, position, param),
                shard_of(param),
                first_index + position,
                -1,
                measures=group["noise_adaptive"] and due and (previous or "half_grad" in state),
                keeps=group["noise_adaptive"] and previous and group["noise_clock"] == 0,
            )

    def _layers(self) -> list[Layer]:
        """Every parameter that has an estimate."""
        found = []
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state.get(param, {})
                if group["noise_adaptive"] and "noise" in state:
                    norm = norm_of(group, param)
                    found.append(Layer(group, param, state, norm, maximum_of(group, norm, param)))
        return found

    # ---- the halves of a batch

    @torch.no_grad()
    def mark_half(
        self,
        fraction: float = 0.5,
        *,
        averaged: bool | None = None,
        process_group: Any = None,
        loss_scale: float | Tensor = 1.0,
    ) -> None:
        """With ``noise="halves"``: call it when the first half of a step's micro-batches has been backpropagated.

        The gradients accumulated so far are copied. ``step()`` compares them with the whole gradients, and drops them::

            for i, batch in enumerate(micro_batches):
                (model(batch) / len(micro_batches)).backward()
                if 2 * (i + 1) == len(micro_batches):
                    optimizer.mark_half()
            optimizer.step()

        A step without a mark (a last batch of one micro-batch) leaves H as it is. Where gradients are changed between
        the last backward pass and the step (clipping, ``GradScaler.unscale_``), call :meth:`mark_whole` first.

        Args:
            fraction: share of the micro-batches that have been done, in (0, 1); the two parts need not be equal.
            averaged: for parameters that every process holds whole. Under ``DistributedDataParallel`` gradients are
                averaged in the backward pass, but not inside ``no_sync()``, nor under Accelerate's ``accumulate()``
                before its last micro-batch. True: they have been averaged. False: average the copies here (one more
                reduction of all gradients). None: there is one process, or parameters are sharded (FSDP2 reduces in
                every pass).
            process_group: the processes to average over; None: all.
            loss_scale: what the loss was multiplied by, as in ``scaler.get_scale()``, if gradients still hold it.

        Raises:
            RuntimeError: without a group with noise="halves"; without any gradient.
            ValueError: a fraction outside (0, 1); ``averaged`` left open where it matters.
        """
        _lanton_halves.mark_half(self.param_groups, self.state, fraction, averaged, process_group, loss_scale)

    @torch.no_grad()
    def mark_whole(self, *, loss_scale: float | Tensor = 1.0) -> None:
        """Take the difference of the halves now, after the last backward pass, before gradients are changed.

        H is then in units of the gradient as it was. Needed only where gradients are changed before ``step()``.

        Args:
            loss_scale: as for :meth:`mark_half`.

        Raises:
            RuntimeError: without a :meth:`mark_half` before it.
        """
        _lanton_halves.mark_whole(self.param_groups, self.state, loss_scale)

    # ---- what can be seen

    def noise_report(self, norm: str | None = None) -> list[dict[str, Any]]:
        """Estimates and rates of all layers, to choose ``alpha`` by (reads the device).

        Args:
            norm: only layers of "rms", "sign" or "vector".

        Returns:
            One dict per matrix or vector that has had a gradient: ``name``; ``group``, whose maximum it shares;
            ``norm``; ``H`` (None before the first estimate); ``factor`` f; ``lr``, the group's rate times f. A stack
            has a row for each of its matrices. Empty with ``noise_adaptive=False``.

        Raises:
            ValueError: when no parameter has that norm.
        """
        held = {norm_of(group, param) for group in self.param_groups for param in group["params"]}
        if norm is not None and norm not in held:
            raise ValueError(f"LANTON: no parameter has norm {norm!r}; this optimizer has {sorted(held)}")
        return [row for row in report(self._layers(), self.param_groups) if norm in (None, row["norm"])]

    def diagnostics(self) -> dict[str, float]:
        """``noise/NAME`` (H) and ``factor/NAME`` (f) of every parameter, for a log; means over the matrices of a stack.

        Parameters without an estimate have no entry. Reads the device.
        """
        sums: dict[str, list[float]] = {}
        for row in self.noise_report():
            if row["H"] is not None:
                name = row["name"].partition("[")[0]
                sums.setdefault(f"noise/{name}", []).append(row["H"])
                sums.setdefault(f"factor/{name}", []).append(row["factor"])
        return {key: sum(values) / len(values) for key, values in sums.items()}


def _say_how_auto_routes(groups: list[dict[str, Any]]) -> None:
    auto = [p for group in groups if group["norm"] == "auto" and not holds_factors(group) for p in group["params"]]
    matrices = sum(p.dim() >= 2 for p in auto)
    if matrices:
        rest = len(auto) - matrices
        warnings.warn(
            f"LANTON: {matrices} parameters of two or more dimensions are taken as hidden matrices"
            f"{f', {rest} others as vectors' if rest else ''}. Embeddings and heads are hidden matrices here too: "
            "leanstep.optimizers.param_groups(model) routes them by module; norm='rms' means them all.",
            stacklevel=3,
        )
