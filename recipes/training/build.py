"""Build a run: its connected processes, model, optimizer and schedule."""

import functools
import inspect
import math
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, tracking
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    LoggerType,
    broadcast_object_list,
)
from torch.optim.lr_scheduler import LambdaLR
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel, PreTrainedTokenizerBase

from leanstep import optimizers
from leanstep._torch import output_head
from leanstep.optimizers import param_groups
from leanstep.optimizers.peers import peer_algorithm
from leanstep.optimizers.rates.adamw import convert_rates
from leanstep.pruning.folder.loading import begin_tokens
from leanstep.recipes.config.schema import (
    OPTIMIZERS,
    DistributedConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    accumulation_steps,
)
from leanstep.recipes.methods.fp8 import to_fp8, why_no_fp8
from leanstep.recipes.methods.lora import adapt, why_not_quantized
from leanstep.recipes.training.failures import lost_process
from leanstep.recipes.training.initial import check_initial_tokenizer, initial_model

T = TypeVar("T")

# LoRA's B by its names here and in PEFT
FACTOR_B = r"(^|\.)lora_(embedding_)?B(\.|$)"
_SELECTORS = {"match", "role"}

_MIXED_PRECISION = {"bf16": "bf16", "fp16": "fp16", "fp32": "no", "bf16-pure": "no"}


def wants_cpu(device: str) -> bool:
    """Whether a run with this ``device`` setting uses the CPU. Raises ValueError for a missing device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: 'cuda' was asked for, torch sees no such device here; take device=cpu or device=auto")
    return device == "cpu" or (device == "auto" and not torch.accelerator.is_available())


def build_accelerator(config: RunConfig) -> Accelerator:
    """Build the Accelerator: device, mixed precision, accumulation, sharding and trackers as the recipe says.

    An ``accelerate config`` file has no effect on these. Raises ValueError for fp16 or FSDP2 on a CPU, a tracker that
    is not installed, a wrong number of processes, or a ``batch.tokens_per_step`` that does not divide; ConnectionError
    if the processes do not connect within ``distributed.connect_minutes``.
    """
    cpu = wants_cpu(config.device)
    if cpu:
        # without it the processes of torchrun and accelerate launch do not connect
        os.environ["ACCELERATE_USE_CPU"] = "true"
    for problem in missing_here(config, cpu):
        raise ValueError(problem)
    limits = config.distributed
    with connecting(limits):
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=_MIXED_PRECISION[config.precision],
            # the loop takes whole windows of micro batches, so windows never end at the end of the loader
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
            fsdp_plugin=_fsdp_plugin() if limits.strategy == "fsdp2" else None,
            # one schedule step is one optimizer step, however many processes there are
            step_scheduler_with_optimizer=False,
            log_with=trackers_of(config) or None,
            project_dir=config.out,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=limits.connect_minutes))],
        )
        # NCCL connects in the first collective call
        accelerator.wait_for_everyone()
    check_world(accelerator.num_processes, asked_world_size())
    accelerator.gradient_accumulation_steps = accumulation_steps(config, accelerator.num_processes)
    return accelerator


@contextmanager
def connecting(limits: DistributedConfig) -> Iterator[None]:
    """Connect the processes inside; afterwards they wait ``timeout_minutes`` for each other.

    Raises ConnectionError if a process is missing after ``connect_minutes``, or ends meanwhile.
    """
    distributed = torch.distributed
    try:
        yield
    except RuntimeError as error:
        of_store = isinstance(error, (distributed.DistStoreError, distributed.DistNetworkError))
        if not of_store and lost_process(error, world_size=2) is None:
            raise
        reason = str(error).partition("\n")[0][:200]
        raise ConnectionError(
            f"the processes did not connect ({reason}); start all of them within distributed.connect_minutes "
            f"({limits.connect_minutes:g})"
        ) from error
    if distributed.is_initialized():
        # torch has no public function for it
        distributed.distributed_c10d._set_pg_timeout(timedelta(minutes=limits.timeout_minutes))


def _fsdp_plugin() -> FullyShardedDataParallelPlugin:
    """Accelerate's FSDP2 plugin: one unit per transformer layer, sharded state."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="SHARDED_STATE_DICT"
    )


