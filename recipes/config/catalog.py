"""Facts of the shipped recipes for `leanstep recipes list`. Imports no torch."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from leanstep._files import is_folder_name
from leanstep.recipes.config.loader import ALIASES
from leanstep.recipes.config.schema import NOT_KEYS, ModelConfig, RunConfig, trained_size

GPU_FLOPS = 1e16  # more floating-point operations than a desktop's CPU does in a day


@dataclass(frozen=True)
class RecipeFacts:
    """Facts of one recipe, as ``leanstep recipes list`` prints them.

    Attributes:
        parameters: number of weights, tied ones counted once; None when a folder or the tokenizer decides it.
        tokens: ``steps * batch.tokens_per_step``.
        flops: ``6 * parameters * tokens``, the usual estimate of forward and backward.
        network: whether it reads from the hub.
        gpu: whether it takes a CPU more than a day (:data:`GPU_FLOPS`).
        expected_val_loss, expected_source: its known validation loss, and where that number comes from.
    """

    name: str
    aliases: tuple[str, ...]
    description: str
    parameters: int | None
    tokens: int
    flops: float | None
    optimizer: str
    data: str
    network: bool
    gpu: bool
    expected_val_loss: float | None
    expected_source: str


def describe(config: RunConfig) -> RecipeFacts:
    """Collect the facts of a loaded recipe."""
    data, trained = config.data, trained_size(config.data.tokenizer)
    parameters = parameter_count(config.model, trained)
    tokens = config.steps * config.batch.tokens_per_step
    flops = 6.0 * parameters * tokens if parameters else None
    source = data.source if data.source == "sotu" else data.name or data.path or data.source
    return RecipeFacts(
        name=config.name,
        aliases=tuple(alias for alias, name in ALIASES.items() if name == config.name),
        description=config.description,
        parameters=parameters,
        tokens=tokens,
        flops=flops,
        optimizer=config.optimizer.name,
        data=source,
        network=data.source == "hf" or not (trained or is_folder_name(data.tokenizer) or Path(data.tokenizer).is_dir()),
        gpu=flops is not None and flops > GPU_FLOPS,
        expected_val_loss=config.expect.val_loss,
        expected_source=config.expect.source,
    )


def parameter_count(model: ModelConfig, vocab_size: int | None = None) -> int | None:
    """Number of weights by the formula of the family, without building the model; tied weights count once.

    LLaMA with vocabulary V, width h, MLP width m, L layers, q query and k key-value heads of size d:
    ``V h (2 if untied) + L (2 h q d + 2 h k d + 3 h m + 2 h) + h``, and biases where switched on. GPT-2 with P
    positions: ``V h + P h + L (4 h^2 + 2 h m + 9 h + m) + 2 h``. None for an unknown vocabulary, or a model from a
    folder.
    """
    sizes = model.config
    vocabulary = sizes.get("vocab_size", vocab_size)
    if model.init_from or vocabulary is None:
        return None
    return _gpt2_count(sizes, vocabulary) if model.family == "gpt2" else _llama_count(sizes, vocabulary)


def _llama_count(sizes: dict[str, Any], vocabulary: int) -> int:
    width, mlp = sizes.get("hidden_size", 4096), sizes.get("intermediate_size", 11008)
    layers, heads = sizes.get("num_hidden_layers", 32), sizes.get("num_attention_heads", 32)
    head = sizes.get("head_dim") or width // heads
    queries, keys = heads * head, (sizes.get("num_key_value_heads") or heads) * head
    attention = 2 * width * queries + 2 * width * keys
    if sizes.get("attention_bias"):
        attention += queries + 2 * keys + width
    feed_forward = 3 * width * mlp + (2 * mlp + width if sizes.get("mlp_bias") else 0)
    tables = 1 if sizes.get("tie_word_embeddings", False) else 2
    return tables * vocabulary * width + layers * (attention + feed_forward + 2 * width) + width


def _gpt2_count(sizes: dict[str, Any], vocabulary: int) -> int:
    width, positions, layers = sizes.get("n_embd", 768), sizes.get("n_positions", 1024), sizes.get("n_layer", 12)
    mlp = sizes.get("n_inner") or 4 * width
    layer = 4 * width * width + 2 * width * mlp + 9 * width + mlp
    tables = 1 if sizes.get("tie_word_embeddings", True) else 2
    return (tables * vocabulary + positions) * width + layers * layer + 2 * width


def recipe_keys() -> list[tuple[str, str, str]]:
    """Every key of a recipe, with its default as JSON and its values in words, in the order of a resolved recipe."""
    return list(_keys_of(RunConfig, ""))


def _keys_of(section: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in section.__pydantic_fields__.items():
        if hasattr(field.annotation, "__pydantic_fields__"):
            yield from _keys_of(field.annotation, f"{prefix}{name}.")
        elif name not in NOT_KEYS:
            default = json.dumps(field.get_default(call_default_factory=True))
            yield f"{prefix}{name}", default, _values(field.annotation, field.metadata)


_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
_WORDS = {int: "whole number", float: "number", str: "text", bool: "true, false", Any: "any value", NoneType: "null"}
_LARGE = 2**16  # limits from here on only catch slips


def _values(annotation: Any, facts: Iterable[Any] = ()) -> str:
    """The values of a type in words; ``facts``: its limits, as pydantic has them."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _values(arguments[0], [*facts, *arguments[1:]])
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (list, dict):
        return f"list: {_values(arguments[0])}" if origin is list else f"mapping: {_values(arguments[1])}"
    if origin in (UnionType, Union):
        return " or ".join(_values(part, facts) for part in arguments)
    limits = [(word, getattr(fact, name, None)) for fact in facts for name, word in _BOUNDS.items()]
    numbers = [f"{word} {value:,}" for word, value in limits if value is not None and value < _LARGE]
    return " ".join([_WORDS[annotation], " and ".join(numbers if annotation in (int, float) else ())]).strip()
