"""Torch helpers of several methods: DTensors, Conv1D, experts, devices, output and attention heads, step hooks."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor. Does not import that class, which would import torch's compiler."""
    return hasattr(tensor, "placements")


# device of models whose weights are elsewhere while they do not run
COMPUTES_ON: WeakKeyDictionary[nn.Module, torch.device] = WeakKeyDictionary()


@functools.cache
def uses_instructions(name: str) -> bool:
    """Whether torch uses these instructions of the CPU for 16-bit products, by their name in its list, as "amx_tile".

    That list is of the processor. ``ATEN_CPU_CAPABILITY`` may hold torch to less than AVX-512, of which all are part.
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and bool(torch.cpu.get_capabilities().get(name))


def device_of(model: nn.Module) -> torch.device:
    """The device on which a model computes."""
    parameter = next(model.parameters(), None)
    return COMPUTES_ON.get(model, torch.device("cpu") if parameter is None else parameter.device)


def unwrapped(model: Any) -> Any:
    """The module inside the results of ``torch.compile(model)`` and DistributedDataParallel, which change its names."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, nn.Module) and "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]
        else:
            return model


def plain_name(name: str) -> str:
    """A name without those of wrappers that leave themselves out of ``state_dict``, such as activation checkpoints."""
    return re.sub(r"(^|\.)(_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.|$)", "", name).removeprefix(".")


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's shard of a DTensor; any other tensor unchanged."""
    return cast("DTensor", tensor).to_local() if is_dtensor(tensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """Gather a DTensor on every process, a collective call; return any other tensor unchanged."""
    return cast("DTensor", tensor).full_tensor() if is_dtensor(tensor) else tensor


def place_like(value: Tensor, like: Tensor) -> Tensor:
    """Place ``value``, whole on every process, on the device and with the placements of ``like``. Sends nothing."""
    value = value.to(like.device)
    if not is_dtensor(like) or is_dtensor(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded = cast("DTensor", like)
    return distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)


def join_parts(
    part: Tensor, like: Tensor, shape: Sequence[int] | None = None, placements: Sequence[Any] | None = None
) -> Tensor:
    """Build a DTensor from every process's shard ``part``, with the placements of ``like`` (or ``placements``).

    Args:
        part: this process's shard.
        like: a DTensor with the device mesh.
        shape: of the whole tensor, contiguous; None: torch infers it from shards of equal size.
        placements: one for each dimension of the mesh; None: those of ``like``.
    """
    from torch.distributed.tensor import DTensor as DTensorClass

    sharded = cast("DTensor", like)
    stride = None if shape is None else torch.empty(shape, device="meta").stride()
    size = None if shape is None else torch.Size(shape)
    placed = sharded.placements if placements is None else placements
    return DTensorClass.from_local(part, sharded.device_mesh, placed, run_check=False, shape=size, stride=stride)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D (or a subclass): a linear layer whose weight is (in, out)."""
    return any(cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.") for cls in type(module).__mro__)


# experts of transformers that store matrices (in, out) and have no attribute `is_transposed`
_TRANSPOSED_EXPERTS = ("Llama4TextExperts", "GptOssExperts")
_EXPERT_NAME = re.compile(r"(^|[._])experts?([._]|$)")


def is_of_experts(name: str, module: nn.Module) -> bool:
    """Whether a parameter called ``name`` of a module belongs to the experts of a mixture."""
    return bool(_EXPERT_NAME.search(name)) or "expert" in type(module).__name__.lower()


def expert_tensors(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The tensors of a module of experts by attribute, parametrized ones too."""
    if isinstance(module, parametrize.ParametrizationList):
        return
    for leaf, tensor in module.named_parameters(recurse=False):
        if is_of_experts(f"{name}.{leaf}", module) and not nn.parameter.is_lazy(tensor):
            yield leaf, tensor
    for leaf, inner in getattr(module, "parametrizations", {}).items():
        if is_of_experts(f"{name}.{leaf}", module) and isinstance(getattr(inner, "original", None), nn.Parameter):
            yield leaf, inner.original


def expert_weights(name: str, module: nn.Module) -> list[str]:
    """Attributes of a module that hold one matrix per expert: (e, out, in), or (e, in, out)."""
    return [leaf for leaf, tensor in expert_tensors(name, module) if tensor.dim() == 3 and 1 not in tensor.shape[1:]]


def stores_in_out(module: nn.Module) -> bool:
    """Whether a module stores its matrices (in, out), or those of its experts (e, in, out)."""
    # a parametrization derives a class of another name
    classes = {cls.__name__ for cls in type(module).__mro__}
    transposed = getattr(module, "is_transposed", False) is True
    return is_conv1d(module) or transposed or not classes.isdisjoint(_TRANSPOSED_EXPERTS)


def weight_count(parameter: Tensor) -> int:
    """Number of weights of a parameter, also where bitsandbytes packed two of them into a byte."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else math.prod(packed.shape)


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the module that computes the logits, by transformers' ``get_output_embeddings``, or None."""
    return _embeddings(model, "get_output_embeddings")


def input_embedding(model: nn.Module) -> nn.Module | None:
    """Return the module that embeds tokens, by transformers' ``get_input_embeddings``, or None."""
    return _embeddings(model, "get_input_embeddings")


def _embeddings(model: nn.Module, getter: str) -> nn.Module | None:
    get = getattr(model, getter, None)
    try:
        return cast("nn.Module | None", get()) if callable(get) else None
    except NotImplementedError:  # models of images and sounds
        return None


_FREED_GRADIENTS = (
    "expected the gradients at the optimizer's step, but release_gradients frees them inside backward. Nothing was "
    "changed. Train without release_gradients."
)


def refuse_gradient_readers(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError, in the name of the caller of the hooks, if :class:`StepHooks` need an optimizer's gradients."""
    for hook in optimizer._optimizer_step_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, StepHooks) and owner.reads_gradients:
            raise ValueError(f"{owner.caller}: {_FREED_GRADIENTS}")


class StepHooks:
    """Run one function on the gradients of an optimizer's step, and another one after the step.

    ``before`` runs when the gradients are complete: at the start of ``step()``, or after every call of the closure in
    ``step(closure)``. ``after`` runs after each step, but not after one that a gradient scaler skips. Both get the
    optimizer. On a wrapper such as Accelerate's, the hooks go on its ``.optimizer``.

    Args:
        before, after: functions of the optimizer; their results are ignored.
        caller: begins error messages.
        parameters: by name; the optimizer must train those that require gradients.
        reads_gradients: whether ``before`` or ``after`` need gradients, which ``release_gradients`` frees earlier.

    Raises:
        TypeError: for anything but a torch optimizer.
        ValueError: if the optimizer does not train some of ``parameters``, or needed gradients are freed.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        before: Callable[[torch.optim.Optimizer], Any],
        after: Callable[[torch.optim.Optimizer], Any],
        *,
        caller: str,
        parameters: Mapping[str, Tensor] | None = None,
        reads_gradients: bool = True,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            hint = " (its .optimizer?)" if hasattr(optimizer, "optimizer") else ""
            raise TypeError(f"{caller}: expected a torch optimizer, got {type(optimizer).__name__}{hint}")
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [name for name, p in (parameters or {}).items() if p.requires_grad and id(p) not in trained]
        if missing:
            raise ValueError(
                f"{caller}: {type(optimizer).__name__} does not train {', '.join(missing[:5])}"
                f"{', ...' if len(missing) > 5 else ''}; build the optimizer from this model's parameters (after "
                "sharding, which replaces them), or freeze them"
            )
        if reads_gradients and getattr(optimizer, "releases_gradients", False):
            raise ValueError(f"{caller}: {_FREED_GRADIENTS}")
        self.caller, self.reads_gradients = caller, reads_gradients
        self._before, self._after = before, after
        self._handles = [
            optimizer.register_step_pre_hook(self._pre_hook),
            optimizer.register_step_post_hook(self._post_hook),
        ]

    def remove(self) -> None:
        """Remove the hooks from the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _pre_hook(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # args[0] is the optimizer itself
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._before(optimizer)
            return None

        def evaluate() -> Any:
            loss = closure()
            self._before(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": evaluate}
        return (args[0], evaluate, *args[2:]), kwargs

    def _post_hook(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # gradient scalers call a fused optimizer also for a step to skip, with this flag set
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is None or not float(skipped):
            self._after(optimizer)


# separate projections of queries, keys and values, by the names of attributes
_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"))
# classes with one weight for all three: all queries, then all keys, then all values
_FUSED = {
    "MultiheadAttention": "in_proj",
    "Phi3Attention": "qkv_proj",
    "Phi4MultimodalAttention": "qkv_proj",
    "MptAttention": "Wqkv",
    "DbrxAttention": "Wqkv",
    "ModernBertAttention": "Wqkv",
}
# the same, with query, key and value of one head after another
_FUSED_BY_HEAD = ("GPTNeoXAttention", "GPTNeoXJapaneseAttention", "BloomAttention", "PersimmonAttention")


class Projection(NamedTuple):
    """The rows of a weight (out, in) that compute the queries, keys or values of all heads.

    Head h has the ``head_dim`` rows from ``start + h * stride``.
    """

    module: nn.Module  # has the weight and the bias
    weight: str  # name of the weight, such as "weight"
    bias: str
    start: int
    heads: int
    head_dim: int
    stride: int

    @property
    def apart(self) -> bool:
        """Whether rows of something else lie between the heads."""
        return self.stride != self.head_dim


def attention_projections(layer: nn.Module) -> dict[str, Projection]:
    """Map "q", "k" and, where it is known, "v" to the rows that compute them; {} for a layer of unknown layout.

    Knows separate projections by the names of LLaMA, BERT, DistilBERT and T5, with any number of key heads; torch's
    ``MultiheadAttention``; and the fused weights of GPT-2 (``c_attn``), Phi-3, MPT, DBRX, ModernBERT, GPT-NeoX, BLOOM
    and Persimmon. The sizes come from the layer, or from its ``config``. A layer whose weights have another number of
    rows than the sizes say, such as queries fused with a gate, is unknown.
    """
    heads = _size(layer, "num_attention_heads", "num_heads", "n_heads", "n_head")
    if heads is None:
        return {}
    key_heads = _size(layer, "num_key_value_heads", "num_kv_heads") or heads
    dim = _size(layer, "head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
    for names in _SEPARATE:
        q, k, v = (_linear(layer, name) for name in names)
        if q is None or k is None:
            continue
        dim = dim or _rows(q) // heads
        parts = {"q": (q, heads), "k": (k, key_heads)} | ({} if v is None else {"v": (v, key_heads)})
        if any(_rows(module) != count * dim for module, count in parts.values()):
            return {}
        return {
            name: Projection(module, "weight", "bias", 0, count, dim, dim) for name, (module, count) in parts.items()
        }
    return _fused_projections(layer, heads, key_heads, dim)


def _fused_projections(layer: nn.Module, heads: int, key_heads: int, dim: int | None) -> dict[str, Projection]:
    """:func:`attention_projections` of a layer with one weight for queries, keys and values."""
    by_head = _class_in(layer, _FUSED_BY_HEAD)
    attribute = "query_key_value" if by_head else next((a for c, a in _FUSED.items() if _class_in(layer, (c,))), "")
    if not attribute and is_conv1d(getattr(layer, "c_attn", nn.Identity())):
        attribute = "c_attn"
    in_proj = attribute == "in_proj"
    module = layer if in_proj else _linear(layer, attribute)
    weight = getattr(module, "in_proj_weight", None) if in_proj else None
    if module is None or (in_proj and weight is None):
        return {}
    rows = _rows(module) if weight is None else weight.shape[0]
    dim = dim or rows // (heads + 2 * key_heads)
    if rows != (heads + 2 * key_heads) * dim or (by_head and heads != key_heads):
        return {}
    names = ("in_proj_weight", "in_proj_bias") if in_proj else ("weight", "bias")
    starts, stride = (0, heads * dim, (heads + key_heads) * dim), dim
    if by_head:
        starts, stride = (0, dim, 2 * dim), 3 * dim
    return {
        name: Projection(module, *names, start, count, dim, stride)
        for name, start, count in zip("qkv", starts, (heads, key_heads, key_heads), strict=True)
    }


def _size(layer: nn.Module, *names: str) -> int | None:
    """Return the first of these sizes that a layer has, or its config."""
    for owner in (layer, getattr(layer, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _class_in(layer: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether a layer's class, or one that it derives from, has one of these names."""
    return any(cls.__name__ in names for cls in type(layer).__mro__)


def _linear(layer: nn.Module, name: str) -> Any:
    """Return the linear layer at an attribute, without the wrapper of an adapter; None if there is none."""
    module = getattr(layer, name, None) if name else None
    module = getattr(module, "base_layer", module)
    weight = getattr(module, "weight", None)
    return module if isinstance(module, nn.Module) and isinstance(weight, Tensor) and weight.dim() == 2 else None


def _rows(module: Any) -> int:
    """Return the number of outputs of a linear layer."""
    return module.weight.shape[1 if is_conv1d(module) else 0]


def attention_blocks(layer: nn.Module, *, heads: bool) -> dict[tuple[nn.Module, str], int | tuple[int, ...]]:
    """Map (module, name of the weight) to the blocks of rows of an attention layer that are matrices of their own.

    Args:
        layer: any module; one that is no attention layer, or of unknown layout, has no blocks.
        heads: split Q and K into heads, too. V stays one matrix, unless the weight has query, key and value of one head
            after another: then each of the three is a block in every head.

    Returns:
        The rows of every block, one number if all have the same. Weights that are one matrix are left out.
    """
    by_weight: dict[tuple[nn.Module, str], list[tuple[str, Projection]]] = {}
    for name, projection in attention_projections(layer).items():
        by_weight.setdefault((projection.module, projection.weight), []).append((name, projection))
    blocks: dict[tuple[nn.Module, str], int | tuple[int, ...]] = {}
    for key, parts in by_weight.items():
        sizes: list[int] = []
        for name, p in parts:
            sizes += [p.head_dim] * p.heads if heads and (name != "v" or p.apart) else [p.head_dim * p.heads]
        if len(sizes) > 1 and (heads or not parts[0][1].apart):
            blocks[key] = sizes[0] if len(set(sizes)) == 1 else tuple(sizes)
    return blocks


def factors_of_rows(projection: Projection, factors: Tensor, rows: int) -> Tensor:
    """Return one factor per row of a weight with ``rows`` rows: that of the row's head, and 1 for all other rows."""
    per_row = torch.ones(rows, dtype=factors.dtype, device=factors.device)
    for head, factor in enumerate(factors):
        first = projection.start + head * projection.stride
        per_row[first : first + projection.head_dim] = factor
    return per_row
