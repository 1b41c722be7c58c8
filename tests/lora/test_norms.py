"""Norms of heads, the verdict on them, and the monitor on transformers' models."""

import copy
import math
import warnings

import pytest
import torch
import transformers
from architectures import CAUSAL
from lora_models import gpt2, llama
from pruned_models import VOCABULARY
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5ForConditionalGeneration

from leanstep.lora.attention.attention import key_means, low_rank_attention, needed_degree
from leanstep.lora.attention.cost import AttentionShape, break_even, cost_ratio, exact_flops, low_rank_flops
from leanstep.lora.attention.interface import AttentionInputs, attach, detach
from leanstep.lora.attention.monitor import STATUSES, NormMonitor, judge
from leanstep.lora.attention.norms import adapter_output, head_norms, sample_rows, sampled_error, whole_weight

IDS = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(0))


def seen(heads=(4, 2), length=30, dim=8, causal=True, masked=False, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, heads[0], length, dim), (2, heads[1], length, dim), (2, heads[1], length, dim)]
    q, k, v = (size * torch.randn(s, generator=generator) for s in shapes)
    mask = None
    if masked:
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[0, :7] = False
    return AttentionInputs(q, k, v, dim**-0.5, causal, mask)


def visible_logits(call, center=None):
    k = call.key if center is None else call.key - center[..., None, :]
    s = call.scale * call.query @ k.repeat_interleave(call.query.shape[1] // k.shape[1], dim=1).mT
    keep = torch.ones(s.shape[-2:], dtype=torch.bool)
    keep = keep.tril() if call.causal else keep
    keep = keep[None, None] if call.key_mask is None else keep & call.key_mask[:, None, None, :]
    return torch.where(keep, s, 0.0)


# --- heads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_the_certified_bound_is_above_every_logit_and_samples_are_below(causal, masked):
    for seed in range(5):
        call = seen(causal=causal, masked=masked, seed=seed)
        center = key_means(call.key, call.key_mask)
        for rows in (4, 1000):
            found = head_norms(call, rows=rows, generator=torch.Generator().manual_seed(seed))
            exact = visible_logits(call, center).abs().amax(dim=(0, 2, 3))
            assert (found.certified >= exact * (1 - 1e-6)).all() and (exact * (1 + 1e-6) >= found.sampled).all()
            if rows == 1000:
                torch.testing.assert_close(found.sampled, exact)
        root = call.scale**0.5
        torch.testing.assert_close(found.gamma_q, root * call.query.abs().amax(dim=(0, 2, 3)))


def test_sampled_errors_are_those_of_low_rank_attention():
    for masked in (False, True):
        call = seen(masked=masked, size=0.7)
        found = head_norms(call, degrees=(2, 4), rows=1000, center=key_means(call.key, call.key_mask))
        exact = torch.softmax(visible_logits(call).masked_fill(visible_logits(call) == 0, -torch.inf), dim=-1)
        exact = exact.nan_to_num() @ call.value.repeat_interleave(2, dim=1)
        for degree, errors in zip((2, 4), found.errors, strict=True):
            out = low_rank_attention(
                *call[:3], degree=degree, causal=True, center=key_means(call.key, call.key_mask), key_mask=call.key_mask
            )
            off = (out - exact).square().sum(dim=(0, 2, 3)).sqrt() / exact.square().sum(dim=(0, 2, 3)).sqrt()
            torch.testing.assert_close(errors, off, rtol=1e-3, atol=1e-6)
            at = sample_rows(30, 1000)
            torch.testing.assert_close(sampled_error(call, out, at), off, rtol=1e-3, atol=1e-6)
    assert sampled_error(call, out * float("nan"), at).isinf().all()


def test_rows_are_sampled_without_repetition_and_the_last_is_among_them():
    rows = sample_rows(100, 10, torch.Generator().manual_seed(0)).tolist()
    assert rows == sorted(set(rows)) and len(rows) == 10 and rows[-1] == 99
    assert sample_rows(5, 10).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("size", "cheap", "status"),
    [(0.2, True, "certified-fast"), (0.2, False, "bounded-but-slow"), (4.0, True, "not-certified")],
)
def test_known_logits_give_the_right_status(size, cheap, status):
    # one direction: the bound is attained, and equals the size
    q = torch.zeros(1, 1, 64, 4)
    q[..., 0] = torch.linspace(-1, 1, 64)
    call = AttentionInputs(size * q, q, torch.randn(1, 1, 64, 4), 1.0, False)
    found = head_norms(call, degrees=(2, 4), rows=64)
    assert float(found.certified) == pytest.approx(size) == pytest.approx(float(found.sampled))

    needed = needed_degree(size, 0.05)
    verdict = judge(needed, needed, float(found.errors[0, 0]), {2: 0.5 if cheap else 2.0, 4: 3.0}, 0.05)
    assert verdict[0] == status


