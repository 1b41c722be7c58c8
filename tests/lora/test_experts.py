"""Adapters of the fused weights of experts (``target_parameters``), against PEFT and against dense sums."""

import copy
import pickle

import peft
import pytest
import torch
from architectures import make
from pruned_models import VOCABULARY

from leanstep.lora import (
    LoraConfig,
    apply_lora,
    load_adapter,
    lora_groups,
    merge,
    remove_lora,
    save_adapter,
    set_adapters,
    unmerge,
)
from leanstep.lora.apply import adapted_experts
from leanstep.lora.merge import merged_state_dict

# a mixture of one kind of adapters is what is tested
pytestmark = pytest.mark.filterwarnings("ignore:save_adapter. PEFT reads:UserWarning")

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next", "llama4"]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def tokens():
    return torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


def adapted(name, targets=BOTH, base=None, **settings):
    config = LoraConfig(
        **{"r": 2, "lora_alpha": 6, "init_lora_weights": False, "target_parameters": targets, **settings}
    )
    torch.manual_seed(1)
    return apply_lora(make(name) if base is None else base, config)


def gradients(model):
    model.zero_grad(set_to_none=True)
    loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("targets", [BOTH, ["experts.down_proj"], ["experts.gate_up_proj"]], ids=str)
@pytest.mark.parametrize("name", MIXTURES)
def test_the_saved_adapter_opens_in_peft_and_back(name, targets, tmp_path):
    model = adapted(name, targets).eval()
    save_adapter(model, tmp_path / "ours")
    assert not torch.allclose(model(tokens()).logits, make(name).eval()(tokens()).logits, atol=1e-4)
    theirs = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(tokens()).logits, model(tokens()).logits, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        loaded = load_adapter(make(name), tmp_path / folder).eval()
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    # also over adapters that are there already
    again = load_adapter(adapted(name, targets, init_lora_weights=True), tmp_path / "theirs").eval()
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("name", MIXTURES)
def test_gradients_are_those_of_the_dense_sums(name):
    fast = adapted(name, base=make(name).double(), fused_blocks=False)
    slow = copy.deepcopy(fast)
    # grouped products have no fp64
    slow.config.get_text_config()._experts_implementation = "eager"
    for _, module in adapted_experts(slow):
        for adapter in module.lora.values():
            adapter.fast_path = False
    standard = name != "llama4"  # whose experts multiply in a forward of their own
    assert all(module.fast_path.on == standard for _, module in adapted_experts(fast))
    (loss, ours), (wanted_loss, wanted) = gradients(fast), gradients(slow)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-10, atol=1e-12)
    assert set(ours) == set(wanted) and all(".lora_" in key for key in ours)
    for key, value in wanted.items():
        assert value.abs().sum() > 0
        torch.testing.assert_close(ours[key], value, rtol=1e-8, atol=1e-12)


def saved_shapes(model):
    """Shapes of the tensors that autograd saves, without those of parameters."""
    weights, shapes = {p.untyped_storage().data_ptr() for p in model.parameters()}, []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: shapes.append((t.untyped_storage().data_ptr(), tuple(t.shape))) or t, lambda t: t
    ):
        model(tokens(), labels=tokens())
    return {shape for address, shape in shapes if address not in weights}


