"""LANTON: steepest descent in each layer's own norm, with smaller steps where the gradient is noisier."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels.matrices.newton_schulz import COEFFICIENTS, ESTIMATORS
from leanstep.optimizers.common.base import LeanOptimizer
from leanstep.optimizers.common.checks import (
    check_betas,
    check_choice,
    check_dtype,
    check_flags,
    check_number,
    check_rounding,
    describe,
    holds_factors,
)
from leanstep.optimizers.common.rounding import effective, init_rounding
from leanstep.optimizers.common.sharding import Steps, local, new_state, offsets_of, shard_of
from leanstep.optimizers.lanton import halves
from leanstep.optimizers.lanton.matrices import is_stack, tasks_of
from leanstep.optimizers.lanton.step import (
    Layer,
    LayerStep,
    estimate_dtype,
    factors_and_noise,
    matrix_count,
    maximum_of,
    norm_of,
    step,
)

ALPHAS = ("auto",)
NORMS = ("auto", "rms", "sign", "vector")
NOISES = ("previous", "halves")
GROUPINGS = ("norm", "role")
SCALINGS = ("scion", "muon")

# settings of older versions, with the values that a saved state may still have
_DROPPED = {
    "decay_rate": ("group",),
    "bias_correction": (False,),
    "nuclear_steps": (3,),
    "nuclear_coefficients": ("nuclear",),
}


class LANTON(LeanOptimizer):
    r"""LANTON (layer-wise noise-adaptive learning rates with operator norms).

    For every matrix or vector p, with gradient G, momentum B, direction O and noise estimate H::

        B = beta1 * B + (1 - beta1) * G
        O = argmax of <B, O> over the unit ball of the layer's norm
        H = beta2 * H + (1 - beta2) * dual_norm(G - G')^2          # G': another gradient of the same layer
        a = alpha / sqrt(alpha^2 + H)
        f = sqrt(a / a_max)                                        # a_max: over all layers with the same norm
        p = p * (1 - lr * weight_decay) - lr * f * radius * O

    :mod:`leanstep.optimizers.lanton.rule` has a function for each line. The least noisy layer of each norm moves by
    exactly ``lr * radius``, measured in that norm; noisier layers move less. A large ``alpha`` makes every f 1, a small
    one makes it (H_min / H)^(1/4). Multiplying all gradients by c has the effect of dividing alpha by c.

    One optimizer serves a whole model. Every group has a ``norm``; :func:`leanstep.optimizers.param_groups` sets it:

    ========  =====================  ==============================  ======================  =====================
    norm      for                    norm of the matrix (m, n)       dual norm               O
    ========  =====================  ==============================  ======================  =====================
    "rms"     hidden matrices        sqrt(n / m) * largest sing. v.  sqrt(m / n) * nuclear   sqrt(m / n) * U V^T
    "sign"    embeddings and heads   largest absolute entry          sum of absolute values  sign(B)
    "vector"  gains, biases          root mean square                sqrt(d) * l2 norm       B / RMS(B)
    ========  =====================  ==============================  ======================  =====================

    "auto" means "rms" for two or more dimensions and "vector" for the rest. A warning says so once, because embeddings
    and heads belong in groups with "sign". A stack (e, m, n) holds e matrices, each with its own H and f, since experts
    differ in noise as layers do. Convolutions are flattened to (m, rest). U V^T comes from
    :func:`leanstep.kernels.newton_schulz`.

    Args:
        params: parameters, named parameters, or groups.
        lr: the common step size, a number or a one-element tensor.
        betas: (beta1, beta2), of the momentum and of H. 0.95 is Muon's; 0.9 averages over about ten steps.
        alpha: the noise level sqrt(H) at which steps shrink. Next to a layer without noise, a layer with
            sqrt(H) = alpha has f = 0.84, one with ten times that 0.32. The unit is the dual norm of a gradient, which
            changes with model, batch size (H is proportional to 1 / batch), loss scale and clipping. Choose it by
            :meth:`noise_report`, per group if needed. "auto" (experimental) takes the median of sqrt(H) over the
            layers that share a maximum, at every step; f then depends on ratios of noise alone.
        weight_decay: decoupled, multiplied by lr and not by f.
        norm: the group's norm, see above.
        radius: size of the update in the group's norm, in units of lr. Scion takes larger radii for heads than for
            hidden matrices; its normalised sign is radius = 1 / n.
        scaling: of "rms". "scion", as in the table, bounds how much a matrix changes the root mean square of its
            output, whatever its shape. "muon" has 0.2 * sqrt(max(m, n)) in place of sqrt(m / n), as Moonlight does:
            entries move about as AdamW's do, so that AdamW's lr and decay fit. The dual norm has the same factor.
        nesterov: take the direction of ``beta1 * B + (1 - beta1) * G``, with the new B, in place of B.
        noise: where G' comes from. "previous": the gradient of the step before, kept in the state. E H is then twice
            the squared dual norm of one gradient's noise, plus the drift of the true gradient. "halves": the two halves
            of the step's micro-batches, separated by :meth:`mark_half`, on the same scale. There is no drift, and no
            gradient is kept between steps.
        noise_adaptive: False: f = 1 and nothing is estimated. This is the base optimizer (Scion or Muon on matrices,
            sign and vector rules), bit for bit what a very large alpha gives.
        noise_every: update H at one of so many steps, from two gradients that follow one another. An estimate costs
            more than half as much as an update, and H changes slowly.
        grouping: which layers share a maximum. "norm": all layers of a norm in the whole optimizer, over all groups,
            including layers without a gradient at this step; the paper speaks of "layers associated with the same
            norm". "role": the layers of a norm in groups with the same ``name``.
        ns_steps, ns_coefficients, ns_dtype: of Newton-Schulz. The defaults are Muon's five steps. dtype None: bf16
            where the device has matrix units for it, else fp32.
        nuclear: the estimator of the nuclear norm. "polar": three Newton-Schulz steps; a bias that all layers share
            cancels in f. "svd": exact, and slow. "frobenius": a lower bound without any product, too small by up to the
            square root of the rank. Use it for layers of similar shape.
        transposed: of a group whose matrices are stored (in, out), as in transformers' ``Conv1D``.
            :func:`leanstep.optimizers.param_groups` sets it, and ``flatten``.
        flatten: of a group whose tensors of three dimensions are single matrices (m, rest), not stacks: weights of
            one-dimensional convolutions.
        momentum_dtype: of B; None is the parameter's. The direction is taken of B as it is stored.
        noise_dtype: of the kept gradient or half; None is the parameter's. bf16 halves its memory for fp32 parameters
            and adds up to 2^-9 of the gradient to the noise.
        rounding, seed, maximize: as for :class:`leanstep.optimizers.Lion`.
        nonfinite: "skip": a parameter with a non-finite gradient is left alone with all its state, and counted; "raise"
            and "pass" as for Lion. A difference that is not finite never enters H.
        foreach: None or True: matrices of one shape in batches; False: one matrix at a time.

    Raises:
        ValueError, TypeError: settings out of range; a vector in a group of matrices or a matrix in one of vectors; a
            group with a norm and without parameters; matrices that are sharded along several dimensions; a saved state
            with a setting that this version does not have.
        RuntimeError: a sparse gradient; noise="halves" before the first :meth:`mark_half`, or in a compiled step.
        NonFiniteGradientError: see ``nonfinite``.

    Notes:
        At the first step there is no difference, and f = 1. A layer keeps f = 1 until its first estimate and does not
        enter the maximum. A layer without a gradient, or with a gradient of zeros (an expert without tokens), keeps H
        and G'.
        State: ``momentum_buffer`` and, for "previous", ``previous_grad``: 8 bytes per fp32 parameter, or 4 with
        "halves", which needs one more copy of the gradients from mark_half to the step; ``noise`` and ``noise_steps``,
        one number each per matrix; ``kahan_compensation``, ``master_param`` or ``step`` where ``rounding`` needs them.
        Memory during a step: differences or directions of a few matrices at a time (64 MB in fp32, or one matrix) and
        the buffers of Newton-Schulz. The maximum forces two passes: no parameter can be updated before all gradients
        are there.
        Under FSDP2, every matrix is gathered on one process, and the work is spread by its cost. A step takes three
        all-to-alls (differences, momenta, directions) and one all-reduce of four numbers per matrix, for the whole
        model. Replicated parameters send nothing.

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

    _shaped_state = ("momentum_buffer", "previous_grad")

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
        ns_steps: int = 5,
        ns_coefficients: str = "jordan",
        ns_dtype: torch.dtype | None = None,
        nuclear: str = "polar",
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
        defaults = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        self._check_group(defaults)
        super().__init__(params, defaults)
        _warn_how_auto_routes(self.param_groups)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_betas("LANTON", group["betas"])
        alpha = group["alpha"]
        if (isinstance(alpha, str) and alpha not in ALPHAS) or alpha == 0:
            raise ValueError(f"Invalid alpha: {alpha!r}; LANTON expects a number above 0, or 'auto'")
        if alpha != "auto":
            check_number("LANTON", "alpha", alpha, 0.0)
        check_number("LANTON", "radius", group["radius"], 0.0)
        for name, choices in (
            ("norm", NORMS), ("scaling", SCALINGS), ("noise", NOISES), ("grouping", GROUPINGS),
            ("nuclear", ESTIMATORS), ("ns_coefficients", COEFFICIENTS),
        ):  # fmt: skip
            check_choice("LANTON", name, group[name], choices)
        for name in ("noise_every", "ns_steps"):
            value = group[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Invalid {name}: {value!r}; LANTON expects an int of at least 1")
        check_flags("LANTON", group, ("nesterov", "noise_adaptive", "transposed", "flatten"))
        check_rounding("LANTON", group)
        if group["transposed"] and group["flatten"]:
            raise ValueError(
                "LANTON: transposed is for matrices and stacks of them, flatten for convolutions; choose one"
            )
        for name in ("momentum_dtype", "noise_dtype", "ns_dtype"):
            check_dtype("LANTON", name, group[name])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Raises ValueError, naming the parameter, where the norm does not fit a parameter's shape."""
        if isinstance(param_group, dict):
            # in every group from the start: torch.distributed.checkpoint reads the keys of a fresh optimizer
            param_group = {"noise_clock": 0, **halves.NOTHING, **param_group}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_norms(group, param_group)
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_norms(self, group: dict[str, Any], given: dict[str, Any]) -> None:
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

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict. ``noise`` and ``noise_steps`` of a single matrix have shape (), as in all versions.

        In the optimizer's state they are (1,): torch.compile loses in-place writes to 0-d fp64 inputs on a CPU.
        """
        packed = super().state_dict()
        return {**packed, "state": _reshaped_estimates(packed["state"], (1,), ())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, keeping the dtype each tensor was saved in.

        Raises:
            ValueError: as for every optimizer; a setting of an older version that this one does not have.
        """
        for group in state_dict["param_groups"]:
            settings = {"grouping": group.get("grouping"), **{name: group.get(name) for name in _DROPPED}}
            unknown = {k: v for k, v in settings.items() if v not in (None, *_DROPPED.get(k, GROUPINGS))}
            if unknown:
                raise ValueError(
                    f"LANTON: the state was saved with {unknown}, which this version does not have; nothing was "
                    "changed. Continue with the version that saved it, or start without the state."
                )
        groups = [{k: v for k, v in group.items() if k not in _DROPPED} for group in state_dict["param_groups"]]
        state = _reshaped_estimates(state_dict["state"], (), (1,))
        super().load_state_dict({**state_dict, "state": state, "param_groups": groups})

    # ---- the step

    def _init_state(self, group: dict[str, Any], position: int, param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = new_state(param, group["momentum_dtype"])
        init_rounding(state, param, effective("LANTON", group, position, param))
        if not group["noise_adaptive"]:
            return state
        if "noise" not in state:
            device = local(param).device
            count = matrix_count(Layer(group, param, state, norm_of(group, param)))
            state["noise"] = torch.zeros(count, dtype=estimate_dtype(device), device=device)
            # the number of estimates that H averages; -1 below, for want of a previous gradient to compare with
            state["noise_steps"] = torch.zeros(count, dtype=torch.float32, device=device)
        if group["noise"] == "previous" and "previous_grad" not in state:
            state["previous_grad"] = new_state(param, group["noise_dtype"])
            state["noise_steps"].fill_(-1)
        return state

    def _steps(self) -> list[Steps[None]]:
        """One rule for all groups: their layers share maxima."""
        for group in self._groups_with_halves():
            halves.check_marked(group)
        layers: list[LayerStep] = []
        first_index = 0
        for group in self.param_groups:
            layers += self._layer_steps(group, first_index)
            first_index += len(group["params"])
        # raise before anything is changed
        tasks_of([x for x in layers if x.norm == "rms"])
        stochastic = [x.shard for x in layers if x.rounding == "stochastic"]
        if stochastic:
            offsets_of(stochastic, local(layers[0].param).device)
        return [self._whole_step(layers)]

    def _whole_step(self, layers: list[LayerStep]) -> Steps[None]:
        yield from step(layers, self._estimated())
        for group in self._groups_with_halves():
            halves.forget(group, self.state)
        for group in self.param_groups:
            # stays below noise_every: torch.compile makes a graph for every value
            group["noise_clock"] = (group["noise_clock"] + 1) % group["noise_every"]

    def _layer_steps(self, group: dict[str, Any], first_index: int) -> Iterator[LayerStep]:
        """The parameters of a group that have a gradient, with their state.

        One step in ``noise_every`` measures; with "previous", the step before it keeps its gradient.
        """
        adaptive, previous = group["noise_adaptive"], group["noise"] == "previous"
        measures = adaptive and group["noise_clock"] == (1 % group["noise_every"] if previous else 0)
        for position, param, grad in self._with_gradient(group):
            state = self._init_state(group, position, param)
            yield LayerStep(
                group,
                param,
                state,
                norm_of(group, param),
                grad,
                effective("LANTON", group, position, param),
                shard_of(param),
                first_index + position,
                measures=measures and (previous or "half_grad" in state),
                keeps=adaptive and previous and group["noise_clock"] == 0,
            )

    def _estimated(self) -> list[Layer]:
        """The parameters that have an estimate."""
        return [
            Layer(group, param, self.state[param], norm_of(group, param))
            for group in self.param_groups
            if group["noise_adaptive"]
            for param in group["params"]
            if "noise" in self.state.get(param, {})
        ]

    def _groups_with_halves(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["noise_adaptive"] and group["noise"] == "halves"]

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
        """With ``noise="halves"``, call this after the backward passes of the first half of a step's micro-batches.

        It copies the gradients accumulated so far. ``step()`` compares the copies with the whole gradients and drops
        them::

            for i, batch in enumerate(micro_batches):
                (model(batch) / len(micro_batches)).backward()
                if 2 * (i + 1) == len(micro_batches):
                    optimizer.mark_half()
            optimizer.step()

        A step without a mark (a last batch of one micro-batch) leaves H unchanged. If gradients change between the last
        backward pass and the step (clipping, ``GradScaler.unscale_``), call :meth:`mark_whole` before they do.

        Args:
            fraction: share of the micro-batches done so far, in (0, 1); the two parts need not be equal.
            averaged: for parameters that every process holds whole. ``DistributedDataParallel`` averages gradients in
                the backward pass, except inside ``no_sync()``, which Accelerate's ``accumulate()`` uses before its last
                micro-batch. True: they have been averaged. False: average the copies here, by one more reduction of
                all gradients. None: there is one process, or parameters are sharded (FSDP2 reduces in every pass).
            process_group: the processes to average over; None: all.
            loss_scale: the factor of the loss, as in ``scaler.get_scale()``, if gradients still have it.

        Raises:
            RuntimeError: no group has noise="halves"; no parameter has a gradient.
            ValueError: a fraction outside (0, 1); ``averaged`` is None where it matters.
        """
        halves.mark_half(self._groups_with_halves(), self.state, fraction, averaged, process_group, loss_scale)

    @torch.no_grad()
    def mark_whole(self, *, loss_scale: float | Tensor = 1.0) -> None:
        """Take the difference of the halves now, after the last backward pass, before gradients are changed.

        H is then in units of the gradient as it was. Needed only if gradients are changed before ``step()``.

        Args:
            loss_scale: as for :meth:`mark_half`.

        Raises:
            RuntimeError: :meth:`mark_half` was never called.
        """
        halves.mark_whole(self._groups_with_halves(), self.state, loss_scale)

    # ---- reports

    def noise_report(self, norm: str | None = None) -> list[dict[str, Any]]:
        """Estimates and step sizes of all layers, to choose ``alpha`` by (reads the device).

        Args:
            norm: only layers of "rms", "sign" or "vector".

        Returns:
            One dict per matrix or vector that has had a gradient: ``name``; ``group``, the name of the maximum that it
            shares; ``norm``; ``H`` (None before the first estimate); ``factor`` f; ``lr``, the group's lr times f.
            A stack has one per matrix. Empty with ``noise_adaptive=False``.

        Raises:
            ValueError: no parameter has that norm.
        """
        norms = {norm_of(group, param) for group in self.param_groups for param in group["params"]}
        if norm is not None and norm not in norms:
            raise ValueError(f"LANTON: no parameter has norm {norm!r}; this optimizer has {sorted(norms)}")
        layers = self._estimated()
        if not layers:
            return []
        factors, noise, counts = (v.tolist() for v in factors_and_noise(layers, local(layers[0].param).device))
        names = {param: _name(group, i) for group in self.param_groups for i, param in enumerate(group["params"])}
        rows: list[dict[str, Any]] = []
        for layer in layers:
            stack = is_stack(layer.group, layer.norm, layer.param.dim())
            for k in range(matrix_count(layer)):
                i = len(rows)
                row = {
                    "name": names[layer.param] + (f"[{k}]" if stack else ""),
                    "group": maximum_of(layer),
                    "norm": layer.norm,
                    "H": noise[i] if counts[i] >= 1 else None,
                    "factor": factors[i],
                    "lr": float(layer.group["lr"]) * factors[i],
                }
                rows.append(row)
        return [row for row in rows if norm in (None, row["norm"])]

    def diagnostics(self) -> dict[str, float]:
        """``noise/NAME`` (H) and ``factor/NAME`` (f) of every parameter, for a log; means over the matrices of a stack.

        Parameters without an estimate have no entry. Reads the device.
        """
        values: dict[str, list[float]] = {}
        for row in self.noise_report():
            if row["H"] is not None:
                name = row["name"].partition("[")[0]
                values.setdefault(f"noise/{name}", []).append(row["H"])
                values.setdefault(f"factor/{name}", []).append(row["factor"])
        return {key: sum(numbers) / len(numbers) for key, numbers in values.items()}


def _reshaped_estimates(states: dict[Any, Any], old: tuple[int, ...], new: tuple[int, ...]) -> dict[Any, Any]:
    """States whose estimates of shape ``old`` are views of shape ``new``."""

    def reshaped(key: str, value: Any) -> Any:
        return value.reshape(new) if key in ("noise", "noise_steps") and value.shape == old else value

    return {
        param: {key: reshaped(key, value) for key, value in state.items()} if isinstance(state, dict) else state
        for param, state in states.items()
    }


def _name(group: dict[str, Any], position: int) -> str:
    names = group.get("param_names")
    return names[position] if names else f"{group.get('name', 'group')}.{position}"


def _warn_how_auto_routes(groups: list[dict[str, Any]]) -> None:
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
