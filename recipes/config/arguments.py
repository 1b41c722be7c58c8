"""What optimizers and model configurations accept, known without importing torch.

The table in ``arguments.json`` is made from the classes by ``python tests/helpers/argument_table.py``; a test compares
the two. To add an optimizer, add its row to :data:`OPTIMIZERS` and run that command.
"""

import json
import re
from functools import lru_cache, reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, ConfigDict
from typing_extensions import TypedDict

__all__ = [
    "MODEL_CONFIGS",
    "OPTIMIZERS",
    "OWN_KEYS",
    "TABLE_FILE",
    "group_options",
    "model_keys",
    "optimizer_arguments",
]

# what `optimizer.name` and `model.family` may be: the module and the class
OPTIMIZERS = {
    "adamw": "torch.optim:AdamW",
    "lion": "leanstep.optimizers:Lion",
    "sinkgd": "leanstep.optimizers:SinkGD",
    "lanton": "leanstep.optimizers:LANTON",
    "mfac": "leanstep.optimizers:MFAC",
    "muon": "leanstep.recipes.methods.muon:MuonAdamW",
    "sgd": "torch.optim:SGD",
}
MODEL_CONFIGS = {"llama": "transformers:LlamaConfig", "gpt2": "transformers:GPT2Config"}
OWN_KEYS = {"lr": "is optimizer.lr", "weight_decay": "is optimizer.weight_decay", "params": "comes from the model"}
TABLE_FILE = Path(__file__).with_name("arguments.json")

_TYPES = {"bool": bool, "int": int, "float": float, "str": str, "null": None, "mapping": dict[str, Any], "any": Any}
_BOUNDS = {"ge": Ge, "gt": Gt, "le": Le, "lt": Lt}


@lru_cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE_FILE.read_text(encoding="utf-8"))


@lru_cache
def optimizer_arguments(name: str) -> Any:
    """What ``optimizer.args`` may hold: the arguments of the class that have no key of their own in the section."""
    entries = _table()["optimizers"][name]
    return _keys(name, {key: entry for key, entry in entries.items() if key not in OWN_KEYS})


@lru_cache
def group_options(name: str) -> Any:
    """What an entry of ``optimizer.groups`` may hold: how it selects parameters, and the options it gives them."""
    types = _keys(name, _table()["optimizers"][name])
    types.__annotations__ |= {"match": Annotated[str, AfterValidator(_regular_expression)], "role": _roles()}
    return types


@lru_cache
def model_keys(family: str) -> Any:
    """What ``model.config`` may hold: the keys of the transformers configuration of the family."""
    return _keys(family, _table()["models"][family])


def _roles() -> Any:
    return Literal[tuple(_table()["roles"])]


def _regular_expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"must be a regular expression, got {text!r}: {error}") from None
    return text


def _keys(name: str, entries: dict[str, Any]) -> Any:
    """A TypedDict of optional keys, whose types are what YAML can write."""
    types = TypedDict(name, {key: _annotation(**entry) for key, entry in entries.items()}, total=False)  # type: ignore
    types.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    return types


def _annotation(
    types: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    items: str | None = None,
    length: int | None = None,
    **bounds: float,
) -> Any:
    """The type of one argument from its entry in the table; bounds hold for numbers, also for those in a list."""
    limits = [_BOUNDS[name](bound) for name, bound in bounds.items()]

    def limited(name: str) -> Any:
        return Annotated[_TYPES[name], *limits] if limits and name in ("int", "float") else _TYPES[name]

    members = [Literal[tuple(choices)]] if choices else []
    members += [limited(name) for name in types]
    if items is not None:
        members.append(tuple[(limited(items),) * length] if length else list[limited(items)])
    return reduce(or_, members)
