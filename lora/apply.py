"""Adapts a model in place, and removes its adapters."""

from __future__ import annotations

import types
import warnings
from collections.abc import Container, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from leanstep._torch import is_conv1d, is_dtensor, unwrapped
from leanstep.lora.config import LoraConfig, is_pissa
from leanstep.lora.layers.block import fuse_blocks, unfuse_blocks
from leanstep.lora.layers.embedding import attach_embedding
from leanstep.lora.layers.experts import (
    LoRAExpertsLayer,
    attach_experts,
    detach_experts,
    expert_sizes,
    why_no_parameter_adapter,
)
from leanstep.lora.layers.frozen import is_linear, why_custom_forward, why_unsupported, widths
from leanstep.lora.layers.linear import Adapter, LoRALayer, attach_linear, detach
from leanstep.lora.layers.pissa import move_start, start_factors, why_no_pissa
from leanstep.lora.layers.tokens import TokenLayer, attach_tokens, detach_tokens, why_no_tokens
from leanstep.lora.targets import (
    rank_of,
    scale_of,
    select,
    select_parameters,
    select_tokens,
    why_not_adaptable,
    with_heads,
)
from leanstep.lora.ties import forget_ties

Model = TypeVar("Model", bound=nn.Module)


def apply_lora(model: Model, config: LoraConfig) -> Model:
    """Give the selected layers of a model low-rank adapters, and freeze everything else.

    Args:
        model: any ``nn.Module``; changed in place. Linear layers, transformers' Conv1D and embeddings can be adapted.
            They stay the same objects with the same parameters and names, and become instances of a subclass.
        config: the layers to adapt, and the settings of their adapters.

    Returns:
        The model, with ``config`` as ``model.lora_config`` (a copy if its task adds a head). The factors (fp32, or
        fp64 in an fp64 model), DoRA's magnitudes, ``modules_to_save`` and the biases of ``config.bias`` require
        gradients.

    Raises:
        TypeError: for a configuration of another class.
        ValueError: for an adapted model, a target that selects nothing (the message suggests similar names), a rank
            larger than a layer, an unsupported dtype of a base weight, a layer that is never called or returns no
            tensor, a weight that is sharded already, a model in DistributedDataParallel, or ``fast_path=True`` and a
            layer that cannot run on the fast path. The model is unchanged.

    Notes:
        Memory: r (in + out) numbers per layer. ``LoraConfig.save`` sets which tensors autograd saves.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(
            f"apply_lora: expected a leanstep.lora.LoraConfig, got {type(config).__module__}.{type(config).__name__}; "
            "leanstep's takes PEFT's fields under the same names"
        )
    refuse_replicas(model, "apply_lora")
    inner = unwrapped(model)
    config = with_heads(inner, config)
    plan = plan_lora(inner, config)
    _refuse("apply_lora", _rank_problems(inner, plan, config))
    attach_adapters(inner, plan, config)
    return model


def refuse_replicas(model: nn.Module, caller: str) -> None:
    """Raise ValueError for a model in DistributedDataParallel, which averages the gradients of no new parameter."""
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            f"{caller}: expected the model itself, got one in DistributedDataParallel, which would not average the "
            f"adapters' gradients; {caller} the model inside (model.module), and wrap it afterwards"
        )


def plan_lora(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Run the checks of :func:`apply_lora`, but for ranks, which are as they are in a file; returns layers by name."""
    if is_adapted(model):
        raise ValueError("apply_lora: the model has adapters already; merge or remove_lora them first")
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise ValueError("apply_lora: this is a PEFT model; make it fast with accelerate_peft(model)")
    plan = select(model, config)
    problems = [problem for name, module in plan.items() for problem in _problems(model, name, module, config)]
    if is_pissa(config.init_lora_weights):
        problems += shared_weights(model, plan)
    problems += _parameter_problems(model, plan, config)
    problems += _token_problems(model, plan, config)
    _refuse("apply_lora", problems)
    modules_to_save(model, config)
    return plan


def _refuse(caller: str, problems: Iterable[str]) -> None:
    if problems := list(problems):
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"{caller}: " + "; ".join(problems[:4]) + more)


