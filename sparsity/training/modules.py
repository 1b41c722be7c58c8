"""The parametrization that makes a weight N:M sparse, and the layers of a model that it applies to.

Under FSDP2, a forward pass needs the whole mask, because FSDP2 gathers the whole weight for it. Computing the mask
there would score rounded weights under a mixed-precision policy, and would repeat in every pass. So after a step, each
process computes the mask of its rows from the full-precision weights and gathers the shards: 1 byte per weight.
"""

from __future__ import annotations

import math
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from leanstep._torch import (
    expert_weights,
    is_conv1d,
    is_dtensor,
    join_parts,
    local_part,
    output_head,
    place_like,
    plain_name,
    stores_in_out,
    whole_tensor,
)
from leanstep.sparsity.functional import s_ste_weight, sparse_weight
from leanstep.sparsity.patterns import NM, abbreviate, as_pattern, match_patterns
from leanstep.sparsity.training.experts import cache_in_forward, flat_experts, stop_caching
from leanstep.sparsity.training.masks import PADS, check_fit

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

AXES = ("in", "out")

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
# steps, n and m of the pattern, n and m of the target, dimension of the groups, alpha, beta; the mask's bits follow
_HEADER = struct.Struct("<6q2d")


class SparseWeight(nn.Module):
    """The parametrization of one weight: computes the masked weight from the dense weight that the optimizer trains.

    A parametrization preserves the layer's class and works for every layer that reads its weight as an attribute. It
    changes the keys of ``state_dict``, so dense weights under a mask do not load into a dense model by mistake. A model
    after :func:`squash` has the dense keys again.

    :class:`Controller` writes the buffers ``mask`` and ``alpha`` in place, so torch.compile does not recompile. The
    buffers are not persistent: ``state_dict`` stores them and the number of steps as one uint8 tensor (packed mask
    bits, 1/32 of an fp32 weight), which every checkpoint format supports.

    Attributes:
        mask: bool, shape of the weight, False for pruned weights.
        alpha: fp32, 0-d, the factor of pruned weights.
        beta: fp32, 0-d, scale of S-STE; used only if ``continuous``.
        target: the final pattern.
        pattern: the current pattern of ``mask``.
        dim: dimension of the weight along which groups lie.
        steps: number of optimizer steps so far.
    """

    mask: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(self, like: Tensor, target: NM, dim: int, *, grad_flow: str, continuous: bool = False) -> None:
        super().__init__()
        mask = torch.ones(like.shape, dtype=torch.bool, device=like.device)
        self.register_buffer("mask", mask, persistent=False)
        for name in ("alpha", "beta"):
            one = torch.ones((), dtype=torch.float32, device=like.device)
            self.register_buffer(name, one, persistent=False)
        self.target, self.pattern, self.dim = target, NM(target.m, target.m), dim
        self.grad_flow, self.continuous = grad_flow, continuous
        self.steps = 0
        # this process's shard of the mask, if the weight is sharded; made on first use
        self.local_mask: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer computes with."""
        if not self.continuous:
            return sparse_weight(weight, self.mask, alpha=self.alpha, grad_flow=self.grad_flow)
        # the gradient is the same in both branches
        value = s_ste_weight(weight, self.target, beta=self.beta, dim=self.dim)
        return torch.where(self.alpha >= 1, weight, value.to(weight.dtype))

    @torch.no_grad()
    def effective(self, weight: Tensor) -> Tensor:
        """Compute :meth:`forward` for a dense weight on any device, without a gradient."""
        mask, alpha, beta = (tensor.to(weight.device) for tensor in (self.mask, self.alpha, self.beta))
        if not self.continuous:
            return sparse_weight(weight, mask, alpha=alpha)
        value = s_ste_weight(weight, self.target, beta=beta, dim=self.dim).to(weight.dtype)
        # beta times a negative zero would not be +0
        return torch.where(alpha >= 1, weight, torch.where(value == 0, 0.0, value))

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> SparseWeight:
        """Move to another device; alpha and beta keep fp32, which model.half() and the like would narrow."""
        numbers = {"alpha": self.alpha, "beta": self.beta}
        super()._apply(fn, recurse)
        for name, number in numbers.items():
            moved = getattr(self, name)
            if moved.dtype != number.dtype:
                setattr(self, name, number.to(moved.device))
        return self

    def extra_repr(self) -> str:
        """The settings for ``print(model)``."""
        return f"{self.target} along dimension {self.dim}, now {self.pattern}, grad_flow={self.grad_flow!r}"

    def get_extra_state(self) -> Tensor:
        """The mask, pattern, alpha, beta and number of steps as one uint8 vector; empty on the meta device."""
        if self.mask.is_meta:
            return torch.empty(0, dtype=torch.uint8)
        numbers = (self.steps, self.pattern.n, self.pattern.m, self.target.n, self.target.m, self.dim)
        header = _HEADER.pack(*numbers, float(self.alpha), float(self.beta))
        bits = np.packbits(self.mask.detach().cpu().numpy())
        return torch.from_numpy(np.concatenate([np.frombuffer(header, dtype=np.uint8), bits]))

    def set_extra_state(self, state: Any) -> None:
        """Load a result of :meth:`get_extra_state`.

        Raises:
            ValueError: as :meth:`check_state`.
        """
        self.check_state(state)
        raw = state.cpu().numpy()
        self.steps, n, m, *_, alpha, beta = _HEADER.unpack(raw[: _HEADER.size].tobytes())
        bits = np.unpackbits(raw[_HEADER.size :], count=self.mask.numel()).view(np.bool_)
        self.pattern = NM(n, m)
        self.mask.copy_(torch.from_numpy(bits.reshape(self.mask.shape)))
        self.alpha.fill_(alpha)
        self.beta.fill_(beta)
        self.local_mask = None

    def check_state(self, state: Any) -> None:
        """Raise ValueError for a state of another pattern, dimension or shape."""
        size = _HEADER.size + -(-self.mask.numel() // 8)
        if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.numel() != size:
            actual = f"{state.numel()} of {state.dtype}" if isinstance(state, Tensor) else type(state).__name__
            raise ValueError(
                f"the sparsity state of a weight of shape {tuple(self.mask.shape)} has {size} bytes, got {actual}; the "
                "checkpoint is of another model, or damaged"
            )
        header = _HEADER.unpack(state[: _HEADER.size].cpu().numpy().tobytes())
        steps, n, m, target_n, target_m, dim, alpha, beta = header
        if steps < 0 or not 0 <= n <= m or m < 1 or not (math.isfinite(alpha) and math.isfinite(beta)):
            raise ValueError(
                f"the sparsity state of a weight of shape {tuple(self.mask.shape)} is damaged: {steps} steps, pattern "
                f"{n}:{m}, alpha {alpha:g}, beta {beta:g}"
            )
        if (NM(target_n, target_m), dim) != (self.target, self.dim):
            raise ValueError(
                f"the checkpoint was trained towards {target_n}:{target_m} along dimension {dim}, this model is set to "
                f"{self.target} along dimension {self.dim}; call sparsify with the patterns of the checkpoint"
            )


@dataclass(eq=False)
class SparseLayer:
    """A weight that is sparse or can become sparse, with all modules that use it.

    Attributes:
        name: the layer's name, or the parameter's if that is not called ``weight``.
        uses: every (module, attribute) that holds the weight, each once; several for tied weights.
        dim: dimension along which groups lie.
        target: the final pattern.
        names: parameter names of all uses; a module that the model has under two names has two.
        transform: the parametrization, shared by all uses.
    """

    name: str
    uses: list[tuple[nn.Module, str]]
    dim: int
    target: NM
    names: list[str] = field(default_factory=list)
    transform: SparseWeight = cast(SparseWeight, None)

    @property
    def weight(self) -> nn.Parameter:
        """The dense weight that the optimizer trains."""
        module, attribute = self.uses[0]
        if parametrize.is_parametrized(module, attribute):
            return cast(nn.Parameter, _holder(module, attribute).original)
        return cast(nn.Parameter, getattr(module, attribute))

    @property
    def installed(self) -> bool:
        """Whether the weight still has this layer's parametrization."""
        module, attribute = self.uses[0]
        return transform_of(module, attribute) is self.transform

    def check_sharding(self) -> None:
        """Raise ValueError if the weight is sharded across its groups, or holds partial sums."""
        weight = self.weight
        if not is_dtensor(weight):
            return
        for placement in cast("DTensor", weight).placements:
            across = placement.is_shard(self.dim) or placement.is_shard(self.dim - weight.dim())
            if across or placement.is_partial() or not (placement.is_shard() or placement.is_replicate()):
                raise ValueError(
                    f"layer {self.name!r} of shape {tuple(weight.shape)} has its {self.target} groups along dimension "
                    f"{self.dim} and is sharded as {placement}, across them; shard it along another dimension "
                    "(fully_shard's shard_placement_fn), or let groups lie along the other axis"
                )

    def local_mask(self) -> Tensor:
        """This process's shard of the mask."""
        transform, weight = self.transform, self.weight
        if not is_dtensor(weight):
            return transform.mask
        if transform.local_mask is None:
            shard = local_part(place_like(transform.mask.view(torch.uint8), weight))
            transform.local_mask = shard.view(torch.bool).clone()
        return transform.local_mask

    def gather_mask(self, shard: Tensor) -> None:
        """Gather the whole mask from all processes' shards. Collective if the weight is sharded."""
        if is_dtensor(self.weight):
            mask = self.transform.mask
            # not every backend exchanges booleans
            mask.copy_(whole_tensor(join_parts(shard.view(torch.uint8), self.weight, mask.shape)).view(torch.bool))

    def total(self, value: Tensor) -> Tensor:
        """Sum a tensor over all shards of the weight; ``value`` is this process's summand."""
        if not is_dtensor(self.weight):
            return value
        from torch.distributed.tensor import Partial

        placements = [Partial() if p.is_shard() else p for p in cast("DTensor", self.weight).placements]
        return whole_tensor(join_parts(value, self.weight, placements=placements))


