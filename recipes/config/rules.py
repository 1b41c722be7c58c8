"""Rules between several keys of a recipe, and types of the keys that optimizer and model classes define.

``python tests/helpers/argument_table.py`` writes the arguments of these classes to ``arguments.json``; a test compares
file and classes. To add an optimizer, add its row to ``OPTIMIZERS`` in :mod:`leanstep.recipes.config.schema` and run
that command. Imports neither torch nor YAML.
"""

import json
import re
from collections.abc import Iterator
from functools import lru_cache, reduce
from operator import or_
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import AfterValidator, ConfigDict
from typing_extensions import TypedDict

from leanstep.recipes.config.schema import MOST_TOKENS, RunConfig, accumulation_steps, trained_size


def accumulates_in_momentum(config: RunConfig) -> bool:
    """Whether the rule of matrices sums the gradients of several passes in its momentum."""
    args = config.optimizer.args
    if args.get("momentum_dtype") in ("int8", "torch.int8", "fp8"):
        return False
    if config.optimizer.name == "sinkgd":
        return bool(args.get("momentum")) and not args.get("nesterov") and args.get("momentum_order", "pre") == "pre"
    betas = args.get("betas") or ()
    return config.optimizer.name == "lion" and len(set(betas)) == 1 and not args.get("cautious")


