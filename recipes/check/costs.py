"""Estimate what a run costs: memory and floating-point operations.

Memory: the model is built and stepped with fake tensors, which take none. Weights, gradients and optimizer state are
exact. Activations are the distinct storages that autograd saves in the forward pass of one micro batch. The peak adds a
margin for the allocator's rounding and the kernels' workspaces.

Operations: :data:`FORMULA`, after appendix B of A. Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways",
arXiv:2204.02311. Each weight takes one multiplication and one addition per token forward, and twice as many backward.
Attention adds the products of queries with keys and of its weights with values. Recomputed activations, norms,
activation functions and the optimizer are not counted: the rate measures training, not device use.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from leanstep._files import format_bytes, free_bytes
from leanstep._torch import output_head, weight_count
from leanstep.kernels import use_backend
from leanstep.optimizers.common.base import LeanOptimizer
from leanstep.optimizers.common.sharding import dtype_of
from leanstep.optimizers.gradient_release import keeping_gradients
from leanstep.optimizers.param_groups import parameter_roles
from leanstep.pruning.folder.loading import empty_model
from leanstep.recipes.config.schema import RunConfig, accumulation_steps, trained_size
from leanstep.recipes.methods.gate import build_gate
from leanstep.recipes.methods.halves import halved_groups
from leanstep.recipes.methods.lora import adapt, quantized_bytes, quantized_layers
from leanstep.recipes.methods.norms import build_monitor
from leanstep.recipes.methods.pruned import masked_names
from leanstep.recipes.methods.sparse import plan
from leanstep.recipes.training.build import build_model, build_optimizer, checkpoint_activations, optimizer_section
from leanstep.recipes.training.checkpoint import find_checkpoints
from leanstep.recipes.training.folder import FolderError, RunFolder
from leanstep.recipes.training.initial import check_initial_config


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process.

    Attributes:
        weights, gradients, optimizer_state: exact, tied weights counted once; with FSDP2 the shard of
            ``1 / world_size``. ``gradients`` includes LANTON's copy at half a step (noise="halves").
        activations: saved for the backward pass of one micro batch.
        logits: fp32 copy of one micro batch's logits, ``4 * micro_batch_size * seq_len * vocab_size``.
        exchange: DDP's gradient buckets; 0 on one process.
        sparsity: masks of sparse or pruned weights (a byte per weight), and the masked copies of sparse weights.
        average: averages of the trained weights (``ema``), in fp32.
        merged: of a run with adapters on a CPU, the merged model in the run's dtype, which it writes to its folder. It
            needs that memory, too, but no activations and gradients meanwhile.
        merged_in_host: the same of a run on another device. It lies in the host's memory and is no part of the peak.
    """

    weights: int
    gradients: int
    optimizer_state: int
    activations: int
    logits: int
    exchange: int = 0
    sparsity: int = 0
    average: int = 0
    merged: int = 0
    merged_in_host: int = 0

    @property
    def peak(self) -> int:
        """The most at any time, and a tenth more for allocator rounding, workspaces and fragmentation."""
        training = sum(astuple(replace(self, merged=0, merged_in_host=0)))
        return int(max(training, self.weights + self.optimizer_state + self.merged) * 1.1)

    def rows(self) -> list[tuple[str, int]]:
        """(name, bytes) to print, in order."""
        named = [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer state", self.optimizer_state),
            ("activations", self.activations),
            ("logits in fp32", self.logits),
            ("gradient exchange", self.exchange),
            ("masks, masked weights", self.sparsity),
            ("averaged weights", self.average),
            ("merged model, when written", self.merged),
            ("merged model, in the host's memory", self.merged_in_host),
            ("peak, with a margin of 10 %", self.peak),
        ]
        optional = ("gradient exchange", "masks,", "averaged weights", "merged model")
        return [(name, size) for name, size in named if size or not name.startswith(optional)]


