"""Checks of adapted models that run on every process of a world (see distributed_world.py)."""

import copy
import functools
from typing import Any

import torch
from distributed_cases import refused
from distributed_world import World, case
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from leanstep.lora import LoraConfig, NormMonitor, QKClip, apply_lora, load_adapter, merge, save_adapter
from leanstep.lora.attention.clip import clip_factors
from leanstep.lora.merge import merged_state_dict
from leanstep.optimizers import LANTON, Lion, SinkGD, param_groups

WORLDS = (2,)
OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2),
    "sinkgd": lambda model: SinkGD(param_groups(model), lr=1e-2),
    "lanton": lambda model: LANTON(param_groups(model), lr=1e-2),
    "lion": lambda model: Lion(param_groups(model), lr=1e-3),
}


class Block(nn.Module):
    """Attention's three projections of one input, and a SwiGLU block."""

    def __init__(self, width: int = 12, inner: int = 20) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.mlp = SwiGLU(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.q_proj(x) * self.k_proj(x).tanh() + self.v_proj(x)
        return x + self.mlp(x)


class SwiGLU(nn.Module):
    """As transformers writes it."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def make_model(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = apply_lora(nn.Sequential(Block(), Block()), LoraConfig(r=4, target_modules="all-linear", **settings))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.weight"):
            nn.init.normal_(parameter, std=0.1)
    return model


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 12, generator=generator), torch.randn(8, 12, generator=generator)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor], count: int = 3) -> None:
    for _ in range(count):
        (model(data[0]) - data[1]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@functools.cache
def mesh(size: int) -> Any:
    return init_device_mesh("cpu", (size,))


def trained(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in found.items()}


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor], where: str) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5, msg=f"{where}: {name}")


@case(*WORLDS)
def lora_sharded_equals_whole(world: World) -> None:
    """FSDP2, each block a unit: fused blocks, DoRA, every optimizer."""
    for name, build in OPTIMIZERS.items():
        whole = make_model(use_dora=name == "adamw")
        inputs, targets = batch()
        if name == "lanton":
            # a polar factor multiplies the rounding errors of small singular values
            whole, inputs, targets = whole.double(), inputs.double(), targets.double()
        part = (inputs[world.rank :: world.size], targets[world.rank :: world.size])
        sharded = copy.deepcopy(whole)
        for block in sharded:
            fully_shard(block, mesh=mesh(world.size))
        fully_shard(sharded, mesh=mesh(world.size))
        steps(whole, build(whole), (inputs, targets))
        steps(sharded, build(sharded), part)
        # inside a unit weights are whole, and the fast path runs; outside, a layer says what it is
        assert "sharded (DTensor)" in sharded[0].q_proj.fast_path.reason
        compare(trained(sharded), trained(whole), name)


@case(*WORLDS)
def lora_sharded_adapter_is_saved_whole(world: World) -> None:
    model = make_model()
    whole = trained(copy.deepcopy(model))
    for block in model:
        fully_shard(block, mesh=mesh(world.size))
    folder = save_adapter(model, world.folder / f"adapter-{world.rank}")
    state = load_file(folder / "adapter_model.safetensors")
    assert len(state) == len(whole)
    for name, tensor in whole.items():
        assert torch.equal(state[f"base_model.model.{name}"], tensor)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    load_adapter(model, folder)
    compare(trained(model), whole, "loaded")


@case(*WORLDS)
def lora_replicated_equals_whole(world: World) -> None:
    inputs, targets = batch()
    whole = make_model()
    replica = copy.deepcopy(whole)
    parallel = DistributedDataParallel(replica)
    build = OPTIMIZERS["adamw"]
    steps(whole, build(whole), (inputs, targets))
    steps(parallel, build(replica), (inputs[world.rank :: world.size], targets[world.rank :: world.size]))
    compare(trained(replica), trained(whole), "ddp")


@case(2)
def lora_in_replicas_is_refused(world: World) -> None:
    """DDP lists its parameters when it is made, and would not average the gradients of factors that come later."""
    config, folder = LoraConfig(r=2, target_modules=["q_proj"]), world.folder / f"late-{world.rank}"
    save_adapter(apply_lora(Block(), config), folder)
    parallel = DistributedDataParallel(Block())
    names = list(dict(parallel.named_parameters()))
    refused(ValueError, "expected the model itself, got one in Distributed", lambda: apply_lora(parallel, config))
    refused(ValueError, "load_adapter the model inside", lambda: load_adapter(parallel, folder))
    assert list(dict(parallel.named_parameters())) == names
    apply_lora(parallel.module, config)


@case(*WORLDS)
def lora_replicated_losses_are_pefts(world: World) -> None:
    """The same adapter under DDP in PEFT, in PEFT accelerated, and here, step by step."""
    import peft

    from leanstep.lora import accelerate_peft

    torch.manual_seed(0)
    base = nn.Sequential(Block(), Block())
    names = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, target_modules=names, use_dora=True)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    folder = world.folder / f"peft-{world.rank}"
    theirs.save_pretrained(folder)
    fast, ours = copy.deepcopy(theirs), load_adapter(base, folder)
    accelerate_peft(fast)
    assert ours[0].q_proj.fast_path.on
    inputs, targets = (part[world.rank :: world.size] for part in batch())
    found = []
    for model in (theirs, fast, ours):
        parallel = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-6)
        losses = torch.empty(40)
        for step in range(40):
            loss = (parallel(inputs) - targets).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[step] = loss.detach()
        found.append(losses)
    assert found[0][-1] < found[0][0] - 0.1
    for losses in found[1:]:
        torch.testing.assert_close(losses, found[0], rtol=0, atol=1e-5)


@case(2)
def lora_sharded_dora_merges_and_pissa_takes_other_starts(world: World) -> None:
    settings = LoraConfig(r=4, target_modules=["0", "1"], use_dora=True)
    models = []
    for sharded in (False, True):
        torch.manual_seed(0)
        model = apply_lora(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)), settings)
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                nn.init.normal_(parameter)
        models.append(shard(model, world) if sharded else model)
    weights = [merged_state_dict(model) for model in models]
    compare({name: _whole(value) for name, value in weights[1].items()}, weights[0], "merged_state_dict")
    for model in models:
        merge(model)
    compare(*({f"{i}": _whole(layer.weight) for i, layer in enumerate(model)} for model in models[::-1]), "merge")

    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        base = nn.Sequential(nn.Linear(12, 12))
        starts.append(apply_lora(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")))
    folder = world.folder / f"pissa-{world.rank}"
    save_adapter(starts[0], folder)
    x = batch()[0]
    expected = copy.deepcopy(starts[1])
    for model in (expected, shard(starts[1], world)):
        load_adapter(model, folder)
    torch.testing.assert_close(starts[1](x), expected(x))
    assert torch.equal(starts[1][0].lora_start_A, starts[0][0].lora_start_A)


def shard(model: nn.Module, world: World) -> nn.Module:
    """Every layer by itself, and the rest."""
    for layer in model:
        fully_shard(layer, mesh=mesh(world.size))
    return fully_shard(model, mesh=mesh(world.size))


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@case(2)
def tensor_parallel_layers_are_refused(world: World) -> None:
    """By name, in either order, for linear layers and for embeddings; a plan without adapted layers works."""
    from distributed_cases import refused
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def model() -> nn.Module:
        return nn.Sequential(nn.Embedding(10, 12), nn.Linear(12, 20), nn.Linear(20, 12))

    config = LoraConfig(r=2, target_modules=["0", "1", "2"])
    for plan in ({"1": ColwiseParallel(), "2": RowwiseParallel()}, {"0": RowwiseParallel()}):
        parallel = parallelize_module(model(), mesh(2), plan)
        before = list(parallel.state_dict())
        refused(ValueError, f"{min(plan)} has a weight that is a DTensor", lambda p=parallel: apply_lora(p, config))
        assert list(parallel.state_dict()) == before
        adapted = apply_lora(model(), config)
        said = "parallelize_module) takes no adapted layer, got lora_"
        refused(ValueError, said, functools.partial(parallelize_module, adapted, mesh(2), plan))
    part = apply_lora(model(), LoraConfig(r=2, target_modules=["0"]))
    parallelize_module(part, mesh(2), {"1": ColwiseParallel(), "2": RowwiseParallel()})
    part(torch.arange(10)).sum().backward()
    assert all(p.grad is not None for name, p in part.named_parameters() if "lora_" in name)


@case(2)
def clipped_heads_of_sharded_models(world: World) -> None:
    """QK-clip under fully_shard, with another batch on every process: the largest logits of both, and whole factors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=3, num_key_value_heads=1, attention_bias=True, head_dim=10)
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config)
    for name, parameter in plain.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            nn.init.normal_(parameter)
    sharded = copy.deepcopy(plain)
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (world.size,)))
    fully_shard(sharded, mesh=init_device_mesh("cpu", (world.size,)))
    ids = torch.arange(4 * 20).view(4, 20) * 7 % 31
    logits = []
    for model, rows in ((plain, ids[:2]), (plain, ids[2:]), (sharded, ids[2 * world.rank : 2 * world.rank + 2])):
        with NormMonitor(model) as monitor:
            clip = QKClip(monitor, threshold=2.0)
            clip.arm()
            model(rows, labels=rows).loss.backward()  # which shards the weights again
            if model is plain:
                logits.append(monitor.logits())
            else:
                assert clip.step() > 0
    for name, layer in plain.named_modules():
        if name not in logits[0]:
            continue
        query, key = clip_factors(torch.maximum(*(each[name] for each in logits)).double(), 1, 2.0)
        for leaf, factors in (("q_proj", query), ("k_proj", key)):
            twin = sharded.get_submodule(f"{name}.{leaf}")
            of_rows = factors.repeat_interleave(10).float()
            for param, expected in ((twin.weight, of_rows[:, None]), (twin.bias, of_rows)):
                whole = param.detach().full_tensor()
                old = getattr(layer, leaf).weight if whole.dim() == 2 else getattr(layer, leaf).bias
                torch.testing.assert_close(whole, old.detach() * expected, rtol=1e-4, atol=0)
    # another model on the other process
    groups = [torch.distributed.new_group([rank]) for rank in range(world.size)]
    with NormMonitor(plain) as monitor:
        clip = QKClip(monitor, threshold=2.0, process_group=groups[world.rank])
        clip.arm()
        rows = ids[2 * world.rank : 2 * world.rank + 2]
        plain(rows, labels=rows)
        clip.step()
    diagnostics = clip.diagnostics()
    for name, values in logits[world.rank].items():
        assert abs(diagnostics[f"logit/{name}"] - float(values.max())) < 1e-4, name
