"""What llama.cpp wants of each architecture: one row of a table says how a Hugging Face folder becomes its file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Config = Mapping[str, Any]
Keys = Mapping[str, "str | Callable[[Config], Any]"]


@dataclass(frozen=True)
class Architecture:
    """How a ``model_type`` of Hugging Face is written.

    Attributes:
        name: of the architecture in GGUF.
        keys: metadata -> field of the configuration, or a function of it; of the names of ``GGUFWriter.add_NAME``.
        needs: field of the configuration -> values that llama.cpp computes; a field that is missing has them.
        check: says what else of a configuration llama.cpp does not compute, or None.
        permuted: endings of weights whose rows llama.cpp orders otherwise, by pairs of a rotation -> field of heads.
        one_more: endings of norms that are stored less one.
        transposed: endings of weights that are stored (in, out).
        prefix: of names, which the table of the package gguf does not have.
        dropped: endings of tensors that the file does not have.
    """

    name: str
    keys: Keys
    needs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    check: Callable[[Config], str | None] = lambda config: None
    permuted: Mapping[str, str] = field(default_factory=dict)
    one_more: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    prefix: str = ""
    dropped: tuple[str, ...] = ("rotary_emb.inv_freq",)


def head_dim(config: Config) -> int:
    """Values of a head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def key_heads(config: Config) -> int:
    """Heads of keys and values."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _rope(config: Config) -> Mapping[str, Any]:
    """Settings of the rotation of full attention, wherever this version of transformers writes them."""
    rope: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope.get("full_attention", rope)
    return {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": rope.get("type", "default"), **rope}


def rope_tensor(config: Config) -> Tensor | None:
    """What the frequencies of Llama 3's rotation are divided by, which a tensor of the file holds; None for others."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    dim = head_dim(config)
    waves = 2 * math.pi * float(rope["rope_theta"]) ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    turns = float(rope["original_max_position_embeddings"]) / waves
    unscaled = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - unscaled) / float(rope["factor"]) + unscaled)).float()


def _check_rope(config: Config, kinds: tuple[str, ...] = ("default", "linear")) -> str | None:
    rope = _rope(config)
    if rope["rope_type"] not in kinds:
        return f"rope_type {' or '.join(kinds)}, got {rope['rope_type']!r}"
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    return None if part in (None, 1.0) else f"partial_rotary_factor 1, got {part}"


def _check_llama(config: Config) -> str | None:
    window = config.get("sliding_window")
    if window is not None and window < config["max_position_embeddings"]:
        return f"sliding_window null, got {window}"
    return _check_rope(config, ("default", "linear", "llama3"))


def _check_gemma(period: int, largest: int) -> Callable[[Config], str | None]:
    """A check of windows in all but every ``period``-th layer, and of the scale, where the ``largest`` has its own."""

    def check(config: Config) -> str | None:
        layers = config["num_hidden_layers"]
        kinds = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]
        if config.get("layer_types", kinds) != kinds:
            return f"layer_types with full_attention in every layer of number {period}, and sliding_attention elsewhere"
        scale = config["hidden_size"] // config["num_attention_heads"] if layers == largest else head_dim(config)
        if config.get("query_pre_attn_scalar", scale) != scale:
            return f"query_pre_attn_scalar {scale}, got {config['query_pre_attn_scalar']}"
        local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
        theta = local.get("rope_theta", config.get("rope_local_base_freq", 10000.0))
        if period == 6 and theta != 10000.0:
            return f"a rope_theta of 10000 in windows, got {theta}"
        return _check_rope(config)

    return check