@contextmanager
def saved_storages(model: nn.Module) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Yield the distinct storages that autograd saves in the block, other than the model's weights and buffers.

    Works on fake and real tensors. Holds the storages while it counts, so that no address is reused.
    """
    known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved.setdefault(storage._cdata, storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def estimate(config: RunConfig, vocab_size: int, *, world_size: int = 1, device: str = "cpu") -> MemoryEstimate:
    """Estimate the memory of one process, for a vocabulary of ``vocab_size`` tokens.

    Takes a second or a few, and a few megabytes, for any model. ``device`` must exist: the fake tensors are placed
    there, which decides the attention kernel. A deep model of equal layers is not built: every number grows by the same
    amount per layer, which two shallow models give.

    Raises ValueError for a model or an optimizer that cannot be built.
    """
    layers, shallow = _equal_layers(config), (4, 8)
    if layers is not None and layers > 2 * shallow[1]:
        try:
            few, more = (
                astuple(_measured(_with_layers(config, number), vocab_size, world_size, device)) for number in shallow
            )
        except ValueError:
            pass  # a setting that names a deeper layer, say; the whole model tells
        else:
            rest, step = layers - shallow[1], shallow[1] - shallow[0]
            return MemoryEstimate(*(b + (b - a) * rest // step for a, b in zip(few, more, strict=True)))
    return _measured(config, vocab_size, world_size, device)


_LAYERS = ("num_hidden_layers", "n_layer")


def _equal_layers(config: RunConfig) -> int | None:
    """Number of layers of a model of the recipe whose settings tell no layer from another; None otherwise."""
    if config.model.init_from is not None or any(isinstance(value, list) for value in config.model.config.values()):
        return None
    selectors = [
        *(str(entry.get("match", "")) for entry in config.optimizer.groups),
        *(str(name) for name in config.sparsity.patterns),
    ]
    if any(sign.isdigit() or sign in "[\\" for text in selectors for sign in text):
        return None
    return next((value for key in _LAYERS if isinstance(value := config.model.config.get(key), int)), None)


def _with_layers(config: RunConfig, number: int) -> RunConfig:
    sizes = {key: number if key in _LAYERS else value for key, value in config.model.config.items()}
    return replace(config, model=replace(config.model, config=sizes))


def _measured(config: RunConfig, vocab_size: int, world_size: int, device: str) -> MemoryEstimate:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(config, vocab_size, device)
        optimizer = build_optimizer(optimizer_section(config), model)
        ids = torch.zeros(config.batch.micro_batch_size, config.data.seq_len, dtype=torch.int64, device=device)
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
        context = torch.autocast(torch.device(device).type, dtype=autocast) if autocast else nullcontext()
        with saved_storages(model) as saved, context, _ExpertsAsOne():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        weights = unique_bytes(model.parameters())
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        average = 0 if config.ema.decay is None else 4 * trained
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        gradient = unique_bytes(gradients)
        if config.release_gradients:
            gradient = max((tensor.nbytes for tensor in gradients), default=0)
            if accumulation_steps(config, world_size) > 1 and isinstance(optimizer, LeanOptimizer):
                gradient += unique_bytes(p.grad for p in keeping_gradients(optimizer) if p.grad is not None)
        state = optimizer_state_bytes(optimizer)
        # LANTON's copies of the gradients at half a step
        half = sum(
            parameter.numel() * (dtype_of(group["noise_dtype"]) or parameter.dtype).itemsize
            for group in (halved_groups(optimizer) if hasattr(optimizer, "mark_half") else ())
            for parameter in group["params"]
            if parameter.requires_grad
        )
    merged, saved_bits = _merged_bytes(config, vocab_size) if config.lora.target_modules else (0, 0)
    weights -= saved_bits
    sharded = config.distributed.strategy == "fsdp2" and world_size > 1
    shards = world_size if sharded else 1
    return MemoryEstimate(
        weights=-(-weights // shards),
        gradients=-(-(gradient + half) // shards),
        optimizer_state=-(-state // shards),
        activations=sum(storage.nbytes() for storage in saved.values()),
        logits=4 * config.batch.micro_batch_size * config.data.seq_len * model.config.get_text_config().vocab_size,
        exchange=gradient if world_size > 1 and not sharded else 0,
        sparsity=_sparsity_bytes(config, vocab_size),
        average=average,
        **{"merged" if torch.device(device).type == "cpu" else "merged_in_host": merged},
    )


class _ExpertsAsOne(TorchFunctionMode):
    """Multiply all tokens of a mixture by its first expert, which saves tensors of the same sizes.

    torch's grouped product refuses fake tensors in fp32, and other forms of the experts save other tensors.
    """

    _GROUPED = tuple(
        getattr(module, name)
        for module, name in ((nn.functional, "grouped_mm"), (torch, "_grouped_mm"))
        if hasattr(module, name)
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self._GROUPED:
            return func(*args, **(kwargs or {}))
        tokens, experts = args[:2]
        # the grouped product has no rule of autocast, which would copy the expert
        with torch.autocast(tokens.device.type, enabled=False):
            return tokens @ experts[0]


def check_layers(config: RunConfig) -> None:
    """Check the settings that select layers or parameters against the model, without its weights or the text.

    Raises ValueError for a pattern, selector or wildcard without a match, or a layer that does not support its setting.
    """
    model = meta_model(config)
    build_optimizer(optimizer_section(config), model)
    if config.log.attention_norms:
        build_monitor(model).close()
    if config.lora.attention != "exact":
        build_gate(config, model).close()
    if config.sparsity.patterns:
        plan(config, model)
    if config.pruning.keep_masks:
        masked_names(config, model)


def _sparsity_bytes(config: RunConfig, vocab_size: int) -> int:
    """Bytes of a pruned model's masks, or of the masks and unsharded masked copies for sparse training."""
    if config.pruning.keep_masks:
        model = meta_model(config, vocab_size)
        return sum(model.get_parameter(name).numel() for name in masked_names(config, model))
    if not config.sparsity.patterns:
        return 0
    layers = plan(config, meta_model(config, vocab_size))
    return sum(layer.weight.numel() * (1 + layer.weight.element_size()) for layer in layers)


