"""Pruned and dense inputs: the statistics of a block are those of the model that the setting names, for every score."""

import json

import pytest
import torch
from pruned_models import make_gpt2, make_llama, tokens
from torch import nn

from leanstep.pruning import find_targets, measure_curves, prune
from leanstep.pruning.folder.report import report_page
from leanstep.pruning.measure.activation_cache import ActivationCache
from leanstep.pruning.measure.batches import as_batches
from leanstep.pruning.score import calibration
from leanstep.pruning.score.calibration import statistics_for
from leanstep.pruning.score.targets import make_groups

SCORES = ("wanda", "sparsegpt", "alps", "mfac")
SMALL = (0.1, 0.2)


def statistics_of_prune(monkeypatch, model, data, **settings):
    """Prune uniformly; returns the statistics of every matrix when it was pruned."""
    collected = {}
    pruner = calibration.Pruning.pruner

    def recording(self, target, statistics):
        collected[target.name] = statistics
        return pruner(self, target, statistics)

    with monkeypatch.context() as patched:
        patched.setattr(calibration.Pruning, "pruner", recording)
        result = prune(model, data, sparsity=0.6, allocation="uniform", held_out=False, **settings)
    return collected, result


def with_first_block_of(pruned, dense):
    """The dense model with the matrices of its first block pruned."""
    weights = {target.name: target.weight for target in find_targets(pruned)}
    for target in find_targets(dense):
        if target.layer.block == 0:
            target.weight.copy_(weights[target.name])
    return dense


def inputs_by_hand(model, data):
    """float64 inputs [rows, in] of the second block's layers."""
    inputs = {}
    handles = [
        target.module.register_forward_pre_hook(
            lambda _, args, name=target.name: inputs.update({name: args[0].flatten(0, -2).double()})
        )
        for target in find_targets(model)
        if target.layer.block == 1
    ]
    with torch.no_grad():
        model(data)
    for handle in handles:
        handle.remove()
    return inputs


def gradients_by_hand(model, data):
    """A gradient of the mean cross-entropy per sample, of the second block's matrices."""
    rows = {}
    for sample in data:
        model.zero_grad()
        model(sample[None], labels=sample[None]).loss.backward()
        for target in find_targets(model):
            if target.layer.block == 1:
                gradient = target.module.weight.grad.reshape(-1).float()
                rows.setdefault(target.name, []).append(gradient)
    return {name: torch.stack(each) for name, each in rows.items()}


def difference(statistics, model, data, score):
    """Largest relative error of the second block's statistics against those computed by hand from a model."""
    if score == "mfac":
        pairs = [(statistics[name].gradients, rows) for name, rows in gradients_by_hand(model, data).items()]
    else:
        inputs = inputs_by_hand(model, data)
        field = "square_sum" if score == "wanda" else "gram"
        grams = {name: rows.T @ rows for name, rows in inputs.items()}
        expected = {name: gram.diagonal() if score == "wanda" else gram for name, gram in grams.items()}
        pairs = [(getattr(statistics[name], field), value) for name, value in expected.items()]
    assert len(pairs) == 7
    return max(float((got.double() - value).norm() / value.double().norm()) for got, value in pairs)


@pytest.mark.parametrize("score", SCORES)
def test_statistics_are_those_of_the_named_inputs(score, monkeypatch):
    data = tokens(6)
    models = {inputs: make_llama(2).double() for inputs in ("pruned", "dense")}
    statistics = {
        inputs: statistics_of_prune(monkeypatch, model, data, score=score, inputs=inputs)[0]
        for inputs, model in models.items()
    }
    half_pruned = with_first_block_of(models["pruned"], make_llama(2).double())
    # squares and products are rounded to fp32
    assert difference(statistics["pruned"], half_pruned, data, score) < 1e-6
    assert difference(statistics["dense"], make_llama(2).double(), data, score) < 1e-6
    assert difference(statistics["dense"], half_pruned, data, score) > 1e-2
    dense = {target.name: target.weight for target in find_targets(models["dense"])}
    changed = [t.layer.block for t in find_targets(models["pruned"]) if not torch.equal(t.weight, dense[t.name])]
    assert set(changed) == {1}


