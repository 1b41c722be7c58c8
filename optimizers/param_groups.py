"""Parameter groups of a model by role; module types and names determine the role of a parameter."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from leanstep._torch import attention_blocks, is_conv1d, is_of_experts, output_head, stores_in_out
from leanstep.optimizers.common.groups import is_flattened

SPLITS = (None, "fused", "heads")
ROLES = ("hidden", "expert", "router", "conv", "lora", "embedding", "position", "head", "norm", "bias", "other")

# role -> settings of its group; "algorithm" (SinkGD's) and "norm" (LANTON's) are ignored by other optimizers
DEFAULTS: dict[str, dict[str, Any]] = {
    "hidden": {"algorithm": "sinkgd", "norm": "rms"},
    "expert": {"algorithm": "sinkgd", "norm": "rms"},
    "router": {"algorithm": "sinkgd", "norm": "rms"},
    "conv": {"algorithm": "sinkgd", "norm": "rms"},
    "lora": {"algorithm": "sinkgd", "norm": "rms"},
    "embedding": {"algorithm": "adamw", "norm": "sign", "weight_decay": 0.0},
    "position": {"algorithm": "adamw", "norm": "sign", "weight_decay": 0.0},
    "head": {"algorithm": "adamw", "norm": "sign"},
    "norm": {"algorithm": "adamw", "norm": "vector", "weight_decay": 0.0},
    "bias": {"algorithm": "adamw", "norm": "vector", "weight_decay": 0.0},
    "other": {"algorithm": "adamw", "norm": "vector", "weight_decay": 0.0},
}

# setting of a group that chooses its rule -> the optimizer that has it
_OWNER_OF_RULE = {"algorithm": "SinkGD", "norm": "LANTON"}

# of embeddings and heads, with `embeddings=`
_EMBEDDINGS: dict[str, dict[str, Any]] = {
    "adamw": {},
    # 2 * 5 alternating normalizations, and that of the rows at the end: 11. The momentum is our choice.
    "balanced": {
        "algorithm": "balanced", "momentum": 0.95, "num_iters": 5, "weight_decay": 0.0,
    },
}  # fmt: skip

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MATRIX_MODULES = (nn.Linear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_WEIGHT_LEAF = re.compile(r"(\w+_)?weight(_\w+)?")
_BIAS_LEAF = re.compile(r"\w*bias(_\w+)?")
_POSITION_NAME = re.compile(
    r"(^|[._])(wpe|(abs|rel)?_?pos|(abs|rel)pos|positions?|positional|rel(ative)?_(attention|position)|rel_embeddings"
    r"|distance_embedding)([._]|$)"
)
_POSITION_CLASS = re.compile(r"(Position\w*|RelPos)(Embed|Encod|Bias)")
_EMBEDDING_CLASS = re.compile(r"Embeddings?$")
_HEAD_NAME = re.compile(
    r"(^|\.)((?!pre_)\w{2,}_)?(heads?|classifiers?)$|(^|\.)(score|embed_out|output_projection|qa_outputs|logits_proj)$"
    r"|(^|\.)(\w+_)?class_embed$"
)
# inner blocks use these names too, so they count only at the top of a model
_HEAD_NAME_AT_TOP = re.compile(r"^((transformer|model|decoder)\.)?(output|output_layer|proj_out)$")
_LORA_NAME = re.compile(r"(^|[._])lora_(A|B|embedding_A|embedding_B|magnitude_vector)([._]|$)")
_ROUTER_CLASS = re.compile(r"[Rr]outer|Top[kK]Gat(e|ing)$|M[oO]EGate$")
_MIXTURE = re.compile(r"expert|moe", re.IGNORECASE)
_NORM_CLASS = re.compile(r"(norm|LayerScale)", re.IGNORECASE)
# path components that torch.compile, checkpointing, FSDP1 and PEFT insert for their wrappers
_WRAPPER = (
    r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|base_layer|original_module|modules_to_save\.[^.]+)"
)
_WRAPPERS = re.compile(rf"(?<![^.]){_WRAPPER}(\.|$)")
_LAST_WRAPPERS = re.compile(rf"((^|\.){_WRAPPER})+$")
# prefixes of DDP and PEFT around a whole model
_ROOT_WRAPPERS = re.compile(r"^(module\.|base_model\.model\.)+")


class ParamGroups(list[dict[str, Any]]):
    """A list of param-group dicts, in the order of :data:`ROLES`, that prints as a table.

    Attributes:
        unused_settings: the roles of ``settings`` that no trainable parameter has.
    """

    unused_settings: tuple[str, ...] = ()

    def summary(self, optimizer: type | None = None) -> str:
        """One line per group: name, rule, rate, tensors, elements, share, rows of the blocks, first parameter names.

        ``4 x 64 + 128`` are four blocks of 64 rows and one of 128; ``64 each`` are blocks of 64 rows, as many as a
        parameter has. The column is there if a group has blocks. A last line names settings that no parameter has.

        Args:
            optimizer: the class that takes the groups, whose rules are named: SinkGD's ``algorithm``, LANTON's
                ``norm``. Others have one rule, and no column. None: the rules of both, under the names of the classes.
        """
        if optimizer is None:
            rules = _OWNER_OF_RULE
        else:
            options = inspect.signature(optimizer).parameters
            known = {*options, *(["algorithm"] if hasattr(optimizer, "algorithms") else [])}
            rules = {key: key for key in _OWNER_OF_RULE if key in known}
        if any("lr" in group for group in self):
            rules = {**rules, "lr": "lr"}
        total = sum(p.numel() for group in self for _, p in group["params"]) or 1
        blocks = [_describe_blocks(group.get("blocks")) for group in self]
        width = max(map(len, blocks)) and max(len("rows"), *map(len, blocks)) + 2
        head = f"{'group':<12} {_cells(rules.values())}{'tensors':>8} {'elements':>14} {'share':>7}"
        lines = [f"{head}  {'rows' if width else '':<{width}}first parameters"]
        for group, rows in zip(self, blocks, strict=True):
            elements = sum(p.numel() for _, p in group["params"])
            names = ", ".join(name for name, _ in group["params"][:2])
            more = f", ... ({len(group['params']) - 2} more)" if len(group["params"]) > 2 else ""
            lines.append(
                f"{group['name']:<12} {_cells(_cell(group.get(key, '-')) for key in rules)}{len(group['params']):>8} "
                f"{elements:>14,} {elements / total:>7.1%}  {rows:<{width}}{names}{more}"
            )
        if self.unused_settings:
            tied = " (a tied head is an embedding)" if "head" in self.unused_settings else ""
            lines.append(f"settings without effect: no parameter has the role {', '.join(self.unused_settings)}{tied}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else f"{float(value):.3g}"


def _cells(rules: Iterable[str]) -> str:
    return "".join(f"{rule:<10} " for rule in rules)


def _describe_blocks(blocks: int | tuple[int, ...] | None) -> str:
    """Return ``4 x 64 + 128`` for blocks of given rows, ``64 each`` for one number, and nothing for None."""
    if blocks is None or isinstance(blocks, int):
        return "" if blocks is None else f"{blocks} each"
    runs = [(size, len(list(run))) for size, run in groupby(blocks)]
    return " + ".join(f"{size}" if count == 1 else f"{count} x {size}" for size, count in runs)


def param_groups(
    model: nn.Module,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    embeddings: str = "adamw",
    split: str | None = None,
    overrides: Iterable[tuple[str, Mapping[str, Any]]] | Mapping[str, Mapping[str, Any]] = (),
) -> ParamGroups:
    """Sort the trainable parameters of a model into groups by their roles.

    The module type determines the role, or the name if the type is not decisive:

    * ``embedding``: weights of ``nn.Embedding`` (a head tied to one is an embedding); ``position``: embeddings and bare
      parameters with a position name (``wpe``, ``position_embeddings``, ``relative_position_bias_table``, ...);
    * ``head``: the model's output embeddings (``get_output_embeddings()``); an ``nn.Linear`` named ``lm_head``,
      ``classifier``, ``score``, ``qa_outputs``, ...; the last one of a module with such a name; one named ``output``,
      ``output_layer`` or ``proj_out`` at the top of the model;
    * ``norm``: parameters of modules whose class is a norm; ``bias``: others with a bias name (those of fused experts,
      one row per expert, included);
    * ``conv``: convolution weights; ``lora``: LoRA factors by PEFT's names;
    * ``expert``: three-dimensional weights of fused experts (one matrix per expert); ``router``: matrices that score
      experts, and linear layers with "router" in their name;
    * ``hidden``: matrices of linear, recurrent and attention layers, and matrices named ``weight`` of other modules;
      ``other``: everything else, such as scalars, vectors (also of shape (1, n)), state-space matrices, tokens and
      queries.

    Wrappers do not change a role: parametrizations, torch.compile, checkpointing, FSDP and PEFT's ``modules_to_save``.

    Four kinds of tensors get separate groups:

    * with ``split``, matrices whose rows are several matrices, with ``blocks``, the rows of each;
    * matrices stored (in, out), with ``transposed=True``: transformers' ``Conv1D`` (GPT-2), and experts of modules
      with ``is_transposed`` or of a known class (GPT-OSS, Aria, Llama 4). All other matrices count as (out, in);
    * weights (out, in, width) of one-dimensional convolutions, with ``flatten=True``;
    * tables of vectors, such as the biases of experts, with ``norm="sign"``.

    Args:
        model: any module.
        settings: group settings per role, merged over :data:`DEFAULTS`; for example
            ``{"embedding": {"lr": 1e-2}, "head": {"lr": 1e-3}}``. Those of a role that no parameter has (a tied head
            is an embedding) have no effect; the table names them.
        embeddings: SinkGD's rule for embeddings and heads: "adamw", or "balanced", which needs half of AdamW's state.
            "balanced" is Nesterov momentum 0.95, rows below a thousandth of the mean norm zeroed, 11 alternating
            normalizations that begin and end with the rows, and no weight decay. ``settings`` may change its values.
        split: weights that LANTON and SinkGD treat as several matrices, by the layout of the module and the sizes of
            its config. "fused": fused QKV weights are split into Q, K and V, fused gate-up weights into their halves.
            "heads": besides, Q and K are split into their heads; V stays whole, except in GPT-NeoX, BLOOM and
            Persimmon, whose fused weights have it head by head (and which "fused" leaves whole). None: every weight is
            one matrix. A layer of unknown layout is left whole; an override can give its group ``blocks``.
            ``leanstep/_torch.py`` lists the known ones.
        overrides: (regular expression, settings) pairs in order, or a mapping. A parameter goes to the group of the
            first expression found in its name. The group is named after the expression, and its settings update
            those of the role.

    Returns:
        :class:`ParamGroups`: dicts with ``name``, ``params`` as (name, parameter) pairs, and the settings. Pass it to
        an optimizer; print it to see the routing. Every trainable parameter is in exactly one group.

    Raises:
        TypeError: for anything but a model, or settings that are not a mapping.
        ValueError: for an unknown role, split or rule of embeddings, an override that is not a regular expression or
            matches nothing, a model that FSDP1 has flattened, or one without trainable parameters.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4), nn.Linear(4, 10))
        >>> [group["name"] for group in param_groups(model)]
        ['hidden', 'embedding', 'norm', 'bias']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"param_groups: expected the model (an nn.Module), got {type(model).__name__}; the types of its modules "
            "determine the roles of parameters"
        )
    if embeddings not in _EMBEDDINGS:
        raise ValueError(f"param_groups: expected embeddings to be one of {tuple(_EMBEDDINGS)}, got {embeddings!r}")
    if split not in SPLITS:
        raise ValueError(f"param_groups: expected split to be one of {SPLITS}, got {split!r}")
    role_settings = {role: dict(DEFAULTS[role]) for role in ROLES}
    for role in ("embedding", "head"):
        role_settings[role].update(_EMBEDDINGS[embeddings])
    for role, values in (settings or {}).items():
        if role not in role_settings:
            raise ValueError(f"param_groups: unknown role {role!r}; expected one of {ROLES}")
        if not isinstance(values, Mapping):
            raise TypeError(
                f"param_groups: the settings of {role!r} must be a mapping such as {{'lr': 1e-3}}, got {values!r}"
            )
        role_settings[role].update(values)
    rules = _rules(overrides)
    used = [False] * len(rules)
    roles = parameter_roles(model)
    transposed = transposed_parameters(model)
    blocks = {} if split is None else _blocks_of_parameters(model, transposed, heads=split == "heads")
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if is_flattened(param):
            raise ValueError(
                f"param_groups: FSDP1 has flattened {name}, and its role is lost with its shape. Shard by FSDP2 "
                "(torch.distributed.fsdp.fully_shard; Accelerate: fsdp_version=2), or give model.parameters() to Lion, "
                "which takes parameters of any shape."
            )
        role = roles[name]
        match = next((i for i, (pattern, _) in enumerate(rules) if pattern.search(name)), None)
        key: tuple[Any, ...]
        if match is None:
            key, label, values = (ROLES.index(role), role), role, role_settings[role]
        else:
            used[match] = True
            label = rules[match][0].pattern
            key, values = (len(ROLES) + match, role), {**role_settings[role], **rules[match][1]}
        if id(param) in transposed and role in ("hidden", "expert", "router"):
            key, values = (*key, "transposed"), {**values, "transposed": True}
        elif role == "conv" and param.dim() == 3:
            key, values = (*key, "flatten"), {**values, "flatten": True}
        if id(param) in blocks and role in ("hidden", "expert") and "blocks" not in values:
            rows = blocks[id(param)]
            # tuples of one type, to be sorted
            key, values = (*key, "blocks", (rows,) if isinstance(rows, int) else rows), {**values, "blocks": rows}
        if values.get("norm") == "vector" and param.dim() > 1:  # a table of vectors, such as biases of experts
            key, values = (*key, "table"), {**values, "norm": "sign"}
        groups.setdefault(key, {"name": label, **values, "params": []})["params"].append((name, param))
    for (pattern, _), was_used in zip(rules, used, strict=True):
        if not was_used:
            raise ValueError(f"param_groups: override {pattern.pattern!r} matches no trainable parameter")
    if not groups:
        raise ValueError("param_groups: the model has no trainable parameter")
    result = ParamGroups(groups[key] for key in sorted(groups))
    present = {roles[name] for group in result for name, _ in group["params"]}
    result.unused_settings = tuple(role for role in settings or () if role not in present)
    return result


