"""Which rule each parameter of a model gets: ordered groups by module type and name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

ROLES = ("hidden", "expert", "conv", "lora", "embedding", "position", "head", "norm", "bias", "other")

# role -> settings of its group; "algorithm" (SinkGD's) and "norm" (LANTON's) are ignored by optimizers without them
DEFAULTS: dict[str, dict[str, Any]] = {
    "hidden": {"algorithm": "sinkgd", "norm": "rms"},
    "expert": {"algorithm": "sinkgd", "norm": "rms"},
    "conv": {"algorithm": "sinkgd", "norm": "rms"},
    "lora": {"algorithm": "sinkgd", "norm": "rms"},
    "embedding": {"algorithm": "adamw", "norm": "sign", "weight_decay": 0.0},
    "position": {"algorithm": "adamw", "norm": "sign", "weight_decay": 0.0},
    "head": {"algorithm": "adamw", "norm": "sign"},
    "norm": {"algorithm": "adamw", "norm": "vector", "weight_decay": 0.0},
    "bias": {"algorithm": "adamw", "norm": "vector", "weight_decay": 0.0},
    "other": {"algorithm": "adamw", "norm": "auto", "weight_decay": 0.0},
}

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_POSITION_NAME = re.compile(r"(^|[._])(wpe|pos_emb|pos_embed|position_embeddings?|embed_positions)([._]|$)")
_HEAD_NAME = re.compile(r"(^|\.)(lm_head|embed_out|output_projection|classifier|score|head)$")
_LORA_NAME = re.compile(r"(^|[._])lora_(A|B|embedding_A|embedding_B|magnitude_vector)([._]|$)")
_EXPERT_NAME = re.compile(r"(^|[._])experts?([._]|$)")
# modules of transformers that store their matrices (in, out); newer expert modules say so in `is_transposed`
_TRANSPOSED_CLASSES = ("Conv1D", "Llama4TextExperts", "GptOssExperts")
_NORM_CLASS = re.compile(r"(norm|LayerScale)", re.IGNORECASE)


class ParamGroups(list[dict[str, Any]]):
    """A list of param-group dicts, in the order of :data:`ROLES`, that prints as a table."""

    def summary(self) -> str:
        """One line per group: name, rule, tensors, elements, share, and the first parameter names."""
        total = sum(p.numel() for group in self for _, p in group["params"]) or 1
        lines = [f"{'group':<12} {'algorithm':<10} {'tensors':>8} {'elements':>14} {'share':>7}  first parameters"]
        for group in self:
            elements = sum(p.numel() for _, p in group["params"])
            names = ", ".join(name for name, _ in group["params"][:2])
            more = f", ... ({len(group['params']) - 2} more)" if len(group["params"]) > 2 else ""
            lines.append(
                f"{group['name']:<12} {group.get('algorithm', '-'):<10} {len(group['params']):>8} {elements:>14,} "
                f"{elements / total:>7.1%}  {names}{more}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()


def param_groups(
    model: nn.Module,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    overrides: Iterable[tuple[str, Mapping[str, Any]]] | Mapping[str, Mapping[str, Any]] = (),
) -> ParamGroups:
    """Sort the trainable parameters of a model into groups by what they are.

    Roles, decided by module type first and by name where types do not tell:

    * ``embedding``: weights of ``nn.Embedding`` (a head tied to one is an embedding); ``position``: those with a
      position name (``wpe``, ``position_embeddings``, ...);
    * ``head``: the model's output embeddings (``get_output_embeddings()``), or an ``nn.Linear`` named ``lm_head``,
      ``classifier``, ``score``, ``head``, ...;
    * ``norm``: parameters of modules whose class is a norm; ``bias``: others whose name ends in ``bias`` (those of
      fused experts, one row per expert, included);
    * ``conv``: convolution weights; ``lora``: LoRA factors by PEFT's names;
    * ``expert``: three-dimensional weights of fused experts (one matrix per expert);
    * ``hidden``: every other matrix; ``other``: what is left (single vectors and scalars).

    Matrices that are known to be stored (in, out) are in groups of their own with ``transposed=True``: those of
    transformers' ``Conv1D`` (GPT-2), and expert weights of modules that say ``is_transposed`` or are known by class
    (GPT-OSS, Aria, Llama 4). All others are taken as (out, in). Weights (out, in, width) of one-dimensional
    convolutions are in one with ``flatten=True``, as they are no stacks.

    Args:
        model: any module.
        settings: group settings per role, merged over :data:`DEFAULTS`; for example
            ``{"embedding": {"algorithm": "balanced", "momentum": 0.95}, "head": {"lr": 1e-3}}``.
        overrides: ordered (regular expression, settings) pairs, or a mapping of them, searched in parameter names; the
            first match takes the parameter into a group of its own, named after the expression. Settings start from the
            role's.

    Returns:
        :class:`ParamGroups`: dicts with ``name``, ``params`` as (name, parameter) pairs, and the settings. Give it to
        an optimizer as it is; print it to see the routing. Every trainable parameter is in exactly one group.

    Raises:
        TypeError: something else than a model, or settings that are no mapping.
        ValueError: an unknown role; an override that is no regular expression or matches nothing; a parameter under no
            group; a model without trainable parameters.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4), nn.Linear(4, 10))
        >>> [group["name"] for group in param_groups(model)]
        ['hidden', 'embedding', 'norm', 'bias']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"param_groups: expected the model (an nn.Module), got {type(model).__name__}; the modules tell what a "
            "parameter is, so its parameters alone are not enough"
        )
    chosen = {role: dict(DEFAULTS[role]) for role in ROLES}
    for role, values in (settings or {}).items():
        if role not in chosen:
            raise ValueError(f"param_groups: unknown role {role!r}; expected one of {ROLES}")
        if not isinstance(values, Mapping):
            raise TypeError(
                f"param_groups: the settings of {role!r} must be a mapping such as {{'lr': 1e-3}}, got {values!r}"
            )
        chosen[role].update(values)
    rules = _rules(overrides)
    used = [False] * len(rules)
    roles = parameter_roles(model)
    transposed = transposed_parameters(model)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        role = roles[name]
        match = next((i for i, (pattern, _) in enumerate(rules) if pattern.search(name)), None)
        key: tuple[Any, ...]
        if match is None:
            key, label, values = (ROLES.index(role), role), role, chosen[role]
        else:
            used[match] = True
            label = rules[match][0].pattern
            key, values = (len(ROLES) + match, role), {**chosen[role], **rules[match][1]}
        if id(param) in transposed and role in ("hidden", "expert"):
            key, values = (*key, "transposed"), {**values, "transposed": True}
        elif role == "conv" and param.dim() == 3:
            key, values = (*key, "flatten"), {**values, "flatten": True}
        if values.get("norm") == "vector" and param.dim() > 1:  # biases of experts: a vector for each, in one table
            key, values = (*key, "table"), {**values, "norm": "sign"}
        groups.setdefault(key, {"name": label, **values, "params": []})["params"].append((name, param))
    for (pattern, _), was_used in zip(rules, used, strict=True):
        if not was_used:
            raise ValueError(f"param_groups: override {pattern.pattern!r} matches no trainable parameter")
    result = ParamGroups(groups[key] for key in sorted(groups))
    _check_claimed_once(model, result)
    return result