def missing_here(config: RunConfig, cpu: bool) -> Iterator[str]:
    """Yield the problems of this machine: no GPU, or a missing tracker (Accelerate would only warn)."""
    if cpu and config.precision == "fp16":
        yield "precision: fp16 needs a GPU, this run is on the CPU; take precision=bf16 or precision=fp32"
    if cpu and config.distributed.strategy == "fsdp2":
        yield "distributed.strategy: fsdp2 needs GPUs, this run is on the CPU; take strategy=ddp"
    if config.fp8 and (reason := why_no_fp8(cpu)) is not None:
        yield f"fp8: {reason}; take fp8=null"
    if config.lora.quantize_base and (reason := why_not_quantized(config.lora.quantize_base)) is not None:
        yield f"lora.quantize_base: {reason}"
    installed = {str(getattr(name, "value", name)) for name in tracking.get_available_trackers()}
    shipped = {item.value for item in LoggerType} - {"all"}
    # trackers that a user registered with Accelerate
    installed |= set(map(str, tracking.LOGGER_TYPE_TO_CLASS)) - shipped
    for name in trackers_of(config):
        # Accelerate also finds a TensorBoard that lacks packages it needs
        if name not in installed or (name == "tensorboard" and not has_tensorboard()):
            hint = f"pip install {name}" if name in shipped else f"Accelerate knows {', '.join(sorted(shipped))}"
            yield f"log.trackers: {name!r} is not available here ({hint}); or take log.trackers=[]"


def trackers_of(config: RunConfig) -> list[str]:
    """``log.trackers``; where it is null, TensorBoard if that can be imported."""
    if config.log.trackers is not None:
        return list(config.log.trackers)
    return ["tensorboard"] if has_tensorboard() else []


@functools.cache
def has_tensorboard() -> bool:
    """Whether torch finds TensorBoard, or Accelerate tensorboardX, with the packages that these need."""
    if find_spec("tensorboardX") is not None:
        return True
    if find_spec("tensorboard") is None:
        return False
    try:
        import_module("torch.utils.tensorboard")
    except ImportError:
        return False
    return True


def asked_world_size(environ: Mapping[str, str] = os.environ, parent: str | None = None) -> dict[str, int]:
    """Collect the requested numbers of processes: {where: number}.

    Reads ``--nproc`` (which our launcher passes on), ``WORLD_SIZE`` (set by torchrun and accelerate), and the parent's
    command line, because ``accelerate launch --cpu --num_processes 2`` starts one process and leaves no other trace.
    """
    requested = {}
    if environ.get("LEANSTEP_NPROC", "").isdigit():
        requested["--nproc"] = int(environ["LEANSTEP_NPROC"])
    if environ.get("WORLD_SIZE", "").isdigit():
        requested["WORLD_SIZE"] = int(environ["WORLD_SIZE"])
    command = parent
    if command is None:
        try:
            command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # Linux only
            command = ""
    match = re.search(r"accelerate(\s|\.commands\.)launch\s.*--num[_-]processes[= ](\d+)", command)
    if match:
        requested["accelerate launch --num_processes"] = int(match[2])
    return requested


def check_world(world_size: int, requested: Mapping[str, int]) -> None:
    """Raise ValueError if Accelerate's ``world_size`` is not the requested number."""
    for where, number in requested.items():
        if number != world_size:
            raise ValueError(
                f"{where} asks for {number} processes, but Accelerate connected {world_size}: several would "
                f"train the same model side by side. Start with 'leanstep train ... --nproc {number}', or 'torchrun "
                f"--standalone --nproc_per_node {number} -m leanstep.recipes.training.train ...' (on a CPU, accelerate "
                "launch needs ACCELERATE_USE_CPU=true and --multi_gpu to start several processes)"
            )