def _holder(module: nn.Module, attribute: str) -> Any:
    """torch's list of an attribute's parametrizations, which holds the original."""
    return cast(nn.ModuleDict, module.parametrizations)[attribute]


def transform_of(module: nn.Module, attribute: str) -> SparseWeight | None:
    """The sparse parametrization of an attribute, or None."""
    if not parametrize.is_parametrized(module, attribute):
        return None
    first = _holder(module, attribute)[0]
    return first if isinstance(first, SparseWeight) else None


def sparse_layers(model: nn.Module) -> list[SparseLayer]:
    """The sparse weights of a model, each once, in the model's order."""
    layers: dict[int, SparseLayer] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for attribute in list(getattr(module, "parametrizations", ())):
            transform = transform_of(module, attribute)
            if transform is None:
                continue
            name = _layer_name(module_name, attribute)
            new = SparseLayer(name, [], transform.dim, transform.target, transform=transform)
            layer = layers.setdefault(id(transform), new)
            _add_use(layer.uses, layer.names, module_name, module, attribute)
    return list(layers.values())


def _add_use(
    uses: list[tuple[nn.Module, str]], names: list[str], module_name: str, module: nn.Module, attribute: str
) -> None:
    """Add a name of a weight in the state dict, and the module and attribute behind it unless another name has."""
    names.append(plain_name(f"{module_name}.{attribute}".lstrip(".")))
    if (module, attribute) not in uses:
        uses.append((module, attribute))