def _merged_bytes(config: RunConfig, vocab_size: int) -> tuple[int, int]:
    """Bytes of the model in the run's dtype, and how many of them ``lora.quantize_base`` saves in memory."""
    model = meta_model(replace(config, lora=replace(config.lora, target_modules=[])), vocab_size)
    saved = 0
    if (kind := config.lora.quantize_base) is not None:
        layers = quantized_layers(model).values()
        saved = sum(layer.weight.nbytes - quantized_bytes(layer, kind) for layer in layers)
    return unique_bytes(model.parameters()), saved


def fake_model(config: RunConfig, vocab_size: int, device: str = "cpu") -> Any:
    """Build the run's model with fake tensors as weights; call it under a ``FakeTensorMode``."""
    model = meta_model(config, vocab_size).to_empty(device=device)
    model.tie_weights()
    if config.activation_checkpointing:
        checkpoint_activations(model)
    return model.train()


def meta_model(config: RunConfig, vocab_size: int | None = None) -> Any:
    """Build the run's model on the meta device, without memory. Reads only config.json of ``init_from``.

    ``vocab_size`` None: any, for what does not depend on it.
    """
    if vocab_size is None:
        trained = trained_size(config.data.tokenizer) or 0
        vocab_size = max(trained, config.model.config.get("vocab_size", 0)) or 512
    dtype = torch.bfloat16 if config.precision == "bf16-pure" else torch.float32
    # outside of any fake mode: the casts inside would fail on fake parameters
    with unset_fake_temporarily(), torch.device("meta"):
        if config.model.init_from is None:
            return build_model(config.model, vocab_size, dtype)
        model = empty_model(config.model.init_from, dtype)
        check_initial_config(config.model.init_from, model.config)
        if config.lora.target_modules:
            adapt(config, model)
        return model


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state. An optimizer without state makes a step first, on uninitialised gradients.

    Pass fake parameters: that step ruins real ones.
    """
    if not optimizer.state:
        before = [dict(group) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            # neither changes the state: "pass" reads no values, and one iteration takes less time
            group.update({key: value for key, value in (("nonfinite", "pass"), ("num_iters", 1)) if key in group})
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
        with use_backend("reference"), warnings.catch_warnings():
            # comparing the addresses of two fake tensors, which are equal, is harmless here
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            _first_step(optimizer)
        for group, old in zip(optimizer.param_groups, before, strict=True):
            group.update(old)
    return unique_bytes(leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor))


def _first_step(optimizer: torch.optim.Optimizer) -> None:
    """Make a step. Fake tensors may raise where it reads a value; LANTON and M-FAC have created their state by then."""
    halves = halved_groups(optimizer) if hasattr(optimizer, "mark_half") else []
    if halves:
        optimizer.mark_half(averaged=True)  # type: ignore[attr-defined]
    try:
        optimizer.step()
    except DataDependentOutputException:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not all(optimizer.state.get(parameter) for parameter in parameters):
            name = type(optimizer).__name__
            raise ValueError(f"the state of {name} is not known before a step with real numbers") from None
    for group in halves:
        for parameter in group["params"]:
            # temporary state of a step; stays behind when the step raises
            optimizer.state.get(parameter, {}).pop("half_grad", None)


def unique_bytes(tensors: Any) -> int:
    """Bytes of distinct storages: tied weights and views count once."""
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


FORMULA = (
    "6 N + 12 L h s per token: N weights without lookup tables (a tied table counts as the head), of experts those a "
    "token meets, 4 instead of 6 for frozen ones; L layers, h heads x their width, s tokens in a sequence with padding"
)

# dense 16-bit tensor-core TFLOP/s with fp32 accumulation, from data sheets (rates with sparsity are halved). The first
# entry whose text is in the device's name counts.
_PEAK_TFLOPS = (
    ("H100 PCIe", 756),
    ("H100 NVL", 835),
    ("H100", 989),
    ("H200", 989),
    ("A100", 312),
    ("L40S", 362),
    ("L4", 121),
    ("RTX 4090", 165),
    ("MI300X", 1307),
)


def flops_per_token(model: PreTrainedModel, seq_len: int) -> int:
    """Count the operations of forward and backward per token (:data:`FORMULA`).

    Call it before sharding the model. Counts no attention if the configuration lacks ``num_hidden_layers`` or
    ``num_attention_heads``.
    """
    roles = parameter_roles(model)
    head = output_head(model)
    tied = None if head is None else head.weight
    config: Any = model.config
    sizes = config.get_text_config()
    routed = getattr(sizes, "num_experts_per_tok", None)  # None: every expert counts
    products = 0
    for name, parameter in model.named_parameters():
        if roles[name] in ("embedding", "position") and parameter is not tied:
            continue
        weights = weight_count(parameter)
        if roles[name] == "expert" and routed:
            weights = weights * min(routed, len(parameter)) // len(parameter)
        # forward, gradient of the input, and gradient of the weight
        products += weights * (6 if parameter.requires_grad else 4)
    layers, heads = (getattr(sizes, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    if layers is None or heads is None:
        return products
    width = heads * (getattr(sizes, "head_dim", None) or sizes.hidden_size // heads)
    return products + 12 * layers * width * seq_len


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak operations per second of a device in 16-bit precision, by its name; None if unknown."""
    # unknown: the peak of a MIG slice, and that of fp32, which depends on TF32
    if precision == "fp32" or " MIG " in device_name:
        return None
    return next((1e12 * peak for name, peak in _PEAK_TFLOPS if name in device_name.split("(")[-1]), None)