def describe_world(accelerator: Accelerator) -> str:
    """``world size 2, backend gloo, device cpu, wrapping DDP``."""
    wrapping = "none"
    if accelerator.num_processes > 1:
        wrapping = "FSDP2" if accelerator.distributed_type == "FSDP" else "DDP"
    backend = "none"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        backend = torch.distributed.get_backend()
    return (
        f"world size {accelerator.num_processes}, backend {backend}, device {accelerator.device}, wrapping {wrapping}"
    )


def maximum(accelerator: Accelerator, value: int) -> int:
    """Largest ``value`` of all processes; a collective call."""
    if accelerator.num_processes == 1:
        return value
    tensor = torch.tensor([value], device=accelerator.device)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return int(tensor.item())


def all_agree(accelerator: Accelerator, fine: bool) -> bool:
    """Whether ``fine`` is true in every process; a collective call."""
    return maximum(accelerator, int(not fine)) == 0


def on_main_process(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run ``action`` in the first process and send its result, or its ValueError or OSError, to all."""
    outcome: list[object] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except (ValueError, OSError) as error:
            outcome[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[1], Exception):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]


def seed_process(seed: int, *more: int) -> None:
    """Seed the generators of Python, numpy and torch from these numbers."""
    words = np.random.SeedSequence([seed, *more]).generate_state(2, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[0] % 2**32))
    torch.manual_seed(int(words[1] % 2**63))


def device_name(device: torch.device) -> str:
    """``cuda:0 (NVIDIA H100)`` or ``cpu``."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def build_model(
    config: ModelConfig,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    end_token: int | None = None,
    begin_token: int | None = None,
    quantize: str | None = None,
) -> PreTrainedModel:
    """Build the transformers model of ``config`` with random weights, or read it from ``config.init_from``.

    Args:
        config: family and configuration keys; ``vocab_size`` defaults to the tokenizer's.
        vocab_size: number of tokens of the tokenizer.
        dtype: of the weights; random weights are drawn in fp32 from torch's global generator and rounded.
        end_token: id of the end-of-text token; generation stops with it.
        begin_token: id of the token with which generation starts; None: ``end_token``.
        quantize: ``lora.quantize_base``, for a model of ``init_from``.

    Raises:
        ValueError: an unknown configuration key; a model vocabulary smaller than the tokenizer's; an ``init_from`` that
            cannot be opened, or whose weights do not fit or are not finite.
    """
    if config.init_from is not None:
        model = initial_model(config, dtype, quantize)
        _check_vocabulary(model.config.get_text_config().vocab_size, vocab_size, f"model.init_from {config.init_from}")
        return model
    config_class = CONFIG_MAPPING[config.family]
    known = set(config_class().to_dict()) | set(inspect.signature(config_class).parameters)
    unknown = sorted(set(config.config) - known)
    if unknown:
        raise ValueError(f"model.config: {config_class.__name__} has no key {', '.join(map(repr, unknown))}")
    # no pad_token_id: nn.Embedding does not train the row of its padding index
    first = end_token if begin_token is None else begin_token
    settings = {"vocab_size": vocab_size, "bos_token_id": first, "eos_token_id": end_token, **config.config}
    _check_vocabulary(settings["vocab_size"], vocab_size, "model.config.vocab_size")
    model = MODEL_FOR_CAUSAL_LM_MAPPING[config_class](config_class(**settings)).to(dtype)
    # transformers derives the loss from the class name, and warns where it cannot
    model.loss_type = "ForCausalLM"
    return model


