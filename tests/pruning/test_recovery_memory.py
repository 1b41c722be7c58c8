"""What recovery with a teacher takes of memory: its parts, their sum beside a measured peak, and what they decide."""

import shutil

import pytest
import torch
from architectures import make
from pruned_models import images, make_llama, save_model, tokens
from torch.profiler import ProfilerActivity, profile
from transformers import MixtralConfig, MixtralForCausalLM

from leanstep.pruning import Recovery, find_targets, prune_checkpoint, recover, recover_checkpoint
from leanstep.pruning.folder import recovery as folder_recovery
from leanstep.pruning.folder.files import open_checkpoint
from leanstep.pruning.folder.loading import load_model
from leanstep.pruning.folder.recovery import recovery_bytes
from leanstep.pruning.score.targets import prunable_names
from leanstep.pruning.training import recovery as recovery_module
from leanstep.pruning.training.recovery_memory import distillation_bytes

WIDE = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 1024}


def halved(model):
    """The model with every second column of its matrices at zero."""
    for target in find_targets(model):
        target.weight[:, ::2] = 0
    return model


def test_every_part_is_counted():
    model, data = halved(make_llama(2)), tokens(6)
    shapes = [target.weight.shape for target in find_targets(model)]
    weights, width = sum(4 * rows * columns for rows, columns in shapes), data.shape[1]
    uses = distillation_bytes(model, data, Recovery(1, batch_size=4), dense=1000)
    common = {
        "dense model": 1000,
        "masks": weights // 4,
        "largest matrix": 8 * 40 * 16,
        "activations": uses["activations"],
        # of four samples 2 x 4 bytes of two models, and logarithms and probabilities; three more of one
        "logits": width * 64 * (4 * 16 + 12),
    }
    assert uses == common
    with recovery_module.training(model, find_targets(model), Recovery(1)), torch.enable_grad():
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            model(data[:1], use_cache=False)
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    storages = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    activations = sum(size for address, size in storages.items() if address not in parameters)
    assert uses["activations"] == pytest.approx(4 * activations, rel=0.1)
    factors = sum(4 * 2 * (rows + columns) for rows, columns in shapes)
    adapted = distillation_bytes(model, data, Recovery(1, rank=2, batch_size=4), dense=1000)
    assert adapted == common | {"factors": factors}