def attach_adapters(model: nn.Module, plan: dict[str, nn.Module], config: LoraConfig) -> None:
    """Adapt the layers of a plan, and freeze everything else."""
    saved = modules_to_save(model, config)
    # all names of tied parameters: a merge may untie them
    frozen = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, module in plan.items():
        is_embedding = isinstance(module, nn.Embedding)
        adapter = _new_adapter(config, name, 0.0 if is_embedding else config.lora_dropout, is_conv1d(module))
        (attach_embedding if is_embedding else attach_linear)(module, adapter, config)
        _rebind_hooks(module)
    _train_saved(model, saved)
    for bias in trained_biases(model, plan, config).values():
        bias.requires_grad_(True)
    model.lora_config = config  # type: ignore[assignment]
    model.lora_frozen = frozen  # type: ignore[assignment]
    _attach_parameters(model, config)
    _attach_tokens(model, config)
    if config.fused_blocks:
        fuse_blocks(model)


def _new_adapter(config: LoraConfig, name: str, dropout: float = 0.0, transposed: bool = False) -> Adapter:
    rank, scale = rank_of(config, name), scale_of(config, name)
    return Adapter(name, rank, scale, dropout, config.save, config.fast_path, transposed)


def _attach_parameters(model: nn.Module, config: LoraConfig) -> None:
    by_module: dict[str, dict[str, Adapter]] = {}
    for name, (path, leaf) in select_parameters(model, config).items():
        by_module.setdefault(path, {})[leaf] = _new_adapter(config, name)
    for path, adapters in by_module.items():
        module = model.get_submodule(path)
        attach_experts(module, adapters, config.init_lora_weights)
        _rebind_hooks(module)


def _attach_tokens(model: nn.Module, config: LoraConfig) -> None:
    for name, rows in select_tokens(model, config).items():
        attach_tokens(rows.module, name, rows.tokens, model.get_submodule(rows.shares) if rows.shares else None)
        _rebind_hooks(rows.module)


def remove_lora(model: Model) -> Model:
    """Undo :func:`apply_lora`: restore the classes of layers and the ``requires_grad`` of parameters.

    A merged adapter stays in the weights; an unmerged one is lost, and PiSSA's principal part returns to the weight, up
    to its rounding. Modules in ``modules_to_save`` and biases keep their
    trained values.

    Raises:
        ValueError: for a model without adapters, or a layer whose class has changed since (by a parametrization, say).
    """
    whole, model = model, unwrapped(model)
    layers, experts = dict(adapted_layers(model)), dict(adapted_experts(model))
    for name, module in layers.items():
        if not type(module).__name__ == f"LoRA{module.lora.base.__name__}":
            raise ValueError(
                f"remove_lora: {name} has become a {type(module).__name__} since it was adapted; undo that first"
            )
    if not layers and not experts:
        raise ValueError("remove_lora: the model has no adapters")
    unfuse_blocks(model)
    for module in layers.values():
        if start_factors(module) is not None and not module.lora.merged:
            move_start(module)
        detach(module)
        _rebind_hooks(module)
    for adapted in experts.values():
        detach_experts(adapted)
        _rebind_hooks(adapted)
    for _, trained in list(token_layers(model)):
        detach_tokens(trained)
        _rebind_hooks(trained)
    frozen: dict[str, bool] = model.lora_frozen  # type: ignore[assignment]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen.get(name, parameter.requires_grad))
    del model.lora_config, model.lora_frozen
    vars(model).pop("lora_ties", None)
    return whole


@torch.no_grad()
def set_adapters(model: nn.Module, enabled: bool) -> None:
    """Turn all adapters on or off. Layers with adapters off compute as in the base model.

    Modules in ``modules_to_save`` and biases keep their trained values in both cases; trained rows of embeddings are
    turned off, too.

    Raises:
        ValueError: for a model without adapters, or with a merged one.
    """
    model = unwrapped(model)
    adapters = all_adapters(model)
    if not adapters or any(adapter.merged for adapter in adapters):
        raise ValueError("set_adapters: expected a model with adapters that are not merged")
    for adapter in adapters:
        adapter.enabled = enabled
    for _, module in token_layers(model):
        module.tokens.enabled = enabled


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """The adapted layers of a model by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALayer))


def adapted_experts(model: nn.Module) -> Iterator[tuple[str, LoRAExpertsLayer]]:
    """The modules with adapted parameters by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRAExpertsLayer))