def build_run_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> PreTrainedModel:
    """Build the model that a run trains: :func:`build_model`, then adapters, recomputation and compilation.

    ``vocab_size`` is what the data needs (``LoadedData.vocabulary``).
    """
    dtype = torch.bfloat16 if config.precision == "bf16-pure" else torch.float32
    if config.model.init_from is not None:
        check_initial_tokenizer(config, tokenizer)
    begin, quantize = begin_tokens(tokenizer), config.lora.quantize_base
    model = build_model(config.model, vocab_size, dtype, tokenizer.eos_token_id, begin[-1] if begin else None, quantize)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and config.data.seq_len > positions:
        raise ValueError(
            f"data.seq_len: {config.data.seq_len} tokens, but the model has {positions} positions; shorten it, or set "
            "model.config.max_position_embeddings (gpt2: n_positions)"
        )
    if config.lora.target_modules:
        adapt(config, model)
    if config.activation_checkpointing:
        checkpoint_activations(model)
    if config.fp8:
        to_fp8(config, model)
    if config.compile:
        model.compile()
    return model


def _check_vocabulary(model_size: int, tokenizer_size: int, where: str) -> None:
    if model_size < tokenizer_size:
        raise ValueError(
            f"{where}: the model has {model_size} tokens, the tokenizer produces {tokenizer_size}; "
            f"take a vocabulary of at least {tokenizer_size}, or leave vocab_size out to fit it to the tokenizer"
        )


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each layer's activations in backward to save memory."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        # the name in older transformers
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """Import the optimizer class ``name``."""
    module, _, cls = OPTIMIZERS[name].partition(":")
    return getattr(import_module(module), cls)


def optimizer_section(config: RunConfig) -> OptimizerConfig:
    """``config.optimizer`` with the learning rate of B by ``lora.lr_ratio`` (LoRA+), after the groups that it names."""
    section, ratio = config.optimizer, config.lora.lr_ratio
    if ratio == 1 or not config.lora.target_modules:
        return section
    return replace(section, groups=[*section.groups, {"match": FACTOR_B, "lr": ratio * section.lr}])


