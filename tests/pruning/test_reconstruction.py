"""Local reconstruction: each pruned block is trained to the dense block's outputs, and its zeros stay."""

import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from pruned_models import make_gpt2, make_llama, make_mixtral, save_model, tokens
from texts import sentences
from torch import nn

from leanstep.cli import main
from leanstep.optimizers import SinkGD
from leanstep.pruning import find_targets, prune, prune_checkpoint
from leanstep.pruning.measure.blocks import BlockMover
from leanstep.pruning.measure.curve_file import weights_hash
from leanstep.pruning.training import reconstruction
from leanstep.pruning.training.reconstruction import Example, keep_zeros, reconstruct_block

SETTINGS = {"sparsity": 0.6, "allocation": "uniform", "reconstruct": 30, "reconstruct_lr": 2e-3, "batch_size": 2}


def reconstructed(model, data=None, **settings):
    return prune(model, tokens(40) if data is None else data, **SETTINGS | settings)


def zeros_of(model):
    return {target.name: target.weight == 0 for target in find_targets(model)}


@pytest.fixture(scope="module")
def pruned():
    """A model that is pruned, and the same one that is reconstructed besides, with the result."""
    plain, model = make_llama(), make_llama()
    prune(plain, tokens(40), **SETTINGS | {"reconstruct": None, "reconstruct_lr": None})
    return SimpleNamespace(plain=plain, model=model, result=reconstructed(model))


def test_the_error_of_each_block_falls_and_with_it_the_model_s(pruned):
    blocks, held_out = pruned.result.reconstruction["blocks"], pruned.result.reconstruction["held_out"]
    assert [block["name"] for block in blocks] == [f"model.layers.{number}" for number in range(3)]
    assert all(block["applied"] and block["after"] < 0.95 * block["before"] for block in blocks)
    assert held_out["mean"] < pruned.result.held_out.joint
    assert pruned.result.to_dict()["reconstruction"]["steps"] == 30


def test_zeros_stay_and_only_pruned_matrices_change(pruned):
    # a first block has the same inputs, so that the same weights are pruned
    first = {name: zeros for name, zeros in zeros_of(pruned.plain).items() if ".0." in name}
    assert len(first) == 7 and all(torch.equal(zeros_of(pruned.model)[name], zeros) for name, zeros in first.items())
    assert pruned.result.sparsity == pytest.approx(0.6, abs=1e-3)
    assert pruned.result.budget["after"] == sum(row["nonzero"] for row in pruned.result.layers())
    names, dense = set(zeros_of(pruned.model)), dict(make_llama().named_parameters())
    trained = {name for name, one in pruned.model.named_parameters() if not torch.equal(one, dense[name])}
    assert trained == names and all(parameter.grad is None for parameter in pruned.model.parameters())


def test_the_same_data_gives_the_same_bits_also_with_activations_in_files(pruned, tmp_path):
    again, in_files, moved = make_llama(), make_llama(), make_llama()
    reconstructed(again)
    reconstructed(in_files, scratch=tmp_path)
    with BlockMover(moved, "cpu"):  # as on a GPU: the weights of two blocks are in its memory
        reconstructed(moved)
    assert weights_hash(again) == weights_hash(in_files) == weights_hash(moved) == weights_hash(pruned.model)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (make_llama, {"pattern": "2:4", "sparsity": None}),
        (make_gpt2, {"score": "magnitude"}),
        (make_llama, {"score": "sparsegpt", "pattern": "N:8", "allocation": "dp", "curves": "fisher"}),
        (make_mixtral, {}),
    ],
)
def test_every_score_pattern_and_architecture(make, settings):
    result = reconstructed(model := make(), **settings)
    assert any(block["applied"] for block in result.reconstruction["blocks"])
    for row, target in zip(result.layers(), find_targets(model), strict=True):
        if row["pattern"]:
            n, m = map(int, row["pattern"].split(":"))
            assert int((target.weight.unflatten(1, (-1, m)) != 0).sum(-1).max()) <= n