def disk_need(config: RunConfig, memory: MemoryEstimate, world_size: int = 1) -> tuple[int, int]:
    """Bytes of one checkpoint, and the most that a run needs: all checkpoints, one being written, the final model.

    ``memory`` is that of one process; with FSDP2 each of ``world_size`` processes writes its shard.
    """
    shards = world_size if config.distributed.strategy == "fsdp2" else 1
    model = shards * (memory.merged or memory.merged_in_host or memory.weights)
    checkpoint = model + shards * (memory.optimizer_state + memory.average)
    count = config.checkpoint.keep_last + 1 + int(config.checkpoint.keep_best)
    return checkpoint, count * checkpoint + (1 + bool(memory.average)) * model


def check_room(config: RunConfig, folder: RunFolder, memory: MemoryEstimate | None, world_size: int = 1) -> str | None:
    """Return a warning if the run needs more disk space than there is, else None.

    ``memory`` is that of one process; None skips the check. Existing checkpoints count as free space, since new ones
    replace them.

    Raises:
        FolderError: not even one checkpoint fits.
    """
    if memory is None:
        return None
    single, need = disk_need(config, memory, world_size)
    free = free_bytes(folder.root)
    if single > free:
        raise FolderError(
            f"out: one checkpoint needs {format_bytes(single)}, the disk of {folder.root} has {format_bytes(free)} "
            "free; make room, or choose another disk with out=ANOTHER_FOLDER"
        )
    present = [*find_checkpoints(folder.checkpoints), folder.final, folder.final_ema]
    room = free + sum(file.stat().st_size for path in present for file in path.rglob("*") if file.is_file())
    if need <= room:
        return None
    return (
        f"WARNING: the run needs {format_bytes(need)} on the disk of {folder.root}, there is room for "
        f"{format_bytes(room)}: saving will fail on the way. Make room, lower checkpoint.keep_last "
        f"({config.checkpoint.keep_last}) or choose another disk with out=ANOTHER_FOLDER"
    )