def plan_layers(
    model: nn.Module, patterns: Mapping[str, NM | str] | NM | str, axis: str, pad: str
) -> list[SparseLayer]:
    """Select and check the layers that the patterns match, without changing the model.

    Warns about layers that a single pattern leaves dense.

    Raises:
        TypeError, ValueError: as :func:`leanstep.sparsity.sparsify` does.
    """
    if axis not in AXES or pad not in PADS:
        raise ValueError(f"sparsify: expected axis in {AXES} and pad in {PADS}, got {axis!r} and {pad!r}")
    candidates = dict(_candidates(model, axis))
    if not isinstance(patterns, Mapping):
        candidates = _wide_enough(model, candidates, as_pattern(patterns))
    if not candidates:
        raise ValueError(f"sparsify: {type(model).__name__} has no linear or convolution layer to make sparse")
    targets = match_patterns(candidates, patterns)
    uses_by_id = _parameter_uses(model)
    layers: dict[int, SparseLayer] = {}
    for name, target in targets.items():
        layer = candidates[name]
        weight = _check_weight(layer)
        if target.is_dense:
            continue
        earlier = layers.get(id(weight))
        if earlier is None:
            layer.target = target
            check_fit(weight.shape, target, layer.dim, pad, f"sparsify: layer {name!r}")
            layer.uses, layer.names = uses_by_id[id(weight)]
            layers[id(weight)] = layer
        elif earlier.target != target:
            raise ValueError(
                f"sparsify: {earlier.name!r} and {name!r} are one tied weight, but the rules give them "
                f"{earlier.target} and {target}"
            )
    if not layers:
        raise ValueError("sparsify: the rules leave every layer dense; give at least one a pattern with n < m")
    return list(layers.values())