@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32])
def test_16_bit_weights_are_trained_in_fp32_and_keep_their_dtype(pruned, products, monkeypatch):
    monkeypatch.setattr(reconstruction, "product_dtype", lambda *_, **settings: products)
    result = reconstructed(model := make_llama().bfloat16())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    blocks, wide = ([block["after"] for block in one.reconstruction["blocks"]] for one in (result, pruned.result))
    assert blocks == pytest.approx(wide, rel=0.05)


def test_one_block_is_trained_at_a_time(monkeypatch):
    """Of all optimizers one lives at a time, with the matrices of one block and not those of the model."""
    living, most = weakref.WeakSet(), [0]

    class Noted(SinkGD):
        def __init__(self, params, **settings):
            super().__init__(params, **settings)
            gc.collect()
            living.add(self)
            groups = (group for one in living for group in one.param_groups)
            most[0] = max(most[0], sum(p.numel() for group in groups for p in group["params"]))

    monkeypatch.setattr(reconstruction, "SinkGD", Noted)
    result = reconstructed(make_llama(), reconstruct=2)
    assert most[0] == sum(row["numel"] for row in result.layers() if row["block"] == 0)


def block_and_examples(count=8, change=1.0):
    torch.manual_seed(0)
    block, dense = (nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(2))
    dense.load_state_dict(block.state_dict())
    inputs = torch.randn(count, 1, 9, 6)
    with torch.no_grad():
        block[0].weight[:, ::2] = 0
        examples = [Example((one,), {}, dense(one) if change else block(one)) for one in inputs]
    return block, examples, {"0.weight": keep_zeros(block[0].weight)}


def test_a_block_alone_learns_within_its_constraints():
    block, examples, constraints = block_and_examples()
    before = {name: one.clone() for name, one in block.state_dict().items()}
    errors = reconstruct_block(block, examples, constraints, steps=60, lr=1e-2)
    assert errors.applied and errors.after < 0.95 * errors.before
    assert torch.equal(block[0].weight == 0, before["0.weight"] == 0)
    changed = [name for name, one in block.state_dict().items() if not torch.equal(one, before[name])]
    assert changed == ["0.weight"]


def test_the_weights_that_are_best_on_held_back_examples_are_taken():
    """Not the last ones: training goes past what the held-back examples ask for, also without a constraint."""
    torch.manual_seed(0)
    block, inputs = nn.Linear(6, 6, bias=False), torch.randn(8, 1, 9, 6)
    start = block.weight.detach().clone()
    examples = [Example((one,), {}, one @ start.T * (0.9 if number == 7 else 0.1)) for number, one in enumerate(inputs)]
    errors = reconstruct_block(block, examples, {"weight": lambda weight: weight}, steps=80, lr=1.5e-3)
    with torch.no_grad():
        final = float(reconstruction.relative_error(block(inputs[7]), examples[7]))
    assert errors.applied and final == pytest.approx(errors.after) and errors.after < errors.before


@pytest.mark.parametrize("case", ["nothing to learn", "overflow", "masked"])
def test_a_block_stays_bit_for_bit_where_training_does_not_help(case):
    block, examples, constraints = block_and_examples(change=case != "nothing to learn")
    if case == "overflow":
        examples[:7] = [one._replace(target=one.target * float("inf")) for one in examples[:7]]
    if case == "masked":  # tokens that do not count, with other targets in what is trained on alone
        mask = torch.arange(9)[None] < 4
        noise = [one.target.where(mask[..., None], torch.full_like(one.target, 1e9)) for one in examples]
        examples = [
            one._replace(target=block(*one.args).detach().where(mask[..., None], more), mask=mask)
            for one, more in zip(examples, noise, strict=True)
        ]
    before = weights_hash(block)
    errors = reconstruct_block(block, examples, constraints, steps=8, lr=1e-2)
    assert not errors.applied and weights_hash(block) == before
    assert (errors.after != errors.after) == (case == "overflow")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reconstruct": 0}, "1 step or more"),
        ({"reconstruct": 2.5}, "1 step or more"),
        ({"reconstruct_lr": 0.0}, "a positive rate"),
        ({"reconstruct": None, "reconstruct_lr": 1e-3}, "goes with a number of steps"),
        ({"inputs": "dense"}, "leave one of them out"),
        ({"batch_size": 64}, "expected two batches or more, got one"),
        ({"processes": SimpleNamespace(size=2)}, "in one process"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(settings, message):
    model = make_llama()
    before = weights_hash(model)
    with pytest.raises(ValueError, match=message):
        reconstructed(model, progress=lambda *_: pytest.fail("began"), **settings)
    assert weights_hash(model) == before


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="no block of Linear can be run alone"):
        reconstructed(nn.Linear(8, 8), torch.randn(40, 8))