def _rules(overrides: Any) -> list[tuple[re.Pattern[str], dict[str, Any]]]:
    """Compile the overrides; raise TypeError or ValueError unless they are (regular expression, settings) pairs."""
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
    """Map every name in ``model.named_parameters()`` to the parameter's role."""
    uses = _uses(model)
    head, head_paths = output_head(model), _head_paths(model)
    head_ids = set() if head is None else {id(param) for param in head.parameters()}
    return {
        name: _role(name, param, uses[id(param)], id(param) in head_ids or uses[id(param)][0].path in head_paths)
        for name, param in model.named_parameters()
    }


def transposed_parameters(model: nn.Module) -> set[int]:
    """Return the ``id()`` of every parameter that is stored (in, out) or (e, in, out)."""
    return {
        param_id
        for param_id, uses in _uses(model).items()
        for use in uses
        if use.dims in (2, 3) and stores_in_out(use.module)
    }


def _blocks_of_parameters(model: nn.Module, transposed: set[int], *, heads: bool) -> dict[int, int | tuple[int, ...]]:
    """Map ``id(parameter)`` to the rows of the matrices that it holds, for parameters that hold several."""
    by_weight: dict[tuple[nn.Module, str], int | tuple[int, ...]] = {}
    for module in model.modules():
        by_weight.update(attention_blocks(module, heads=heads))
    shapes = {id(param): param.shape for param in model.parameters()}
    blocks: dict[int, int | tuple[int, ...]] = {}
    for param_id, (use, *_) in _uses(model).items():
        rows = by_weight.get((use.module, use.leaf))
        if rows is None and _is_gate_up(use):
            count = shapes[param_id][-1 if param_id in transposed else -2]
            rows = count // 2 if count % 2 == 0 else None
        if rows is not None:
            blocks[param_id] = rows
    return blocks