def test_verdicts():
    costs = {2: 0.5, 4: 2.0}
    assert judge(2, 2, 0.01, costs, 0.05) == ("certified-fast", 2)
    assert judge(8, 2, 0.01, costs, 0.05) == ("measured-fast", 2)
    assert judge(8, 2, 0.06, costs, 0.05) == ("not-certified", 4)
    assert judge(8, 4, 0.01, costs, 0.05) == ("bounded-but-slow", 4)
    assert judge(4, 4, 0.01, costs, 0.05) == ("bounded-but-slow", 4)
    assert judge(None, 6, 0.01, costs, 0.05) == ("not-certified", 4)
    assert judge(8, 2, float("nan"), costs, 0.05) == ("not-certified", 4)


class _Traffic(TorchDispatchMode):
    """Counts the entries of all tensors that operations give."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.entries += sum(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        return result


def test_the_measurement_is_linear_in_the_length():
    # counted: operations of products, and what everything else writes
    def cost(length):
        call = seen(heads=(1, 1), length=length)
        with FlopCounterMode(display=False) as counter:
            head_norms(call, rows=16)
        with _Traffic() as traffic:
            head_norms(call, rows=16)
        return counter.get_total_flops(), traffic.entries

    (few, short), (many, long) = cost(1 << 12), cost(1 << 16)
    assert many / few == 16
    assert 8 * short < long < 16.1 * short


# --- costs ---------------------------------------------------------------------------------------------------------


def test_costs_cross_where_they_say():
    shape = AttentionShape(1, 1, 4096, 64, 64)
    assert exact_flops(shape, backward=False) == 2 * 128 * 4096 * 4097 // 2
    assert exact_flops(AttentionShape(1, 1, 100, 64, 64, causal=False)) == 2 * 7 * 64 * 100**2
    length = break_even(shape)
    near = [cost_ratio(AttentionShape(1, 1, int(length * f), 64, 64)) for f in (0.97, 1.03)]
    assert near[0] > 1 > near[1]
    assert 4000 < length < 6000 and break_even(shape, speed=3.0) > 2.5 * length
    assert low_rank_flops(shape, 4) > 300 * low_rank_flops(shape, 2)
    # grouped queries share the states of their keys
    assert cost_ratio(AttentionShape(8, 1, 4096, 64, 64)) < cost_ratio(shape)


# --- the monitor ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_monitor_sees_what_attention_sees_and_changes_nothing(make, implementation):
    model = make(attn_implementation=implementation)
    want = model(IDS).logits
    captured = {}
    taps = attach(model)
    for tap in taps.values():
        tap.observers.append(lambda call: captured.setdefault(call.layer, call.inputs.sequences(slice(2))))
    with NormMonitor(model) as monitor:
        monitor.arm()
        assert torch.equal(model(IDS).logits, want)
        rows = monitor.report()
        assert torch.equal(model(IDS).logits, want)
    for tap in taps.values():
        tap.observers.clear()
    detach(model)
    assert model.config._attn_implementation == implementation
    assert [(row.layer, row.head) for row in rows] == [(tap.name, head) for tap in taps.values() for head in range(4)]
    for row in rows:
        call = next(captured[layer] for layer, tap in taps.items() if tap.name == row.layer)
        head, key_head = row.head, row.head * call.key.shape[1] // 4
        root = call.scale**0.5
        assert row.gamma_q == pytest.approx(root * float(call.query[:, head].abs().max()))
        assert row.gamma_k == pytest.approx(root * float(call.key[:, key_head].abs().max()))
        assert row.threshold == pytest.approx(math.sqrt(math.log(24)))
        assert row.rho == pytest.approx(max(row.gamma_q, row.gamma_k) / row.threshold)
        assert row.certified >= row.sampled > 0 and row.status in STATUSES and row.why
        # rotary embeddings keep pairs' lengths, so the part before them is near
        assert 0.7 < row.base / max(row.gamma_q, row.gamma_k) < 1.5 and row.adapter == 0 and row.drift == 1


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_norm_of_full_adaptation_is_that_of_queries_through_the_keys_weights(make):
    model = make()
    if make is llama:
        from leanstep.lora import LoraConfig, apply_lora

        apply_lora(model, LoraConfig(r=2, target_modules=["k_proj"]))
        layer = model.model.layers[0].self_attn
        with torch.no_grad():
            layer.k_proj.lora_B.weight.normal_()
            weight = (
                layer.k_proj.weight + layer.k_proj.lora.scale * layer.k_proj.lora_B.weight @ layer.k_proj.lora_A.weight
            )
        projection = layer.q_proj
    else:
        layer = model.transformer.h[0].attn
        projection, weight = layer.c_attn, layer.c_attn.weight[:, 32:64].T
    outputs = []
    handle = projection.register_forward_hook(lambda _, __, y: outputs.append(y.detach()))
    with NormMonitor(model) as monitor, torch.no_grad():
        monitor.arm()
        model(IDS)
    handle.remove()
    q = outputs[0][..., :32].unflatten(-1, (4, 8))
    keys = weight.detach().unflatten(0, (-1, 8))
    for head, row in enumerate(monitor.report()[:4]):
        want = (q[:, :, head] @ keys[head * len(keys) // 4]).abs().max() * 8**-0.5
        assert row.gamma_full == pytest.approx(float(want), rel=1e-4)


def test_measures_the_next_pass_when_armed_only():
    model = llama()
    with NormMonitor(model) as monitor:
        model(IDS)
        assert not monitor.report() and not monitor.diagnostics()
        monitor.arm()
        model.train()(IDS)
        assert len(monitor.report()) == 8
        monitor._reports.clear()
        model(IDS)
        assert not monitor.report()
        model.eval()
        monitor.arm()
        model(IDS)
        assert len(monitor.report()) == 8
        numbers = monitor.diagnostics()
        assert sum(numbers[f"heads/{status}"] for status in STATUSES) == 8
        assert numbers["sampled logit/model.layers.0.self_attn"] > 0
        assert monitor.rows_of_report()[0]["layer"] == "model.layers.0.self_attn"


def test_recomputation_for_checkpointing_is_not_measured_again():
    model = llama().train()
    model.activation_checkpointing_enable()
    with NormMonitor(model) as monitor:
        monitor.arm()
        loss = model(IDS, labels=IDS).loss
        before = monitor.report()
        loss.backward()
        assert monitor.report() == before and len(before) == 8


def test_large_keys_are_on_the_hard_side_and_the_reason_names_the_factor():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(300)
    with NormMonitor(model) as monitor:
        monitor.arm()
        model(IDS)
        first, second = monitor.report()[:4], monitor.report()[4:]
        assert {row.status for row in first} <= {"bounded-but-slow", "certified-fast"}
        for row in second:
            assert row.status == "not-certified" and row.of == "k" and row.dominant == "W*"
            assert "keys" in row.why and "QK-norm" in row.why and (row.degree is None or row.degree > 4)
        # drift is against the first sight of a head
        with torch.no_grad():
            model.model.layers[1].self_attn.k_proj.weight.mul_(2)
        monitor.arm()
        model(IDS)
        assert [row.drift for row in monitor.report()[4:]] == pytest.approx([2.0] * 4, rel=1e-4)


@pytest.mark.parametrize(
    ("value", "part", "everywhere"),
    [(value, "k_proj", everywhere) for value in (math.nan, math.inf, 1e30, 3e38, 0.0) for everywhere in (False, True)]
    + [(value, part, False) for value in (math.nan, 0.0) for part in ("q_proj", "v_proj")],
)
def test_degenerate_values_are_reported_and_not_fatal(value, part, everywhere):
    model = llama()

    def change(module, inputs, output):
        changed = output.clone()
        changed[... if everywhere else (-1, -1, 0)] = value
        return changed

    getattr(model.model.layers[0].self_attn, part).register_forward_hook(change)
    with NormMonitor(model) as monitor:
        monitor.arm()
        model(IDS)
        rows = [row for row in monitor.report() if row.layer.endswith("0.self_attn")]
        assert len(rows) == 4 and all(row.status in STATUSES for row in rows)
        monitor.diagnostics()
    if not math.isfinite(value) and part != "v_proj":
        assert rows[0].status == "not-certified" and "non-finite logits" in rows[0].why and rows[0].degree is None
    if value == 0:
        assert rows[-1].status == "bounded-but-slow"


# PEFT asks transformers for names that are going away
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["leanstep", "peft"])
def test_the_adapters_part_is_told_apart(kind):
    model = llama()
    if kind == "leanstep":
        from leanstep.lora import LoraConfig, apply_lora

        apply_lora(model, LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"]))
    else:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"]))
    layers = [m for n, m in model.named_modules() if n.endswith("q_proj")]
    factors = [(m.lora_A.weight, m.lora_B.weight) if kind == "leanstep" else (
        m.lora_A["default"].weight, m.lora_B["default"].weight) for m in layers]  # fmt: skip
    with torch.no_grad():
        factors[0][1].normal_(generator=torch.Generator().manual_seed(1)).mul_(100)
    x = torch.randn(1, 5, 32)
    torch.testing.assert_close(adapter_output(layers[0], x), 4 * x @ factors[0][0].T @ factors[0][1].T)
    inputs = []
    handle = layers[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with NormMonitor(model) as monitor:
        monitor.arm()
        model(IDS)
    handle.remove()
    want = (4 * inputs[0] @ factors[0][0].T @ factors[0][1].T).unflatten(-1, (4, 8)).abs().amax(dim=(0, 1, 3))
    rows = monitor.report()
    for row, size in zip(rows[:4], want.tolist(), strict=True):
        assert row.dominant == "sBA" and row.of == "q" and "alpha / r" in row.why
        assert row.adapter == pytest.approx(size * 8**-0.25, rel=1e-4)
    assert all(row.adapter == 0 for row in rows[4:])


# PEFT asks transformers for names that are going away
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["leanstep", "peft", "both adapters of peft", "conv1d", "zeros"])
def test_the_parts_are_of_the_weight_that_is_used(kind):
    """With DoRA, base weight and adapter times magnitude / norm; with kept zeros, the masked product."""
    from leanstep.lora import LoraConfig, apply_lora, keep_zeros, merge

    model, part = (gpt2(), "c_attn") if kind == "conv1d" else (llama(), "k_proj")
    layers = [module for name, module in model.named_modules() if name.endswith(part)]
    settings = dict(r=2, lora_alpha=8, use_dora=kind != "zeros")
    names = ["default"]
    if "peft" in kind:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(**settings, target_modules=[part]))
        if "both" in kind:
            names.append("b")
            model.add_adapter("b", peft.LoraConfig(**settings, target_modules=[part]))
            model.base_model.set_adapter(names)
    else:
        with torch.no_grad():
            layers[0].weight[::2] = 0
        apply_lora(model, LoraConfig(**settings, target_modules=[part]))
        if kind == "zeros":
            keep_zeros(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=generator)
            elif "magnitude" in name:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) + 1)
    layer = next(module for name, module in model.named_modules() if name.endswith(part))
    base_weight = getattr(layer, "base_layer", layer).weight.detach().clone()
    base_weight = base_weight.T if kind == "conv1d" else base_weight
    if "peft" in kind:
        # what each adapter's part is, by PEFT's own numbers
        used, adapter = base_weight.clone(), torch.zeros_like(base_weight)
        for name in names:
            delta = layer.get_delta_weight(name).detach()
            norm = (base_weight + delta).norm(dim=1)
            c = (layer.lora_magnitude_vector[name].weight.detach() / norm)[:, None]
            used, adapter = c * used, c * (adapter + delta)
    else:
        other = copy.deepcopy(model)
        merge(other)
        whole = next(module for name, module in other.named_modules() if name.endswith(part)).weight.detach()
        whole = whole.T if kind == "conv1d" else whole
        c = 1.0
        if settings["use_dora"]:
            c = (layer.lora_magnitude_vector / layer.norms()).detach()[:, None]
        used, adapter = c * base_weight, whole - c * base_weight
    x = torch.randn(1, 5, 32, generator=generator)
    torch.testing.assert_close(adapter_output(layer, x), x @ adapter.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole_weight(layer), used + adapter, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x) - layer(0 * x), x @ (used + adapter).T, rtol=1e-3, atol=1e-4)


def test_no_identity_is_pushed_through_the_factors():
    from leanstep.lora import LoraConfig, apply_lora

    layer = torch.nn.Sequential(torch.nn.Linear(4000, 30))
    layer = apply_lora(layer, LoraConfig(r=2, target_modules=["0"], use_dora=True))[0]
    with FlopCounterMode(display=False) as counter:
        whole_weight(layer)
    # the product of the factors; an identity would take 4000 times as much
    assert counter.get_total_flops() <= 2 * 2 * 4000 * 30


def test_padding_counts_for_nothing_and_other_masks_are_said():
    model = llama()
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    with NormMonitor(model) as monitor:
        monitor.arm()
        model(IDS, attention_mask=mask)
        padded = monitor.report()
        changed = IDS.clone()
        changed[0, :6] = 7
        monitor.arm()
        model(changed, attention_mask=mask)
        assert [row.gamma_k for row in monitor.report()] == pytest.approx([row.gamma_k for row in padded], rel=1e-5)
        window = torch.ones(24, 24, dtype=torch.bool).tril().triu(-3)[None, None].expand(2, 1, -1, -1)
        monitor.arm()
        model(IDS, attention_mask=window)
        assert "neither causal nor padding" in monitor.skipped["model.layers.0.self_attn"]


def test_what_cannot_be_monitored_is_refused_and_the_model_unchanged():
    with pytest.raises(ValueError, match=r"Linear has no attention layers"):
        NormMonitor(torch.nn.Linear(2, 2))
    model = llama()
    for settings, message in [(dict(tolerance=0), "tolerance > 0"), (dict(speed=-1.0), "speed > 0")]:
        with pytest.raises(ValueError, match=message):
            NormMonitor(model, **settings)
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("_leanstep_tap" in vars(module) for module in model.modules())


def test_a_model_of_which_nothing_can_be_measured_is_said_to_be_one():
    sizes = dict(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(T5Config(**sizes, pad_token_id=0, eos_token_id=1)).eval()
    with NormMonitor(model) as monitor:
        model(input_ids=IDS, labels=IDS)
        monitor.arm()
        message = "no attention layer of T5ForConditionalGeneration could be measured: a bias by position"
        with pytest.warns(UserWarning, match=message):
            model(input_ids=IDS, labels=IDS)
        assert monitor.report() == [] and set(monitor.skipped.values()) == {"a bias by position (position_bias)"}


REASONS = {
    "llama": ({}, "its attention was not called by name"),
    "gpt_oss": ({}, "attention sinks"),
    "mistral": ({"sliding_window": 4}, "a mask that is neither causal nor padding: windows"),
    "gemma3": ({"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}, "windows"),
}


@pytest.mark.parametrize("name", REASONS)
def test_every_layer_is_measured_or_has_a_reason(name):
    class_name, settings = CAUSAL[name]
    changes, reason = REASONS[name]
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**settings, **changes)).eval()
    if name == "llama":
        model.model.layers[0].self_attn.forward = lambda hidden_states, **others: (hidden_states, None)
    ids = torch.randint(VOCABULARY, (1, 12))
    with warnings.catch_warnings(record=True) as caught, NormMonitor(model) as monitor:
        warnings.simplefilter("always")
        monitor.arm()
        model(ids)
        measured, layers = {row.layer for row in monitor.report()}, set(monitor.layers().keys())
        assert measured | set(monitor.skipped) == layers and not measured & set(monitor.skipped)
        assert all(reason in text for text in monitor.skipped.values()) and monitor.skipped
    told = [str(w.message) for w in caught if "NormMonitor: no attention layer" in str(w.message)]
    assert len(told) == (not measured) and all(reason in text for text in told)