_COMMON: Keys = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "head_count": "num_attention_heads",
    "vocab_size": "vocab_size",
}
_DECODER: Keys = {
    **_COMMON,
    "head_count_kv": key_heads,
    "layer_norm_rms_eps": "rms_norm_eps",
    "key_length": head_dim,
    "value_length": head_dim,
    "rope_dimension_count": head_dim,
    "rope_freq_base": lambda config: float(_rope(config)["rope_theta"]),
    "rope_scaling_factor": lambda config: (
        float(_rope(config)["factor"]) if _rope(config)["rope_type"] == "linear" else None
    ),
}
_WINDOW = {"sliding_window": "sliding_window"}
_SILU = {"hidden_act": ("silu",)}
_LLAMA = Architecture(
    "llama",
    _DECODER,
    needs={**_SILU, "mlp_bias": (False,)},
    check=_check_llama,
    # transformers rotates the first half of a head with the second, llama.cpp neighbours
    permuted={
        **dict.fromkeys(("q_proj.weight", "q_proj.bias"), "num_attention_heads"),
        **dict.fromkeys(("k_proj.weight", "k_proj.bias"), "num_key_value_heads"),
    },
)
_GELU = {"hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False,)}
_NORMS = ("norm.weight",)
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", _DECODER, needs={**_SILU, "use_sliding_window": (False,)}, check=_check_rope),
    "qwen3": Architecture(
        "qwen3",
        _DECODER,
        needs={**_SILU, "use_sliding_window": (False,), "attention_bias": (False,)},
        check=_check_rope,
    ),
    "gemma": Architecture(
        "gemma",
        _DECODER,
        needs={"hidden_act": ("gelu", "gelu_pytorch_tanh"), "attention_bias": (False,)},
        check=_check_rope,
        one_more=_NORMS,
    ),
    "gemma2": Architecture(
        "gemma2",
        {
            **_DECODER,
            **_WINDOW,
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        needs=_GELU,
        check=_check_gemma(2, 46),
        one_more=_NORMS,
    ),
    "gemma3_text": Architecture(
        "gemma3",
        {**_DECODER, **_WINDOW},
        needs={
            **_GELU,
            "attn_logit_softcapping": (None,),
            "final_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
        },
        check=_check_gemma(6, 62),
        one_more=_NORMS,
    ),
    "gpt2": Architecture(
        "gpt2",
        {
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "block_count": "n_layer",
            "feed_forward_length": lambda config: config.get("n_inner") or 4 * config["n_embd"],
            "head_count": "n_head",
            "layer_norm_eps": "layer_norm_epsilon",
            "vocab_size": "vocab_size",
        },
        needs={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
        dropped=(".attn.bias", ".attn.masked_bias"),
    ),
    "bert": Architecture(
        "bert",
        {
            **_COMMON,
            "layer_norm_eps": "layer_norm_eps",
            "causal_attention": lambda config: False,
            "token_type_count": "type_vocab_size",
            "pooling_type": "pooling",
        },
        needs={
            "hidden_act": ("gelu",),
            "is_decoder": (False,),
            "position_embedding_type": ("absolute",),
            "add_cross_attention": (False,),
        },
        prefix="bert.",
        # the pooled output is another than those of sentence embeddings
        dropped=("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"),
    ),
}


def architecture_of(config: Config, where: object) -> Architecture:
    """The row of a configuration. Raises ValueError for one that llama.cpp, or this table, does not compute."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{where}: GGUF is written for {', '.join(ARCHITECTURES)}, got model_type {kind!r}")
    row = ARCHITECTURES[kind]
    for name in row.keys.values():
        if isinstance(name, str) and not isinstance(config.get(name), (int, float)):
            advice = "save the model again by save_pretrained"
            raise ValueError(f"{where}: expected a number {name} in config.json, got {config.get(name)!r}; {advice}")
    for name, values in row.needs.items():
        if config.get(name, values[0]) not in values:
            wanted = " or ".join(repr(value) for value in values)
            raise ValueError(f"{where}: llama.cpp computes {kind} with {name} {wanted}, got {config[name]!r}")
    try:
        problem = row.check(config)
        metadata(row, config), rope_tensor(config)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: config.json cannot be understood ({type(error).__name__}: {error})") from None
    if problem is not None:
        raise ValueError(f"{where}: llama.cpp computes {kind} with {problem}")
    return row


def metadata(row: Architecture, config: Config) -> dict[str, Any]:
    """Values for ``GGUFWriter.add_NAME`` by NAME, without those that are None."""
    values = {name: source(config) if callable(source) else config[source] for name, source in row.keys.items()}
    return {name: value for name, value in values.items() if value is not None}


def transform(row: Architecture, name: str, tensor: Tensor) -> Tensor:
    """A tensor of a folder as llama.cpp wants it, (out, in), but for the order of its rows."""
    if name.endswith(row.transposed):
        tensor = tensor.T
    return tensor.float() + 1 if name.endswith(row.one_more) else tensor


def permute_rows(row: Architecture, config: Config, name: str, tensor: Tensor) -> Tensor:
    """A weight, a bias, or encoded rows of one, with the rows in llama.cpp's order."""
    source = next((heads for ending, heads in row.permuted.items() if name.endswith(ending)), None)
    if source is None:
        return tensor
    heads = key_heads(config) if source == "num_key_value_heads" else int(config[source])
    halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)
