"""The gate: exact unless low-rank is close and pays, checked in every call, and out of the way when it is closed."""

import functools

import pytest
import torch
from lora_models import gpt2, llama
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from leanstep.lora.attention.attention import LowRankAttentionError
from leanstep.lora.attention.gate import LowRankGate, autocasted_inputs
from leanstep.lora.attention.interface import AttentionInputs
from leanstep.lora.attention.monitor import NormMonitor

IDS = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(0))
# so that low-rank attention is predicted to pay at the length of a test
PAYS = dict(speed=1e-3)


def gradients(model):
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_default_is_exact_attention_bit_for_bit(make, implementation):
    model = make(attn_implementation=implementation)
    want = model(IDS).logits
    with LowRankGate(model) as gate:
        assert torch.equal(model(IDS).logits, want)
        assert [(row.low_rank, row.reason) for row in gate.report()] == [(False, "mode is 'exact'")] * 2
    assert model.config._attn_implementation == implementation
    assert not any("_leanstep_tap" in vars(module) for module in model.modules())


@pytest.mark.parametrize("make", [llama, gpt2])
def test_auto_switches_after_two_good_judgements_and_reports_the_error(make, monkeypatch):
    monkeypatch.setattr(LowRankGate, "spot_every", 1)
    model = make()
    want, grads = model(IDS).logits, gradients(model)
    with LowRankGate(model, "auto", **PAYS) as gate:
        first = model(IDS).logits
        assert torch.equal(first, want) and not any(row.low_rank for row in gate.report())
        assert "1 of 2 judgements" in gate.report()[0].reason and gate.report()[0].error is not None
        second = model(IDS).logits
        assert all(row.low_rank and row.reason.startswith("certified") for row in gate.report())
        assert not torch.equal(second, want)
        torch.testing.assert_close(second, want, rtol=0, atol=1e-4)
        assert all(0 < row.error < 1e-4 and row.largest_error == row.error and row.cost < 1 for row in gate.report())
        model.train()
        found = gradients(model) if make is llama else grads
        for name, grad in found.items():
            assert (grad - grads[name]).norm() <= 2e-2 * grads[name].norm() + 1e-6, name
        if make is llama:
            errors = gate.report()[0].gradient_errors
            assert set(errors) == {"O", "dQ", "dK", "dV"} and all(0 < e < 0.05 for e in errors.values())
            numbers = gate.diagnostics()
            assert numbers["low-rank calls"] == pytest.approx(2 / 3) and numbers["fallbacks"] == 0
            assert numbers["gate dQ error/model.layers.0.self_attn"] == errors["dQ"]


def test_what_does_not_pay_stays_exact_and_says_from_where_it_would():
    model = llama()
    want = model(IDS).logits
    with LowRankGate(model, "auto", speed=1) as gate:
        for _ in range(3):
            assert torch.equal(model(IDS).logits, want)
        row = gate.report()[0]
    assert (
        row.cost > 1 and "it pays from" in " ".join(row.reason.split()) and row.low_rank_calls == 0 and row.calls == 3
    )


def test_it_falls_back_at_once_when_logits_grow():
    model = llama()
    with LowRankGate(model, "auto", every=4, **PAYS) as gate:
        for _ in range(3):
            model(IDS)
        assert all(row.low_rank for row in gate.report())
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight.mul_(300)
        # low-rank was computed, found wanting, and answered exactly in the same call
        found = model(IDS).logits
        rows = gate.report()
        assert all(not row.low_rank and row.fallbacks == 1 and row.reason.startswith("fell back") for row in rows)
        assert all(row.error > 0.05 for row in rows)
        for _ in range(3):
            model(IDS)
        assert all(row.calls == 7 and row.low_rank_calls == 2 for row in gate.report())
        assert "logits reach" in gate.report()[0].reason
    assert torch.equal(found, model(IDS).logits)


def test_overflow_falls_back_too():
    model = llama()
    with LowRankGate(model, "auto", **PAYS) as gate:
        for _ in range(2):
            model(IDS)
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight.mul_(1e25)
            model.model.layers[0].self_attn.k_proj.weight.mul_(1e5)
        assert model(IDS).logits.isfinite().all()
        assert "not positive and finite" in gate.report()[0].reason and gate.report()[0].fallbacks == 1


def breaks(model, part, value):
    """Puts a value into one entry of the last query's or key's projection in the first layer; the list turns it on."""
    on = [True]

    def change(module, inputs, output):
        changed = output.clone()
        changed[-1, -1, 0] = value
        return changed if on[0] else None

    getattr(model.model.layers[0].self_attn, part).register_forward_hook(change)
    return on


