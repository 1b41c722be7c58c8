"""One call that makes a model train N:M sparse, and the controller that moves masks and decay along while it trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from leanstep._torch import StepHooks, is_dtensor, local_part, whole_tensor
from leanstep.kernels.nm.mask import nm_mask
from leanstep.sparsity import sharding
from leanstep.sparsity.functional import s_ste_scale
from leanstep.sparsity.methods import METHODS, Method, resolve_schedule
from leanstep.sparsity.modules import SparseLayer, install, plan_layers
from leanstep.sparsity.patterns import NM
from leanstep.sparsity.schedules import Schedule, Stage
from leanstep.sparsity.scores import magnitude_times_gradient
from leanstep.sparsity.statistics import Measurement, layer_rows, summary
from leanstep.sparsity.transposable import transposable_mask

SCORES = ("magnitude", "gradient", "transposable")
Score = Callable[[SparseLayer, Tensor], Tensor]


def sparsify(
    model: nn.Module,
    patterns: Mapping[str, NM | str] | NM | str,
    *,
    schedule: Schedule | int | None = None,
    method: str | None = None,
    score: str | Score = "magnitude",
    grad_flow: str | None = None,
    srste_lambda: float | None = None,
    mask_every: int = 1,
    axis: str = "in",
    pad: str = "refuse",
    measure_every: int = 0,
) -> Controller:
    """Let layers of a model compute with N:M sparse weights, from dense ones that go on being trained.

    In every forward pass a chosen layer computes with ``W * (P + (1 - P) * alpha)``, where P keeps the N weights of
    highest score in every M, and alpha follows the schedule. The dense W stays the optimizer's parameter.

    ==================  =======================================  =====================================================
    method              schedule                                 gradient of W, from g of the weight computed with
    ==================  =======================================  =====================================================
    "ste"               any                                      g
    "srste"             any                                      g + lambda (1 - P) W, lambda = 2e-4
    "fixed"             any; P is made when the pattern changes  P g
    "mdgf-linear"       alpha falls linearly                     g; alpha g on pruned entries with grad_flow="decay"
    "mdgf-exponential"  alpha = exp(-c j)                        the same
    "sdgf-stepwise"     (M-1):M, M/2:M, ..., N:M                 g
    "sdgf-geometric"    8N:8M, 4N:4M, 2N:2M, N:M                 g
    "sdgf-...+mdgf-..." both at once                             g; alpha g with grad_flow="decay"
    "s-ste"             constant; computes with beta S(W)        g
    ==================  =======================================  =====================================================

    Args:
        model: any module. Linear layers, convolutions, ``nn.MultiheadAttention`` and transformers' ``Conv1D`` can be
            sparse. Changed in place.
        patterns: shell-style wildcards over layer names -> pattern, the first that matches decides; ``{"*.mlp.*":
            NM(1, 8), "*.q_proj": "2:4"}``. The projections of ``nn.MultiheadAttention`` have the names of their
            parameters (``attn.in_proj_weight``). A dense pattern such as ``NM(1, 1)`` leaves layers out; 0:M, which
            keeps nothing, is taken with a warning. One pattern alone is for every such layer but the output head that a
            transformers model names.
        schedule: how N:M is reached. A number means that many steps with the method's own kind of schedule; None is for
            methods that need none.
        method: of the table; None: what the kind of the schedule says, and "ste" for a constant one.
        score: "magnitude"; "gradient" (|W * its gradient|, of the last step); "transposable" (magnitudes under masks
            that are N:M along outputs, too: :func:`transposable_mask`, dearer than the others, see ``mask_every``); or
            a function of (layer, weight) that gives scores like the weight, of whose magnitudes the largest are kept.
        grad_flow: "ste", "decay" or "fixed"; None: the method's.
        srste_lambda: adds SR-STE's term to any method; None: the method's.
        mask_every: optimizer steps between two masks.
        axis: groups lie along a layer's inputs ("in"; in-channels of convolutions) or its outputs ("out").
        pad: what to do with rows that groups do not fill: "refuse", or "zero" for a shorter last group.
        measure_every: steps between two measurements for :meth:`Controller.statistics`; 0 measures never.

    Returns:
        The :class:`Controller`. Attach it to the optimizer, or call its ``step`` after every step.

    Raises:
        TypeError: for patterns that are none.
        ValueError: for a rule that matches no layer; M larger than a row, or no divisor of it; a layer that is
            parametrized, quantised or sharded already; tied weights with two patterns; settings that contradict each
            other. The model is unchanged then.

    Notes:
        Costs 1 byte per sparse weight for its mask, and the weight that is computed with, for as long as autograd keeps
        it. SR-STE's term is added to the gradient once per optimizer step, after any clipping and unscaling, where
        code that adds it in backward adds it once per use and micro batch, and scaled down by a loss scale. Tied
        weights are sparse wherever they are used. Sharding comes after this call; the optimizer may come before or
        after, but a run that resumes has to build it at the same place, since ``model.parameters()`` comes in another
        order afterwards and optimizers load their state by it.

    References:
        Zhou et al., arXiv 2102.04010 (SR-STE); Bambhaniya et al., arXiv 2402.04744 (MDGF, SDGF); Hu, Zhu, Chen,
        arXiv 2409.09099 (S-STE).

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> controller = sparsify(model, {"0": "2:4"}, schedule=100, method="mdgf-exponential").attach(optimizer)
    """
    chosen, plan = resolve_schedule(schedule, method)
    flow = grad_flow if grad_flow is not None else chosen.grad_flow
    weight_decay = chosen.srste_lambda if srste_lambda is None else srste_lambda
    _check_settings(chosen, plan, flow, weight_decay, score, mask_every, measure_every)
    layers = plan_layers(model, patterns, axis, pad)
    if chosen.continuous and any(layer.weight.shape[layer.dim] % layer.target.m for layer in layers):
        raise ValueError("sparsify: method 's-ste' needs rows that groups fill; pad='zero' is for the other methods")
    if score == "transposable":
        _check_tiles(layers)
    controller = Controller(layers, plan, chosen, score, weight_decay, mask_every, measure_every)
    empty = [f"{layer.name} ({layer.target})" for layer in layers if layer.target.n == 0]
    if empty:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        warnings.warn(f"sparsify: patterns 0:M prune every weight of {', '.join(empty[:5])}{more}", stacklevel=2)
    for layer in layers:
        install(layer, flow, chosen.continuous)
    _spare_from_broadcast(model, layers)
    controller.refresh()
    return controller


class Controller:
    """Keeps the masks and the decay of a model's sparse layers in step with its optimizer; made by :func:`sparsify`.

    All state lies in the model's parametrizations and goes with ``model.state_dict()``; :meth:`state_dict` has the same
    for whoever keeps weights elsewhere. The state is exact: the next step after loading is the step that would have
    been made.

    Attributes:
        layers: the sparse layers.
        schedule, method, srste_lambda, mask_every, measure_every: the settings.
    """

    def __init__(
        self,
        layers: list[SparseLayer],
        schedule: Schedule,
        method: Method,
        score: str | Score,
        srste_lambda: float,
        mask_every: int,
        measure_every: int,
    ) -> None:
        self.layers, self.schedule, self.method, self.score = layers, schedule, method, score
        self.srste_lambda, self.mask_every, self.measure_every = srste_lambda, mask_every, measure_every
        self.measured: dict[str, Measurement] = {}
        self._hooks: StepHooks | None = None

    @property
    def step_count(self) -> int:
        """Optimizer steps made."""
        return self.layers[0].transform.steps

    def stage(self, layer: SparseLayer | None = None) -> Stage:
        """What the schedule says now, for one layer (the first one by default)."""
        return self._stage(layer or self.layers[0], self.step_count)

    @property
    def finished(self) -> bool:
        """Whether every layer has arrived at its own N:M, and computes with zeros."""
        stages = [self.stage(layer) for layer in self.layers]
        return all(s.alpha == 0 and s.pattern == layer.target for s, layer in zip(stages, self.layers, strict=True))

    def attach(self, optimizer: torch.optim.Optimizer) -> Controller:
        """Follow an optimizer by hooks around its ``step``, with or without a closure. Returns the controller.

        Any number of backward passes may lie between two steps. Steps that a gradient scaler skips do not count.

        Raises:
            TypeError: for anything but a torch optimizer. Accelerate's wrapper is one.
            ValueError: if the controller is attached already, the optimizer does not train the sparse weights, or
                they are sharded across groups.
        """
        if self._hooks is not None:
            raise ValueError("Controller.attach: attached already; call detach first, or each step would count twice")
        for layer in self.layers:
            sharding.check(layer)
        self._hooks = StepHooks(
            optimizer, self.before_step, lambda _: self.step(), caller="Controller.attach",
            parameters={layer.names[0]: layer.weight for layer in self.layers},
        )  # fmt: skip
        if self.step_count == 0:
            # wrapping and sharding may have replaced the weights, by those of another process
            self.refresh()
        return self

    def detach(self) -> None:
        """Let go of the optimizer; masks and decay stay as they are."""
        if self._hooks is not None:
            self._hooks.remove()
        self._hooks = None

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Measure the gradients that a step is about to use, and add SR-STE's term to them.

        :meth:`attach` calls it, after every call of a closure too. The gradients of sparse weights change where
        ``srste_lambda`` is not 0.
        """
        self._check_installed()
        if self._measures(self.step_count + 1):
            for layer in self.layers:
                self._measurement(layer).see_gradient(layer)
        if self.srste_lambda:
            # a fused optimizer unscales gradients inside its step
            scale = getattr(optimizer, "grad_scale", None)
            factor = self.srste_lambda if scale is None else self.srste_lambda * scale
            for layer in self.layers:
                if layer.weight.grad is not None:
                    gradient, weight, mask = sharding.local_parts(layer)
                    gradient.add_((weight * factor).to(gradient.dtype).masked_fill_(mask, 0))

    @torch.no_grad()
    def step(self) -> None:
        """Count a step of the optimizer, and bring masks and decay to where the next one needs them.

        Raises:
            ValueError: where the model's parametrizations are gone: it was squashed.
        """
        self._check_installed()
        for layer in self.layers:
            layer.transform.steps += 1
        self._advance(self._measures(self.step_count))

    @torch.no_grad()
    def refresh(self) -> None:
        """Make masks anew from the weights as they are now, without counting a step: after weights were replaced.

        Loading a checkpoint needs no refresh, since it brings its masks. Masks that a method keeps fixed are made anew,
        too. Where weights are sharded, every process has to call it.
        """
        self._check_installed()
        self._advance(measure=False, always=True)

    def statistics(self) -> list[dict[str, Any]]:
        """One row for each sparse layer; see :func:`leanstep.sparsity.statistics.layer_rows`.

        Waits for the device. Where weights are sharded, every process has to call it.
        """
        return layer_rows(self)

    def diagnostics(self) -> dict[str, float]:
        """The same as a flat dict of numbers for a log, ``WHAT/LAYER``; see :func:`statistics.summary`."""
        return summary(self)

    def masks_of(self, params: Iterable[Tensor | tuple[str, Tensor]]) -> list[Tensor | None]:
        """The masks of parameters as they are now, in order: True where a weight is kept, None for what is not sparse.

        For optimizers that take masks, where these stay (method "fixed", a frozen last phase). Pruned weights stay out
        of the window of ``MFAC([{"params": params, "masks": controller.masks_of(params)}])``. ``params`` can be named;
        it is a list there, since ``model.parameters()`` can be gone through once only.

        Raises:
            ValueError: where weights are sharded; build the optimizer before.
        """
        masks = {id(layer.weight): layer for layer in self.layers}
        found: list[Tensor | None] = []
        for entry in params:
            layer = masks.get(id(entry[1] if isinstance(entry, tuple) else entry))
            if layer is not None and is_dtensor(layer.weight):
                raise ValueError(f"Controller.masks_of: the weight of layer {layer.name!r} is sharded; call it before")
            found.append(None if layer is None else layer.transform.mask.clone())
        return found

    def state_dict(self) -> dict[str, Any]:
        """Masks, decay and the number of steps made, by layer. ``model.state_dict()`` has it, too."""
        return {layer.name: layer.transform.get_extra_state() for layer in self.layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a controller of the same layers.

        Raises:
            ValueError: for other layers or patterns; nothing is changed then.
        """
        own = {layer.name for layer in self.layers}
        if own != set(state):
            raise ValueError(
                f"Controller.load_state_dict: the state is of other layers; missing {sorted(own - set(state))[:5]}, "
                f"unknown {sorted(set(state) - own)[:5]}"
            )
        for layer in self.layers:
            layer.transform.check_state(state[layer.name])
        for layer in self.layers:
            layer.transform.set_extra_state(state[layer.name])

    def _measurement(self, layer: SparseLayer) -> Measurement:
        return self.measured.setdefault(layer.name, Measurement())

    def _measures(self, step: int) -> bool:
        return self.measure_every > 0 and (step == 1 or step % self.measure_every == 0)

    def _stage(self, layer: SparseLayer, step: int) -> Stage:
        stage = self.schedule.at(step, layer.target)
        if stage.phase == "dense":
            return stage
        shape = layer.weight.shape
        sizes = shape if self.score == "transposable" else (shape[layer.dim],)
        return stage._replace(pattern=_that_fits(stage.pattern, layer.target, sizes))

    def _advance(self, measure: bool, always: bool = False) -> None:
        """Bring every layer to the stage of its step, masks of like layers in one call."""
        due: dict[tuple[Any, ...], list[SparseLayer]] = {}
        for layer in self.layers:
            transform, stage = layer.transform, self._stage(layer, layer.transform.steps)
            transform.alpha.fill_(stage.alpha)
            if measure:
                self._measurement(layer).see_no_change(layer)
            if not (always or self._is_due(layer, stage)):
                continue
            if self.method.continuous and transform.pattern != stage.pattern and stage.phase != "dense":
                transform.beta.fill_(s_ste_scale(whole_tensor(layer.weight.detach()), stage.pattern, dim=layer.dim))
            transform.pattern = stage.pattern
            if stage.pattern.is_dense:
                transform.mask.fill_(True)
                layer.transform.local_mask = None
            else:
                weight = layer.weight
                due.setdefault((stage.pattern, layer.dim, weight.device, weight.dtype), []).append(layer)
        for (pattern, dim, *_), layers in due.items():
            self._renew(layers, pattern, dim, measure)

    def _is_due(self, layer: SparseLayer, stage: Stage) -> bool:
        if layer.transform.pattern != stage.pattern:
            return True
        kept = self.method.fixed or (self.schedule.freeze_mask_in_finetune and stage.phase == "finetune")
        return not kept and stage.phase != "dense" and layer.transform.steps % self.mask_every == 0

    def _renew(self, layers: list[SparseLayer], pattern: NM, dim: int, measure: bool) -> None:
        scores = [self._score(layer) for layer in layers]
        masks = [sharding.mask_part(layer) for layer in layers]
        before = [mask.clone() for mask in masks] if measure else []
        if self.score == "transposable":
            for score, mask in zip(scores, masks, strict=True):
                mask.copy_(transposable_mask(score, pattern))
        else:
            _fill_masks(scores, pattern, dim, masks)
        for i, layer in enumerate(layers):
            sharding.share_mask(layer, masks[i])
            if measure:
                self._measurement(layer).see_masks(layer, before[i], masks[i])

    def _score(self, layer: SparseLayer) -> Tensor:
        weight = local_part(layer.weight.detach())
        if callable(self.score):
            score = local_part(self.score(layer, layer.weight.detach()))
            if score.shape != weight.shape:
                raise ValueError(
                    f"sparsify: the score of layer {layer.name!r} has shape {tuple(score.shape)}, its weight "
                    f"{tuple(weight.shape)}"
                )
            return score
        if self.score == "transposable" and is_dtensor(layer.weight):
            raise ValueError(
                f"sparsify: score 'transposable' needs whole matrices, and {layer.name!r} is sharded; train under DDP, "
                "or with another score"
            )
        if self.score == "gradient" and layer.weight.grad is not None:
            return magnitude_times_gradient(weight, local_part(layer.weight.grad))
        return weight

    def _check_installed(self) -> None:
        gone = [layer.name for layer in self.layers if not layer.installed]
        if gone:
            raise ValueError(
                f"the sparse parametrization of {', '.join(gone[:5])} is gone (squash removes it); training on would "
                "fill the zeros: call detach() first if that is what you want"
            )


def _check_settings(
    method: Method, schedule: Schedule, flow: str, factor: float, score: Any, mask_every: int, measure_every: int
) -> None:
    """The settings of :func:`sparsify` that do not depend on the model."""
    for name, accepted, expected, value in (
        ("grad_flow", flow in ("ste", "decay", "fixed"), "'ste', 'decay' or 'fixed'", flow),
        ("srste_lambda", 0 <= factor < float("inf"), ">= 0", factor),
        ("score", callable(score) or score in SCORES, f"a function or one of {SCORES}", score),
        ("mask_every", isinstance(mask_every, int) and mask_every >= 1, "an integer >= 1", mask_every),
        ("measure_every", isinstance(measure_every, int) and measure_every >= 0, "an integer >= 0", measure_every),
    ):
        if not accepted:
            raise ValueError(f"sparsify: {name} must be {expected}, got {value!r}")
    if method.continuous and (schedule.kind != "constant" or flow != "ste" or factor or score != "magnitude"):
        raise ValueError("sparsify: method 's-ste' has a rule of its own: a constant schedule, magnitudes, no SR-STE")


def _check_tiles(layers: list[SparseLayer]) -> None:
    """Refuse layers that M x M tiles do not fill."""
    for layer in layers:
        shape, m = tuple(layer.weight.shape), layer.target.m
        if len(shape) != 2 or shape[0] % m or shape[1] % m:
            raise ValueError(
                f"sparsify: score 'transposable' needs matrices that tiles of {m} x {m} fill, and {layer.name!r} has a "
                f"weight of shape {shape}; leave it out of the patterns, or give it another one"
            )


def _that_fits(pattern: NM, target: NM, sizes: Iterable[int]) -> NM:
    """A coarse pattern on the way to the target, halved until its groups fill rows of ``sizes`` as the target's do."""
    while pattern.m > target.m and any(
        pattern.m > size or (size % pattern.m and size % target.m == 0) for size in sizes
    ):
        pattern = NM(pattern.n // 2, pattern.m // 2)
    return pattern


def _fill_masks(scores: list[Tensor], pattern: NM, dim: int, out: list[Tensor]) -> None:
    """Masks of scores that are alike, all in one call; rows that groups do not fill end in a shorter one."""
    sizes = {score.shape[dim] for score in scores}
    for size in sizes:
        alike = [i for i, score in enumerate(scores) if score.shape[dim] == size]
        rest = size % pattern.m
        for start, length, n, m in (
            (0, size - rest, pattern.n, pattern.m),
            (size - rest, rest, min(pattern.n, rest), rest),
        ):
            if length:
                parts = [[tensors[i].narrow(dim, start, length) for i in alike] for tensors in (scores, out)]
                nm_mask(parts[0], n, m, dim=dim, out=parts[1])


def _spare_from_broadcast(model: nn.Module, layers: list[SparseLayer]) -> None:
    """Keep DDP from sending masks around before every forward pass: they follow from weights that are equal already."""
    chosen = {id(layer.transform): layer for layer in layers}
    names = [
        f"{name}.{buffer}"
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in chosen
        for buffer in ("mask", "alpha", "beta")
    ]
    known = list(getattr(model, "_ddp_params_and_buffers_to_ignore", []))
    model._ddp_params_and_buffers_to_ignore = [*known, *names]  # type: ignore[assignment]


__all__ = ["METHODS", "SCORES", "Controller", "sparsify"]
