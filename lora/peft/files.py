"""Adapter files in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

A key is ``base_model.model.`` followed by PEFT's name of the parameter without the adapter's name:
``LAYER.lora_A.weight`` (r, in), ``LAYER.lora_B.weight`` (out, r), ``LAYER.lora_magnitude_vector`` (out,),
``LAYER.lora_embedding_A`` (r, vocabulary), ``LAYER.token_adapter.trainable_tokens_delta`` (tokens, width). The bias of
an adapted layer is ``LAYER.base_layer.bias``. Modules trained whole have their parameters and persistent buffers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from leanstep._checkpoint.card import write_card
from leanstep._checkpoint.files import load_pickled, load_tensors, read_json
from leanstep._files import model_name, one_line, replacing, write_text
from leanstep._torch import input_embedding, is_dtensor, output_head, place_like, plain_name, unwrapped, whole_tensor
from leanstep.lora.apply import (
    Model,
    adapted_experts,
    adapted_layers,
    all_adapters,
    attach_adapters,
    modules_to_save,
    plan_lora,
    refuse_replicas,
    saved_buffers,
    trained_biases,
)
from leanstep.lora.config import LoraConfig, is_pissa
from leanstep.lora.layers.experts import expert_sizes, file_keys
from leanstep.lora.layers.frozen import widths
from leanstep.lora.layers.linear import LoRALinearLayer
from leanstep.lora.layers.pissa import move_start, start_factors
from leanstep.lora.layers.tokens import IN_FILES, ROWS
from leanstep.lora.merge import base_bias
from leanstep.lora.peft.experts import names_read_as_experts
from leanstep.lora.peft.layer_parameters import name_by_layers, name_by_weights, why_not_parameters
from leanstep.lora.targets import rank_of, scale_of, select_parameters, select_tokens, without_foreign_names

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
# those that torch converts to fp32
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_FACTORS = ("lora_A.", "lora_B.", "lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B", ROWS)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's adapter under PEFT's keys. If tensors are sharded, all processes must call it."""
    config: LoraConfig = model.lora_config  # type: ignore[assignment]
    layers, in_files = dict(adapted_layers(model)), _adapted_keys(model)
    biases = trained_biases(model, layers, config)
    saved_whole = tuple(f"{name}." for name in modules_to_save(model, config))
    # a module under several names has one adapter
    first_names = {name for name, _ in model.named_modules()}
    state = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, end = name.rpartition(".")
        if ".lora_" in f".{name}" and owner not in first_names:
            continue
        if end == ROWS:
            key = f"{owner}.{IN_FILES}"
        elif any(f".{factor}" in f".{name}" for factor in _FACTORS) or name.startswith(saved_whole):
            key = in_files.get(name, name)
        elif name in biases:
            key = f"{owner}.base_layer.bias" if owner in layers else name
        else:
            continue
        is_base_bias = end == "bias" and owner in layers
        state[PREFIX + key] = whole_tensor(base_bias(layers[owner]) if is_base_bias else parameter.detach())
    state |= {PREFIX + name: whole_tensor(buffer) for name, buffer in saved_buffers(model, config).items()}
    for name, layer in layers.items():
        if (start := start_factors(layer)) is not None:
            a, b = (f"{PREFIX}{name}.{factor}.weight" for factor in ("lora_A", "lora_B"))
            state[a] = torch.cat([state[a], start[0].to(state[a])])
            state[b] = torch.cat([state[b], -start[1].to(state[b])], dim=1)
    return {plain_name(key): value for key, value in state.items()}