def _rules(overrides: Any) -> list[tuple[re.Pattern[str], dict[str, Any]]]:
    """The overrides, compiled; anything else than pairs of an expression and settings is an error that shows it."""
    rules = []
    for entry in overrides.items() if isinstance(overrides, Mapping) else overrides:
        pair = isinstance(entry, (tuple, list)) and len(entry) == 2
        if not pair or not isinstance(entry[0], str) or not isinstance(entry[1], Mapping):
            raise TypeError(
                "param_groups: overrides must be pairs of a regular expression and settings, such as "
                f"('q_proj', {{'lr': 1e-3}}), got {entry!r}"
            )
        try:
            rules.append((re.compile(entry[0]), dict(entry[1])))
        except re.error as error:
            raise ValueError(f"param_groups: override {entry[0]!r} is not a regular expression: {error}") from None
    return rules


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """Role of every parameter, by its name in ``model.named_parameters()``."""
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for leaf, param in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(param), []).append((module_name, module, leaf))
    output = _output_module(model)
    return {
        name: _role(name, param, owners[id(param)], output)
        for name, param in model.named_parameters()
    }  # fmt: skip


def transposed_parameters(model: nn.Module) -> set[int]:
    """Identities of the weights that are known to be stored (in, out), or (e, in, out)."""
    return {
        id(param)
        for module in model.modules()
        if type(module).__name__ in _TRANSPOSED_CLASSES or getattr(module, "is_transposed", False) is True
        for param in module.parameters(recurse=False)
        if param.dim() in (2, 3)
    }


def _output_module(model: nn.Module) -> nn.Module | None:
    """The module that makes logits, as transformers names it; None for other models."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        return get() if callable(get) else None
    except NotImplementedError:
        return None


def _role(name: str, param: nn.Parameter, owners: list[tuple[str, nn.Module, str]], output: nn.Module | None) -> str:
    if _LORA_NAME.search(name):
        return "lora" if param.dim() >= 2 else "other"
    # a tied head has two owners: the embedding decides
    for module_name, module, _ in owners:
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            return "position" if _POSITION_NAME.search(module_name) else "embedding"
    module_name, module, leaf = owners[0]
    if _NORM_CLASS.search(type(module).__name__):
        return "norm"
    if leaf.endswith("bias"):
        return "bias"
    if param.dim() < 2:
        return "other"
    if _POSITION_NAME.search(name):
        return "position"
    if module is output or (isinstance(module, nn.Linear) and _HEAD_NAME.search(module_name)):
        return "head"
    if isinstance(module, _CONV):
        return "conv"
    if param.dim() == 3:
        return "expert" if _EXPERT_NAME.search(name) or "expert" in type(module).__name__.lower() else "other"
    return "hidden" if param.dim() == 2 else "conv"


def _check_claimed_once(model: nn.Module, groups: ParamGroups) -> None:
    """Every trainable parameter in exactly one group, or an error that names it."""
    claims: dict[int, int] = {}
    for group in groups:
        for _, param in group["params"]:
            claims[id(param)] = claims.get(id(param), 0) + 1
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not trainable:
        raise ValueError("param_groups: the model has no trainable parameter")
    wrong = [name for name, param in trainable if claims.get(id(param), 0) != 1]
    if wrong:
        raise ValueError(f"param_groups: not claimed exactly once: {', '.join(wrong)}")