def _is_gate_up(use: _Use) -> bool:
    """Whether a parameter is the weight of a gate, then that of another layer with the same input."""
    if use.dims == 3:  # of experts; GPT-OSS has their rows in turn
        # parametrizations derive a class of another name
        names = {cls.__name__ for cls in type(use.module).__mro__}
        in_turn = "GptOssExperts" in names or getattr(use.module, "is_concatenated", True) is False
        return use.leaf == "gate_up_proj" and not in_turn
    return use.dims == 2 and use.leaf == "weight" and use.path.rpartition(".")[2] == "gate_up_proj"


class _Use(NamedTuple):
    """A module that uses a parameter; wrappers and parametrizations are resolved."""

    path: str  # of the module, without the components of wrappers
    module: nn.Module
    parent: nn.Module
    leaf: str  # name of the module's attribute, such as "weight"
    dims: int


def _uses(model: nn.Module) -> dict[int, list[_Use]]:
    modules = dict(model.named_modules(remove_duplicate=False))
    uses: dict[int, list[_Use]] = {}
    for name, module in modules.items():
        for leaf, param in module.named_parameters(recurse=False, remove_duplicate=False):
            owner_name, attribute = name, leaf
            if isinstance(module, parametrize.ParametrizationList):
                # "layer.parametrizations.weight.original"; weight norm's "original0" is a vector of magnitudes
                owner_name, _, attribute = name.rpartition("parametrizations.")
                owner_name = owner_name.removesuffix(".")
            parent = modules[_LAST_WRAPPERS.sub("", owner_name).rpartition(".")[0]]
            use = _Use(_plain_path(owner_name), modules[owner_name], parent, attribute, param.dim())
            uses.setdefault(id(param), []).append(use)
    return uses