def test_a_model_whose_activations_are_not_cached_is_pruned_block_by_block_too(monkeypatch):
    data, weights = tokens(6), []
    for cached in (True, False):
        model = make_gpt2()
        with monkeypatch.context() as patched:
            if not cached:
                patched.setattr(ActivationCache, "_find_starts", lambda self, _: self.disable("not cached"))
            result = prune(model, data, sparsity=0.6, allocation="uniform", score="sparsegpt", held_out=False)
        assert ("activations are not cached: not cached" in result.notes) != cached
        weights.append({target.name: target.weight.clone() for target in find_targets(model)})
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_blocks_that_start_together_are_taken_one_after_the_other():
    model = make_llama(2)
    cache = ActivationCache(model, as_batches(tokens(2), model))
    groups = make_groups(find_targets(model))
    separate = [[group.name for group in block] for _, block in cache.by_block(groups)]
    cache.disable("")
    assert [start for start, _ in cache.by_start(groups)] == [0]
    assert [[group.name for group in block] for _, block in cache.by_block(groups)] == separate
    assert len(separate) == 2


def test_curves_serve_both_inputs_and_the_result_names_them(tmp_path):
    data = tokens(8)
    file = tmp_path / "curves.jsonl"
    measured = []
    for inputs in ("pruned", "dense"):
        result = prune(
            make_llama(2),
            data,
            sparsity=0.6,
            levels=(0.4, 0.6, 0.8),
            inputs=inputs,
            resume=file,
            progress=lambda done, total, name: measured.append(name) if "model.layers" in name else None,
        )
        content = json.loads(json.dumps(result.to_dict()))
        assert content["inputs"] == result.inputs == inputs
        assert f"inputs {inputs}" in report_page(content)
        if inputs == "pruned":
            points = len(measured)
    assert points == 42 and len(measured) == points
    curves = measure_curves(make_llama(2), data[:7], sparsity=0.6, levels=(0.4, 0.6, 0.8))
    assert {name: curve.distortion for name, curve in curves.items()} == {
        name: curve.distortion for name, curve in result.curves.items()
    }


def test_an_unknown_kind_of_inputs_is_refused():
    with pytest.raises(ValueError, match="inputs must be one of pruned, dense, got 'sparse'"):
        prune(make_llama(2), tokens(8), sparsity=0.6, inputs="sparse")


class _Flattening(nn.Module):
    """Its first layer reads flattened tokens, the second gets its input by name."""

    def __init__(self):
        super().__init__()
        self.embed, self.flat, self.named = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask):
        h = self.flat(self.embed(input_ids).flatten(0, 1))
        return self.named(input=h.view(*input_ids.shape, 8))


def test_padding_is_left_out_of_flattened_tokens_and_inputs_may_have_names():
    model = _Flattening()
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:] = 0
    data = [{"input_ids": torch.randint(0, 12, (2, 6)), "attention_mask": mask}]
    with torch.no_grad():
        statistics = statistics_for(
            ActivationCache(model, as_batches(data, model)), find_targets(model), ("square_sum",)
        )
    assert [one.count for one in statistics.values()] == [10, 10]
    assert measure_curves(model, data, levels=SMALL, score="magnitude", metric="kl", method="fisher")


class _Attention(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.embed, self.fc, self.lm_head = nn.Embedding(12, 16), nn.Linear(16, 16), nn.Linear(16, 12)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **settings)

    def forward(self, x):
        h = self.embed(x)
        memory = h[..., : self.attention.kdim]
        return self.lm_head(self.fc(h + self.attention(h, memory, memory)[0]))


@pytest.mark.parametrize("settings", [{}, {"kdim": 8, "vdim": 8}])
def test_the_matrices_of_multi_head_attention_are_left_out_where_inputs_are_needed(settings):
    model, data = _Attention(**settings), torch.randint(0, 12, (8, 6))
    result = prune(model, data, sparsity=0.5, score="wanda", allocation="uniform", held_out=False)
    assert [row["name"] for row in result.layers()] == ["fc.weight"]
    assert any("belongs to a MultiheadAttention, which multiplies several inputs" in note for note in result.notes)
    with pytest.raises(ValueError, match="MultiheadAttention, which multiplies several inputs; score it by magnitude"):
        measure_curves(model, data, levels=SMALL, score="magnitude", metric="kl", method="fisher")
