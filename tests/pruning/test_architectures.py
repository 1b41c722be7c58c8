"""Architectures of transformers: each is pruned from a folder to a folder, and what is left out is said."""

import json
import re

import pytest
import torch
from architectures import CAUSAL, ENCODER_DECODER, IMAGE, MASKED, WITHOUT_HEAD, make
from pruned_models import images, make_llama, make_mixtral, save_model, tokens
from texts import sentences
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from leanstep.cli import main
from leanstep.pruning import (
    CalibrationText,
    LatencyTable,
    Refinement,
    find_targets,
    layer_pruner,
    measure_curves,
    prune,
    prune_checkpoint,
)
from leanstep.pruning.allocate.closed_form import outlier_ratio
from leanstep.pruning.measure.activation_cache import ActivationCache, take_note
from leanstep.pruning.measure.batches import as_batches, evaluating
from leanstep.pruning.measure.curve_file import weights_hash
from leanstep.pruning.score.base import LayerStatistics
from leanstep.pruning.score.calibration import Pruning, statistics_for
from leanstep.pruning.score.targets import make_groups

QUICK = {"sparsity": 0.5, "levels": (0.4, 0.7), "batch_size": 4}
SMALL = ["--samples", "4", "--curve-samples", "2", "--held-out", "2", "--seq-len", "16", "--levels", "0.4,0.7"]
LEFT_OUT = {
    "mamba": r"conv1d.weight, .*dt_proj.weight.* was never run",
    "falcon_mamba": r"conv1d.weight, .*dt_proj.weight.* was never run",
    "mamba2": r"conv1d.weight.* was never run",
    "jamba": r"conv1d.weight, .*dt_proj.weight.* was never run",
    "lfm2": r"conv.conv.weight.* was never run",
    "qwen3_next": r"conv1d.weight.* was never run",
    "convnext": r"dwconv.weight.* has groups",
}
EXPERTS = {
    "olmoe", "granitemoe", "phimoe", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "llama4", "deepseek_v3", "jamba",
    "qwen3_next", "switch",
}  # fmt: skip


def data_for(name):
    if name == "whisper":
        sounds = torch.randn(6, 8, 32, generator=torch.Generator().manual_seed(0))
        given = zip(sounds.split(2), tokens(6, 16).split(2), strict=True)
        return [{"input_features": sound, "decoder_input_ids": text} for sound, text in given]
    if name in IMAGE or name.startswith("vit"):
        return images(8)
    return CalibrationText((sentences(12),), samples=4, curve_samples=2, held_out=2, seq_len=16)


@pytest.mark.parametrize("name", [*CAUSAL, *MASKED, *ENCODER_DECODER, *IMAGE, *WITHOUT_HEAD])
def test_every_architecture_is_pruned_and_opens_again(name, tmp_path):
    model = make(name)
    save_model(model, tmp_path / "in")
    # the classes of the untrained ResNet are certain, so that their KL divergence is 0 in fp32
    metric = "mse_logits" if name == "resnet" else None
    result = prune_checkpoint(tmp_path / "in", tmp_path / "out", data_for(name), metric=metric, **QUICK)
    names = {target.parameter for group in result.groups for target in group.targets}
    assert result.sparsity == pytest.approx(0.5, abs=0.01) and result.held_out.joint > 0
    again = type(model).from_pretrained(tmp_path / "out")
    state = dict(again.named_parameters())
    changed = {key for key, weight in model.named_parameters() if not torch.equal(weight, state[key])}
    assert changed <= names and len(changed) > 0.5 * len(names)
    assert not any(re.search(r"router|A_log|position|table|embed|pooler|\.gate\.", key) for key in names)
    notes = json.loads((tmp_path / "out" / "sparsity.json").read_text())["notes"]
    left_out = [note for note in notes if note.startswith("left out")]
    assert len(left_out) == (name in LEFT_OUT)
    if name in LEFT_OUT:
        assert re.search(LEFT_OUT[name], left_out[0])
    assert any("pruned by magnitude" in note for note in notes) == (name in EXPERTS)


