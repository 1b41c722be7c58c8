"""The model that a run begins with, ``model.init_from``: how it is opened, and which ones are refused."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from leanstep._files import is_folder_name
from leanstep.pruning.folder.loading import open_model
from leanstep.recipes.config.loader import load, recipe_names
from leanstep.recipes.config.schema import ModelConfig, RunConfig
from leanstep.recipes.data.tokens import open_tokenizer, tokenizer_fingerprint, trained_size
from leanstep.recipes.methods.lora import quantize_base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def initial_model(config: ModelConfig, dtype: torch.dtype, quantize: str | None = None) -> PreTrainedModel:
    """Open ``model.init_from``, with ``quantize`` as by :func:`quantize_base`, in the memory of the result and a layer.

    Raises ValueError for a folder that cannot be opened, or stores its weights sparse or quantised.
    """
    source = config.init_from
    assert source is not None
    try:
        stored: Any = "auto" if quantize else dtype
        model: Any = open_model(source, dtype=stored, new_heads=config.new_heads, mapped=quantize is not None)
    except ValueError as error:
        raise ValueError(initial_problem(error)) from error
    check_initial_config(source, model.config)
    if quantize:
        quantize_base(model, quantize, dtype)
    return model


def check_initial_folder(source: str, recipe: str) -> None:
    """Raise ValueError for a folder ``model.init_from`` that is not there; ``recipe`` is the file that named it."""
    if is_folder_name(source) and not Path(source).expanduser().exists():
        name = Path(recipe).stem
        shipped = f"`leanstep recipes show {name}` begins with the commands that make it"
        is_shipped = name in recipe_names() and load(name).model.init_from == source
        hint = shipped if is_shipped else "make it first, or name another one"
        raise ValueError(f"model.init_from: the folder '{source}' does not exist; {hint}")


def initial_problem(error: ValueError) -> str:
    """Message for a ``model.init_from`` that cannot be used, with the key to set where weights are missing."""
    hint = "; name heads that are meant to be new in model.new_heads" if "do not fit" in str(error) else ""
    return f"model.init_from: {error}{hint}"


def check_initial_config(source: str, config: Any) -> None:
    """Raise ValueError for weights stored sparse or in few bits, which a run can neither train nor merge into."""
    quantization: Any = getattr(config, "quantization_config", None) or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    method = str(getattr(method, "value", method) or "")
    if not method:
        return
    stored, other = f"quantised ({method})", "for adapters on few bits with lora.quantize_base=nf4"
    if method == "leanstep":
        stored, other = "sparse", f"or `leanstep export {source} --format dense --out FOLDER`"
    raise ValueError(
        f"model.init_from: '{source}' stores its weights {stored}, and a run can neither train them nor merge adapters "
        f"into them; take the folder it was made from, {other}"
    )


def check_initial_tokenizer(config: RunConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ValueError for a tokenizer trained on the data beside a model that has another one.

    Other tokenizers are the user's choice; ``train:SIZE`` is mostly the recipe's, which ``model.init_from`` left there.
    """
    source = config.model.init_from
    if source is None or not trained_size(config.data.tokenizer):
        return
    if not any((Path(source).expanduser() / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return
    if tokenizer_fingerprint(open_tokenizer(source)) != tokenizer_fingerprint(tokenizer):
        raise ValueError(
            f"data.tokenizer: '{config.data.tokenizer}' makes other tokens than the model of model.init_from was "
            f"trained on; take its own, data.tokenizer={source}"
        )