@pytest.mark.parametrize("part", ["q_proj", "k_proj"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_exact_and_judged_anew_when_it_is_over(part, value):
    model = llama()
    on = breaks(model, part, value)
    broken = model(IDS).logits
    with LowRankGate(model, "auto", every=3, **PAYS) as gate:
        for _ in range(2):
            torch.testing.assert_close(model(IDS).logits, broken, rtol=0, atol=1e-4, equal_nan=True)
            row = gate.report()[0]
            assert "non-finite logits" in row.reason and not row.low_rank and row.fallbacks == 0
        # the other layer is as it was, and its calls the third and fourth of three and four judgements
        on[0] = False
        for _ in range(2):
            model(IDS)
        assert "1 of 2 judgements" in gate.report()[0].reason and gate.report()[0].low_rank_calls == 0
        for _ in range(2):
            model(IDS)
        assert gate.report()[0].low_rank and gate.report()[0].low_rank_calls == 2
        # while it runs low-rank: at once, counted, and not again before two good judgements
        on[0] = True
        torch.testing.assert_close(model(IDS).logits, broken, rtol=0, atol=1e-4, equal_nan=True)
        row = gate.report()[0]
        assert not row.low_rank and row.fallbacks == 1 and row.reason == "fell back: non-finite logits"
        on[0] = False
        for _ in range(3):
            model(IDS)
            assert gate.report()[0].low_rank_calls == 2
        model(IDS)
        assert gate.report()[0].low_rank_calls == 3 and gate.report()[0].error < 1e-4


def test_force_runs_low_rank_whatever_the_error_but_not_nonsense():
    model = llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(300)
    with LowRankGate(model, "force") as gate:
        model(IDS)
        assert gate.report()[0].low_rank and gate.report()[0].error > 0.05
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight.mul_(1e30)
        with pytest.raises(LowRankAttentionError, match="not positive and finite"):
            model(IDS)


def test_causality_holds_with_a_running_mean_of_keys():
    model = llama()
    changed = IDS.clone()
    changed[:, 15:] = 3
    for mode in ("force", "auto"):
        with LowRankGate(model, mode, **PAYS) as gate:
            model(IDS)
            model(IDS)
            # the state of the gate is the same before both
            states = [(state.center.clone(), state) for state in gate._layers.values()]
            first = model(IDS).logits
            for center, state in states:
                state.center = center
            second = model(changed).logits
            assert all(row.low_rank for row in gate.report())
        torch.testing.assert_close(first[:, :15], second[:, :15], rtol=0, atol=1e-6)
        assert (first[:, 15:] - second[:, 15:]).abs().max() > 1e-3


def test_padding_is_low_rank_and_what_it_does_not_know_is_exact_with_the_reason():
    model = llama()
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    want = model(IDS, attention_mask=mask).logits
    window = torch.ones(24, 24, dtype=torch.bool).tril().triu(-3)[None, None].expand(2, 1, -1, -1)
    windowed = model(IDS, attention_mask=window).logits
    with LowRankGate(model, "force") as gate:
        found = model(IDS, attention_mask=mask).logits
        assert gate.report()[0].low_rank
        torch.testing.assert_close(found[mask.bool()], want[mask.bool()], rtol=0, atol=1e-4)
        assert torch.equal(model(IDS, attention_mask=window).logits, windowed)
        assert "neither causal nor padding" in gate.report()[0].reason and not gate.report()[0].low_rank
        tokens = model.generate(IDS[:1, :8], max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert "against a cache" in gate.report()[0].reason
    assert torch.equal(tokens, model.generate(IDS[:1, :8], max_new_tokens=3, do_sample=False, pad_token_id=0))
    model = gpt2().train()
    with LowRankGate(model, "force") as gate:
        model(IDS)
        assert "dropout of 0.1" in gate.report()[0].reason


def test_checkpointing_repeats_what_the_first_pass_did():
    plain, saved = llama().train(), llama().train()
    saved.activation_checkpointing_enable()
    grads = []
    for model in (plain, saved):
        with LowRankGate(model, "auto", **PAYS) as gate:
            for _ in range(3):
                found = gradients(model)
            assert all(row.low_rank_calls == 2 and row.calls == 3 for row in gate.report())
        grads.append(found)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-7)


def products_are_kept(_, op, *args, **kwargs):
    kept = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
    return CheckpointPolicy.MUST_SAVE if kept or "_linear_pointwise" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_what_is_measured_is_no_part_of_a_pass_that_is_repeated(implementation, monkeypatch):
    """Selective checkpointing hands products out again by their order: those of measurements must not be among them."""
    from leanstep.lora import LoraConfig, apply_lora

    monkeypatch.setattr(LowRankGate, "spot_every", 1)
    contexts = functools.partial(create_selective_checkpoint_contexts, products_are_kept)
    results = []
    for selective in (False, True):
        model = llama(attn_implementation=implementation).double().train()
        torch.manual_seed(1)
        apply_lora(model, LoraConfig(r=2, target_modules=["q_proj", "k_proj"], use_dora=True))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B.weight"):
                    parameter.normal_(std=0.02)
        if selective:
            model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
        found = []
        with LowRankGate(model, "auto", every=2, **PAYS) as gate, NormMonitor(model) as monitor:
            for _ in range(4):
                model.zero_grad()
                monitor.arm()
                model(IDS, labels=IDS).loss.backward()
                found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
            assert len(monitor.report()) == 8
            assert all(row.low_rank_calls == 3 and row.calls == 4 for row in gate.report())
        results.append((found, [row.gamma_full for row in monitor.report()]))
    assert results[0][1] == pytest.approx(results[1][1])
    for first, second in zip(results[0][0], results[1][0], strict=True):
        for name, grad in first.items():
            torch.testing.assert_close(second[name], grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj"]], ids=["partial", "full"])
def test_adapters_learn_through_low_rank_attention(targets):
    from leanstep.lora import LoraConfig, apply_lora

    results = []
    for mode in ("exact", "force"):
        model = llama().train()
        torch.manual_seed(1)
        apply_lora(model, LoraConfig(r=2, target_modules=targets))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B.weight"):
                    parameter.normal_(std=0.02)
        with LowRankGate(model, mode), NormMonitor(model) as monitor:
            monitor.arm()
            model(IDS, labels=IDS).loss.backward()
            assert len(monitor.report()) == 8
        results.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(results[0]) == 4 * len(targets)
    for name, grad in results[0].items():
        assert (results[1][name] - grad).norm() <= 0.05 * grad.norm(), name


def test_the_speed_is_measured_where_none_is_given(monkeypatch):
    calls = []
    monkeypatch.setattr("leanstep.lora.attention.gate.measure_speed", lambda *args: calls.append(args) or 2.5)
    model = llama()
    with LowRankGate(model, "auto") as gate:
        model(IDS)
        measured = gate.report()[0].cost
    with LowRankGate(model, "auto", speed=1) as gate:
        model(IDS)
        assert measured == pytest.approx(2.5 * gate.report()[0].cost)
    assert calls[0][:3] == (8, 8, 2)


def test_measured_speed_is_a_positive_number():
    from leanstep.lora.attention.cost import measure_speed

    assert 0.01 < measure_speed(8, 8, 2, torch.device("cpu"), torch.float32, length=256) < 1000


def through_a_file(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def trained_calls(model, gate, count, begin):
    """Outputs and gradients of calls on batches of their own, with weights that move."""
    results = []
    for step in range(begin, begin + count):
        ids = torch.randint(0, 50, (3, 24), generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        results += [output.logits.detach(), *(p.grad.clone() for p in model.parameters())]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    return results


@pytest.mark.parametrize("begin", [1, 2, 3, 12])
def test_a_gate_goes_on_from_its_state_bit_for_bit(tmp_path, monkeypatch, begin):
    """Before the first switch, between judgements, and long after; with another speed where it goes on."""
    speeds = []
    monkeypatch.setattr(
        "leanstep.lora.attention.gate.measure_speed",
        lambda *_: speeds.append(1e-3 if not speeds else 1e3) or speeds[-1],
    )
    model = llama().train()
    monkeypatch.setattr(LowRankGate, "rows", 8)
    monkeypatch.setattr(LowRankGate, "spot_every", 2)
    monkeypatch.setattr(LowRankGate, "sequences", 1)
    settings = dict(every=3)
    with LowRankGate(model, "auto", **settings) as gate:
        trained_calls(model, gate, begin, 0)
        state, weights = through_a_file(gate.state_dict(), tmp_path / "gate.pt"), dict(model.state_dict())
        weights = {name: tensor.clone() for name, tensor in weights.items()}
        wanted, report = trained_calls(model, gate, 10, begin), gate.report()
        assert all(row.low_rank_calls >= 8 and row.gradient_errors for row in report)
        # what was taken is a copy: the gate went on
        assert state["layers"][report[0].layer]["calls"] == begin
    model.load_state_dict(weights)
    with LowRankGate(model, "auto", **settings, seed=7) as gate:
        gate.load_state_dict(state)
        found = trained_calls(model, gate, 10, begin)
        assert gate.report() == report
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)) and len(speeds) == 1
    # a gate that judges anew does something else
    model.load_state_dict(weights)
    with LowRankGate(model, "auto", **settings) as gate:
        other = trained_calls(model, gate, 10, begin)
    assert any(not torch.equal(a, b) for a, b in zip(other, wanted, strict=True))


def test_a_state_of_something_else_is_refused_and_the_gate_unchanged():
    model = llama()
    with LowRankGate(model, "auto", **PAYS) as gate:
        model(IDS)
        state, other = gate.state_dict(), gate.state_dict()
    with LowRankGate(gpt2(), "auto", **PAYS) as gate, pytest.raises(ValueError) as caught:
        gate.load_state_dict(state)
    assert "of other attention layers: it lacks transformer.h.0.attn" in str(caught.value)
    assert "the model lacks model.layers.0.self_attn, model.layers.1.self_attn" in str(caught.value)
    del other["layers"]["model.layers.0.self_attn"]["calls"]
    with LowRankGate(model, "auto", degree=4, tolerance=0.1, **PAYS) as gate:
        for broken, message in (
            (state, "degree was 2, is 4; tolerance was 0.05, is 0.1"),
            ({"layers": {}}, "expected a state with generator, layers, settings, speeds"),
            (None, "expected a state with"),
        ):
            with pytest.raises(ValueError, match=message):
                gate.load_state_dict(broken)
        assert all(row.calls == 0 for row in gate.report())
    with LowRankGate(model, "auto", **PAYS) as gate:
        with pytest.raises(ValueError, match="the state of model.layers.0.self_attn lacks some of calls, center"):
            gate.load_state_dict(other)
        gate.load_state_dict(state)
        assert [row.calls for row in gate.report()] == [1, 1]


@pytest.mark.parametrize(
    ("key", "value"),
    [("calls", "3"), ("on", 1), ("error", "x"), ("good", -1), ("center", torch.ones(3)), ("gradient_errors", [1])],
)
def test_a_state_of_other_types_is_refused_and_the_gate_unchanged(key, value):
    with LowRankGate(gpt2(), "auto", **PAYS) as gate:
        state, before = gate.state_dict(), repr(gate.state_dict())
        layers = {name: {**saved, key: value} for name, saved in state["layers"].items()}
        settings = {**state["settings"], "degree": torch.ones(3)}
        others = ({"layers": layers}, {"generator": torch.ones(3)}, {"speeds": [1]}, {"settings": settings})
        for broken in ({**state, **other} for other in others):
            with pytest.raises(ValueError, match="^LowRankGate: "):
                gate.load_state_dict(broken)
            assert repr(gate.state_dict()) == before


def test_bad_settings_are_refused_and_the_model_unchanged():
    model = llama()
    for settings, message in [
        (dict(mode="fast"), "'exact', 'auto' or 'force'"),
        (dict(degree=3), "even degree"),
        (dict(tolerance=0.0), "tolerance > 0"),
        (dict(every=0), "every >= 1"),
        (dict(patience=0), "patience >= 1"),
        (dict(speed=0.0), "speed > 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            LowRankGate(model, **settings)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="no attention layers"):
        LowRankGate(torch.nn.Linear(2, 2))
    with LowRankGate(model), pytest.raises(ValueError, match="has a gate already"):
        LowRankGate(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_under_autocast_q_k_and_v_have_its_dtype(implementation, monkeypatch):
    """RoPE leaves fp32 queries and keys beside bf16 values; torch's attention casts them, and so does the gate."""
    monkeypatch.setattr(LowRankGate, "spot_every", 1)
    model = llama(attn_implementation=implementation).train()
    with torch.autocast("cpu", torch.bfloat16):
        want = gradients(model)
        with LowRankGate(model, "auto", **PAYS) as gate, NormMonitor(model) as monitor:
            monitor.arm()
            first, second, found = gradients(model), gradients(model), gradients(model)
            rows = gate.report()
    assert all(row.low_rank and row.low_rank_calls == 2 and row.gradient_errors for row in rows), rows
    assert monitor.report() and all(torch.equal(first[name], want[name]) for name in want)
    for name in want:
        assert (found[name] - want[name]).norm() < 0.05 * want[name].norm(), name
        torch.testing.assert_close(found[name], second[name])


def test_fp64_stays_so_under_autocast():
    seen = AttentionInputs(*(torch.ones(1, 1, 3, 2, dtype=torch.float64) for _ in range(3)), 1.0, True)
    with torch.autocast("cpu", torch.bfloat16):
        assert {x.dtype for x in autocasted_inputs(seen)[:3]} == {torch.float64}