def _double_rank(settings: dict[str, Any]) -> None:
    """Describe an adapter that began with PiSSA as one of rank 2 r for the plain base, with the same scales."""
    alpha = math.sqrt(2) if settings["use_rslora"] else 2
    settings |= {"init_lora_weights": True, "r": 2 * settings["r"], "lora_alpha": alpha * settings["lora_alpha"]}
    settings["rank_pattern"] = {key: 2 * r for key, r in settings["rank_pattern"].items()}
    settings["alpha_pattern"] = {key: alpha * value for key, value in settings["alpha_pattern"].items()}


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write a model's adapter for :func:`load_adapter` and ``peft.PeftModel.from_pretrained``.

    Args:
        model: a model that :func:`leanstep.lora.apply_lora` adapted, merged or not. An adapter that began with PiSSA
            is written with rank 2 r: it opens over the plain base.
        folder: created if missing; each file is replaced atomically. Where huggingface_hub is installed, it gets a
            model card, ``README.md``; one that somebody wrote stays.

    Returns:
        The folder.

    Raises:
        ValueError: for a model without adapters, a tensor with a NaN or an infinity, or a file in place of the folder.
            Nothing is written.

    Notes:
        In mixtures of experts, PEFT takes layers called ``gate_proj``, ``up_proj`` or ``down_proj`` for experts. Such
        layers are named by their weights, in ``target_parameters``. ``lora_dropout`` is then written as 0, with a
        warning. With DoRA, a bias on B or a quantised base PEFT computes something else; a warning says so.
    """
    model = unwrapped(model)
    config = getattr(model, "lora_config", None)
    if not isinstance(config, LoraConfig):
        raise ValueError("save_adapter: the model has no adapters; call apply_lora first")
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ValueError(f"save_adapter: {target} is a file; expected a folder, for {CONFIG} and {WEIGHTS}")
    state = adapter_state(model)
    broken = [key for key, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"save_adapter: {broken[0]} holds NaN or infinity ({len(broken)} tensors in all)")
    transposed = {layer.lora.transposed for _, layer in adapted_layers(model) if isinstance(layer, LoRALinearLayer)}
    settings = config.to_dict() | {"inference_mode": True, "fan_in_fan_out": transposed == {True}}
    if not settings["base_model_name_or_path"]:
        settings["base_model_name_or_path"] = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    if settings["target_modules"] == "all-linear":
        settings["target_modules"] = _exact_names(model)
    if is_pissa(config.init_lora_weights):
        _double_rank(settings)
    _name_renamed_layers(model, settings)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.cpu().contiguous().clone() for key, value in sorted(state.items())}
    with replacing(target / WEIGHTS) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    write_text(target / CONFIG, json.dumps(settings, indent=2, sort_keys=True))
    if find_spec("huggingface_hub"):
        facts = {"Adapter": f"{'DoRA' if config.use_dora else 'LoRA'}, rank {settings['r']}"}
        base = settings["base_model_name_or_path"]
        write_card(target, model_name(target), facts, base=base, relation="adapter", tags=["lora"])
    return target


def _exact_names(model: nn.Module) -> list[str] | str:
    """The names of the adapted layers; as a regular expression if one is also the end of another module's name."""
    adapted = dict(adapted_layers(model))
    ends = tuple(f".{name}" for name in adapted)
    if any(name.endswith(ends) for name, _ in model.named_modules() if name not in adapted):
        return "|".join(re.escape(plain_name(name)) for name in sorted(adapted))
    return sorted(map(plain_name, adapted))


def _name_renamed_layers(model: nn.Module, settings: dict[str, Any]) -> None:
    """Name layers that PEFT would take for experts by their weights. Warn of what is lost, or where that fails."""
    ends = names_read_as_experts(model)
    renamed = [name for name, _ in adapted_layers(model) if name.rpartition(".")[2] in ends]
    if not renamed:
        return
    layers = renamed[0] + (f" and {len(renamed) - 1} more" if len(renamed) > 1 else "")
    dropout, reason = settings["lora_dropout"], why_not_parameters(model, settings, renamed)
    if reason is not None:
        warnings.warn(
            f"save_adapter: PEFT reads the adapters of {layers} as those of experts, since it renames layers called "
            f"{', '.join(sorted(ends))} in this kind of model, and takes them by no other name where {reason}; load "
            "the folder by leanstep.lora.load_adapter, or merge the adapters",
            stacklevel=3,
        )
        return
    name_by_weights(model, settings, renamed)
    if dropout:
        warnings.warn(
            f"save_adapter: writes lora_dropout 0 instead of {dropout:g}, since PEFT adapts {layers} without dropout "
            f"only; to train further, load_adapter(model, folder, lora_dropout={dropout:g})",
            stacklevel=3,
        )


