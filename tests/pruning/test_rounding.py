"""Curves of 16-bit models: what a change of any size does by rounding activations otherwise is not in them."""

import pytest
import torch
from pruned_models import make_llama, make_mixtral, tokens

from leanstep.pruning import measure_curves
from leanstep.pruning.measure import measure
from leanstep.pruning.measure.products import products_in, rounded_anew, rounding_unit
from leanstep.pruning.score.targets import find_targets

LEVELS = (0.02, 0.05, 0.1, 0.5)


def make_bf16(blocks=6):
    return make_llama(blocks).to(torch.bfloat16)


def test_small_changes_of_a_bf16_model_cost_what_they_cost_in_fp32(monkeypatch):
    model, samples = make_bf16(), tokens(16, length=24)
    curves = measure_curves(model, samples, levels=LEVELS)
    exact = measure_curves(make_bf16().float(), samples, levels=LEVELS)
    monkeypatch.setattr(measure, "rounding_unit", lambda *_: 0.0)
    raw = measure_curves(model, samples, levels=LEVELS)

    def error(of, level):
        return sum(abs(of[name].distortion[level] - exact[name].distortion[level]) for name in exact)

    for level in (1, 2, 3):
        assert error(curves, level) < error(raw, level) / 3
    # at the first level rounding is most of it
    assert sum(c.distortion[1] for c in raw.values()) > 2 * sum(c.distortion[1] for c in exact.values())
    assert error(curves, 4) < sum(c.distortion[4] for c in exact.values()) / 10


def test_an_expert_is_compared_with_what_its_own_tokens_change(monkeypatch):
    """It reaches some of the tokens; what all of them change would make it free."""
    model, samples = make_mixtral(3).to(torch.bfloat16), tokens(16, length=24)
    experts = [target.name for target in find_targets(model) if target.is_expert]
    curves = measure_curves(model, samples, levels=LEVELS)
    exact = measure_curves(make_mixtral(3).to(torch.bfloat16).float(), samples, levels=LEVELS)
    monkeypatch.setattr(measure, "rounding_unit", lambda *_: 0.0)
    raw = measure_curves(model, samples, levels=LEVELS)
    errors = [sum(abs(of[n].distortion[1] - exact[n].distortion[1]) for n in experts) for of in (curves, raw)]
    assert errors[0] < 0.8 * errors[1]


def test_a_curve_of_an_expert_without_tokens_is_zero():
    """A negative one would not be seen to be without any effect."""
    model, samples = make_mixtral(3).to(torch.bfloat16), torch.tensor([[5] * 8, [5] * 8])
    curves = measure_curves(model, samples, levels=LEVELS)
    experts = [target.name for target in find_targets(model) if target.is_expert]
    unused = [name for name in experts if not any(curves[name].distortion)]
    assert 0 < len(unused) < len(experts)
    exact = measure_curves(make_mixtral(3), samples, levels=LEVELS)
    assert all(not any(exact[name].distortion) for name in unused)


@pytest.mark.parametrize("method", ["measured", "anchored"])
@pytest.mark.parametrize("score", ["wanda", "sparsegpt"])
def test_a_run_that_was_cut_goes_on_to_the_same_curves(method, score, tmp_path):
    model, samples, file = make_bf16(2), tokens(4), tmp_path / "curves.jsonl"
    settings = {"levels": LEVELS, "method": method, "score": score, "resume": file}
    whole = measure_curves(model, samples, **settings)
    lines = file.read_text().splitlines(keepends=True)
    for cut in (2, len(lines) // 2, len(lines) - 5):
        file.write_text("".join(lines[:cut]))
        assert measure_curves(model, samples, **settings) == whole


def test_points_of_an_earlier_version_are_not_mixed_with_those_without_rounding(monkeypatch, tmp_path):
    model, samples, file = make_bf16(1), tokens(2), tmp_path / "curves.jsonl"
    with monkeypatch.context() as earlier:
        earlier.setattr(measure, "rounding_unit", lambda *_: 0.0)
        measure_curves(model, samples, levels=LEVELS, resume=file)
    with pytest.raises(ValueError, match="less rounding"):
        measure_curves(model, samples, levels=LEVELS, resume=file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_16_bits_nothing_is_measured_besides_the_points(dtype, monkeypatch):
    monkeypatch.setattr(measure, "rounded_anew", lambda *_: 1 / 0)
    measure_curves(make_llama(1).to(dtype), tokens(2), levels=LEVELS)


def test_the_unit_is_that_of_activations_or_of_products():
    model = make_llama(1)
    assert rounding_unit(model) == 0 and rounding_unit(model, "bf16") == 2**-7
    with products_in(model, "bf16"):
        assert rounding_unit(model) == 2**-7
    assert rounding_unit(model.half()) == 2**-10 and rounding_unit(model.to(torch.bfloat16)) == 2**-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_change_in_their_last_digits(dtype):
    model = make_llama(1).to(dtype)
    weight, unit = find_targets(model)[0].weight.detach(), rounding_unit(model) or 2**-7
    weight = weight.masked_fill(weight > weight.float().quantile(0.9), 0.0)
    changed = rounded_anew(weight, unit)
    assert changed.dtype == dtype and torch.equal(changed, rounded_anew(weight, unit))
    step = (changed.double() - weight.double()).abs() / weight.double().abs().clamp(min=1e-30)
    assert step.max() <= unit and not changed[weight == 0].any()
    assert (changed != weight)[weight != 0].float().mean() > 0.7