def _role(name: str, param: nn.Parameter, uses: list[_Use], in_head: bool) -> str:
    if _LORA_NAME.search(name):
        return "lora" if param.dim() >= 2 else "other"
    # a head tied to an embedding is an embedding
    for use in uses:
        if _is_embedding(use):
            return "position" if _is_position(use) else "embedding"
    use = uses[0]
    known = isinstance(use.module, (*_MATRIX_MODULES, *_CONV)) or is_conv1d(use.module)
    if not known and _NORM_CLASS.search(type(use.module).__name__):
        return "norm"
    if param.dim() >= 2 and not known and _is_position(use):
        return "position"
    if _BIAS_LEAF.fullmatch(use.leaf):
        return "bias"
    if param.dim() < 2:
        return "other"
    if in_head and not _is_router(use):
        return "head"
    if isinstance(use.module, _CONV):
        return "conv"
    if sum(side != 1 for side in param.shape) < 2:
        return "other"  # a vector, such as (1, n)
    if param.dim() == 3:
        return "expert" if is_of_experts(name, use.module) else "other"
    if not known and not _WEIGHT_LEAF.fullmatch(use.leaf):
        return "other"
    if param.dim() > 3:
        return "conv"
    return "router" if _is_router(use) else "hidden"


def _is_embedding(use: _Use) -> bool:
    if isinstance(use.module, (nn.Embedding, nn.EmbeddingBag)):
        return True
    named = _EMBEDDING_CLASS.search(type(use.module).__name__) and use.leaf == "weight" and use.dims == 2
    return bool(named) and not isinstance(use.module, _MATRIX_MODULES)


