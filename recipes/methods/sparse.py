"""N:M sparsity in a run: build the controller, save and load its state, report."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from leanstep._checkpoint.files import TensorFile, load_tensors
from leanstep.recipes.config.schema import RunConfig
from leanstep.recipes.training.checkpoint import CheckpointError
from leanstep.recipes.training.parts import Part
from leanstep.sparsity import Controller, Schedule, sparsify
from leanstep.sparsity.squash import sparse_state
from leanstep.sparsity.training.flops import FORMULA, Operations, training_operations
from leanstep.sparsity.training.methods import METHODS
from leanstep.sparsity.training.modules import SparseLayer, plan_layers, sparse_layers
from leanstep.sparsity.verify import PATTERNS_FILE

STATE_FILE = "sparsity.safetensors"


class Sparsity(Part):
    """N:M sparsity of a run. ``sparsity_report.json``: sparsity of each layer, and operations of the run."""

    name = "sparsity"
    source: Controller

    def build(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Make the layers sparse, after the optimizer's groups, which go by the original parameter names."""
        self.model = model
        self.source = build_controller(self.run.config, model)
        self.run.say(f"sparsity    {self.run.config.sparsity.method}: {describe_sparsity(self.source)}")

    def prepared(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Follow the optimizer's steps."""
        self.source.attach(optimizer)

    def after_step(self, applied: bool, finite: bool) -> None:
        """Follow the run's steps, also those that are left out here or by a gradient scaler."""
        while self.source.step_count <= self.run.state.step:
            self.source.skip()

    def save(self, trainer: Path) -> None:
        """Write dense weights and masks; those of a sharded model are in Accelerate's state."""
        accelerator = self.run.accelerator
        if accelerator.is_main_process and accelerator.distributed_type != "FSDP":
            save_sparse(self.model, trainer)

    def export(self, model: torch.nn.Module, path: Path) -> None:
        """Write the patterns."""
        write_patterns(model, path)

    def report(self) -> Iterator[tuple[str, Any]]:
        """Statistics of each layer."""
        yield "sparsity_report.json", report(self.run.config, self.source, self.run.flops_per_token)


def schedule_of(config: RunConfig) -> Schedule:
    """Build the schedule of ``config.sparsity`` over the run's steps. Raises ValueError for invalid settings."""
    names = ("dense", "finetune", "decay", "alpha_end", "coarsest", "freeze_mask_in_finetune")
    settings = {name: getattr(config.sparsity, name) for name in names}
    return Schedule(kind=METHODS[config.sparsity.method].kind or "constant", total_steps=config.steps, **settings)


def plan(config: RunConfig, model: torch.nn.Module) -> list[SparseLayer]:
    """List the layers of ``model``, on any device, that match ``sparsity.patterns``."""
    sparsity = config.sparsity
    return plan_layers(model, sparsity.patterns, sparsity.axis, sparsity.pad)


def build_controller(config: RunConfig, model: torch.nn.Module) -> Controller:
    """Make ``model`` sparse as the recipe says (``sparsity.patterns``).

    Call it after building the optimizer, whose groups go by parameter names, and before sharding the model. Raises
    ValueError for layers that cannot be sparse.
    """
    names = ("method", "score", "grad_flow", "srste_lambda", "mask_every", "axis", "pad")
    settings: dict[str, Any] = {name: getattr(config.sparsity, name) for name in names}
    every = config.log.every
    return sparsify(model, config.sparsity.patterns, schedule=schedule_of(config), measure_every=every, **settings)


def describe_sparsity(controller: Controller) -> str:
    """``1:16 12 layers, 589,824 weights; 2:4 ...``."""
    sizes_of: dict[str, list[int]] = {}
    for layer in controller.layers:
        sizes_of.setdefault(str(layer.target), []).append(layer.transform.mask.numel())
    return "; ".join(f"{pattern} {len(sizes)} layers, {sum(sizes):,} weights" for pattern, sizes in sizes_of.items())


def write_patterns(model: torch.nn.Module, path: Path) -> None:
    """Write the N:M patterns beside the weights, for ``leanstep verify``, if every layer has reached its pattern."""
    layers = sparse_layers(model)
    if layers and all(layer.transform.pattern == layer.target and layer.transform.alpha == 0 for layer in layers):
        # transformers renames the tensors of some models when it stores them
        stored: set[str] = set()
        for file in path.glob("*.safetensors"):
            with TensorFile(file) as weights:
                stored |= set(weights.names)
        named = [(name, layer) for layer in layers for name in layer.names if name in stored]
        content = {name: {"pattern": str(layer.target), "dim": layer.dim} for name, layer in named}
        (path / PATTERNS_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def save_sparse(model: torch.nn.Module, trainer: Path) -> None:
    """Write the dense weights and masks, which a resumed run needs."""
    state = sparse_state(model)
    if state:
        # store a tied weight once
        name_of = {tensor.data_ptr(): name for name, tensor in reversed(state.items())}
        save_file({name: state[name].contiguous() for name in name_of.values()}, trainer / STATE_FILE)


def load_sparse(model: torch.nn.Module, trainer: Path) -> dict[str, torch.Tensor]:
    """Read the file of :func:`save_sparse`; empty for a dense model. Raises CheckpointError if it is missing."""
    if not sparse_layers(model):
        return {}
    file = trainer / STATE_FILE
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: the checkpoint is of a run without sparsity")
    return load_tensors(file)


def without_sparse(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove the sparse weights, which :func:`load_sparse` reads in their dense form."""
    sparse = {name for layer in sparse_layers(model) for name in layer.names}
    return {name: tensor for name, tensor in weights.items() if name not in sparse}


def run_operations(config: RunConfig, layers: Iterable[SparseLayer], flops_per_token: int) -> Operations:
    """Floating-point operations of the run: dense, theoretical and on hardware."""
    tokens = config.batch.tokens_per_step
    sizes = [(layer.weight.numel(), layer.target) for layer in layers]
    return training_operations(
        float(flops_per_token) * tokens,
        sizes,
        schedule_of(config),
        steps=config.steps,
        tokens=tokens,
        transposable=config.sparsity.score == "transposable",
    )


def report(config: RunConfig, controller: Controller, flops_per_token: int) -> dict[str, Any]:
    """Content of ``sparsity_report.json``: statistics of each layer, and operations of the run."""
    operations = run_operations(config, controller.layers, flops_per_token)
    counted = {"dense": operations.dense, "theoretical": operations.theoretical, "hardware": operations.hardware}
    return {"layers": controller.statistics(), "operations": counted, "formula": FORMULA}