def test_weights_in_no_layer_are_told_before_and_after(tmp_path, capsys):
    """XLNet multiplies the matrices of its attention by einsum: none of them is pruned."""
    from transformers import XLNetConfig, XLNetLMHeadModel

    config = XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=64)
    save_model(XLNetLMHeadModel(config), tmp_path / "xlnet")
    command = ["prune", str(tmp_path / "xlnet"), "--sparsity", "0.5", "--allocation", "uniform", "--score", "magnitude"]
    sentence = "56% of the weights beside embeddings and head stay dense, in 13 parameters that are no linear layer"
    for more in (["--dry-run"], []):
        assert main([*command, "--out", str(tmp_path / "out"), *more]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if sentence in line]
        assert "transformer.layer.0.rel_attn.q, " in line
    save_model(make("bert_base"), tmp_path / "bert")
    command[1] = str(tmp_path / "bert")
    assert main([*command, "--out", str(tmp_path / "out 2"), "--dry-run"]) == 0
    assert "stay dense, in" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["llama4", "gpt_oss", "mamba", "t5", "convnext", "bert_base", "switch"])
def test_fisher_curves_of_other_architectures(name, tmp_path):
    save_model(make(name), tmp_path / "in")
    result = prune_checkpoint(tmp_path / "in", tmp_path / "out", data_for(name), curves="fisher", **QUICK)
    assert {curve.source for curve in result.curves.values()} == {"fisher"}
    # an expert without tokens has a curve of zeros
    assert sum(curve.distortion[-1] > 0 for curve in result.curves.values()) > 0.5 * len(result.curves)


def test_the_command_gives_the_decoder_its_inputs(tmp_path, capsys):
    save_model(make("t5"), tmp_path / "t5")
    (tmp_path / "text.txt").write_text(sentences(12))
    arguments = ["prune", str(tmp_path / "t5"), "--data", str(tmp_path / "text.txt"), *SMALL, "--sparsity", "0.5"]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--eval"]) == 0
    assert re.search(r"perplexity +\d.*\(14 targets\)", capsys.readouterr().out)


def test_the_encoder_reads_the_first_half_and_the_decoder_the_second():
    model, samples = make("bart"), tokens(3, 8)
    (batch,) = as_batches(samples, model)
    assert torch.equal(batch.kwargs["input_ids"], samples[:, :4])
    assert batch.kwargs["decoder_input_ids"].tolist() == [[2, *row[4:7]] for row in samples.tolist()]
    assert torch.equal(batch.labels, batch.kwargs["decoder_input_ids"])
    labels = samples.clone()
    labels[0, 5:] = -100
    (batch,) = as_batches([{"input_ids": samples, "labels": labels}], model)
    with torch.no_grad():
        expected = model(input_ids=samples, labels=labels).logits
        assert torch.equal(batch.run(model).logits, expected)
    assert batch.mask.tolist() == (labels != -100).tolist()
    with pytest.raises(ValueError, match="has a decoder: expected decoder_input_ids or labels .* got input_ids"):
        as_batches([{"input_ids": samples}], model)