def load_adapter(model: Model, folder: str | os.PathLike[str], **changes: object) -> Model:
    """Load an adapter written by :func:`save_adapter` or PEFT.

    Args:
        model: the adapter's base model, plain or with such an adapter; changed in place. A plain model is adapted by
            the file's configuration.
        folder: folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).
        changes: fields of :class:`leanstep.lora.LoraConfig` that override the file's, such as ``save``. An adapted
            model has its settings already, and takes no others.

    Returns:
        The model. The adapter can be trained further. A model adapted by ``init_lora_weights="pissa"`` takes a file of
        such a model, and goes on at rank r.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: for another kind of adapter; for another base (an unknown target, a missing or unexpected key, a
            different shape); for an initialisation that changed the base (OLoRA and the like); for tensors with a NaN
            or an infinity, or of integers where the model has none; for an adapted model that is merged, has another
            scale (``lora_alpha``, ``use_rslora``, patterns) or other values of ``changes``. The model is unchanged.

    Notes:
        Warns if the file names another base model, or layers that the model lacks. Also warns if the file holds a
        different base weight of an embedding or head, which then replaces the model's; PEFT writes such weights if they
        are adapted or resized.
    """
    source, whole, model = Path(folder), model, unwrapped(model)
    merged = [adapter.name for adapter in all_adapters(model) if adapter.merged]
    if merged:
        raise ValueError(f"load_adapter: {merged[0]} is merged; unmerge the model first")
    config = dataclasses.replace(read_config(source), inference_mode=False)
    tensors = _read_weights(source)
    _check_values(model, tensors, source)
    base = f"the adapter was made for {config.base_model_name_or_path or 'a model whose name it does not say'}"
    adapted = isinstance(getattr(model, "lora_config", None), LoraConfig)
    if not adapted:
        refuse_replicas(whole, "load_adapter")
    plan: dict[str, nn.Module] = {}
    try:
        config = name_by_layers(model, config)
    except ValueError as error:
        raise ValueError(f"load_adapter: {source} does not fit this model ({base}): {error}") from error
    start = changes.get("init_lora_weights", config.init_lora_weights)
    if not adapted and is_pissa(start) and start != config.init_lora_weights:
        raise ValueError(
            f"load_adapter: init_lora_weights={start!r} moves some of the base into the factors, and the file's "
            "factors are for the base as it is; leave it out, or apply_lora(model, ...) with it and then "
            "load_adapter(model, folder) to go on with a file of such a model"
        )
    config = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
    if adapted:
        _refuse_changes(model, config, changes)
        _compare_tokens(model, config, f"{source} ({base})")
        by_key = {key: name for name, key in _adapted_keys(model).items()}
        expected = set(_by_parameter(adapter_state(model), by_key))
        shapes = {key: _stored_shape(model, key) for key in expected}
    else:
        try:
            config = without_foreign_names(model, config, str(source))
            plan = plan_lora(model, config)
            shapes = _planned_shapes(model, plan, config)
            by_key = {key: name for name, key in _planned_keys(model, config).items()}
        except ValueError as error:
            raise ValueError(f"load_adapter: {source} does not fit this model ({base}): {error}") from error
    state = _without_repetitions(model, _by_parameter(tensors, by_key))
    embeddings = _embedding_shapes(model, set(state) - set(shapes))
    shapes |= embeddings
    _compare(shapes, {key: tuple(value.shape) for key, value in state.items()}, f"{source} ({base})")
    _compare_scales(model, config, f"{source} ({base})")
    _compare_names(model, config, source)
    _compare_embeddings(model, {key: state[key] for key in embeddings}, source)
    if not adapted:
        attach_adapters(model, plan, config)
    with torch.no_grad():
        for key, value in (_take_starts(model, state) if adapted else state).items():
            tensor = _tensor(model, key)
            tensor.copy_(place_like(value.to(tensor.dtype), tensor) if is_dtensor(tensor) else value)
    for _, layer in adapted_layers(model):
        layer.lora.norms = None
    return whole


def _stored_shape(model: nn.Module, key: str) -> tuple[int, ...]:
    """The shape of a tensor in a file: PiSSA's factors have twice their rank there."""
    shape = _tensor(model, key).shape
    owner, _, factor = key.removesuffix(".weight").rpartition(".")
    if factor not in ("lora_A", "lora_B") or start_factors(model.get_submodule(owner)) is None:
        return tuple(shape)
    m, n = shape
    return (2 * m, n) if factor == "lora_A" else (m, 2 * n)


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, key = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), key)
    return tensor


