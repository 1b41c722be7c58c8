"""The controller: updates masks and decay after every optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from leanstep._torch import StepHooks, is_dtensor, local_part, whole_tensor
from leanstep.sparsity.functional import s_ste_scale, srste_term
from leanstep.sparsity.patterns import NM
from leanstep.sparsity.training.masks import fill_masks
from leanstep.sparsity.training.methods import Method
from leanstep.sparsity.training.modules import SparseLayer
from leanstep.sparsity.training.schedules import Schedule, Stage
from leanstep.sparsity.training.scores import magnitude_times_gradient
from leanstep.sparsity.training.transposable import transposable_mask

Score = Callable[[SparseLayer, Tensor], Tensor]


class Controller:
    """Updates the masks and the decay of a model's sparse layers after every optimizer step; :func:`sparsify` makes it.

    The model's parametrizations hold all state, so ``model.state_dict()`` contains it; :meth:`state_dict` returns only
    this state. A run that loads it continues exactly.

    Attributes:
        layers: the sparse layers.
        schedule, method, score, srste_lambda, mask_every, measure_every: the settings of :func:`sparsify`.
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
        # the last measurements by layer: 0-d tensors on its device, so that measuring does not wait for the device
        self.flip_rates: dict[str, Tensor] = {}
        self.gradient_noise: dict[str, Tensor] = {}
        self._hooks: StepHooks | None = None
        # torch's counts of the writes to the weights that the masks of attach were made of
        self._attached_to: list[int] | None = None

    @property
    def step_count(self) -> int:
        """Number of optimizer steps and skipped steps so far."""
        return self.layers[0].transform.steps

    def stage(self, layer: SparseLayer | None = None) -> Stage:
        """The current pattern, alpha and phase of one layer (by default, the first)."""
        layer = layer or self.layers[0]
        stage = self.schedule.at(layer.transform.steps, layer.target)
        if stage.phase == "dense":
            return stage
        shape = layer.weight.shape
        sizes = shape if self.score == "transposable" else (shape[layer.dim],)
        return stage._replace(pattern=_fitting_pattern(stage.pattern, layer.target, sizes))

    @property
    def finished(self) -> bool:
        """Whether every layer has reached its target pattern with alpha 0."""
        stages = [self.stage(layer) for layer in self.layers]
        return all(s.alpha == 0 and s.pattern == layer.target for s, layer in zip(stages, self.layers, strict=True))

    def attach(self, optimizer: torch.optim.Optimizer) -> Controller:
        """Follow an optimizer with hooks around its ``step``, with or without a closure. Returns the controller.

        Any number of backward passes may lie between two steps. Steps that a gradient scaler skips do not count, unless
        :meth:`skip` counts them. Wrap the model in DistributedDataParallel before: it gives all processes the weights
        of the first one. Where it does so later, the passes before the first step run with each process's own masks.

        Raises:
            TypeError: for anything but a torch optimizer (Accelerate's wrapper counts as one).
            ValueError: if the controller is attached already, the optimizer does not train the sparse weights, a
                weight is sharded across its groups, or SR-STE's term, measurements or the score "gradient" need the
                gradients that :func:`leanstep.release_gradients` has freed.
        """
        if self._hooks is not None:
            raise ValueError("Controller.attach: attached already; call detach first, or each step would count twice")
        for layer in self.layers:
            layer.check_sharding()
        self._hooks = StepHooks(
            optimizer, self.before_step, lambda _: self.step(), caller="Controller.attach",
            parameters={layer.names[0]: layer.weight for layer in self.layers},
            reads_gradients=bool(self.srste_lambda or self.measure_every or self.score == "gradient"),
        )  # fmt: skip
        if self.step_count == 0:
            # wrapping or sharding may have replaced the weights by those of another process
            self.refresh()
            self._attached_to = self._writes()
        return self

    def detach(self) -> None:
        """Remove the hooks from the optimizer; masks and decay stay as they are."""
        if self._hooks is not None:
            self._hooks.remove()
        self._hooks = None

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Measure the gradients before a step, and add SR-STE's term to them unless ``srste_lambda`` is 0.

        The hooks of :meth:`attach` call this, also after every call of a closure.
        """
        self._check_installed()
        if self._attached_to is not None:
            self._follow_broadcast()
        if self._measures(self.step_count + 1):
            for layer in self.layers:
                self._measure_gradient(layer)
        if self.srste_lambda:
            # a fused optimizer unscales gradients inside its step
            scale = getattr(optimizer, "grad_scale", None)
            factor = self.srste_lambda if scale is None else self.srste_lambda * scale
            for layer in self.layers:
                if layer.weight.grad is not None:
                    gradient, weight = local_part(layer.weight.grad), local_part(layer.weight.detach())
                    gradient.add_(srste_term(weight, layer.local_mask(), factor).to(gradient.dtype))

    @torch.no_grad()
    def step(self) -> None:
        """Count an optimizer step, and update masks and decay for the next one.

        Raises:
            ValueError: if the model has lost its parametrizations, as after :func:`squash`.
        """
        self._check_installed()
        for layer in self.layers:
            layer.transform.steps += 1
        self._advance(self._measures(self.step_count))

    @torch.no_grad()
    def skip(self) -> None:
        """Count a step that changed no weight, so that the schedule ends with the run: pattern and alpha go on.

        Masks change only where the pattern does, there by magnitudes in place of the score "gradient". If weights are
        sharded, every process has to call it.

        Raises:
            ValueError: if the model has lost its parametrizations, as after :func:`squash`.
        """
        self._check_installed()
        for layer in self.layers:
            layer.transform.steps += 1
        self._advance(measure=False, skipped=True)

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute all masks, fixed ones too, and S-STE's scale from the current weights, without counting a step.

        Call it after replacing weights; a loaded checkpoint contains its masks. If weights are sharded, every process
        has to call it.
        """
        self._check_installed()
        self._advance(measure=False, always=True)

    def statistics(self) -> list[dict[str, Any]]:
        """One row for each sparse layer.

        * ``layer``, ``target``: name and final pattern. ``pattern``, ``alpha``, ``phase``: the schedule's current
          values. ``weights``: number of weights.
        * ``sparsity``: fraction of exact zeros in the masked weight; 0 while pruned weights only decay.
        * ``kept_magnitude``: sum of the unpruned weights' magnitudes, divided by the sum of all magnitudes.
        * ``flip_rate``: fraction of mask entries that the last measured step changed (a swap changes two; Hu et al.,
          arXiv 2404.01847, judge the decay of pruned weights by it).
        * ``gradient_noise``: fraction of the last measured gradient's squared norm that falls on pruned entries, before
          SR-STE's term; this part updates weights that the forward pass does not use. ``1 - N/M`` for a gradient
          independent of the mask, 0 with ``grad_flow="fixed"``.

        The last two are None before the first measurement (``measure_every``). Waits for the device. If weights are
        sharded, every process has to call it.
        """
        measurements = [self._measurements(layer) for layer in self.layers]
        # wait for the device once for all layers
        values = torch.stack([row.to(measurements[0].device) for row in measurements]).tolist()
        rows = []
        for layer, (density, magnitude, flips, noise) in zip(self.layers, values, strict=True):
            stage = self.stage(layer)
            rows.append(
                {
                    "layer": layer.name,
                    "target": str(layer.target),
                    "pattern": str(layer.transform.pattern),
                    "phase": stage.phase,
                    "alpha": stage.alpha,
                    "sparsity": 1 - density if stage.alpha == 0 else 0.0,
                    "kept_magnitude": magnitude,
                    "flip_rate": None if flips < 0 else flips,
                    "gradient_noise": None if noise < 0 else noise,
                    "weights": layer.transform.mask.numel(),
                }
            )
        return rows

    def diagnostics(self) -> dict[str, float]:
        """The :meth:`statistics` as numbers for a log.

        Keys: ``sparsity/all`` over all sparse layers, ``alpha/TARGET``, and ``KEY/LAYER`` for the keys ``sparsity``,
        ``flip_rate``, ``kept_magnitude`` and ``gradient_noise``.
        """
        rows = self.statistics()
        zeros = sum(row["sparsity"] * row["weights"] for row in rows)
        numbers = {"sparsity/all": zeros / sum(row["weights"] for row in rows)}
        numbers |= {f"alpha/{row['target']}": row["alpha"] for row in rows}
        for key in ("sparsity", "flip_rate", "kept_magnitude", "gradient_noise"):
            numbers |= {f"{key}/{row['layer']}": row[key] for row in rows if row[key] is not None}
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """Mask, decay and number of steps of every layer, by name. ``model.state_dict()`` contains them too."""
        return {layer.name: layer.transform.get_extra_state() for layer in self.layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the :meth:`state_dict` of a controller of the same layers.

        Raises:
            ValueError: for a state of other layers or patterns; nothing is changed.
        """
        names = {layer.name for layer in self.layers}
        if names != set(state):
            raise ValueError(
                f"Controller.load_state_dict: the state is of other layers; missing {sorted(names - set(state))[:5]}, "
                f"unknown {sorted(set(state) - names)[:5]}"
            )
        for layer in self.layers:
            layer.transform.check_state(state[layer.name])
        for layer in self.layers:
            layer.transform.set_extra_state(state[layer.name])

    def _writes(self) -> list[int]:
        return [local_part(layer.weight)._version for layer in self.layers]

    def _follow_broadcast(self) -> None:
        """Before the first step: recompute masks if the weights were replaced since :meth:`attach`.

        DistributedDataParallel broadcasts weights when it wraps a model, and no masks.
        """
        before, self._attached_to = self._attached_to, None
        replicated = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.step_count or not replicated or before == self._writes() or is_dtensor(self.layers[0].weight):
            return
        weights = [layer.weight for layer in self.layers]
        gradients = [weight.grad for weight in weights]
        try:
            for weight in weights:
                # attach scored without gradients, too
                weight.grad = None
            self.refresh()
        finally:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient

    def _measures(self, step: int) -> bool:
        return self.measure_every > 0 and (step == 1 or step % self.measure_every == 0)

    def _measure_gradient(self, layer: SparseLayer) -> None:
        if layer.weight.grad is None:
            return
        squares = local_part(layer.weight.grad).float().square()
        sums = torch.stack([squares.sum(), torch.where(layer.local_mask(), squares, 0.0).sum()])
        total, unpruned = layer.total(sums)
        noise = 1 - unpruned / total.clamp_min(torch.finfo(torch.float32).tiny)
        self.gradient_noise[layer.name] = noise.clamp(0, 1)

    @torch.no_grad()
    def _measurements(self, layer: SparseLayer) -> Tensor:
        """Density, ``kept_magnitude``, flip rate and gradient noise (-1 if unknown): fp64 [4]."""
        mask, magnitude = layer.local_mask(), local_part(layer.weight.detach()).abs()
        sums = torch.stack([t.sum(dtype=torch.float64) for t in (mask, torch.where(mask, magnitude, 0), magnitude)])
        count, kept_magnitude, total_magnitude = layer.total(sums)
        fraction = torch.where(total_magnitude > 0, kept_magnitude / total_magnitude, torch.ones_like(kept_magnitude))
        unknown = torch.full((), -1.0, device=sums.device)
        measured = (values.get(layer.name, unknown) for values in (self.flip_rates, self.gradient_noise))
        return torch.stack([count / layer.transform.mask.numel(), fraction, *(number.double() for number in measured)])

    def _advance(self, measure: bool, *, always: bool = False, skipped: bool = False) -> None:
        """Set every layer's alpha and mask for its step, batching layers of one pattern, device and dtype."""
        due: dict[tuple[Any, ...], list[SparseLayer]] = {}
        for layer in self.layers:
            transform, stage = layer.transform, self.stage(layer)
            transform.alpha.fill_(stage.alpha)
            if measure:
                self.flip_rates[layer.name] = torch.zeros((), device=transform.mask.device)
            # a skipped step leaves the weights, and its gradient must not score
            due_now = transform.pattern != stage.pattern if skipped else self._is_due(layer, stage)
            if not (always or due_now):
                continue
            new = always or transform.pattern != stage.pattern
            if self.method.continuous and new and stage.phase != "dense":
                transform.beta.fill_(s_ste_scale(whole_tensor(layer.weight.detach()), stage.pattern, dim=layer.dim))
            transform.pattern = stage.pattern
            if stage.pattern.is_dense:
                transform.mask.fill_(True)
                layer.transform.local_mask = None
            else:
                weight = layer.weight
                due.setdefault((stage.pattern, layer.dim, weight.device, weight.dtype), []).append(layer)
        for (pattern, dim, *_), layers in due.items():
            self._update_masks(layers, pattern, dim, measure, skipped)

    def _is_due(self, layer: SparseLayer, stage: Stage) -> bool:
        if layer.transform.pattern != stage.pattern:
            return True
        frozen = self.method.fixed or (self.schedule.freeze_mask_in_finetune and stage.phase == "finetune")
        return not frozen and stage.phase != "dense" and layer.transform.steps % self.mask_every == 0

    def _update_masks(self, layers: list[SparseLayer], pattern: NM, dim: int, measure: bool, skipped: bool) -> None:
        scores = [self._score(layer, skipped) for layer in layers]
        for layer in layers:
            layer.check_sharding()
        masks = [layer.local_mask() for layer in layers]
        before = [mask.clone() for mask in masks] if measure else []
        if self.score == "transposable":
            for score, mask in zip(scores, masks, strict=True):
                mask.copy_(transposable_mask(score, pattern))
        else:
            fill_masks(scores, pattern, dim, masks)
        for i, layer in enumerate(layers):
            layer.gather_mask(masks[i])
            if measure:
                flips = layer.total((before[i] ^ masks[i]).sum(dtype=torch.float32))
                self.flip_rates[layer.name] = flips / layer.transform.mask.numel()

    def _score(self, layer: SparseLayer, skipped: bool) -> Tensor:
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
        # the gradient of a skipped step may be non-finite
        if self.score == "gradient" and not skipped and layer.weight.grad is not None:
            return magnitude_times_gradient(weight, local_part(layer.weight.grad))
        return weight

    def _check_installed(self) -> None:
        removed = [layer.name for layer in self.layers if not layer.installed]
        if removed:
            raise ValueError(
                f"the sparse parametrization of {', '.join(removed[:5])} is gone (squash removes it); a step would "
                "fill the zeros: call detach() first to train dense"
            )


def _fitting_pattern(pattern: NM, target: NM, sizes: Iterable[int]) -> NM:
    """Halve a pattern on its way to the target until its groups fill rows of ``sizes`` as the target's do."""
    while pattern.m > target.m and any(
        pattern.m > size or (size % pattern.m and size % target.m == 0) for size in sizes
    ):
        pattern = NM(pattern.n // 2, pattern.m // 2)
    return pattern
