"""What a linear layer with an adapter must tell of itself to run on the fast path, whoever made the layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leanstep.kernels._modes import unseen
from leanstep.lora.layers.autograd import Setting, Weights, lora_linears, matrix
from leanstep.lora.layers.frozen import dequantizer, why_own_forward
from leanstep.lora.layers.layer import Adapter, FastPath, common_reasons, layer_order
from leanstep.lora.layers.seeds import new_seed


class FastLinear:
    """A linear layer with an adapter; :class:`leanstep.lora.layers.linear.LoRALinearLayer` and PEFT's layers are such.

    Attributes:
        lora: the adapter's numbers.
        siblings: the layers that are asked for the same input (:mod:`leanstep.lora.layers.block`), or None.
    """

    lora: Adapter
    siblings: Any = None

    def base_class(self) -> type[nn.Module]:
        """The class whose forward computes the base product."""
        return type(self.parts()[0])

    def parts(self) -> tuple[nn.Module, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The module with the base weight and bias, A, B, the bias of B, and DoRA's magnitude."""
        raise NotImplementedError

    def in_training(self) -> bool:
        """Whether dropout is on."""
        raise NotImplementedError

    def plain(self, x: Tensor, reason: str, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output where the fast path cannot run."""
        raise NotImplementedError

    @property
    def fast_path(self) -> FastPath:
        """Whether the next forward pass runs on the fast path, and why (not)."""
        reason = self.why_not_fast()
        text = "one autograd function that keeps the input only"
        if self.siblings is not None and self.siblings.broken:
            others = "the layers beside it were asked for inputs of their own, so each keeps its input"
            text += f", for this layer alone: {others}"
        return FastPath(reason is None, reason or text)

    def why_not_fast(self, x: Tensor | None = None) -> str | None:
        """The reason against the fast path, for an input if one is given; None when there is none."""
        base, a, _, _, _ = self.parts()
        weight = base.weight
        assert isinstance(weight, Tensor)
        reason = common_reasons(self.lora, {"weight": weight, "lora_A": a}, x)
        if reason is not None:
            return reason
        reason = why_own_forward(self.base_class())
        if reason is not None:
            return reason
        if weight.requires_grad:
            return "the base weight is trained, whose gradient is a full matrix"
        if dequantizer(base) is None:
            if not weight.is_floating_point():
                return f"the base weight is {weight.dtype}, which no code here can multiply"
            if x is not None and x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
                return f"the input is {x.dtype} and the base weight {weight.dtype}"
        return None

    def run(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] to [..., out], on the fast path where it can be."""
        if self.siblings is not None:
            y = self.siblings.take(self, x)
            if y is not None:
                return y
        reason = self.why_not_fast(x)
        if reason is not None:
            if self.lora.fast_path:
                raise RuntimeError(f"{self.lora.name}: fast_path=True was asked for, but {reason}")
            return self.plain(x, reason, *args, **kwargs)
        x = autocasted(x)
        setting, weights = self.operands(x)
        return lora_linears(x, (setting,), (weights,), (self.seed(),))[0]

    def seed(self) -> Tensor | None:
        """A new seed where the next pass drops anything."""
        return new_seed() if self.in_training() and self.lora.dropout > 0 else None

    def operands(self, x: Tensor) -> tuple[Setting, Weights]:
        """What :func:`leanstep.lora.layers.autograd.lora_linears` needs of this layer for an input."""
        base, a, b, b_bias, magnitude = self.parts()
        lora, dense = self.lora, dequantizer(base)
        p = lora.dropout if self.in_training() else 0.0
        save, norm = lora.save, None
        if magnitude is not None:
            norm = self.norms()
            if save == "min" and _can_look(magnitude) and bool((magnitude == 0).any()):
                # a zero magnitude hides in the output what its gradient needs
                save = "full"
        plain = p == 0 and dense is None and magnitude is None and save != "lora_fa"
        order = layer_order(lora, x, a.shape[1], b.shape[0], plain)
        setting = Setting(lora.scale, p, save, lora.transposed, order, dense)
        return setting, Weights(base.weight, base.bias, a, b, b_bias, magnitude, norm)  # type: ignore[arg-type]

    def norms(self) -> Tensor:
        """DoRA's norms: (out,), fp32 or fp64, no gradient."""
        return unseen(self._norms)

    def _norms(self) -> Tensor:
        base, a, b, _, _ = self.parts()
        a, b = a.detach(), b.detach()
        assert isinstance(base.weight, Tensor)
        weight = base.weight.detach() if base.weight.is_floating_point() else base.weight
        setting = Setting(self.lora.scale, transposed=self.lora.transposed, dense=dequantizer(base))
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        dense = matrix(setting, Weights(weight, None, a, b), dtype)
        return self.lora.norms.norms(weight, dense, a, b, self.lora.scale, self.in_training())


def _can_look(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor are there to be looked at, without waiting for a device."""
    real = type(tensor) in (Tensor, nn.Parameter)
    return real and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def autocasted(x: Tensor) -> Tensor:
    """x in the dtype that autocast computes linear layers in, where it is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def fast_linear(module: nn.Module | None) -> FastLinear | None:
    """The fast layer that a module is, or that has taken over its forward; None for other modules."""
    if isinstance(module, FastLinear):
        return module
    owner = getattr(vars(module).get("forward"), "__self__", None) if isinstance(module, nn.Module) else None
    return owner if isinstance(owner, FastLinear) else None