def _wide_enough(model: nn.Module, candidates: dict[str, SparseLayer], pattern: NM) -> dict[str, SparseLayer]:
    """The layers that a single pattern makes sparse: all but the output head and those shorter than a group."""
    head = output_head(model)
    hidden = {name: layer for name, layer in candidates.items() if layer.uses[0][0] is not head}
    narrow = [name for name, layer in hidden.items() if _is_narrow(layer, pattern)]
    if len(narrow) == len(hidden):
        return hidden
    _warn_of_dense(narrow, f"a group of {pattern} is longer than their rows")
    _warn_of_dense(flat_experts(model), "experts in one matrix, whose layout is not known")
    return {name: layer for name, layer in hidden.items() if name not in set(narrow)}


def _is_narrow(layer: SparseLayer, pattern: NM) -> bool:
    weight = getattr(*layer.uses[0])
    # a lazy weight has no shape yet
    return not nn.parameter.is_lazy(weight) and 0 < weight.shape[layer.dim] < pattern.m and not pattern.is_dense


def _warn_of_dense(names: list[str], reason: str) -> None:
    if names:
        verb = "stays" if len(names) == 1 else "stay"
        warnings.warn(f"sparsify: {abbreviate(names)} {verb} dense: {reason}", stacklevel=5)


def install(layer: SparseLayer, grad_flow: str, continuous: bool) -> None:
    """Register the layer's parametrization for all uses of its weight. The Parameter stays the same object."""
    layer.transform = SparseWeight(layer.weight, layer.target, layer.dim, grad_flow=grad_flow, continuous=continuous)
    for module, attribute in layer.uses:
        names = list(module._parameters)
        # unsafe=True skips the trial forward pass
        parametrize.register_parametrization(module, attribute, layer.transform, unsafe=True)
        # remove() restores the order of parameters with it
        _holder(module, attribute).following = names[names.index(attribute) + 1 :]
        if attribute in expert_weights(layer.name, module):
            cache_in_forward(module)
    if len(layer.names) > 1:
        _declare_tied(layer)


def _declare_tied(layer: SparseLayer) -> None:
    """Let transformers' save_pretrained store a tied weight under one of its names; it refuses ties not declared.

    It looks for patterns of the other names in every module, and puts the module's own name before them.
    """
    patterns = [re.escape(original_key(name)) for name in layer.names]
    _holder(*layer.uses[0])._tied_weights_keys = {"|".join(["original", *patterns]): ""}


def original_key(name: str) -> str:
    """The key of a sparse parameter's dense weight: a.weight -> a.parametrizations.weight.original."""
    module, _, attribute = name.rpartition(".")
    return f"{module}.parametrizations.{attribute}.original".lstrip(".")


def remove(module: nn.Module, attribute: str) -> None:
    """Remove the parametrization, and restore the dense Parameter under its name and in its position."""
    following = _holder(module, attribute).following
    parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
    # torch appends it, which would change the order of state_dict() and parameters()
    for name in [name for name in module._parameters if name in following]:
        module._parameters[name] = module._parameters.pop(name)
    if not parametrize.is_parametrized(module):
        stop_caching(module)


def spare_from_broadcast(model: nn.Module) -> None:
    """Stop DDP from broadcasting masks before every forward pass: equal weights already give equal masks."""
    known = list(getattr(model, "_ddp_params_and_buffers_to_ignore", []))
    model._ddp_params_and_buffers_to_ignore = [*known, *_buffer_names(model)]  # type: ignore[assignment]