def _take_starts(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give layers that began with PiSSA the start in a file; returns the tensors with the trained half of the factors.

    The base weight changes where the file's start is another one, as after a decomposition on another machine.
    """
    state = dict(state)
    for name, layer in adapted_layers(model):
        if (start := start_factors(layer)) is None:
            continue
        keys = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        (a, start_a), (b, start_b) = state[keys[0]].chunk(2), state[keys[1]].chunk(2, dim=1)
        move_start(layer, start_a.to(start[0]), -start_b.to(start[1]))
        state |= {keys[0]: a, keys[1]: b}
    return state


def read_config(folder: Path) -> LoraConfig:
    """Read the configuration in a folder. Raises FileNotFoundError and ValueError as :func:`load_adapter` does."""
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; an adapter is a folder with {CONFIG} and {WEIGHTS}")
    settings = read_json(path, unique=True)
    try:
        return LoraConfig.from_dict(settings)
    except (TypeError, OverflowError, RecursionError) as error:  # values of types that no field takes
        raise ValueError(f"{path} cannot be understood: {one_line(error)}") from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS).exists():
        return load_tensors(folder / WEIGHTS)
    if (folder / OLD_WEIGHTS).exists():
        content = load_pickled(folder / OLD_WEIGHTS)
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise ValueError(f"{folder / OLD_WEIGHTS} holds a {type(content).__name__}; expected tensors by name")
        return content
    raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {OLD_WEIGHTS}")


def _check_values(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    # BatchNorm counts its batches
    integers = {PREFIX + name for name, buffer in model.named_buffers() if not buffer.is_floating_point()}
    for key, value in tensors.items():
        if key in integers and isinstance(value, Tensor) and value.dtype in _INTEGERS:
            continue
        if not isinstance(value, Tensor) or value.dtype not in _DTYPES:
            kind = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"load_adapter: {source}: {key} is {kind}; expected a tensor of floating-point numbers")
        if not torch.isfinite(value.float()).all():
            raise ValueError(f"load_adapter: {source}: {key} holds NaN or infinity")


def _planned_keys(model: nn.Module, config: LoraConfig) -> dict[str, str]:
    """The names of the factors of ``target_parameters`` in the model -> their names in a file."""
    leaves: dict[str, list[str]] = {}
    for path, leaf in select_parameters(model, config).values():
        leaves.setdefault(path, []).append(leaf)
    return {name: key for path, inside in leaves.items() for name, key in file_keys(path, inside).items()}


def _adapted_keys(model: nn.Module) -> dict[str, str]:
    """The same of an adapted model."""
    modules = adapted_experts(model)
    return {name: key for path, module in modules for name, key in file_keys(path, list(module.lora)).items()}


def _by_parameter(tensors: dict[str, Tensor], by_key: dict[str, str]) -> dict[str, Tensor]:
    """Rename a file's tensors to the names of the model's parameters. ``by_key`` has those of adapted parameters.

    With ``bias="all"``, PEFT writes the biases of ``modules_to_save`` three times: also under its wrapper's names, and
    with their values before training.
    """
    state: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if not key.endswith(".original_module.bias"):
            name = (
                key.removeprefix(PREFIX).replace(".modules_to_save.bias", ".bias").replace(f".{IN_FILES}", f".{ROWS}")
            )
            name = name.replace(".token_adapter.base_layer.", ".base_layer.")
            name = by_key.get(name, name)
            state[re.sub(r"\.base_layer\.(bias|weight)$", r".\1", name)] = value
    return state


def _without_repetitions(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out factors under the later names of a module that are those under its first name, as PEFT writes them."""
    first_names = {id(module): name for name, module in model.named_modules()}
    later_names = {name: first_names[id(module)] for name, module in model.named_modules(remove_duplicate=False)}

    def is_repeated(key: str) -> bool:
        owner, dot, factor = key.partition(".lora_")
        twin = f"{later_names.get(owner, owner)}{dot}{factor}"
        if twin == key or twin not in state:
            return False
        return state[twin].dtype == state[key].dtype and torch.equal(state[twin], state[key])

    return {key: value for key, value in state.items() if not is_repeated(key)}


def _embedding_shapes(model: nn.Module, others: set[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of the embedding and head weights among ``others``, the file's keys outside the adapter.

    PEFT writes these weights if they are adapted or resized.
    """
    modules = [module for module in (input_embedding(model), output_head(model)) if module is not None]
    names = {f"{name}.weight": module for name, module in model.named_modules() if any(module is m for m in modules)}
    return {name: tuple(names[name].weight.shape) for name in others & set(names)}


def _compare_embeddings(model: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    for key, value in weights.items():
        current = model.get_parameter(key)
        if not is_dtensor(current) and not torch.equal(value.to(current), current):
            warnings.warn(
                f"load_adapter: {source} has a base weight of {key.removesuffix('.weight')} that differs from the "
                "model's; it replaces the model's, and save_adapter does not write it",
                stacklevel=3,
            )


def _planned_shapes(model: nn.Module, plan: dict[str, nn.Module], config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Shapes that the adapter's tensors will have in a plain model, by parameter name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in plan.items():
        r = rank_of(config, name)
        if isinstance(module, nn.Embedding):
            n, m = module.num_embeddings, module.embedding_dim
            shapes |= {f"{name}.lora_embedding_A": (r, n), f"{name}.lora_embedding_B": (m, r)}
        else:
            n, m = widths(module)
            shapes |= {f"{name}.lora_A.weight": (r, n), f"{name}.lora_B.weight": (m, r)}
            if config.lora_bias:
                shapes[f"{name}.lora_B.bias"] = (m,)
        if config.use_dora:
            shapes[f"{name}.lora_magnitude_vector"] = (m,)
    for name, (path, leaf) in select_parameters(model, config).items():
        count, n, m = expert_sizes(model.get_submodule(path), leaf)
        rank = rank_of(config, name) * count
        shapes |= {f"{path}.lora_A.{leaf}.weight": (rank, n), f"{path}.lora_B.{leaf}.weight": (m, rank)}
    for name, rows in select_tokens(model, config).items():
        if not rows.shares:
            weight: Any = rows.module.weight
            shapes[f"{name}.{ROWS}"] = (len(rows.tokens), weight.shape[1])
    for name, root in modules_to_save(model, config).items():
        shapes |= {f"{name}.{key}": tuple(p.shape) for key, p in root.named_parameters()}
    others: dict[str, Tensor] = {**saved_buffers(model, config), **trained_biases(model, plan, config)}
    return shapes | {name: tuple(tensor.shape) for name, tensor in others.items()}


def _compare(expected: dict[str, tuple[int, ...]], shapes: dict[str, tuple[int, ...]], where: str) -> None:
    missing, foreign = sorted(set(expected) - set(shapes)), sorted(set(shapes) - set(expected))
    problems = []
    if missing:
        problems.append(f"{len(missing)} keys are missing, such as {PREFIX}{missing[0]}")
    if foreign:
        problems.append(f"{len(foreign)} keys are not of this model and configuration, such as {PREFIX}{foreign[0]}")
    for key in sorted(set(expected) & set(shapes)):
        if expected[key] != shapes[key]:
            problems.append(f"{PREFIX}{key} has shape {shapes[key]}, the model needs {expected[key]}")
            break
    if problems:
        raise ValueError(f"load_adapter: {where} does not fit this model: " + "; ".join(problems))


def _refuse_changes(model: nn.Module, config: LoraConfig, changes: Iterable[str]) -> None:
    """Raise ValueError for settings that an adapted model does not have: its layers are made already."""
    for name in changes:
        value, current = getattr(config, name), getattr(model.lora_config, name)
        if value != current:
            raise ValueError(
                f"load_adapter: got {name}={value!r}, and the model is adapted already, with {name}={current!r}; call "
                f"remove_lora(model) first to adapt it with {name}={value!r}"
            )


def _compare_scales(model: nn.Module, config: LoraConfig, where: str) -> None:
    scales = {adapter.name: (adapter.scale, scale_of(config, adapter.name)) for adapter in all_adapters(model)}
    differ = {name: pair for name, pair in scales.items() if not math.isclose(*pair, rel_tol=1e-6)}
    if differ:
        name, (current, stored) = next(iter(differ.items()))
        more = f" (and {len(differ) - 1} layers more)" if len(differ) > 1 else ""
        raise ValueError(
            f"load_adapter: {where} does not fit this model: {name} has scale {stored:g} in the file, {current:g} in "
            f"the model{more}, by lora_alpha, use_rslora or a pattern; call remove_lora(model) first to adapt it by "
            "the file's configuration"
        )


def _compare_tokens(model: nn.Module, config: LoraConfig, where: str) -> None:
    current = model.lora_config.trainable_token_indices  # type: ignore[union-attr]
    if (current or None) != (config.trainable_token_indices or None):
        raise ValueError(
            f"load_adapter: {where} does not fit this model: it has trainable_token_indices "
            f"{config.trainable_token_indices}, the model {current}; call remove_lora(model) first to adapt it by the "
            "file's configuration"
        )


def _compare_names(model: nn.Module, config: LoraConfig, source: Path) -> None:
    stored, name = config.base_model_name_or_path, getattr(getattr(model, "config", None), "_name_or_path", None)
    if stored and name and _normalized(stored) != _normalized(name):
        warnings.warn(
            f"load_adapter: {source} was made for {stored!r}, and this model is {name!r}; if their weights differ, the "
            "adapter does not fit this model",
            stacklevel=3,
        )


def _normalized(name: str) -> str:
    """Map a model's hub name and its folder in the hub's cache to the same string; make other paths absolute."""
    cached = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]", name)
    name = cached.group(1).replace("--", "/") if cached else name
    return os.path.realpath(os.path.expanduser(name))
