"""Blocks copied to a device while they run: the results of the unmoved model, with two blocks there at most."""

import pytest
import torch
from architectures import make
from pruned_models import images, make_llama, save_model, tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from leanstep._checkpoint.mapped import touched
from leanstep._torch import device_of
from leanstep.pruning import Refinement, find_targets, prune, prune_checkpoint
from leanstep.pruning.folder import run
from leanstep.pruning.folder.files import open_checkpoint
from leanstep.pruning.folder.loading import load_model
from leanstep.pruning.measure.batches import Batch, as_batches
from leanstep.pruning.measure.blocks import BlockMover, candidate_blocks, whole_on_device

QUICK = {"sparsity": 0.5, "batch_size": 4}
MEASURED = {"levels": (0.4, 0.7), "curves": "measured"}
FISHER = {"levels": (0.4, 0.7), "curves": "fisher"}


@pytest.fixture
def moved(monkeypatch):
    """``prune_checkpoint`` moves blocks on the CPU, too; the list gets the blocks on the device after every copy."""
    resident = []
    loaded = BlockMover._loaded

    def counted(mover, block):
        slot = loaded(mover, block)
        resident.append(mover.resident)
        return slot

    monkeypatch.setattr(BlockMover, "_loaded", counted)
    monkeypatch.setattr(run, "moves_blocks", lambda device: True)
    return resident


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", MEASURED),
        ("mixtral", {"score": "sparsegpt", **FISHER}),
        ("t5", FISHER),
        ("vit", {"score": "mfac", **FISHER}),
        ("gpt2", {"allocation": "owl", "score": "sparsegpt"}),
        ("llama", {"allocation": "uniform", "score": "alps", "activations": "disk"}),
        ("llama", {"refine": Refinement(evaluations=3), **FISHER}),
        ("bert", {"allocation": "atp"}),
        ("opt", {"inputs": "dense", **MEASURED}),
        ("qwen3", {"correction": "relinearise", **MEASURED}),
        ("qwen3", {"correction": "relinearise", **FISHER}),
        ("vit", {"correction": "relinearise", **FISHER}),
    ],
)
def test_moved_blocks_give_the_bits_of_the_model_that_stays(name, settings, moved, tmp_path):
    save_model(make(name), tmp_path / "in", max_shard_size="20KB")
    data = images(16) if name == "vit" else tokens(16, 16)
    settings = QUICK | settings
    in_place = {key: value for key, value in settings.items() if key != "activations"}
    model = load_model(open_checkpoint(tmp_path / "in"))
    for parameter in model.parameters():
        # the sums of some products depend on where in a file a weight begins
        parameter.data = parameter.data.clone()
    expected = prune(model, data, **in_place)
    result = prune_checkpoint(tmp_path / "in", tmp_path / "out", data, **settings)
    assert result.allocation == expected.allocation and result.curves == expected.curves
    assert result.compared == expected.compared
    again = load_model(open_checkpoint(tmp_path / "out"))
    for (key, weight), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(weight, other), key
    assert max(map(len, moved)) == 2
    assert not [note for note in result.notes if "held the whole model" in note]


def test_held_out_data_without_other_data_is_measured_by_moved_blocks(moved, tmp_path):
    save_model(make("llama"), tmp_path / "in")
    settings = {"sparsity": 0.5, "allocation": "erk", "score": "magnitude"}
    costs = [
        prune_checkpoint(tmp_path / "in", tmp_path / f"out{number}", data, held_out=held_out, **settings).held_out
        for number, (data, held_out) in enumerate([(None, iter(tokens(8).split(4))), (tokens(4), tokens(8).split(4))])
    ]
    assert costs[0] == costs[1] and costs[0].joint > 0 and moved


class HostReads(TorchDispatchMode):
    """Names the operations that read a parameter where it lies on the host, which a device could not do."""

    def __init__(self, model):
        super().__init__()
        self.addresses = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.reads = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        copies = func.overloadpacket.__name__ in ("copy_", "empty_like", "detach", "_to_copy")
        if not copies and any(tensor.untyped_storage().data_ptr() in self.addresses for tensor in tensors):
            self.reads.append(func.overloadpacket.__name__)
        return output


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5", "vit"])
def test_no_operation_of_a_pass_reads_a_weight_on_the_host(name):
    model, data = make(name), images(2) if name == "vit" else tokens(2, 16)
    [batch] = as_batches(data, model)
    inside = {id(p) for _, block in candidate_blocks(model) for p in block.parameters()}
    reads = HostReads(model)
    # on a device these have copies of their own
    reads.addresses -= {p.untyped_storage().data_ptr() for p in model.parameters() if id(p) not in inside}
    with torch.no_grad(), reads:
        batch.run(model)
    assert reads.reads
    reads.reads.clear()
    with BlockMover(model, "cpu"), torch.no_grad(), reads:
        batch.run(model)
    assert not reads.reads