def joint_problems(config: RunConfig, world_size: int = 1) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield ``(keys, message)`` for each broken rule between several fields, which are valid alone.

    The first of ``keys`` is the one to change. The message continues after its name.
    """
    data, schedule, release = config.data, config.schedule, config.release_gradients
    batch_keys = ("batch.tokens_per_step", "batch.micro_batch_size", "data.seq_len")
    accumulation, divides = 1, True
    try:
        accumulation = accumulation_steps(config, world_size)
    except ValueError as error:
        divides = False
        yield batch_keys, str(error)
    args = config.optimizer.args if config.optimizer.name == "lanton" else {}
    if args.get("noise") == "halves" and args.get("noise_adaptive", True) and divides and accumulation < 2:
        yield (
            ("optimizer.args.noise", *batch_keys),
            "'halves' compares two halves of a step's micro batches, and a step has one; lower "
            "batch.micro_batch_size, or take noise: previous",
        )
    if config.optimizer.embeddings == "balanced" and config.optimizer.name != "sinkgd":
        yield (
            ("optimizer.embeddings", "optimizer.name"),
            f"'balanced' is a rule of sinkgd, and optimizer.name is {config.optimizer.name!r}; take embeddings=adamw",
        )
    if config.optimizer.like_adamw and config.optimizer.name not in ("lion", "sinkgd", "lanton"):
        yield (
            ("optimizer.like_adamw", "optimizer.name"),
            f"carries AdamW's rates over to lion, sinkgd or lanton, and optimizer.name is {config.optimizer.name!r}; "
            "take like_adamw=false",
        )
    if config.optimizer.split is not None and config.optimizer.name not in ("sinkgd", "lanton"):
        yield (
            ("optimizer.split", "optimizer.name"),
            f"is for the rules of matrices of sinkgd and lanton, and optimizer.name is {config.optimizer.name!r}; "
            "take split=null",
        )
    if data.source in ("text", "json", "parquet", "local_c4", "chat") and not data.path:
        yield ("data.path", "data.source"), f"is needed by data.source '{data.source}': a file, a folder or a pattern"
    if data.source == "hf" and not data.name:
        yield ("data.name", "data.source"), "is needed by data.source 'hf': a dataset on the hub, as in 'allenai/c4'"
    if data.source in ("sotu", "chat") and data.streaming:
        yield (
            ("data.streaming", "data.source"),
            f"is not possible with data.source '{data.source}', which is read whole",
        )
    if data.source == "chat" and trained_size(data.tokenizer):
        yield (
            ("data.tokenizer", "data.source"),
            f"must be that of the model with data.source 'chat', a folder or a name on the hub, got '{data.tokenizer}'",
        )
    if schedule.warmup_steps is not None and schedule.warmup_steps > config.steps:
        yield ("schedule.warmup_steps", "steps"), f"must be at most steps ({config.steps}), got {schedule.warmup_steps}"
    if release and accumulation > 1 and not accumulates_in_momentum(config):
        yield (
            ("release_gradients", *batch_keys),
            f"steps inside backward, and the {accumulation} passes of a step can only be summed in a momentum: of "
            "sinkgd with momentum and without nesterov, or of lion with equal betas, neither in 8 bits; set such an "
            "optimizer, raise batch.micro_batch_size until one pass is one step, or set it to false",
        )
    if release and config.max_grad_norm is not None:
        yield ("release_gradients", "max_grad_norm"), "excludes max_grad_norm, which needs every gradient at once"
    if release and config.precision == "fp16":
        yield (
            ("release_gradients", "precision"),
            "steps inside backward, on gradients that fp16 has scaled up; take precision=bf16, or set it to false",
        )
    if release and config.stop.on_spike in ("skip", "rollback"):
        yield (
            ("stop.on_spike", "release_gradients"),
            f"{config.stop.on_spike} drops the gradients of a step, which release_gradients applies inside backward; "
            "take on_spike=stop, or set release_gradients to false",
        )
    if release and not config.stop.nan:
        yield (
            ("stop.nan", "release_gradients"),
            "false leaves a step with a non-finite loss out, and release_gradients updates inside backward; take "
            "stop.nan=true, or set release_gradients to false",
        )
    if config.stop.on_spike == "rollback" and not config.checkpoint.every and not config.checkpoint.keep_best:
        yield (
            ("stop.on_spike", "checkpoint.every"),
            "rollback returns to the last checkpoint, and checkpoint.every 0 writes one at the end only; raise it, or "
            "take on_spike=skip",
        )
    if config.model.init_from and config.model.config:
        yield (
            ("model.config", "model.init_from"),
            "must be empty when model.init_from names a folder, which brings its own; add model.config={}",
        )
    if config.model.new_heads and not config.model.init_from:
        yield ("model.new_heads", "model.init_from"), "names heads that model.init_from lacks; name its folder there"
    if config.compile and config.log.attention_norms:
        yield ("log.attention_norms", "compile"), "looks into attention layers, which compile hides; set one to false"
    if config.compile and config.qk_clip.threshold is not None:
        yield ("qk_clip.threshold", "compile"), "looks into attention layers, which compile hides; set compile=false"
    if config.fp8 and config.precision in ("fp32", "fp16"):
        yield ("fp8", "precision"), "goes with 16-bit products elsewhere; take precision=bf16 or bf16-pure"
    if config.fp8 and config.lora.target_modules:
        yield ("fp8", "lora.target_modules"), "converts layers that are trained whole; with adapters take fp8=null"
    if config.fp8 and config.sparsity.patterns:
        yield ("fp8", "sparsity.patterns"), "rounds weights that the masks choose from; take fp8=null or patterns={}"
    if config.lora.target_modules and config.qk_clip.threshold is not None:
        yield (
            ("qk_clip.threshold", "lora.target_modules"),
            "scales the weights of queries and keys, and adapters leave them as they are; set it to null",
        )
    if config.ema.decay is not None and config.sparsity.patterns:
        yield (
            ("ema.decay", "sparsity.patterns"),
            "averages weights under masks that change; take patterns={} or decay=null",
        )
    if config.ema.decay is not None and config.distributed.strategy == "fsdp2":
        yield ("ema.decay", "distributed.strategy"), "averages whole weights, which fsdp2 shards; take strategy=ddp"
    yield from _sparsity_problems(config)
    yield from _pruning_problems(config)
    yield from _lora_problems(config)
    yield from _size_problems(config)
    yield from _limit_problems(config)


def _sparsity_problems(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    sparsity = config.sparsity
    if not sparsity.patterns:
        return
    if config.release_gradients:
        yield (
            ("release_gradients", "sparsity.patterns"),
            "steps inside backward, between which masks cannot be renewed; set it to false, or sparsity.patterns={}",
        )
    if sparsity.dense + sparsity.finetune > 1:
        yield (
            ("sparsity.finetune", "sparsity.dense"),
            f"and sparsity.dense are parts of the steps and must be at most 1 together, got {sparsity.finetune:g} and "
            f"{sparsity.dense:g}",
        )
    decays = [name for name in ("decay", "alpha_end") if getattr(sparsity, name) is not None]
    if len(decays) == 2:
        yield ("sparsity.alpha_end", "sparsity.decay"), "says the same thing as sparsity.decay; give one of them"
    elif decays and "mdgf" not in sparsity.method:
        yield (
            (f"sparsity.{decays[0]}", "sparsity.method"),
            f"is for the methods with mdgf-linear or mdgf-exponential, sparsity.method is {sparsity.method}",
        )
    if "mdgf-exponential" in sparsity.method and sparsity.alpha_end == 0:
        yield ("sparsity.alpha_end", "sparsity.method"), "must be greater than 0 with mdgf-exponential, got 0"
    if sparsity.coarsest & (sparsity.coarsest - 1):
        yield ("sparsity.coarsest",), f"must be a power of two, got {sparsity.coarsest}"
    if sparsity.method == "s-ste":
        for name, plain in (("grad_flow", (None, "ste")), ("srste_lambda", (None, 0)), ("score", ("magnitude",))):
            if getattr(sparsity, name) not in plain:
                keys = (f"sparsity.{name}", "sparsity.method")
                yield keys, f"does not go with sparsity.method s-ste, got {getattr(sparsity, name)!r}; leave it out"


def _pruning_problems(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    if not config.pruning.keep_masks:
        return
    keys = ("pruning.keep_masks",)
    if not config.model.init_from:
        yield (*keys, "model.init_from"), "keeps the zeros of a pruned model; name its folder in model.init_from"
    if config.release_gradients:
        yield (
            (*keys, "release_gradients"),
            "acts between backward and step, which release_gradients joins; set one of them to false",
        )
    if config.sparsity.patterns:
        yield (*keys, "sparsity.patterns"), "and sparsity.patterns both decide what is zero; take one of them"


def _lora_problems(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    if config.lora.attention != "exact" and config.compile:
        yield ("lora.attention", "compile"), "looks into attention layers, which compile hides; set it to exact"
    if not config.lora.target_modules:
        alone = {"attention": "exact", "lr_ratio": 1, "quantize_base": None}
        for name in (name for name, default in alone.items() if getattr(config.lora, name) != default):
            yield (f"lora.{name}", "lora.target_modules"), "goes with adapters; name layers in lora.target_modules"
        return
    keys = ("lora.target_modules",)
    if not config.model.init_from:
        yield (*keys, "model.init_from"), "adapts an existing model; name its folder in model.init_from"
    if config.distributed.strategy == "fsdp2":
        yield (*keys, "distributed.strategy"), "goes with distributed.strategy ddp, whose models are whole"
    if config.sparsity.patterns:
        yield (*keys, "sparsity.patterns"), "leaves the base as it is; sparsity.patterns is for training it"
    if config.lora.use_dora and config.pruning.keep_masks:
        yield (
            ("lora.use_dora", "pruning.keep_masks"),
            "scales by norms of the unmasked sum; with pruning.keep_masks take lora.use_dora=false",
        )
    if str(config.lora.init_lora_weights).startswith("pissa") and config.pruning.keep_masks:
        yield (
            ("lora.init_lora_weights", "pruning.keep_masks"),
            "leaves no zeros in the base; with pruning.keep_masks take lora.init_lora_weights=true",
        )
    if config.lora.quantize_base and config.pruning.keep_masks:
        yield (
            ("lora.quantize_base", "pruning.keep_masks"),
            "rounds zeros of the base to other values; with pruning.keep_masks take lora.quantize_base=null",
        )
    if config.lora.quantize_base and str(config.lora.init_lora_weights).startswith("pissa"):
        yield (
            ("lora.quantize_base", "lora.init_lora_weights"),
            "keeps the base as it is, which PiSSA changes; take lora.init_lora_weights=true",
        )


def _size_problems(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    sizes, tokenizer = config.model.config, config.data.tokenizer
    for whole, divisor in (
        ("hidden_size", "num_attention_heads"),
        ("n_embd", "n_head"),
        ("num_attention_heads", "num_key_value_heads"),
    ):
        free = whole == "hidden_size" and sizes.get("head_dim")
        if sizes.get(whole) and sizes.get(divisor) and not free and sizes[whole] % sizes[divisor]:
            keys = (f"model.config.{whole}", f"model.config.{divisor}")
            yield keys, f"{sizes[whole]} must be a multiple of {divisor} {sizes[divisor]}"
    key, default = ("n_positions", 1024) if config.model.family == "gpt2" else ("max_position_embeddings", 2048)
    positions = sizes.get(key, default)
    if not config.model.init_from and isinstance(positions, int) and config.data.seq_len > positions:
        yield (
            ("data.seq_len", f"model.config.{key}", "model.family"),
            f"must be at most the model's {positions} positions, got {config.data.seq_len}; "
            f"shorten it or set model.config.{key}",
        )
    vocabulary = sizes.get("vocab_size")
    trained = trained_size(tokenizer) or 0
    if isinstance(vocabulary, int) and vocabulary < trained:
        yield (
            ("model.config.vocab_size", "data.tokenizer"),
            f"must be at least the tokenizer's {trained} (data.tokenizer {tokenizer}), got {vocabulary}; "
            f"leave it out to take the tokenizer's",
        )


# largest sizes: a larger model would exhaust the memory, or its run would never end
_MOST = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 1000),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head"), 2**14),
    **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size", "n_inner", "head_dim"), 2**20),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 2**27),
    "vocab_size": MOST_TOKENS,
}
_MOST_ITERATIONS = 1000
_MOST_WEIGHTS = 10**14


def _limit_problems(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Sizes beyond any model, heads that rotary embeddings cannot halve, and iterations that would not end."""
    sizes = config.model.config
    for key, most in _MOST.items():
        if isinstance(size := sizes.get(key), int) and size > most:
            yield (f"model.config.{key}",), f"must be at most {most:,}, got {size:,}"
    sections = [("optimizer.args", config.optimizer.args)]
    sections += [(f"optimizer.groups.{index}", group) for index, group in enumerate(config.optimizer.groups)]
    for section, options in sections:
        for key in ("num_iters", "ns_steps"):
            if isinstance(count := options.get(key), int) and count > _MOST_ITERATIONS:
                yield (f"{section}.{key}",), f"must be at most {_MOST_ITERATIONS:,} iterations, got {count:,}"
    if config.model.init_from:
        return
    if config.model.family == "llama":
        width = sizes.get("hidden_size", 4096)
        head = sizes.get("head_dim") or width // sizes.get("num_attention_heads", 32)
        if head % 2:
            yield (
                ("model.config.head_dim", "model.config.hidden_size", "model.config.num_attention_heads"),
                f"must be even for rotary position embeddings, got {head} (hidden_size / num_attention_heads)",
            )
        layers, inner = sizes.get("num_hidden_layers", 32), sizes.get("intermediate_size", 11008)
        weights = layers * width * (4 * width + 3 * inner) + sizes.get("vocab_size", 0) * width
        keys = ("model.config.hidden_size", "model.config.num_hidden_layers", "model.config.intermediate_size")
    else:
        width, layers = sizes.get("n_embd", 768), sizes.get("n_layer", 12)
        inner = sizes.get("n_inner") or 4 * width
        weights = layers * width * (4 * width + 2 * inner) + sizes.get("vocab_size", 0) * width
        keys = ("model.config.n_embd", "model.config.n_layer", "model.config.n_inner")
    if weights > _MOST_WEIGHTS:
        yield keys, f"makes a model of {weights:,} weights, expected at most {_MOST_WEIGHTS:,}"