def token_layers(model: nn.Module) -> Iterator[tuple[str, TokenLayer]]:
    """The modules with trained rows by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, TokenLayer))


def all_adapters(model: nn.Module) -> list[Adapter]:
    """The adapters of layers and parameters."""
    inside = [adapter for _, module in adapted_experts(model) for adapter in module.lora.values()]
    return [layer.lora for _, layer in adapted_layers(model)] + inside


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has adapters."""
    return any(isinstance(module, (LoRALayer, LoRAExpertsLayer)) for module in model.modules())


def _parameter_problems(model: nn.Module, plan: dict[str, nn.Module], config: LoraConfig) -> Iterator[str]:
    for name, (path, leaf) in select_parameters(model, config).items():
        module = model.get_submodule(path)
        if path in plan or is_linear(module) or isinstance(module, nn.Embedding):
            yield f"{name} is the weight of a layer; name {path.rpartition('.')[2]} in target_modules instead"
        elif not path:
            yield f"{name} is a parameter of the model itself, which PEFT cannot adapt; wrap the model in a module"
        elif (reason := why_no_parameter_adapter(module, leaf)) is not None:
            yield f"{name} cannot be adapted: {reason}"


def _token_problems(model: nn.Module, plan: dict[str, nn.Module], config: LoraConfig) -> Iterator[str]:
    saved = {id(inner) for root in modules_to_save(model, config).values() for inner in root.modules()}
    for name, rows in select_tokens(model, config).items():
        if name in plan:
            yield f"{name} has an adapter and trained rows; leave it out of target_modules or trainable_token_indices"
        elif id(rows.module) in saved:
            yield f"{name} is trained whole by modules_to_save; leave it out of that or of trainable_token_indices"
        elif (reason := why_no_tokens(rows.module, rows.tokens)) is not None:
            yield f"rows of {name} cannot be trained: {reason}"
        elif is_dtensor(rows.module.weight):
            yield f"{name} has a weight that is a DTensor; call apply_lora first and fully_shard then"


def _problems(model: nn.Module, name: str, module: nn.Module, config: LoraConfig) -> Iterator[str]:
    is_embedding = isinstance(module, nn.Embedding)
    if not is_linear(module) and not is_embedding:
        yield f"{name} is a {type(module).__name__}; expected a linear layer, Conv1D or embedding"
        return
    weight = module.weight
    assert isinstance(weight, Tensor)
    reason = why_unsupported(module, weight)
    if reason is not None:
        yield f"{name} cannot be adapted: {reason}"
        return
    reason = why_not_adaptable(model, name, module)
    if reason is not None:
        yield f"{name} cannot be adapted: {reason}; leave it out with exclude_modules"
    if is_dtensor(weight):
        yield (
            f"{name} has a weight that is a DTensor (FSDP2, tensor parallelism), where whole factors would train on a "
            "part of the gradient; call apply_lora first and fully_shard then. Tensor-parallel layers have no adapters"
        )
    if is_pissa(config.init_lora_weights) and (reason := why_no_pissa(module, rank_of(config, name))) is not None:
        yield f"{name} cannot begin with {config.init_lora_weights!r}: {reason}"
    reason = None if is_embedding else why_custom_forward(type(module))
    if config.fast_path and reason is not None:
        yield f"fast_path=True was asked for, but {name} cannot run on the fast path: {reason}"
    if config.lora_bias and is_embedding:
        yield f"{name} is an embedding, which has no bias on B; unset lora_bias, or leave it out"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        yield f"{name} is an embedding with max_norm or sparse gradients, which adapters do not support"
    if "forward" in vars(module) and "_old_forward" not in vars(module):
        yield f"{name} has a custom forward, set by another tool, which would skip the adapter"