REFUSALS = {
    "text for sounds": (
        "whisper",
        tokens(6),
        "WhisperForConditionalGeneration takes input_features, got token numbers",
    ),
    "sounds alone": ("whisper", torch.randn(6, 8, 32), "mappings with input_features and decoder_input_ids"),
    "images for a pair": ("clip_pair", images(6), "CLIPModel takes token numbers, got torch.float32"),
    "text for a pair": (
        "clip_pair",
        tokens(6),
        r"could not be measured .*\(input_ids\): .* of: input_ids, pixel_values",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_data_that_a_model_cannot_take_is_refused_with_the_reason(case):
    name, data, message = REFUSALS[case]
    model = make(name)
    before = weights_hash(model)
    with pytest.raises(ValueError, match=message):
        prune(model, data, sparsity=0.5)
    assert weights_hash(model) == before


def test_the_command_refuses_what_it_cannot_measure_in_one_line(tmp_path, capsys):
    save_model(make("clip_pair"), tmp_path / "clip")
    (tmp_path / "text.txt").write_text(sentences(12))
    arguments = ["prune", str(tmp_path / "clip"), "--data", str(tmp_path / "text.txt"), *SMALL, "--sparsity", "0.5"]
    for more, expected in (
        ([], "CLIPModel could not be measured on the data"),
        (["--eval"], "perplexity needs a model that predicts the next token, which CLIPModel does not"),
    ):
        assert main([*arguments, "--out", str(tmp_path / "out"), *more]) == 2
        (error,) = capsys.readouterr().err.splitlines()[-1:]
        assert error.startswith(f"error: {expected}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["bert", "vit_base"])
def test_perplexity_needs_a_model_that_predicts_the_next_token(name, tmp_path):
    save_model(make(name), tmp_path / "in")
    with pytest.raises((ValueError, TypeError), match="perplexity needs a model that predicts the next token"):
        prune_checkpoint(tmp_path / "in", tmp_path / "out", data_for(name), evaluate=True, **QUICK)


def test_the_fisher_score_of_a_masked_language_model_has_no_next_token():
    model = make("bert")
    assert as_batches(tokens(2), model)[0].labels is None
    assert prune(model, tokens(6), sparsity=0.5, allocation="uniform", score="mfac").held_out.joint > 0
    with pytest.raises(ValueError, match="score='mfac' needs the loss of a model with a head"):
        prune(make("bert_base"), tokens(6), sparsity=0.5, allocation="uniform", score="mfac")


class _Crossing(nn.Module):
    """Later stages need only the output of the stage before for one sample alone, but not for several."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        first = self.blocks[0](x).tanh()
        second = self.blocks[1](first).tanh()
        third = self.blocks[2](second).tanh()
        return self.blocks[3](third + first if len(x) > 1 else third)


@pytest.mark.parametrize("settings", [{}, {"held_out": False}, {"curves": "measured", "minutes": 1e-9}])
def test_a_cache_that_changes_an_output_is_given_up_and_the_report_says_so(settings):
    torch.manual_seed(0)
    model, data = _Crossing(), torch.randn(40, 6)
    assert ActivationCache(model, as_batches(data, model)).starts == (0, 1, 2, 3)
    result = prune(model, data, **{**QUICK, **settings})
    assert result.sparsity == pytest.approx(0.5, abs=0.01)
    assert sum("activations are not cached: from blocks.2 on" in note for note in result.notes) == 1
    # of another run of the same model, whose passes all run from the first stage
    again = prune(model, data, sparsity=0.6, allocation="uniform", score="magnitude", held_out=False)
    assert not any("activations" in note for note in again.notes)


def test_statistics_from_a_cache_that_is_given_up_are_taken_anew():
    torch.manual_seed(0)
    model, data = _Crossing(), torch.randn(40, 6)
    settings = {"levels": (0.2, 0.4, 0.6, 0.8), "score": "wanda"}
    truth = measure_curves(model, data, prefix_cache=False, **settings)
    curves = measure_curves(model, data, method="anchored", **settings)
    assert "from blocks.2 on" in take_note(model)
    for name, curve in curves.items():
        equal = [a == b for a, b in zip(curve.distortion[1:], truth[name].distortion[1:], strict=True)]
        assert curve.source == "anchored" and any(equal), name


class _Picky(nn.Module):
    """A model that raises an error of its own where a stage's output is not what it was."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 7), nn.Linear(7, 6)

    def forward(self, x):
        first = self.first(x)
        second = self.second(first)
        if first.shape[-1] != 6:
            raise self.Error
        return self.third(second) + first


def test_a_model_that_the_cache_cannot_cut_is_pruned_without_it():
    torch.manual_seed(0)
    model = _Picky()
    assert ActivationCache(model, as_batches(torch.randn(4, 6), model)).starts == (0, 1)
    assert prune(model, torch.randn(40, 6), **QUICK).sparsity == pytest.approx(0.5, abs=0.02)


class _Repeated(nn.Module):
    """It calls its first block twice, which is no stage then."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x):
        return self.blocks[1](self.blocks[0](self.blocks[0](x)))


def test_a_model_without_any_cut_is_pruned_and_the_report_says_so():
    torch.manual_seed(0)
    result = prune(_Repeated(), torch.randn(40, 6), **QUICK)
    assert sum("not cached: no stage of the model needs only" in note for note in result.notes) == 1


def test_exclude_gets_past_a_weight_norm():
    model = make_llama(1)
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.down_proj)
    with pytest.raises(
        ValueError, match=r"down_proj.weight is parametrized .*exclude='model.layers.0.mlp.down_proj.\*'"
    ):
        find_targets(model)
    names = [target.name for target in find_targets(model, exclude=["model.layers.0.mlp.down_proj.*"])]
    assert len(names) == 6 and not any("down_proj" in name for name in names)


def test_state_matrices_are_never_pruned_whatever_a_rule_names():
    with pytest.raises(ValueError, match="A_log is of the kind 'other', which is never pruned"):
        find_targets(make("mamba"), include=["*.mixer.*"])


def test_experts_with_few_tokens_are_pruned_by_magnitude_and_the_others_by_their_score():
    model = make_mixtral()
    with torch.no_grad():  # every token goes to the first two of three experts
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    dense = {target.name: target.weight.clone() for target in find_targets(model)}
    settings = {"sparsity": 0.5, "allocation": "uniform", "held_out": False}
    result = prune(model, tokens(8), score="sparsegpt", **settings)
    (note,) = (note for note in result.notes if "magnitude" in note)
    assert note.startswith("4 experts got fewer than 32 calibration tokens and were pruned by magnitude")
    assert note.count("[2] (0)") == 4
    for target in find_targets(model):
        support = target.weight != 0
        same = torch.equal(target.weight[support], dense[target.name][support])
        assert same == (target.expert == 2), target.name  # magnitude leaves the others as they are
    gradients = prune(make_routed(), tokens(8), score="mfac", **settings)
    assert any("4 experts got no sample with a gradient" in note for note in gradients.notes)


def test_experts_with_fewer_tokens_than_sparsegpt_takes_are_pruned_by_wanda():
    """Its update would fit these tokens alone: on others, the error of a layer's output is above Wanda's."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=64, num_hidden_layers=1, num_local_experts=3, num_experts_per_tok=2, **sizes)
    model = MixtralForCausalLM(config).eval()
    dense = {target.name: target.weight.clone() for target in find_targets(model)}
    counts = {}
    pruning = Pruning(ActivationCache(model, as_batches(tokens(8), model)), "sparsegpt")
    groups = make_groups(find_targets(model))
    pruners = pruning.pruners(groups)
    for target, statistics in pruners.statistics():
        counts[target.name] = (statistics.count, target.weight.shape[1])
        # as if so many had come to experts of many inputs
        statistics.count = 32 if target.is_expert else statistics.count
    assert all(count >= 32 for count, _ in counts.values())
    for target in (target for group in groups for target in group.targets):
        weight, mask = pruners[target.name].prune(target.weight.numel() // 2)[:2]
        same = torch.equal(weight[mask], dense[target.name][mask])
        assert same == (target.is_expert and 2 * target.weight.shape[1] > 3 * 32), target.name
    (note,) = pruning.notes()
    assert re.search(r"experts got fewer calibration tokens than two thirds of their inputs, .* pruned by Wanda", note)


@pytest.mark.parametrize(("tokens_per_input", "lower"), [(0.25, "wanda"), (0.5, "wanda"), (2.0, "sparsegpt")])
def test_sparsegpt_takes_more_tokens_than_two_thirds_of_the_inputs(tokens_per_input, lower):
    assert _lower_error(tokens_per_input, "sparsegpt") == lower


def test_alps_takes_few_tokens():
    assert _lower_error(0.25, "alps") == "alps"


def _lower_error(tokens_per_input, score):
    """The error of a layer's output on fresh tokens, whose directions differ in size as those of hidden states do."""
    generator = torch.Generator().manual_seed(0)
    inputs = 256
    turn = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator))[0]
    sizes = torch.arange(1, inputs + 1).pow(-0.5)
    weight = torch.randn(128, inputs, generator=generator)
    few, fresh = (
        (torch.randn(count, inputs, generator=generator) * sizes) @ turn
        for count in (int(tokens_per_input * inputs), 2048)
    )
    errors = {}
    for each, need in (("wanda", "square_sum"), (score, "gram")):
        statistics = LayerStatistics.empty([need], inputs)
        statistics.add(few)
        pruned = layer_pruner(weight, each, statistics).prune(int(0.4 * weight.numel()))[0]
        errors[each] = float((fresh @ (pruned - weight).T).square().sum())
    return min(errors, key=errors.__getitem__)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_the_blocks_of_encoder_and_decoder_are_counted_on(name):
    model = make(name)
    blocks = {}
    for target in find_targets(model):
        blocks.setdefault(target.layer.block, []).append(target.name)
    outside = blocks.pop(None, [])
    assert len(outside) == (2 if name == "whisper" else 0)  # its convolutions
    assert sorted(blocks) == list(range(len(blocks))) and len(blocks) == 3
    for names in blocks.values():
        # all of one entry of the encoder's or the decoder's list
        assert len({re.search(r".*?\.\d+\.", one)[0] for one in names}) == 1 and len(names) >= 5
    assert "encoder" in blocks[0][0] and "decoder" in blocks[1][0]
    assert len(make_groups(find_targets(model), "block")) == 3 + len(outside)


def test_roles_of_bert_are_those_of_llama():
    groups = make_groups(find_targets(make("bert")), "role")
    kinds = {group.name: [target.name for target in group.targets] for group in groups if "0" in group.name}
    assert [len(names) for names in kinds.values()] == [2, 2, 1, 1]
    (joined,) = (names for name, names in kinds.items() if name.endswith("vo"))
    assert joined[0].endswith("self.value.weight") and joined[1].endswith("attention.output.dense.weight")


def make_routed():
    model = make_mixtral()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    return model


@pytest.mark.parametrize("score", ["wanda", "sparsegpt", "alps", "mfac"])
def test_experts_in_linear_layers_without_tokens_are_pruned_by_magnitude(score):
    model = make("switch")
    with torch.no_grad():  # every token goes to the first of four experts
        for name, weight in model.named_parameters():
            if name.endswith("router.classifier.weight"):
                weight.zero_()
        model.shared.weight.mul_(0.05)  # predictions that are certain have no gradient
    settings = {"sparsity": 0.5, "allocation": "global", "held_out": False}
    result = prune(model, tokens(8), score=score, **settings)
    (note,) = (note for note in result.notes if "magnitude" in note)
    # a ReLU may leave an expert with tokens without a gradient
    assert int(note.split()[0]) in (24, 25 if score == "mfac" else 24) and note.count(".experts.expert_") == 12
    assert not any("left out" in note for note in result.notes)
    targets = {target.parameter: target for target in find_targets(model) if target.is_expert}
    assert len(targets) == 4 * 4 * 2 and all(".experts.expert_" in name for name in targets)
    # in the unit of the score of the others: about as many zeros as the expert with tokens
    for kind in {target.kind for target in targets.values()}:
        shares = [float((t.weight == 0).float().mean()) for t in targets.values() if t.kind == kind]
        assert len(shares) == 4 and max(shares) - min(shares) < 0.3, (kind, shares)


@pytest.mark.parametrize(
    ("score", "settings"),
    [
        ("wanda", {"curves": "measured", "refine": Refinement(evaluations=40, seed=0)}),
        ("wanda", {"curves": "fisher", "correction": "relinearise"}),
        ("sparsegpt", {"curves": "anchored"}),
        ("magnitude", {"curves": "measured"}),
    ],
)
def test_experts_that_no_token_reaches_are_not_pruned_beyond_uniform_sparsity(score, settings):
    model = make_routed()  # of three experts, two get all tokens
    levels = (0.2, 0.4, 0.6, 0.95)
    result = prune(model, tokens(8), score=score, sparsity=0.4, levels=levels, held_out=False, **settings)
    (note,) = (note for note in result.notes if "curves are zero" in note)
    rows = {row["name"]: row["nonzero"] / row["numel"] for row in result.layers()}
    unreached = {name for name in rows if name.endswith("[2]")}
    assert note.startswith(f"{len(unreached)} of {len(rows)} curves") and len(unreached) == 4
    assert all(rows[name] >= 0.597 for name in unreached), rows
    assert result.sparsity == pytest.approx(0.4, abs=0.002)


def test_curves_of_zeros_do_not_make_a_sparsity_unreachable():
    model = make_routed()
    result = prune(model, tokens(8), sparsity=0.7, levels=(0.3, 0.7), curves="measured", held_out=False)
    assert {row["nonzero"] * 10 // row["numel"] for row in result.layers()} <= {2, 3}


def test_experts_that_no_token_reaches_have_a_table_of_seconds_too():
    model, levels = make_routed(), (0.0, 0.3, 0.6, 0.9)
    rows = {t.name: tuple(t.layer.numel * (1 - level) for level in levels) for t in find_targets(model)}
    result = prune(model, tokens(8), sparsity=0.4, budget=LatencyTable(levels, rows), held_out=False)
    densities = {row["name"]: row["nonzero"] / row["numel"] for row in result.layers()}
    assert min(density for name, density in densities.items() if name.endswith("[2]")) == pytest.approx(0.4, abs=0.01)
    assert result.budget["after"] <= result.budget["target"]


def test_a_layer_that_is_no_expert_and_never_runs_is_refused():
    lists = {name: nn.ModuleList([nn.Linear(6, 6)]) for name in ("experts", "shared_experts")}
    model = nn.ModuleDict(lists)
    model.forward = lambda x: x
    expert, shared = find_targets(model)
    assert (expert.is_expert, shared.is_expert) == (True, False)
    cache = ActivationCache(model, as_batches(torch.randn(4, 6), model))
    assert statistics_for(cache, [expert], ("gram",))[expert.name].count == 0
    with pytest.raises(ValueError, match="shared_experts.0.weight was never run on the calibration data"):
        statistics_for(cache, [shared], ("gram",))


@pytest.mark.parametrize("score", ["wanda", "sparsegpt", "alps", "mfac"])
def test_scores_by_magnitude_are_in_the_unit_of_the_others(score):
    """A threshold over all experts, and a mean over those of a block, depend on no unit of the inputs."""
    model, shares = make_routed(), {}
    targets = [target for target in find_targets(model) if target.expert is not None]
    groups = make_groups(targets)
    for factor in (1.0, 1e-3):
        with torch.no_grad():
            for layer in model.model.layers:  # inputs of the experts
                layer.post_attention_layernorm.weight.fill_(factor)
        pruning = Pruning(ActivationCache(model, as_batches(tokens(8), model)), score)
        with evaluating(model):
            scores = pruning.scores(groups)
            for name in {target.parameter for target in targets}:
                means = [float(scores[f"{name}[{expert}]"].mean()) for expert in range(3)]
                shares.setdefault(name, []).append(means[2] / (means[0] + means[1]))
            outliers = pruning.outliers(groups)
        for block in (0, 1):
            names = [group.name for group in groups if group.layer.block == block]
            assert outliers[names[0]] == outlier_ratio([scores[name] for name in names])
    assert all(share == pytest.approx(0.5, rel=0.3) for pair in shares.values() for share in pair), shares


@pytest.mark.parametrize(("score", "name"), [("sparsegpt", "SparseGPT"), ("alps", "ALPS")])
def test_data_too_short_for_the_statistics_is_said(score, name):
    result = prune(make_llama(1), tokens(4, 12), sparsity=0.5, allocation="uniform", score=score)
    (note,) = (note for note in result.notes if "is short" in note)
    assert "1 matrices got 36 tokens" in note and "up to 40" in note and f"{name}'s Gram matrices are singular" in note
    settings = {"sparsity": 0.5, "score": "wanda", "curve_score": score, "levels": (0.4, 0.6), "curves": "fisher"}
    curves = prune(make_llama(1), tokens(4, 12), **settings)
    assert note in curves.notes, "the weights are Wanda's, the curves those of the score"
    result = prune(make_llama(1), tokens(4, 6), sparsity=0.5, allocation="uniform")
    assert any("7 matrices got 18 tokens" in note and "too few for their statistics" in note for note in result.notes)


class _Gate(nn.Module):
    """A router of a module of its own, as HunYuan's."""

    def __init__(self):
        super().__init__()
        self.wg = nn.Linear(8, 4, bias=False)


def test_a_router_inside_a_gate_is_not_pruned():
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"gate": _Gate(), "gate_proj": nn.Linear(8, 8)})})
    assert [target.name for target in find_targets(model)] == ["mlp.gate_proj.weight"]