def _is_position(use: _Use) -> bool:
    return bool(_POSITION_NAME.search(f"{use.path}.{use.leaf}") or _POSITION_CLASS.search(type(use.module).__name__))


def _head_paths(model: nn.Module) -> set[str]:
    """Return the paths of linear layers with a head's name, and of the last linear layer in modules with one."""
    paths = set()
    for name, module in model.named_modules(remove_duplicate=False):
        path = _plain_path(name)
        if isinstance(module, nn.Linear):
            if _HEAD_NAME.search(path) or _HEAD_NAME_AT_TOP.search(path):
                paths.add(path)
        elif _HEAD_NAME.search(path):
            layers = [f"{path}.{leaf}" for leaf, child in module.named_children() if isinstance(child, nn.Linear)]
            paths.update(layers if isinstance(module, nn.ModuleList) else layers[-1:])
    return paths


def _plain_path(name: str) -> str:
    return _ROOT_WRAPPERS.sub("", _WRAPPERS.sub("", name)).removesuffix(".")


def _is_router(use: _Use) -> bool:
    """Whether a matrix scores the experts of a mixture, or other choices."""
    if any(_ROUTER_CLASS.search(type(module).__name__) for module in (use.module, use.parent)):
        return True
    leaf = use.path.rpartition(".")[2]
    if leaf != "gate":
        return "router" in leaf.split("_")
    # other kinds of gates have this name, too
    around = [type(use.parent).__name__, *(name for name, _ in use.parent.named_children())]
    return any(_MIXTURE.search(word) for word in around)