def test_gradients_and_copies_are_counted_where_they_are_the_peak(monkeypatch):
    model, data = halved(make_llama(2, intermediate_size=400)), tokens(6)[:, :2]
    weights = sum(target.weight.nbytes for target in find_targets(model))
    uses = distillation_bytes(model, data, Recovery(1, batch_size=1), dense=1000, snapshot=True)
    assert uses["gradients"] == uses["copies of the pruned weights"] == weights
    assert "activations" not in uses
    # several passes, which add to the gradients
    monkeypatch.setattr(recovery_module, "_TOGETHER", 1)
    uses = distillation_bytes(model, data, Recovery(1, batch_size=4), dense=1000)
    assert uses["gradients"] == weights and uses["activations"] > 0
    head = distillation_bytes(model, data, Recovery(1), dense=0, include=["lm_head.weight"])
    assert head["optimizer's state"] == 2 * model.lm_head.weight.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("together", [1, 1 << 26])
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_the_measured_peak(dtype, rank, together, monkeypatch):
    monkeypatch.setattr(recovery_module, "_TOGETHER", together)
    model, teacher = (make_llama(3, **WIDE).to(dtype) for _ in range(2))
    data = torch.randint(0, 1024, (8, 64), generator=torch.Generator().manual_seed(0))
    recovery = Recovery(2, rank=rank, batch_size=4)
    estimate = sum(distillation_bytes(halved(model), data, recovery, dense=0, snapshot=True).values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        recover(model, data, recovery, teacher=teacher)
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            peak = max(peak, now := now + event.nbytes())
    assert 0.97 * peak < estimate < 1.3 * peak, (estimate, peak)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A mixture of experts, which are most of its weights, its pruned folder, and a few tokens."""
    base, data = tmp_path_factory.mktemp("mixture"), tokens(8)[:, :4]
    sizes = {"hidden_size": 32, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    save_model(MixtralForCausalLM(MixtralConfig(**sizes, **heads, max_position_embeddings=64)), base / "model")
    prune_checkpoint(base / "model", base / "out", data, sparsity=0.5, allocation="uniform", held_out=False)
    return base, data


def taken(base, data, recovery):
    """Bytes by use that the decision is made by."""
    model = load_model(open_checkpoint(base / "out"))
    names = [target.parameter for target in find_targets(model)]
    return distillation_bytes(model, data, recovery, dense=open_checkpoint(base / "model").size, include=names)


def recovered(pruned, tmp_path, monkeypatch, recovery, free):
    """Recover a copy of the folder in some free memory; returns the result."""
    base, data = pruned
    out = shutil.copytree(base / "out", tmp_path / f"{recovery.rank} {free}")
    monkeypatch.setattr(folder_recovery, "free_memory", lambda device: free)
    return recover_checkpoint(base / "model", out, data, recovery)


@pytest.mark.parametrize("rank", [None, 2])
def test_distillation_needs_memory_for_all_parts(rank, pruned, tmp_path, monkeypatch):
    recovery = Recovery(2, rank=rank, batch_size=2)
    total = sum((uses := taken(*pruned, recovery)).values())
    assert recovered(pruned, tmp_path, monkeypatch, recovery, total).settings.distill
    result = recovered(pruned, tmp_path, monkeypatch, recovery, total - 1)
    assert not result.settings.distill
    (note,) = [note for note in result.notes if "learnt the next tokens" in note]
    assert all(use in note for use in uses)


def test_weights_that_a_rank_does_not_train_need_no_gradients(pruned, tmp_path, monkeypatch):
    base, data = pruned
    whole, factors = (Recovery(2, rank=rank, batch_size=2) for rank in (None, 2))
    free = sum(taken(base, data, factors).values())
    assert free < sum(taken(base, data, whole).values())
    # the gradients of all matrices would not fit beside the dense model
    weights = sum(target.weight.nbytes for target in find_targets(load_model(open_checkpoint(base / "model"))))
    assert free < open_checkpoint(base / "model").size + weights
    assert recovered(pruned, tmp_path, monkeypatch, factors, free).settings.distill
    assert not recovered(pruned, tmp_path, monkeypatch, whole, free).settings.distill


def test_pages_of_files_are_counted_where_the_weights_are_mapped(pruned, tmp_path, monkeypatch):
    base, data = pruned
    uses = []

    def counting(model, *arguments, **settings):
        uses.append(distillation_bytes(model, *arguments, **settings))
        return uses[-1]

    monkeypatch.setattr(folder_recovery, "distillation_bytes", counting)
    settings = {"sparsity": 0.5, "allocation": "uniform", "held_out": False}
    prune_checkpoint(base / "model", tmp_path / "out", data, recovery=Recovery(1, batch_size=2), **settings)
    # all but the experts, which are joined in memory as they have less than 1 MiB
    parameters = load_model(open_checkpoint(base / "model")).named_parameters()
    assert uses[0]["pruned model"] == sum(p.nbytes for name, p in parameters if ".experts." not in name)


def test_batches_of_an_iterator_are_read_for_the_estimate_and_the_training(pruned, tmp_path):
    base, data = pruned
    out = shutil.copytree(base / "out", tmp_path / "out")
    result = recover_checkpoint(base / "model", out, iter(data.split(2)), Recovery(2))
    assert result.settings.distill and len(result.losses) == 2


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "vit", "half", "mixture"])
def test_a_pass_without_values_gives_the_memory(name, rank, tmp_path):
    """Of a folder that is not pruned yet, beside that of the pruned model in memory."""
    made = {"half": lambda: make_llama(2).half(), "mixture": lambda: make("mixtral").to(torch.bfloat16)}
    model, samples, length = made.get(name, lambda: make(name))(), 6, 16
    save_model(model, tmp_path / "in")
    checkpoint = open_checkpoint(tmp_path / "in")
    data = images(samples) if name == "vit" else tokens(samples, length)
    names = prunable_names(model)
    recovery = Recovery(1, rank=rank, batch_size=4)
    expected, unknown = recovery_bytes(checkpoint, names, recovery, samples=samples, tokens=length)
    assert unknown == ""
    if name == "half":  # is trained in fp32
        model.float()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    settings = {"dense": checkpoint.size, "include": names, "snapshot": name == "half", "in_files": weights}
    uses = distillation_bytes(halved(model), data, recovery, **settings)
    activations = [taken.pop("activations") for taken in (expected, uses)]
    assert expected == uses
    masks = 2 * 2 * 4 * length**2 * 4  # of each of two layers, where it is added; of four samples, in fp32
    assert 0 <= activations[0] - activations[1] <= masks