def test_a_matrix_of_two_blocks_is_left_and_the_blocks_around_it_are_trained():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(5)))
    blocks = nn.Sequential(*(_Block(layers) for layers in model))
    blocks[2].layers[0].weight = blocks[1].layers[0].weight
    result = reconstructed(blocks, torch.randn(80, 12), batch_size=4)
    assert [block["name"] for block in result.reconstruction["blocks"]] == ["0", "3", "4"]
    assert any(note.startswith("not reconstructed") and "1.layers.0.weight" in note for note in result.notes)


class _Block(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, inputs):
        return self.layers(inputs)


def test_an_interrupted_run_resumes_without_measuring_again(tmp_path):
    """Blocks begin again, curves do not; the weights are those of a run that was not interrupted."""
    save_model(make_llama(2), tmp_path / "in")
    settings = SETTINGS | {"allocation": "dp", "curves": "measured", "levels": (0.4, 0.6, 0.8)}
    sets = {"held_out": tokens(4, seed=1), "curve_data": tokens(4)}
    points = []

    def interrupt(done, total, name):
        points.append(name)
        if name == "reconstruction" and done > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(tmp_path / "in", tmp_path / "out", tokens(40), progress=interrupt, **sets, **settings)
    assert not (tmp_path / "out").exists() and any("_proj" in name for name in points)
    again = []
    prune_checkpoint(
        tmp_path / "in", tmp_path / "out", tokens(40), resume=True,
        progress=lambda done, total, name: again.append((name, done)), **sets, **settings,
    )  # fmt: skip
    assert ("reconstruction", 60) in again and not any("_proj" in name for name, done in again if done > 0)
    whole = prune_checkpoint(tmp_path / "in", tmp_path / "whole", tokens(40), **sets, **settings)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1] and whole.reconstruction["blocks"]


def test_the_command_reports_it(tmp_path, capsys):
    save_model(make_llama(2), tmp_path / "in")
    (tmp_path / "text.txt").write_text(sentences(60))
    command = ["prune", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--data", str(tmp_path / "text.txt")]
    command += ["--samples", "8", "--held-out", "2", "--seq-len", "24", "--sparsity", "0.6", "--allocation", "uniform"]
    command += ["--batch-size", "2", "--reconstruct", "20", "--reconstruct-lr", "1e-3"]
    assert main([*command, "--dry-run", "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)
    assert estimate["seconds"]["reconstruction of blocks"] > 0 and estimate["memory"]["training of a block"] > 0
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "reconstructed  2 of 2 blocks, 20 steps each" in printed.out and "reconstruction of blocks" in printed.err
    content = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    assert content["settings"]["reconstruct"] == 20 and len(content["reconstruction"]["blocks"]) == 2
    assert "<h2>Reconstruction</h2>" in (tmp_path / "out" / "report.html").read_text()
    assert main([*command[:-2], "--inputs", "dense"]) == 2
    assert "leave one of them out" in capsys.readouterr().err


def test_zeros_of_weights_on_another_device_are_kept_where_training_is():
    assert keep_zeros(torch.eye(2))(torch.empty(2, 2, device="meta")).device.type == "meta"