def test_the_fast_path_keeps_no_sum_of_a_weights_size():
    model = adapted("qwen3_moe")
    weights = {tuple(getattr(module, leaf).shape) for _, module in adapted_experts(model) for leaf in module.lora}
    weights |= {(e, n, m) for e, m, n in weights} | {shape[1:] for shape in weights}
    assert not saved_shapes(model) & weights
    for _, module in adapted_experts(model):
        for adapter in module.lora.values():
            adapter.fast_path = False
    assert saved_shapes(model) & weights


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
def test_merged_unmerged_off_and_removed_it_is_what_it_should_be(name):
    base, model = make(name).eval(), adapted(name, target_modules=["q_proj"]).eval()
    plain, trained = base(tokens()).logits, model(tokens()).logits
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(tokens()).logits, trained, rtol=0, atol=0)
    set_adapters(model, False)
    torch.testing.assert_close(model(tokens()).logits, plain, rtol=1e-5, atol=1e-6)
    set_adapters(model, True)
    state = merged_state_dict(model)
    report = merge(model, backup=True)
    assert any("experts.down_proj" in key for key in report.layers) and set(state) == set(base.state_dict())
    torch.testing.assert_close(model(tokens()).logits, trained, rtol=1e-4, atol=1e-5)
    base.load_state_dict(state)
    torch.testing.assert_close(base(tokens()).logits, trained, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert torch.equal(model(tokens()).logits, trained)
    merge(model)
    unmerge(model)
    torch.testing.assert_close(model(tokens()).logits, trained, rtol=1e-4, atol=1e-5)
    removed = remove_lora(model)
    torch.testing.assert_close(removed(tokens()).logits, plain, rtol=1e-4, atol=1e-5)
    assert set(removed.state_dict()) == set(base.state_dict()) and not list(adapted_experts(removed))


# PEFT looks for the keys among modules, and follows them for parameters all the same
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_ranks_and_scales_follow_patterns_and_lora_plus_knows_the_factors(tmp_path):
    settings = {"rank_pattern": {"experts.down_proj": 3}, "alpha_pattern": {"gate_up_proj": 4.0}}
    model = adapted("qwen3_moe", **settings).eval()
    module = next(module for _, module in adapted_experts(model))
    assert {leaf: (a.rank, a.scale) for leaf, a in module.lora.items()} == {
        "gate_up_proj": (2, 2.0), "down_proj": (3, 2.0)
    }  # fmt: skip
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make("qwen3_moe"), tmp_path).eval()
    torch.testing.assert_close(theirs(tokens()).logits, model(tokens()).logits, rtol=1e-4, atol=1e-5)
    groups = lora_groups(model, lr=1e-3, lr_ratio=8)
    assert [(group["name"], group["lr"]) for group in groups] == [("lora_A", 1e-3), ("lora_B", 8e-3)]


def test_a_fresh_adapter_changes_nothing_and_a_bf16_model_trains():
    model = adapted("qwen3_moe", init_lora_weights=True).eval()
    torch.testing.assert_close(model(tokens()).logits, make("qwen3_moe").eval()(tokens()).logits, rtol=1e-5, atol=1e-6)
    model = adapted("qwen3_moe", base=make("qwen3_moe").to(torch.bfloat16), init_lora_weights=True)
    assert all(module.fast_path.on for _, module in adapted_experts(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(8):
        losses.append(gradients(model)[0])
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_parameters": ["experts.down_prj"]}, "fits no parameter of the model; did you mean .*down_proj"),
        ({"target_parameters": ["q_proj.weight"]}, "is the weight of a layer; name q_proj in target_modules"),
        ({"target_parameters": ["input_layernorm.weight"]}, "has 1 dimensions; expected a matrix, or one matrix per"),
        ({"r": 500}, r"rank 500 is larger; set at most \d+ with rank_pattern"),
        ({"lora_dropout": 0.1}, "target_parameters excludes lora_dropout, as in PEFT; unset it"),
        ({"use_dora": True}, "target_parameters excludes use_dora"),
        ({"init_lora_weights": "pissa"}, "takes init_lora_weights True, False or 'gaussian'"),
        ({"rank_pattern": {"nothing": 2}, "target_modules": ["q_proj"]}, "rank_pattern 'nothing' fits none"),
    ],
)
def test_what_cannot_be_adapted_is_refused(settings, message):
    model = make("qwen3_moe")
    with pytest.raises(ValueError, match=message):
        adapted("qwen3_moe", base=model, **settings)
    assert not any("lora" in name for name in model.state_dict())


def test_the_fast_path_alone_refuses_other_experts():
    with pytest.raises(RuntimeError, match="fast_path=True was asked for, but .* no module of experts"):
        adapted("llama4", fast_path=True)(tokens())
