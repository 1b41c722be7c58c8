"""Make the table of arguments from the classes that take them.

    python tests/helpers/argument_table.py    # writes recipes/config/arguments.json

Types come from annotations. The words that a text argument may be are those in the error of the class for a word that
it does not know; ranges come from the numbers that the class refuses.
"""

import inspect
import json
import re
import types
import typing
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Literal, Union

import torch
from transformers.activations import ACT2FN

from leanstep.optimizers import param_groups
from leanstep.optimizers.common.checks import REMOVED
from leanstep.recipes.config.rules import TABLE_FILE
from leanstep.recipes.config.schema import MODEL_CONFIGS, OPTIMIZERS

DTYPES = ["float16", "bfloat16", "float32", "float64"]
NAMES = {bool: "bool", int: "int", float: "float", str: "str", type(None): "null", Any: "any"}
# what transformers checks late or not at all
_SIZE, _PROBABILITY, _SCALE = {"ge": 1}, {"ge": 0, "lt": 1}, {"gt": 0}
MODEL_BOUNDS = {
    **dict.fromkeys(
        (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
            *("num_key_value_heads", "max_position_embeddings", "n_positions", "n_embd", "n_layer", "n_head"),
            "n_inner",
        ),
        _SIZE,
    ),
    **dict.fromkeys(("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"), _PROBABILITY),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_epsilon", "initializer_range"), _SCALE),
}


ACTIVATIONS = ("hidden_act", "activation_function")


def load(spec: str) -> Any:
    module, _, name = spec.partition(":")
    return getattr(import_module(module), name)


def table() -> dict[str, Any]:
    """The whole table."""
    optimizers = {name: optimizer_entries(load(spec)) for name, spec in OPTIMIZERS.items()}
    # an argument that torch's classes do not check has the range of its namesake
    ranges = {}
    for entries in optimizers.values():
        for key, entry in entries.items():
            ranges.setdefault(key, {}).update({name: entry[name] for name in ("ge", "gt", "le", "lt") if name in entry})
    for name in ("muon", "scale", "sgd"):
        for key, entry in optimizers[name].items():
            entry.update(ranges.get(key, {}))
    models = {name: model_entries(load(spec)) for name, spec in MODEL_CONFIGS.items()}
    removed = {
        name: {option: f"{option} was removed: {entry.instead}" for option, entry in REMOVED[cls.__name__].items()}
        for name, cls in ((name, load(spec)) for name, spec in OPTIMIZERS.items())
        if cls.__name__ in REMOVED
    }
    return {"roles": known_roles(), "removed": removed, "optimizers": optimizers, "models": models}


def known_roles() -> list[str]:
    return list(import_module(param_groups.__module__).ROLES)


def optimizer_entries(cls: type) -> dict[str, dict[str, Any]]:
    hints = typing.get_type_hints(cls.__init__)
    names = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "params")]
    return {name: optimizer_entry(cls, name, hints[name]) for name in names}


def optimizer_entry(cls: type, name: str, hint: Any) -> dict[str, Any]:
    entry = shape(hint)
    if entry.get("choices") == DTYPES:  # a word names one of them
        entry["types"] = [kind for kind in entry["types"] if kind != "str"]
    if "str" in entry.get("types", []):
        words = re.findall(r"'([\w-]+)'", str(refusal(cls, name, "no such word") or "").replace("'no such word'", ""))
        if words:
            entry["choices"] = words
            entry["types"] = [kind for kind in entry["types"] if kind != "str"]
    if entry.get("choices") == DTYPES and refusal(cls, name, torch.int8) is None:
        entry["choices"] = ["int8", "fp8", *DTYPES]
    return {key: value for key, value in {**entry, **limits(cls, name, entry)}.items() if value != []}


def limits(cls: type, name: str, entry: dict[str, Any]) -> dict[str, float]:
    """The range of a number, or of the numbers in a list, by what the class refuses."""
    of_list = entry.get("items") == "float"
    if not of_list and not {"int", "float"} & set(entry.get("types", [])):
        return {}
    others = (0.9,) * (entry.get("length", 1) - 1)

    whole = "float" not in entry.get("types", []) and not of_list

    def refused(number: float) -> bool:
        value = number if whole else float(number)
        return isinstance(refusal(cls, name, (value, *others) if of_list else value), ValueError)

    found: dict[str, float] = {}
    if refused(1 if whole else 0.5) or not refused(-1):
        return found
    if whole:
        found["ge"] = 1 if refused(0) else 0
    else:
        found["gt" if refused(0) else "ge"] = 0
        if refused(2):
            found["lt" if refused(1) else "le"] = 1
    return found


def refusal(cls: type, name: str, value: Any) -> Exception | None:
    try:
        with warnings.catch_warnings(action="ignore"):
            cls([torch.nn.Parameter(torch.ones(4, 4))], **{"lr": 0.1, name: value})
    except (ValueError, TypeError) as error:
        return error
    return None


def model_entries(cls: type) -> dict[str, dict[str, Any]]:
    scope = {"torch": torch, **{base.__name__: base for base in cls.__mro__}}
    hints = typing.get_type_hints(cls, localns=scope)
    return {
        name: {**shape(hint), **MODEL_BOUNDS.get(name, {})} if name not in ACTIVATIONS else {"choices": sorted(ACT2FN)}
        for name, hint in hints.items()
        if typing.get_origin(hint) is not typing.ClassVar and not name.startswith("__")
    }


def shape(hint: Any) -> dict[str, Any]:
    """Types, choices, items and length of an annotation; type "any" where it says nothing that YAML can write."""
    found: dict[str, Any] = {"types": [], "choices": []}
    for member in members(hint):
        origin, inner = typing.get_origin(member), typing.get_args(member)
        kind = origin or member
        if kind is Literal:
            found["choices"] += inner
        elif kind is torch.dtype:
            found["choices"] += DTYPES
        elif kind in NAMES:
            found["types"].append(NAMES[kind])
        elif isinstance(kind, type) and issubclass(kind, tuple | list | Sequence | set | frozenset):
            item = shape(inner[0])["types"] if inner else ["any"]
            found["items"] = item[0] if item else "null"
            if kind is tuple and inner and ... not in inner:
                found["length"] = len(inner)
        elif (isinstance(kind, type) and issubclass(kind, Mapping)) or getattr(
            kind, "__name__", ""
        ) == "RopeParameters":
            found["types"].append("mapping")
        elif kind not in (torch.Tensor, torch.device, torch.distributed.ProcessGroup):
            return {"types": ["any"]}
    found["types"] = list(dict.fromkeys(found["types"]))
    entry = {key: value for key, value in found.items() if value}
    return entry or {"types": ["any"]}


def members(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(member for inner in typing.get_args(hint) for member in members(inner))
    return (hint,)


def text() -> str:
    """The file: one argument a line."""
    whole = table()
    parts = [f' "roles": {json.dumps(whole["roles"])}']
    for kind in ("removed", "optimizers", "models"):
        groups = [
            f'  "{name}": {{\n'
            + ",\n".join(f'   "{key}": {json.dumps(entry)}' for key, entry in entries.items())
            + "\n  }"
            for name, entries in whole[kind].items()
        ]
        parts.append(f' "{kind}": {{\n' + ",\n".join(groups) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    TABLE_FILE.write_text(text(), encoding="utf-8")