def build_optimizer(config: OptimizerConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer over the groups of :func:`leanstep.optimizers.param_groups`, one group per role.

    AdamW is torch's, with ``fused=True`` by default. Only matrices have weight decay: norms, biases, token and position
    embeddings get ``weight_decay`` 0. Entries of ``config.groups`` override options of the parameters they select; the
    first entry that selects a parameter wins.

    Raises:
        ValueError: an unknown argument, a refused value, or an entry of ``groups`` that selects nothing.
    """
    cls = optimizer_class(config.name)
    rates = {"lr": config.lr, "weight_decay": config.weight_decay}
    options: dict[str, Any] = {**rates, **config.args}
    unknown = sorted(set(options) - set(inspect.signature(cls.__init__).parameters))
    if unknown:
        raise ValueError(f"optimizer.args: {cls.__name__} takes no argument {', '.join(map(repr, unknown))}")
    if config.name == "adamw":
        options.setdefault("fused", True)
    groups = list(_groups(config, model))
    options = {key: _python_value(key, value) for key, value in options.items()}
    try:
        if config.like_adamw:
            options = {key: options[key] for key in config.args}
            convert_rates("optimizer.like_adamw", cls, groups, options, rates)
        return cls(groups, **options)
    except TypeError as error:
        # a recipe's wrong type is an error of the user, like a value out of range
        raise ValueError(f"optimizer: {error}") from error


def _python_value(key: str, value: Any) -> Any:
    """Convert lists to tuples and names of dtypes to dtypes, which YAML cannot express."""
    if isinstance(value, list):
        return tuple(value)
    if key.endswith("dtype") and isinstance(value, str):
        dtype = torch.float8_e4m3fn if value == "fp8" else getattr(torch, value.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"optimizer.args.{key}: torch has no dtype {value!r}; take float32 or bfloat16")
        return dtype
    return value


def _groups(config: OptimizerConfig, model: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """Split each role's group by the first entry of ``config.groups`` that selects a parameter."""
    for number, entry in enumerate(config.groups):
        if ("match" in entry) == ("role" in entry):
            raise ValueError(f"optimizer.groups[{number}]: expected either 'match' or 'role', got {sorted(entry)}")

    def first_entry(name: str, role: str) -> int | None:
        for index, entry in enumerate(config.groups):
            if role == entry["role"] if "role" in entry else re.search(entry["match"], name):
                return index
        return None

    head = output_head(model)
    unused = set(range(len(config.groups)))
    for base in param_groups(model, embeddings=config.embeddings, split=config.split):
        role = base["name"]
        common = {key: value for key, value in base.items() if key not in ("name", "params")}
        algorithm = common.pop("algorithm", "adamw")
        algorithm = algorithm if config.name == "sinkgd" else peer_algorithm(config.name, base, head)
        if algorithm is not None:
            common["algorithm"] = algorithm
        by_entry: dict[int | None, list[tuple[str, torch.Tensor]]] = {}
        for name, parameter in base["params"]:
            by_entry.setdefault(first_entry(name, role), []).append((name, parameter))
        for index, params in by_entry.items():
            if index is None:
                yield {**common, "name": role, "params": params}
                continue
            unused.discard(index)
            options = {k: _python_value(k, value) for k, value in config.groups[index].items() if k not in _SELECTORS}
            yield {**common, **options, "name": f"{role}/{index}", "params": params}
    for number in sorted(unused):
        (key,) = _SELECTORS & config.groups[number].keys()
        text = config.groups[number][key]
        raise ValueError(f"optimizer.groups[{number}]: {key} {text!r} selects no parameter of the model")


def release_gradients(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any) -> optimizers.GradientRelease:
    """Let the optimizer step inside backward. Raises ValueError where it cannot."""
    if accelerator.num_processes > 1:
        raise ValueError(
            "release_gradients: it updates weights before the processes exchange their gradients, so it needs "
            f"one process and this run has {accelerator.num_processes}; set release_gradients=false"
        )
    try:
        return optimizers.release_gradients(model, optimizer)
    except TypeError as error:
        raise ValueError(str(error)) from None


def schedule_factor(config: ScheduleConfig, steps: int) -> Callable[[int], float]:
    """Return the factor on the learning rate as a function of the number n of steps made, 0 to steps - 1.

    The scheduler also asks for n = steps, after the last step.

    Warm-up of w steps: ``(n + 1) / (w + 1)``, so no step has rate 0. Then, with ``t = (n - w) / (steps - 1 - w)`` and
    ``f = final_fraction``: cosine ``f + (1 - f) (1 + cos(pi t)) / 2``, linear ``1 - (1 - f) t``, constant 1. wsd is 1
    until the last d = ``decay_fraction * steps`` steps: ``1 - (1 - f) (n - (steps - 1 - d)) / d``.
    """
    given = config.warmup_steps
    warmup = round(config.warmup_fraction * steps) if given is None else given
    final = config.final_fraction
    stable_until = steps - 1
    if config.name == "wsd":
        stable_until = max(warmup, steps - 1 - round(config.decay_fraction * steps))

    def factor(made: int) -> float:
        if made < warmup:
            return (made + 1) / (warmup + 1)
        progress = min(1.0, (made - warmup) / max(1, steps - 1 - warmup))
        if config.name == "cosine":
            return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
        if config.name == "linear":
            return 1 - (1 - final) * progress
        if config.name == "wsd" and made > stable_until:
            return 1 - (1 - final) * min(1.0, (made - stable_until) / max(1, steps - 1 - stable_until))
        return 1.0

    return factor


def build_schedule(config: ScheduleConfig, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Multiply every group's learning rate by :func:`schedule_factor`."""
    return LambdaLR(optimizer, schedule_factor(config, steps))


def describe_groups(optimizer: torch.optim.Optimizer) -> str:
    """``hidden 28 tensors, 850,000 elements, lr 0.004; ...``."""
    texts = []
    for group in optimizer.param_groups:
        count = sum(parameter.numel() for parameter in group["params"])
        settings = [f"lr {group['lr']:g}", f"weight decay {group['weight_decay']:g}"]
        if "algorithm" in group:
            settings.insert(0, str(group["algorithm"]))
        texts.append(f"{group.get('name', 'group')} {len(group['params'])} tensors, {count:,} ({', '.join(settings)})")
    return "; ".join(texts)
