"""Adapters of the fused weights of experts: ``W[e] + s B[e] A[e]`` for every expert e, in PEFT's layout of the factors.

A weight of E experts is (E, out, in), or (E, in, out) in modules with ``is_transposed``; a matrix (out, in) is one
expert. ``lora_A`` stacks the experts' A, (E r, in); the columns of ``lora_B``, (out, r E), have the expert last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any, cast

import torch
from torch import Tensor, nn

from leanstep._torch import is_dtensor
from leanstep.lora.layers.autograd import Setting, Weights, lora_linears
from leanstep.lora.layers.linear import (
    Adapter,
    FastPath,
    Mixin,
    autocasted,
    factor_type,
    mixture,
    restore_class,
    why_not_fast,
)


class LoRAExpertsLayer(Mixin):
    """Adapters of a module's own parameters, mixed into its class.

    On the fast path, each expert is a pair of layers of :func:`leanstep.lora.layers.autograd.lora_linears`: no sum or
    gradient of a weight's size is formed. It takes the modules that transformers' ``use_experts_implementation`` makes.
    Any other module runs its own forward on the sums, which autograd keeps.

    Attributes:
        lora: the adapters by the parameter's attribute.
        lora_A, lora_B: the factors by the same names.
    """

    lora: dict[str, Adapter]
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict

    def factors(self, leaf: str) -> tuple[Tensor, Tensor]:
        """A (E, r, in) and B (E, out, r) of one parameter, as views."""
        a, b = cast("Tensor", self.lora_A[leaf].weight), cast("Tensor", self.lora_B[leaf].weight)
        rank = self.lora[leaf].rank
        count = a.shape[0] // rank
        return a.view(count, rank, -1), b.view(-1, rank, count).permute(2, 0, 1)

    def summed(self, leaf: str) -> Tensor:
        """The parameter plus its adapter's product, in the wider of their dtypes."""
        weight, (a, b) = getattr(self, leaf), self.factors(leaf)
        update = torch.bmm(b, a).mul(self.lora[leaf].scale)
        update = update.transpose(1, 2) if self.lora[leaf].transposed else update
        return weight + update.view(weight.shape)

    @property
    def fast_path(self) -> FastPath:
        """Whether the next forward pass runs on the fast path, and why (not)."""
        reason = self.why_not_fast()
        return FastPath(reason is None, reason or "each expert's products with its factors, which save their input")

    def why_not_fast(self, x: Tensor | None = None) -> str | None:
        """The reason why the module cannot run on the fast path (on ``x``, if given); None if it can."""
        weights = {leaf: getattr(self, leaf) for leaf in self.lora}
        for leaf, adapter in self.lora.items():
            reason = why_not_fast(adapter, {leaf: weights[leaf], "lora_A": self.lora_A[leaf].weight})  # type: ignore[dict-item]
            if reason is not None:
                return reason
        base = next(iter(self.lora.values())).base
        if not _is_standard(base) or getattr(self, "_is_expert_parallel", False):
            return f"{base.__name__} is no module of experts with transformers' standard forward"
        if foreign := set(self.lora) - set(self._leaves()):
            return f"{', '.join(sorted(foreign))} is no projection of the experts"
        if any(weight.requires_grad for weight in weights.values()):
            return "the base weight is trained, and its gradient is as large"
        if x is not None and (not x.numel() or any(w.dtype != autocasted(x).dtype for w in weights.values())):
            return f"the input is {x.dtype} or empty, and the weights are of another dtype"
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own forward, with adapted parameters."""
        adapters = list(self.lora.values())
        if adapters[0].merged or not adapters[0].enabled:
            return super().forward(*args, **kwargs)
        standard = len(args) == 3 and not kwargs and isinstance(args[0], Tensor)
        reason = self.why_not_fast(args[0] if standard else None)
        if reason is None and not standard:
            reason = "it is called with other arguments than experts"
        if reason is None:
            return self._run(*args)
        if adapters[0].fast_path:
            raise RuntimeError(f"{adapters[0].name}: fast_path=True was asked for, but {reason}")
        with self._sums():
            return super().forward(*args, **kwargs)

    @contextmanager
    def _sums(self) -> Iterator[None]:
        """Let attributes of the module be the sums."""
        sums = {leaf: self.summed(leaf).to(getattr(self, leaf).dtype) for leaf in self.lora}
        # found before the parameters, which stay registered
        vars(self).update(sums)
        try:
            yield
        finally:
            for leaf in sums:
                del vars(self)[leaf]

    def _leaves(self) -> tuple[str, str]:
        return "gate_up_proj" if self.has_gate else "up_proj", "down_proj"

    def _run(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' outputs, [tokens, width]: tokens in the order of experts, one expert after another."""
        tokens, top_k = top_k_index.shape
        expert_of = top_k_index.reshape(-1)
        order = torch.argsort(expert_of, stable=True)
        up, down = self._leaves()
        count = getattr(self, down).shape[0]
        sizes = torch.bincount(expert_of, minlength=count).tolist()
        experts = {leaf: self._experts(leaf) for leaf in (up, down)}
        outputs = []
        for index, x in enumerate(hidden[order // top_k].split(sizes)):
            if not x.shape[0]:
                continue
            inner = self._product(x, experts[up], up, index)
            inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)  # type: ignore[operator]
            outputs.append(self._product(inner, experts[down], down, index))
        y = torch.cat(outputs)
        if self.has_post_expert_norm:
            y = self.post_expert_norm(y)  # type: ignore[operator]
        y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        # summed over each token's experts, in their order, as transformers does
        return y[torch.argsort(order)].view(tokens, top_k, -1).sum(1).to(hidden.dtype)

    def _experts(self, leaf: str) -> Sequence[tuple[Tensor | None, ...]]:
        """Weight, bias, A and B of each expert; A and B are None without an adapter."""
        weight = getattr(self, leaf).unbind()
        bias = getattr(self, f"{leaf}_bias").unbind() if self.has_bias else (None,) * len(weight)
        # unbind, since the gradient of each index would be as large as all factors
        a, b = (f.unbind() for f in self.factors(leaf)) if leaf in self.lora else ((None,) * len(weight),) * 2
        return list(zip(weight, bias, a, b, strict=True))

    def _product(self, x: Tensor, experts: Sequence[tuple[Any, ...]], leaf: str, index: int) -> Tensor:
        weight, bias, a, b = experts[index]
        if a is None:
            return nn.functional.linear(x, weight.t() if self.is_transposed else weight, bias)
        adapter = self.lora[leaf]
        setting = Setting(adapter.scale, save=adapter.save, transposed=adapter.transposed)
        return lora_linears(autocasted(x), (setting,), (Weights(weight, bias, a, b),), (None,))[0]


def _is_standard(cls: type[nn.Module]) -> bool:
    """Whether a class has the forward of transformers' ``use_experts_implementation``."""
    code = getattr(cls.forward, "__code__", None)
    parts = PurePath(code.co_filename).parts[-3:] if code is not None else ()
    return parts == ("transformers", "integrations", "moe.py")


def expert_sizes(module: nn.Module, leaf: str) -> tuple[int, int, int]:
    """(E, in, out) of a parameter, by PEFT's reading of its layout."""
    shape = getattr(module, leaf).shape
    count = shape[0] if len(shape) == 3 else 1
    m, n = shape[-2:]
    return (count, m, n) if is_stored_in_out(module, leaf) else (count, n, m)


def is_stored_in_out(module: nn.Module, leaf: str) -> bool:
    """Whether PEFT reads a parameter as (E, in, out)."""
    return getattr(module, leaf).dim() == 3 and getattr(module, "is_transposed", False) is True


def why_no_parameter_adapter(module: nn.Module, leaf: str) -> str | None:
    """The reason why a parameter cannot have an adapter; None if it can."""
    weight = getattr(module, leaf)
    if weight.dim() not in (2, 3):
        return f"it has {weight.dim()} dimensions; expected a matrix, or one matrix per expert"
    if not weight.is_floating_point() or type(weight) is not nn.Parameter or is_dtensor(weight):
        return (
            f"it is a {type(weight).__name__} of {weight.dtype}; expected a dense floating-point parameter, not sharded"
        )
    return None


def attach_experts(module: Any, adapters: dict[str, Adapter], init: bool | str) -> None:
    """Adapt parameters of a module in place, after all checks; ``adapters`` are by attribute, in the module's order."""
    a, b = nn.ModuleDict(), nn.ModuleDict()
    for leaf, adapter in adapters.items():
        count, n, m = expert_sizes(module, leaf)
        like = factor_type(getattr(module, leaf))
        a[leaf] = nn.Linear(n, adapter.rank * count, bias=False, **like)
        b[leaf] = nn.Linear(adapter.rank * count, m, bias=False, **like)
        with torch.no_grad():
            if init == "gaussian":
                nn.init.normal_(a[leaf].weight, std=1 / adapter.rank)  # type: ignore[arg-type]
            if init is not False:
                nn.init.zeros_(b[leaf].weight)  # type: ignore[arg-type]
        a[leaf].weight.requires_grad_(adapter.save != "lora_fa")
        adapter.transposed, adapter.base = is_stored_in_out(module, leaf), type(module)
    module.lora_A, module.lora_B, module.lora = a.train(module.training), b.train(module.training), adapters
    cls: Any = type(module)
    module.__class__ = mixture(cls, LoRAExpertsLayer)


def detach_experts(module: Any) -> None:
    """Remove the adapters from a module."""
    restore_class(module, next(iter(module.lora.values())).base, ("lora_A", "lora_B", "lora"))


def file_keys(name: str, leaves: Sequence[str]) -> dict[str, str]:
    """The name of each factor in the model -> its name in PEFT's files, which nest a wrapper for each parameter."""
    inside = {leaf: ".base_layer" * (len(leaves) - 1 - index) for index, leaf in enumerate(leaves)}
    return {
        f"{name}.lora_{factor}.{leaf}.weight": f"{name}{inside[leaf]}.lora_{factor}.weight"
        for leaf in leaves
        for factor in "AB"
    }
