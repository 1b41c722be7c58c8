"""Checks of optimizers inside engines that flatten parameters, or give each process some of them."""

from functools import partial
from typing import Any

import torch
from distributed_cases import assert_same, new_model, refused, train
from distributed_world import World, case
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

from leanstep.optimizers import LANTON, MFAC, Lion, SinkGD, create, param_groups


@case(2)
def flattened_parameters_are_refused(world: World) -> None:
    """FSDP1 leaves vectors, or views of them: rows and columns are lost. Elementwise rules do not mind."""
    for orig in (False, True):
        model = FullyShardedDataParallel(new_model(tie=False), use_orig_params=orig, device_id=torch.device("cpu"))
        for cls, settings in ((SinkGD, {}), (LANTON, {}), (MFAC, {"window": 2})):
            refused(ValueError, "FSDP1 has flattened it", partial(cls, model.parameters(), **settings))
        refused(ValueError, "param_groups: FSDP1 has flattened", partial(param_groups, model))
        SinkGD([{"params": list(model.parameters()), "algorithm": "adamw"}])
        train(model, Lion(model.parameters(), lr=1e-3), world, steps=1)
    flat = nn.Parameter(torch.ones(20))
    refused(ValueError, "flattened by a sharding engine", lambda: SinkGD([{"params": [flat], "algorithm": "sinkgd"}]))


def without_names(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups as docs/distributed.md makes them for engines that take no named parameters."""
    return [{**group, "params": [p for _, p in group["params"]]} for group in groups]


@case(2)
def zero_redundancy_optimizer(world: World) -> None:
    """torch's ZeRO-1 gives whole parameters to processes, to some of them none of a group: as one process."""
    for cls, settings in (
        (Lion, {"lr": 1e-2}),
        (SinkGD, {"lr": 0.05}),
        (LANTON, {"lr": 0.01, "noise_adaptive": False}),
        (MFAC, {"lr": 0.01, "window": 3, "scope": "layer", "damping": 0.1}),
    ):
        plain, replica = new_model(torch.float64), new_model(torch.float64)
        train(plain, cls(without_names(param_groups(plain)), **settings), None)
        parallel = nn.parallel.DistributedDataParallel(replica)
        groups = without_names(param_groups(replica))
        train(parallel, ZeroRedundancyOptimizer(groups, optimizer_class=cls, **settings), world)
        assert_same(replica, plain, 1e-6, cls.__name__)


@case(2)
def zero_redundancy_optimizer_is_refused_by_rules_over_all_parameters(world: World) -> None:
    params = list(new_model().parameters())

    def build(cls: Any, **settings: Any) -> partial[object]:
        return partial(ZeroRedundancyOptimizer, params, optimizer_class=cls, lr=1e-2, **settings)

    said = "needs all parameters of the model, but ZeroRedundancyOptimizer gives this process some of them"
    refused(ValueError, f"LANTON: noise_adaptive=True {said}", build(LANTON))
    for scope in ("model", "group"):
        refused(ValueError, f"MFAC: scope={scope!r} {said}", build(MFAC, window=2, scope=scope))
    MFAC(params, lr=1e-2, window=2)  # the engine is loaded, and does not call


@case(2)
def pipeline_stages_are_refused_by_rules_over_all_parameters(world: World) -> None:
    from torch.distributed.pipelining import PipelineStage

    layers = [nn.Linear(4, 4) for _ in range(2)]
    example = torch.zeros(1, 4)
    stage = PipelineStage(
        layers[world.rank], world.rank, 2, torch.device("cpu"), input_args=example, output_args=example
    )
    for cls, settings, said in (
        (LANTON, {}, "LANTON: noise_adaptive=True needs all parameters of the model, but a pipeline"),
        (MFAC, {"window": 2}, "MFAC: scope='model' needs all parameters of the model, but a pipeline"),
        (LANTON, {"noise_adaptive": False}, None),
        (MFAC, {"window": 2, "scope": "group"}, None),
    ):
        optimizer = cls(stage.submod.parameters(), lr=1e-2, **settings)
        for param in stage.submod.parameters():
            param.grad = torch.ones_like(param)
        before = stage.submod.weight.detach().clone()
        if said is None:
            optimizer.step()
        else:
            refused(ValueError, said, optimizer.step)
        assert torch.equal(before, stage.submod.weight) == (said is not None)
    other = nn.Linear(4, 4)
    other(torch.ones(1, 4)).sum().backward()
    MFAC(other.parameters(), window=2).step()  # of no stage


@case(2)
def trainer_shards_a_created_optimizer(world: World) -> None:
    """transformers' Trainer with FSDP2 makes the optimizer by ``create``, and steps as a loop on one process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.utils.data import SequentialSampler
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    class OnCPU(Trainer):
        """Accelerate offers FSDP2 for GPUs only: what it reads of its state is told otherwise."""

        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            for state in (PartialState, AcceleratorState):
                state._shared_state["distributed_type"] = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            )
            self.is_fsdp_enabled = True

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

    def llama() -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=16, **sizes))

    ids = (torch.arange(12) + torch.arange(24).unsqueeze(1)) % 32
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    arguments = TrainingArguments(
        str(world.folder / "trainer"), per_device_train_batch_size=4, max_steps=3, learning_rate=2e-2,
        lr_scheduler_type="constant", max_grad_norm=0, save_strategy="no", report_to=[], use_cpu=True,
    )  # fmt: skip
    options = {"name": "sinkgd", "lr": 2e-2, "say": None}
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = OnCPU(llama(), arguments, train_dataset=data, optimizer_cls_and_kwargs=(lambda: create, options))
    trainer.train()
    plain = llama()
    optimizer = create(plain, **options)
    for batch in ids.split(8):
        plain(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(isinstance(p, DTensor) for group in trainer.optimizer.param_groups for p in group["params"])
    assert [g["name"] for g in trainer.optimizer.param_groups] == [g["name"] for g in optimizer.param_groups]
    assert_same(trainer.accelerator.unwrap_model(trainer.model_wrapped), plain, 1e-5)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