def test_the_next_block_is_copied_while_one_runs_and_none_twice_for_a_block_alone():
    model = make_llama(4)
    [batch] = as_batches(tokens(2, 16), model)
    blocks = [block for _, block in candidate_blocks(model)]
    with BlockMover(model, "cpu") as mover, torch.no_grad():
        for _ in range(2):  # the order of the blocks is learnt from a pass and the begin of the next
            batch.run(model)
        ahead = []
        handles = [
            block.register_forward_pre_hook(lambda module, _: ahead.append(module in mover.resident))
            for block in blocks
        ]
        batch.run(model)
        assert ahead == [True] * len(blocks)
        for handle in handles:
            handle.remove()
        copies = []
        for slot in mover._slots:
            slot.fill = lambda block, fill=slot.fill: (copies.append(block), fill(block))
        layer, hidden = model.model.layers[1], torch.randn(1, 4, 16)
        embedding = model.model.rotary_emb(hidden, torch.arange(4)[None])
        for _ in range(5):
            layer(hidden, position_embeddings=embedding)
        assert len(copies) <= 2


def test_gradients_by_activations_copy_the_weights_again_and_are_those_of_the_model():
    model = make_llama(4).requires_grad_(False)
    embedding = model.get_input_embeddings()(tokens(2, 16)).requires_grad_()
    gradients = []
    for moves in (False, True):
        with BlockMover(model, "cpu") if moves else torch.enable_grad() as mover:
            loss = model(inputs_embeds=embedding).logits.square().mean()
            gradients += torch.autograd.grad(loss, [embedding])
            assert not moves or len(mover.resident) == 2
    assert torch.equal(*gradients) and bool(gradients[0].any())


def test_what_is_written_to_a_weight_is_in_the_next_pass():
    model = make_llama(2)
    [batch] = as_batches(tokens(2, 16), model)
    weight = model.model.layers[1].mlp.up_proj.weight
    with BlockMover(model, "cpu"), torch.no_grad():
        before = batch.run(model).logits
        touched(weight).zero_()
        after = batch.run(model).logits
        assert not torch.equal(before, after)
    with torch.no_grad():
        assert torch.equal(batch.run(model).logits, after)


def test_gradients_by_weights_need_the_whole_model_and_get_it():
    model = make_llama(2)
    [batch] = as_batches(tokens(2, 16), model)
    expected = torch.autograd.grad(batch.run(model).logits.square().mean(), list(model.parameters()))
    hosts = [parameter.data_ptr() for parameter in model.parameters()]
    with BlockMover(model, "cpu"):
        with whole_on_device(model):
            gradients = torch.autograd.grad(batch.run(model).logits.square().mean(), list(model.parameters()))
        assert [parameter.data_ptr() for parameter in model.parameters()] == hosts
    assert all(map(torch.equal, gradients, expected))


class Shared(nn.Module):
    """Its second block reads a weight of the first, which a device lacks at that moment."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), _Reader()
        object.__setattr__(self.second, "other", self.first)
        self.host = self.first.weight.data_ptr()

    def forward(self, x):
        return self.second(self.first(x), self.host)


class _Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, host):
        if self.other.weight.data_ptr() == host:
            raise RuntimeError("Expected all tensors to be on the same device")
        return self.linear(x) @ self.other.weight.T


def test_a_model_whose_blocks_do_not_run_alone_is_held_whole_and_that_is_said():
    model = Shared()
    with BlockMover(model, "cpu") as mover:
        note = mover.try_on(Batch((torch.randn(2, 4),)))
        assert note == (
            "the device cpu held the whole model, whose blocks do not run alone: Expected all tensors to be on the "
            "same device"
        )
        assert model(torch.randn(2, 4)).shape == (2, 4) and mover.resident == []


class Table(nn.Module):
    """Gives a part of its weight, not a copy."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4))

    def forward(self, x):
        return self.weight[: len(x)]


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList([Table(), Table(), Table()])

    def forward(self, x):
        return torch.stack([table(x) for table in self.tables])