TABLE_FILE = Path(__file__).with_name("arguments.json")

_TYPES = {"bool": bool, "int": int, "float": float, "str": str, "null": None, "mapping": dict[str, Any], "any": Any}
_BOUNDS = {"ge": Ge, "gt": Gt, "le": Le, "lt": Lt}


@lru_cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE_FILE.read_text(encoding="utf-8"))


def removed_options(name: str) -> dict[str, str]:
    """Options that an optimizer had in an earlier version -> the message, which says what to write instead."""
    return _table()["removed"].get(name, {})


@lru_cache
def optimizer_arguments(name: str) -> Any:
    """Schema of ``optimizer.args``: all arguments of the class but lr and weight_decay, which have their keys."""
    entries = _table()["optimizers"][name]
    return _keys(name, {key: entry for key, entry in entries.items() if key not in ("lr", "weight_decay")})


@lru_cache
def group_options(name: str) -> Any:
    """Schema of an entry of ``optimizer.groups``: its selector and the options of the class."""
    types = _keys(name, _table()["optimizers"][name])
    types.__annotations__ |= {
        "match": Annotated[str, AfterValidator(_regular_expression)],
        "role": Literal[tuple(_table()["roles"])],
    }
    return types


@lru_cache
def model_keys(family: str) -> Any:
    """Schema of ``model.config``: the keys of the family's transformers configuration."""
    return _keys(family, _table()["models"][family])


def _regular_expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"must be a regular expression, got {text!r}: {error}") from None
    return text


def _keys(name: str, entries: dict[str, Any]) -> Any:
    """Make a TypedDict of optional keys whose types YAML can express."""
    make: Any = TypedDict
    types = make(name, {key: _annotation(**entry) for key, entry in entries.items()}, total=False)
    types.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    return types


def _annotation(
    types: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    items: str | None = None,
    length: int | None = None,
    **bounds: float,
) -> Any:
    """Make the type of one argument from its entry in the table. Bounds apply to numbers, also inside a list."""
    limits = [_BOUNDS[name](bound) for name, bound in bounds.items()]

    def limited(name: str) -> Any:
        return Annotated[_TYPES[name], *limits] if limits and name in ("int", "float") else _TYPES[name]

    options: list[Any] = [Literal[tuple(choices)]] if choices else []
    options += [limited(name) for name in types]
    if items is not None:
        item = limited(items)
        list_of = GenericAlias(list, (item,))
        options.append(Annotated[list_of, Len(length, length)] if length else list_of)
    return reduce(or_, options)
