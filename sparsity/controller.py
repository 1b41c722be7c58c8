"""The controller: updates masks and decay after every optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leanstep._torch import StepHooks, is_dtensor, local_part, whole_tensor
from leanstep.sparsity import sharding
from leanstep.sparsity.functional import s_ste_scale, srste_term
from leanstep.sparsity.masks import fill_masks
from leanstep.sparsity.modules import SparseLayer
from leanstep.sparsity.patterns import NM
from leanstep.sparsity.schedules import Schedule, Stage
from leanstep.sparsity.scores import magnitude_times_gradient
from leanstep.sparsity.statistics import Measurement, layer_rows, summary
from leanstep.sparsity.transposable import transposable_mask

if TYPE_CHECKING:
    from leanstep.sparsity.methods import Method

Score = Callable[[SparseLayer, Tensor], Tensor]


class Controller:
    """Updates the masks and the decay of a model's sparse layers after every optimizer step; :func:`sparsify` makes it.

    The model's parametrizations hold all state, so ``model.state_dict()`` contains it; :meth:`state_dict` returns only
    this state. A run that loads it continues exactly.

    Attributes:
        layers: the sparse layers.
        schedule, method, srste_lambda, mask_every, measure_every: the settings of :func:`sparsify`.
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
        """Number of optimizer steps so far."""
        return self.layers[0].transform.steps

    def stage(self, layer: SparseLayer | None = None) -> Stage:
        """The current pattern, alpha and phase of one layer (by default, the first)."""
        return self._stage(layer or self.layers[0], self.step_count)

    @property
    def finished(self) -> bool:
        """Whether every layer has reached its target pattern with alpha 0."""
        stages = [self.stage(layer) for layer in self.layers]
        return all(s.alpha == 0 and s.pattern == layer.target for s, layer in zip(stages, self.layers, strict=True))

    def attach(self, optimizer: torch.optim.Optimizer) -> Controller:
        """Follow an optimizer with hooks around its ``step``, with or without a closure. Returns the controller.

        Any number of backward passes may lie between two steps. Steps that a gradient scaler skips do not count.

        Raises:
            TypeError: for anything but a torch optimizer (Accelerate's wrapper counts as one).
            ValueError: if the controller is attached already, the optimizer does not train the sparse weights, or a
                weight is sharded across its groups.
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
            # wrapping or sharding may have replaced the weights with those of another process
            self.refresh()
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
        if self._measures(self.step_count + 1):
            for layer in self.layers:
                self._measurement(layer).record_gradient(layer)
        if self.srste_lambda:
            # a fused optimizer unscales gradients inside its step
            scale = getattr(optimizer, "grad_scale", None)
            factor = self.srste_lambda if scale is None else self.srste_lambda * scale
            for layer in self.layers:
                if layer.weight.grad is not None:
                    gradient, weight, mask = sharding.local_parts(layer)
                    gradient.add_(srste_term(weight, mask, factor).to(gradient.dtype))

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
    def refresh(self) -> None:
        """Recompute all masks, fixed ones too, from the current weights, without counting a step.

        Call it after replacing weights; a loaded checkpoint contains its masks. If weights are sharded, every process
        has to call it.
        """
        self._check_installed()
        self._advance(measure=False, always=True)

    def statistics(self) -> list[dict[str, Any]]:
        """One row for each sparse layer; see :func:`leanstep.sparsity.statistics.layer_rows`.

        Waits for the device. If weights are sharded, every process has to call it.
        """
        return layer_rows(self)

    def diagnostics(self) -> dict[str, float]:
        """The statistics as a flat dict ``WHAT/LAYER`` for a log; see :func:`statistics.summary`."""
        return summary(self)

    def masks_of(self, params: Iterable[Tensor | tuple[str, Tensor]]) -> list[Tensor | None]:
        """Copies of the parameters' current masks in order: True for unpruned weights, None for a dense parameter.

        Pass them to optimizers that take masks, if the masks are fixed (method "fixed", or a frozen last phase):
        ``MFAC([{"params": params, "masks": controller.masks_of(params)}])`` keeps pruned weights out of its window.
        ``params`` is a list, with or without names, since ``model.parameters()`` can be iterated only once.

        Raises:
            ValueError: if weights are sharded; build the optimizer before sharding.
        """
        layers = {id(layer.weight): layer for layer in self.layers}
        masks: list[Tensor | None] = []
        for entry in params:
            layer = layers.get(id(entry[1] if isinstance(entry, tuple) else entry))
            if layer is not None and is_dtensor(layer.weight):
                raise ValueError(f"Controller.masks_of: the weight of layer {layer.name!r} is sharded; call it before")
            masks.append(None if layer is None else layer.transform.mask.clone())
        return masks

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
        return stage._replace(pattern=_fitting_pattern(stage.pattern, layer.target, sizes))

    def _advance(self, measure: bool, always: bool = False) -> None:
        """Set every layer's alpha and mask for its step, batching layers of one pattern, device and dtype."""
        due: dict[tuple[Any, ...], list[SparseLayer]] = {}
        for layer in self.layers:
            transform, stage = layer.transform, self._stage(layer, layer.transform.steps)
            transform.alpha.fill_(stage.alpha)
            if measure:
                self._measurement(layer).record_no_change(layer)
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
        frozen = self.method.fixed or (self.schedule.freeze_mask_in_finetune and stage.phase == "finetune")
        return not frozen and stage.phase != "dense" and layer.transform.steps % self.mask_every == 0

    def _renew(self, layers: list[SparseLayer], pattern: NM, dim: int, measure: bool) -> None:
        scores = [self._score(layer) for layer in layers]
        for layer in layers:
            sharding.check(layer)
        masks = [sharding.local_mask(layer) for layer in layers]
        before = [mask.clone() for mask in masks] if measure else []
        if self.score == "transposable":
            for score, mask in zip(scores, masks, strict=True):
                mask.copy_(transposable_mask(score, pattern))
        else:
            fill_masks(scores, pattern, dim, masks)
        for i, layer in enumerate(layers):
            sharding.gather_mask(layer, masks[i])
            if measure:
                self._measurement(layer).record_masks(layer, before[i], masks[i])

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


def _fitting_pattern(pattern: NM, target: NM, sizes: Iterable[int]) -> NM:
    """Halve a pattern on its way to the target until its groups fill rows of ``sizes`` as the target's do."""
    while pattern.m > target.m and any(
        pattern.m > size or (size % pattern.m and size % target.m == 0) for size in sizes
    ):
        pattern = NM(pattern.n // 2, pattern.m // 2)
    return pattern