def _buffer_names(model: nn.Module) -> list[str]:
    return [
        f"{name}.{buffer}"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, SparseWeight)
        for buffer in ("mask", "alpha", "beta")
    ]


def stop_sparing(model: nn.Module) -> None:
    """Undo :func:`spare_from_broadcast`, before the masks are removed. Names that others gave stay."""
    ours = set(_buffer_names(model))
    others = [name for name in getattr(model, "_ddp_params_and_buffers_to_ignore", []) if name not in ours]
    if others:
        model._ddp_params_and_buffers_to_ignore = others  # type: ignore[assignment]
    elif hasattr(model, "_ddp_params_and_buffers_to_ignore"):
        del model._ddp_params_and_buffers_to_ignore


def group_dim(module: nn.Module, axis: str) -> int:
    """The dimension of a layer's matrices along which groups lie: their inputs (in-channels) or their outputs."""
    return int((axis == "in") != stores_in_out(module))


def _candidates(model: nn.Module, axis: str) -> Iterator[tuple[str, SparseLayer]]:
    """Every weight that may become sparse, by name; tied modules appear under all their names."""
    for module_name, module in model.named_modules(remove_duplicate=False):
        if module_name.rpartition(".")[2].startswith("lora_"):  # factors of adapters
            continue
        # the first dimension of a tensor of experts counts them
        attributes: tuple[str, ...] = ()
        before = 0
        if isinstance(module, (nn.Linear, *_CONVOLUTIONS)) or is_conv1d(module) or _is_foreign_linear(module):
            attributes = ("weight",)
        elif isinstance(module, nn.MultiheadAttention):
            attributes = _ATTENTION_WEIGHTS
        else:
            attributes, before = tuple(expert_weights(module_name, module)), 1
        for attribute in attributes:
            if getattr(module, attribute, None) is not None:
                name = _layer_name(module_name, attribute)
                yield name, SparseLayer(name, [(module, attribute)], before + group_dim(module, axis), NM(1, 1))


def _is_foreign_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer of another package, such as a quantised one: refused by name, not skipped."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.startswith(("Linear", "QuantLinear")) and isinstance(weight, Tensor) and weight.dim() > 1
    )


def _layer_name(module_name: str, attribute: str) -> str:
    return module_name if attribute == "weight" and module_name else f"{module_name}.{attribute}".lstrip(".")


def _parameter_uses(model: nn.Module) -> dict[int, tuple[list[tuple[nn.Module, str]], list[str]]]:
    uses_by_id: dict[int, tuple[list[tuple[nn.Module, str]], list[str]]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            _add_use(*uses_by_id.setdefault(id(parameter), ([], [])), module_name, module, attribute)
    return uses_by_id


def _check_weight(layer: SparseLayer) -> nn.Parameter:
    """The weight of a layer. Raises ValueError with the reason if it cannot be parametrized."""
    module, attribute = layer.uses[0]
    where = f"sparsify: layer {layer.name!r}"
    if parametrize.is_parametrized(module, attribute):
        is_sparse = transform_of(module, attribute) is not None
        advice = "squash it first to begin again" if is_sparse else "remove that parametrization first"
        raise ValueError(f"{where} is parametrized already ({_holder(module, attribute)[0]}); {advice}")
    weight = getattr(module, attribute)
    if nn.parameter.is_lazy(weight):
        raise ValueError(f"{where} has no shape yet ({type(module).__name__}); run a batch through the model first")
    if is_dtensor(weight):
        raise ValueError(
            f"{where} is sharded already ({weight.placements}), and FSDP loses a weight that is parametrized later; "
            "call sparsify first and fully_shard after it"
        )
    if not isinstance(weight, nn.Parameter):
        raise ValueError(
            f"{where}: its {attribute} is a {type(weight).__name__}, not a Parameter, so it cannot be trained; remove "
            "the hook that computes it first (prune.remove, remove_weight_norm and the like)"
        )
    if weight.is_complex():
        raise ValueError(f"{where} is complex ({weight.dtype}): expected a real floating weight")
    if not weight.is_floating_point() or type(weight.data) is not Tensor:
        raise ValueError(
            f"{where} is quantised ({type(module).__name__} with {type(weight.data).__name__} of {weight.dtype}): "
            "expected a plain floating weight; make it sparse first, and quantise it after squash"
        )
    return weight
