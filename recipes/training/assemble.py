"""The objects of one start of a run, in the order in which they need each other, from recipe and checkpoint."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from leanstep.pruning import MaskKeeper
from leanstep.recipes.check.memory import MemoryEstimate, estimate
from leanstep.recipes.config.schema import RunConfig, targets_note
from leanstep.recipes.data.batches import Windows
from leanstep.recipes.data.sequences import LoadedData, load_data
from leanstep.recipes.data.vocabulary import vocabulary_size
from leanstep.recipes.methods.halves import Halves, find_halves
from leanstep.recipes.methods.lora import adapt, describe_adapters, is_adapted
from leanstep.recipes.methods.pruned import build_masks
from leanstep.recipes.methods.sparse import build_controller, describe_sparsity
from leanstep.recipes.training.build import (
    build_model,
    build_optimizer,
    build_schedule,
    check_positions,
    checkpoint_activations,
    describe_groups,
)
from leanstep.recipes.training.checkpoint import TrainState
from leanstep.recipes.training.flops import flops_per_token
from leanstep.recipes.training.folder import RunFolder
from leanstep.recipes.training.saver import Saver
from leanstep.recipes.training.start import check_room
from leanstep.recipes.training.world import main_does, seed_process
from leanstep.sparsity import Controller

__all__ = ["Parts", "assemble"]


@dataclass
class Parts:
    """What a run trains with. ``model``, ``optimizer`` and ``schedule`` are Accelerate's; ``memory`` may be unknown."""

    data: LoadedData
    memory: MemoryEstimate | None
    model: torch.nn.Module
    optimizer: Any
    schedule: Any
    saver: Saver
    windows: Windows
    halves: Halves | None
    sparsity: Controller | None
    masks: MaskKeeper | None
    parameters: int
    flops_per_token: int


def assemble(
    config: RunConfig,
    accelerator: Accelerator,
    folder: RunFolder,
    state: TrainState,
    checkpoint: Path | None,
    say: Callable[[str], None],
) -> Parts:
    """Build everything and load ``checkpoint``, whose ``state`` is read already; ``state`` gets this run's recipe.

    Raises ValueError, ImportError or OSError for what cannot be built here.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    data = load_data(config.data, seed=config.seed, rank=rank, world_size=world)
    say(data.summary())
    say(f"targets     {targets_note(config.data.seq_len)}")
    memory, unknown = None, ""
    if state.step < config.steps:
        memory, unknown = _memory(config, accelerator, data)
        warning = main_does(accelerator, lambda: check_room(config, folder, memory, world))
        if warning:
            say(warning)
    # the same weights in every process; later each one gets random numbers of its own
    seed_process(config.seed)
    model = _model(config, data)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    flops = flops_per_token(model, config.data.seq_len)
    optimizer = build_optimizer(config.optimizer, model)
    say(f"model       {type(model).__name__}, {parameters:,} parameters")
    if is_adapted(model):
        say(f"adapters    {describe_adapters(model)}")
    say(f"optimizer   {type(optimizer).__name__}: {describe_groups(optimizer)}")
    # the optimizer's groups go by the names that weights have until now
    sparsity = build_controller(config, model)
    if sparsity is not None:
        say(f"sparsity    {config.sparsity.method}: {describe_sparsity(sparsity)}")
    if unknown:
        # after everything is built: what cannot be built says the same, and better
        say(f"WARNING: memory and disk could not be compared with what the run needs: {unknown}")
    # both in one call: sharding replaces the parameters, in the optimizer too
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    if sparsity is not None:
        sparsity.attach(optimizer.optimizer)
    # what is zero in model.init_from, before a checkpoint of this run is loaded
    masks = build_masks(config, accelerator.unwrap_model(model), optimizer.optimizer, say)
    schedule = accelerator.prepare(build_schedule(config.schedule, optimizer.optimizer, config.steps))
    saver = Saver(accelerator, folder, config.checkpoint, model, data.tokenizer, say)
    if masks is not None:
        saver.pruned = list(masks.parameters), str(config.model.init_from)
    # the step is part of the seed for a run that goes on with another number of processes
    seed_process(config.seed, rank, state.step)
    stream = None if checkpoint is None else saver.load(checkpoint, state)
    if checkpoint is not None and state.world_size != world:
        say(f"WARNING: {world} processes go on where {state.world_size} stopped: not bit for bit the same")
    windows = Windows(
        accelerator,
        data,
        seed=config.seed,
        micro_batch_size=config.batch.micro_batch_size,
        accumulation=accelerator.gradient_accumulation_steps,
        made=state.step,
        steps=config.steps,
        stream_state=stream,
    )
    state.config, state.world_size = dataclasses.asdict(config), world
    _release_gradients(config, accelerator, model, optimizer)
    halves = find_halves(optimizer.optimizer, accelerator)
    return Parts(data, memory, model, optimizer, schedule, saver, windows, halves, sparsity, masks, parameters, flops)


def _memory(config: RunConfig, accelerator: Accelerator, data: LoadedData) -> tuple[MemoryEstimate | None, str]:
    """The memory of one process as ``leanstep check`` estimates it; None where that cannot be told, and why."""
    vocabulary = vocabulary_size(data.tokenizer)
    try:
        found = estimate(config, vocabulary, world_size=accelerator.num_processes, device=accelerator.device.type)
    except Exception as error:
        # whatever keeps the estimate from being made must not end a run
        return None, str(error) or type(error).__name__
    return found, ""


def _model(config: RunConfig, data: LoadedData) -> torch.nn.Module:
    dtype = torch.bfloat16 if config.precision == "bf16-pure" else torch.float32
    tokenizer = data.tokenizer
    model = build_model(config.model, vocabulary_size(tokenizer), dtype, tokenizer.eos_token_id)
    check_positions(model, config.data.seq_len)
    adapt(config, model)
    if config.activation_checkpointing:
        checkpoint_activations(model)
    if config.compile:
        model.compile()
    return model


def _release_gradients(config: RunConfig, accelerator: Accelerator, model: torch.nn.Module, optimizer: Any) -> None:
    """Let the optimizer step inside backward, when the recipe asks for it."""
    if not config.release_gradients:
        return
    if accelerator.num_processes > 1:
        raise ValueError(
            "release_gradients: it updates weights before the processes exchange their gradients, so it needs "
            f"one process and this run has {accelerator.num_processes}; set release_gradients=false"
        )
    from leanstep.optimizers import release_gradients

    try:
        release_gradients(accelerator.unwrap_model(model), optimizer.optimizer)
    except TypeError as error:
        raise ValueError(str(error)) from None