def test_an_output_that_is_a_part_of_a_weight_is_not_overwritten_by_the_next_block():
    model, x = Tables(), torch.zeros(3)
    with torch.no_grad():
        expected = model(x)
        with BlockMover(model, "cpu"):
            assert torch.equal(model(x), expected) and torch.equal(model(x), expected)


class Outer(nn.Module):
    """A block that calls another one in the middle of its own work."""

    def __init__(self, inner):
        super().__init__()
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)
        object.__setattr__(self, "inner", inner)

    def forward(self, x):
        return self.after(self.inner(self.before(x)))


class Nested(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        for _ in range(depth):
            self.blocks.append(Outer(self.blocks[-1]))

    def forward(self, x):
        return self.blocks[-1](self.blocks[0](x))


def test_a_block_that_another_one_calls_leaves_its_weights_where_they_are():
    x = torch.randn(3, 4)
    for depth, note in ((1, ""), (2, "3 blocks of Nested run inside each other")):
        model = Nested(depth)
        with torch.no_grad():
            expected = model(x)
            with BlockMover(model, "cpu") as mover:
                assert mover.try_on(Batch((x,))).endswith(note)
                assert torch.equal(model(x), expected) and torch.equal(model(x), expected)


def test_after_an_error_the_model_is_what_it_was():
    model = make_llama(2)
    hosts = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    [batch] = as_batches(tokens(2, 16), model)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), BlockMover(model, "cpu") as mover:
        assert device_of(model) == mover.device
        batch.run(model)
    handle.remove()
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == hosts
    assert not [module for module in model.modules() if "forward" in module.__dict__]
    batch.run(model)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [MEASURED, FISHER, {"score": "sparsegpt", "allocation": "uniform"}])
def test_a_gpu_gives_the_results_of_the_cpu_to_rounding_and_never_holds_the_model(settings, tmp_path):
    save_model(make_llama(12, hidden_size=512, intermediate_size=2048), tmp_path / "in")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    assert_equal_to_rounding(tmp_path, "cuda", settings)
    # Fisher curves collect the rows of all matrices that fit into half of the free memory
    if settings.get("curves") != "fisher":
        assert torch.cuda.max_memory_allocated() < 0.6 * open_checkpoint(tmp_path / "in").size


@pytest.mark.parametrize("device", ["cpu:0", pytest.param("cuda:0", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "settings",
    [
        {**MEASURED, "curves": "anchored", "minutes": 5.0, "activations": "disk"},
        {**FISHER, "refine": Refinement(evaluations=5)},
        {"score": "alps", "allocation": "uniform", "activations": "disk"},
        {"pattern": "2:4"},
    ],
)
def test_a_device_gives_the_masks_of_the_cpu_to_rounding(settings, device, tmp_path, monkeypatch):
    # so that blocks move on the CPU, too, unless it has no number
    monkeypatch.setattr(run, "moves_blocks", lambda device: device.index == 0)
    save_model(make_llama(3, hidden_size=64, intermediate_size=128), tmp_path / "in")
    assert_equal_to_rounding(tmp_path, device, settings)


def assert_equal_to_rounding(folder, device, settings):
    """Prune ``folder / "in"`` on the CPU and on a device; compare curves, counts, masks and distortion."""
    expected, result = (
        prune_checkpoint(folder / "in", folder / name, tokens(8, 16), device=where, **QUICK, **settings)
        for name, where in (("host", "cpu"), ("device", device))
    )
    assert set(result.curves) == set(expected.curves)
    for name, curve in expected.curves.items():
        assert result.curves[name].distortion == pytest.approx(curve.distortion, rel=1e-2, abs=1e-6)
    counts, other = (run.allocation.counts for run in (expected, result))
    assert sum(abs(counts[name] - other[name]) for name in counts) <= 0.02 * sum(counts.values())
    assert result.compared[0].joint == pytest.approx(expected.compared[0].joint, rel=0.05)
    masks, others = (masks_of(folder / name) for name in ("host", "device"))
    # a matrix at another level, or weights whose scores are equal to rounding
    differ = sum(int((mask != others[name]).sum()) for name, mask in masks.items())
    assert differ <= 0.02 * sum(mask.numel() for mask in masks.values())


def masks_of(folder):
    """Nonzero weights of the matrices of a pruned folder."""
    return {target.name: target.weight != 0 for target in find_targets(load_model(open_checkpoint(folder)))}