def _rank_problems(model: nn.Module, plan: dict[str, nn.Module], config: LoraConfig) -> Iterator[str]:
    """The ranks above a side of a weight, which train more numbers than the weight has. PEFT makes such adapters."""
    sides = {n: tuple(m.weight.shape) if isinstance(m, nn.Embedding) else widths(m) for n, m in plan.items()}
    for name, (path, leaf) in select_parameters(model, config).items():
        sides[name] = expert_sizes(model.get_submodule(path), leaf)[1:]
    for name, shape in sides.items():
        if (rank := rank_of(config, name)) > min(shape):
            yield (
                f"{name} has a weight of {shape}, rank {rank} is larger; set at most {min(shape)} with rank_pattern, "
                "or leave it out with exclude_modules"
            )


def shared_weights(model: nn.Module, plan: dict[str, nn.Module]) -> Iterator[str]:
    """The reasons why PiSSA must not change the weights of some layers: other modules compute with them, too."""
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    for name in plan:
        others = [other for other in holders[id(model.get_parameter(f"{name}.weight"))] if other != f"{name}.weight"]
        if others:
            yield f"{name} shares its weight with {others[0]}, and PiSSA changes the base weight; leave it out"


def modules_to_save(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The modules that ``config.modules_to_save`` names.

    Raises:
        ValueError: for a name that fits no module.
    """
    modules: dict[str, nn.Module] = {}
    for entry in config.modules_to_save or ():
        # by the end of the name, also within a word, as in PEFT: "classifier" fits "pre_classifier"
        matches = {name: module for name, module in model.named_modules() if name.endswith(entry)}
        if not matches:
            raise ValueError(f"apply_lora: modules_to_save {entry!r} fits no module of the model")
        modules |= matches
    return modules


def saved_buffers(model: nn.Module, config: LoraConfig) -> dict[str, Tensor]:
    """The persistent buffers of :func:`modules_to_save` by name, such as BatchNorm's running statistics."""
    return {
        f"{name}.{inner}.{key}" if inner else f"{name}.{key}": buffer
        for name, root in modules_to_save(model, config).items()
        for inner, module in root.named_modules()
        for key, buffer in module.named_buffers(recurse=False)
        if key not in module._non_persistent_buffers_set
    }


def trained_biases(model: nn.Module, layers: Container[str], config: LoraConfig) -> dict[str, nn.Parameter]:
    """The base model's biases that ``config.bias`` trains, by name; ``layers``: the names of the adapted layers."""
    named = model.named_parameters(remove_duplicate=False)
    biases = {name: p for name, p in named if name.endswith("bias") and ".lora_" not in name}
    if config.bias == "lora_only":
        return {n: p for n, p in biases.items() if n.endswith(".bias") and n.removesuffix(".bias") in layers}
    return biases if config.bias == "all" else {}


def _train_saved(model: nn.Module, saved: dict[str, nn.Module]) -> None:
    """Train whole modules. Copies the parameters that they share with other modules first, with a warning."""
    copied: list[str] = []
    inside = {id(module) for root in saved.values() for module in root.modules()}
    elsewhere = {
        id(p) for module in model.modules() if id(module) not in inside for p in module.parameters(recurse=False)
    }
    for path, root in saved.items():
        for inner, module in root.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in elsewhere:
                    parameter = nn.Parameter(parameter.detach().clone())
                    setattr(module, name, parameter)
                    copied.append(".".join(filter(None, (path, inner, name))))
                parameter.requires_grad_(True)
    if copied:
        forget_ties(model)
        warnings.warn(
            f"apply_lora: {', '.join(copied)} was one parameter with that of another module; modules_to_save trains a "
            "copy of it, and the config of a transformers model no longer ties them",
            stacklevel=4,
        )


def _rebind_hooks(module: nn.Module) -> None:
    """Make Accelerate's hooks, which store the forward they replaced, call the forward of the layer's new class."""
    if "_old_forward" in vars(module):
        module._old_forward = types.MethodType(type(module).forward, module)  # type: ignore[assignment]
