"""Layers that are asked for one input run as one function: q, k and v of an attention block, and SwiGLU blocks."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leanstep.lora.layers.autograd import lora_linears
from leanstep.lora.layers.fast import FastLinear, autocasted, fast_linear
from leanstep.lora.layers.layer import mixture
from leanstep.lora.layers.linear import LoRALinearLayer
from leanstep.lora.layers.swiglu import FusedSwiGLU, is_swiglu, members

# the names that a block's projections of one input go by
GROUPS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))


class Siblings:
    """Layers of one block that get the same input one after another.

    The first that is asked computes all, in one function with one gradient of the input; the others find their output
    waiting. When an input comes that is another one (as in cross-attention), the group is given up for good, and every
    layer computes for itself.
    """

    def __init__(self, layers: Sequence[FastLinear]) -> None:
        self.layers = list(layers)
        self.broken = False
        self._forget()

    def _forget(self) -> None:
        self._waiting: dict[int, Tensor] = {}
        self._source: tuple[weakref.ref, int, bool] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "broken": self.broken}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers, self.broken = state["layers"], state["broken"]
        self._forget()

    def take(self, layer: FastLinear, x: Tensor) -> Tensor | None:
        """The output of one layer, or None where it has to compute for itself."""
        # a compiled program shares the input's storage anyway, and must not depend on what waits here
        # and a tensor of inference mode does not tell whether it was changed
        if self.broken or torch.compiler.is_compiling() or x.is_inference():
            return None
        place = next((i for i, other in enumerate(self.layers) if other is layer), None)
        if place is None:
            # a replica of the layer, as DataParallel makes them
            return None
        if self._waiting:
            if place in self._waiting and self._is_source(x):
                return self._waiting.pop(place)
            self.broken = not self._is_abandoned()
            self._forget()
            if self.broken:
                return None
        # before anything else of them: a layer of PEFT's that the active adapter is not on has no numbers to look at
        if any(other.why_not_fast(x) is not None for other in self.layers):
            return None
        return self._compute(place, x)

    def _compute(self, place: int, x: Tensor) -> Tensor:
        inputs = autocasted(x)
        operands = [other.operands(inputs) for other in self.layers]
        settings, weights = zip(*operands, strict=True)
        outputs = lora_linears(inputs, settings, weights, [other.seed() for other in self.layers])
        self._waiting = {i: y for i, y in enumerate(outputs) if i != place}
        self._source = (weakref.ref(x), x._version, torch.is_grad_enabled())
        return outputs[place]

    def _is_source(self, x: Tensor) -> bool:
        assert self._source is not None
        reference, version, grad = self._source
        return reference() is x and version == x._version and grad == torch.is_grad_enabled()

    def _is_abandoned(self) -> bool:
        """Whether the pass that left outputs waiting is over, as after an exception: its input is gone."""
        assert self._source is not None
        return self._source[0]() is None


def join_siblings(model: nn.Module) -> None:
    """Make groups of the fast layers that have their names in :data:`GROUPS` within one module."""
    for module in model.modules():
        for names in GROUPS:
            layers = [fast_linear(getattr(module, name, None)) for name in names]
            found = [layer for layer in layers if layer is not None and layer.siblings is None]
            if len(found) == len(names):
                group = Siblings(found)
                for layer in found:
                    layer.siblings = group


def fuse_blocks(model: nn.Module) -> None:
    """Find the blocks of an adapted model and let each run as one function."""
    join_siblings(model)
    for module in list(model.modules()):
        if is_swiglu(module) and len(members(module)) == 3:
            module.__class__ = mixture(type(module), FusedSwiGLU)  # type: ignore[arg-type]


def unfuse_blocks(model: nn.Module) -> None:
    """Undo :func:`fuse_blocks`."""
    for module in model.modules():
        if isinstance(module, LoRALinearLayer):
            module.siblings = None
        if isinstance(module, FusedSwiGLU):
            own: Any = type(module).__bases__[1]
            module.__class__ = own
