"""Weights whose rows are several matrices: every block is stepped as a matrix of its own."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    BloomConfig,
    DbrxConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    ModernBertConfig,
    MptConfig,
    PersimmonConfig,
    Phi3Config,
    Qwen3MoeConfig,
)

from leanstep._torch import attention_projections, is_conv1d
from leanstep.kernels.reference.quantization import dequantize
from leanstep.optimizers import LANTON, SinkGD, create, param_groups
from leanstep.optimizers.sinkgd import blocks as sinkgd_blocks

LANTONS = {
    "plain": {"alpha": 0.5},
    "muon": {"alpha": "auto", "scaling": "muon", "nesterov": True, "noise_every": 2},
    "svd": {"alpha": 0.5, "nuclear": "svd"},
    "base": {"noise_adaptive": False, "foreach": False},
}
SINKS = {
    "plain": {},
    "momentum": {"momentum": 0.9, "nesterov": True},
    "momentum after": {"momentum": 0.9, "momentum_order": "post", "base_width": 4},
    "balanced": {"algorithm": "balanced", "momentum": 0.9},
}
# shape, blocks, settings
LAYOUTS = {
    "heads": ((12, 8), 4, {}),
    "fused": ((12, 8), (2, 6, 4), {}),
    "stored (in, out)": ((8, 12), (2, 6, 4), {"transposed": True}),
    "experts": ((3, 12, 8), 6, {}),
    "experts stored (in, out)": ((3, 8, 12), (5, 7), {"transposed": True}),
    "convolution": ((12, 4, 3), 6, {"flatten": True}),
}


def step_both(cls, layout, dtype=torch.float64, steps=4, **settings):
    """Train a parameter with blocks, and its blocks as parameters; return both, the latter joined, and optimizers."""
    shape, blocks, more = LAYOUTS[layout]
    dim = -1 if more.get("transposed") else 0 if more.get("flatten") else -2
    whole = nn.Parameter(torch.randn(shape, dtype=dtype))
    parts = [nn.Parameter(part.detach().clone()) for part in whole.split(blocks, dim)]
    group = {"norm": "rms"} if cls is LANTON else {"algorithm": settings.pop("algorithm", "sinkgd")}
    optimizers = [
        cls([{"params": params, **group, **more, **extra}], lr=0.1, weight_decay=0.1, **settings)
        for params, extra in (([whole], {"blocks": blocks}), (parts, {}))
    ]
    sizes = torch.arange(1, shape[dim] + 1, dtype=dtype).view(
        [-1 if d == dim % len(shape) else 1 for d in range(len(shape))]
    )
    for step in range(steps):
        whole.grad = torch.randn(shape, dtype=dtype) * sizes
        if step == 2:  # a head without gradient keeps its estimate and its last gradient
            whole.grad.narrow(dim, 0, parts[0].shape[dim]).zero_()
        for part, grad in zip(parts, whole.grad.split(blocks, dim), strict=True):
            part.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    return whole.detach(), torch.cat(parts, dim).detach(), optimizers


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", LANTONS.values(), ids=LANTONS)
def test_lanton_steps_blocks_as_matrices(layout, settings):
    whole, parts, (optimizer, other) = step_both(LANTON, layout, **settings)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-12)
    factors = [sorted(row["factor"] for row in o.noise_report()) for o in (optimizer, other)]
    assert factors[0] == pytest.approx(factors[1], rel=1e-12)
    if settings.get("noise_adaptive", True):
        assert len(set(factors[0])) > 1  # noise that differs by block


# the balanced rule takes no stacks
SINK_CASES = [
    pytest.param(layout, settings, id=f"{layout}-{name}")
    for layout, (shape, *_) in LAYOUTS.items()
    for name, settings in SINKS.items()
    if settings.get("algorithm") != "balanced" or len(shape) == 2
]


@pytest.mark.parametrize(("layout", "settings"), SINK_CASES)
def test_sinkgd_steps_blocks_as_matrices(layout, settings):
    whole, parts, _ = step_both(SinkGD, layout, scale=1.0, **settings)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rounding", ["kahan", "master", "split", "stochastic"])
def test_rounding_states_are_those_of_the_parameter(rounding):
    whole, parts, (optimizer, _) = step_both(SinkGD, "fused", torch.bfloat16, rounding=rounding)
    state = next(iter(optimizer.state.values()))
    if rounding == "stochastic":  # other bits for every block
        assert float(state["step"]) == 4
        torch.testing.assert_close(whole, parts, rtol=2**-6, atol=2**-6)
    else:
        assert torch.equal(whole, parts)
        assert all(value.shape == (12, 8) for value in state.values())


def test_updates_of_heads_have_their_own_size():
    """RMS lr * scale for SinkGD; operator norm lr * sqrt(m / n) for LANTON, with m the rows of a head."""
    for cls, settings in ((SinkGD, {"scale": 1.0}), (LANTON, {"nuclear": "svd", "ns_coefficients": "classic_quintic"})):
        param = nn.Parameter(torch.zeros(12, 16, dtype=torch.float64))
        param.grad = torch.randn(12, 16, dtype=torch.float64) * torch.logspace(-6, 0, 12, dtype=torch.float64)[:, None]
        group = {"algorithm": "sinkgd"} if cls is SinkGD else {"norm": "rms"}
        cls([{"params": [param], "blocks": 4, **group}], lr=0.5, **settings).step()
        for head in param.detach().split(4):
            if cls is SinkGD:
                assert head.square().mean().sqrt() == pytest.approx(0.5, rel=1e-6)
            else:
                assert torch.linalg.matrix_norm(head, 2) == pytest.approx(0.5 * math.sqrt(4 / 16), rel=1e-2)


def test_a_nonfinite_gradient():
    """LANTON leaves the whole parameter; SinkGD the block."""
    for cls in (LANTON, SinkGD):
        group = {"norm": "rms"} if cls is LANTON else {"algorithm": "sinkgd"}
        param = nn.Parameter(torch.ones(8, 6))
        optimizer = cls([{"params": [param], "blocks": 4, **group}], lr=0.1)
        param.grad = torch.randn(8, 6)
        param.grad[1, 2] = math.nan
        optimizer.step()
        assert optimizer.nonfinite_count() == 1
        assert torch.equal(param[:4], torch.ones(4, 6))
        assert torch.equal(param[4:], torch.ones(4, 6)) == (cls is LANTON)


@pytest.mark.parametrize("cls", [LANTON, SinkGD])
def test_blocks_are_saved_with_the_groups(cls):
    group = {"norm": "rms", "algorithm": "sinkgd", "blocks": (2, 6)}
    group.pop("algorithm" if cls is LANTON else "norm")
    settings = {"lr": 0.1} if cls is LANTON else {"lr": 0.1, "momentum": 0.9}
    param = nn.Parameter(torch.randn(8, 6))
    optimizer = cls([{"params": [param], **group}], **settings)
    param.grad = torch.randn(8, 6)
    optimizer.step()
    twin = nn.Parameter(param.detach().clone())
    other = cls([{"params": [twin], **group, "blocks": 4}], **settings)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["blocks"] == (2, 6)
    param.grad = torch.randn(8, 6)
    twin.grad = param.grad.clone()
    optimizer.step()
    other.step()
    assert torch.equal(param, twin)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["blocks"] = (2, 5)
    with pytest.raises(ValueError, match=r"blocks=\(2, 5\) have 7 rows"):
        other.load_state_dict(saved)


@pytest.mark.parametrize("cls", [LANTON, SinkGD])
def test_blocks_that_do_not_fit_are_refused(cls):
    group = {"params": [nn.Parameter(torch.randn(8, 6))], "norm": "rms", "algorithm": "sinkgd"}
    group.pop("algorithm" if cls is LANTON else "norm")
    for blocks in (0, -1, (), (4, 0), 2.0, True, "4", (4, "4")):
        with pytest.raises(ValueError, match="Invalid blocks"):
            cls([{**group, "blocks": blocks}])
    for blocks, covered in (((4, 3), 7), (3, 6), (16, 0)):
        with pytest.raises(ValueError, match=f"have {covered} rows, and .* has 8"):
            cls([{**group, "blocks": blocks}])
    with pytest.raises(ValueError, match=r"\(in, out\), has 6"):
        cls([{**group, "blocks": 8, "transposed": True}])


def test_sinkgd_scales_whole_matrices_to_an_operator_norm():
    group = {"params": [nn.Parameter(torch.randn(8, 6))], "algorithm": "sinkgd", "blocks": 4}
    with pytest.raises(ValueError, match="spectral scales whole matrices"):
        SinkGD([{**group, "spectral": "muon"}])


def values(optimizer, param, key):
    """A state of 8 bits, decoded."""
    state = optimizer.state[param]
    return dequantize(state[key], state[f"{key}_scale"], torch.float32)


WIDE = (
    {"shape": (12, 150), "blocks": (2, 7, 3)},
    {"shape": (150, 12), "blocks": 4, "transposed": True},
    {"shape": (2, 12, 150), "blocks": (5, 7)},
    {"shape": (2, 150, 12), "blocks": 6, "transposed": True},
)


@pytest.mark.parametrize(
    "options", [{}, {"nesterov": True}, {"momentum_order": "post"}], ids=["pre", "nesterov", "post"]
)
@pytest.mark.parametrize("layout", WIDE, ids=str)
def test_momenta_of_8_bits_step_blocks_as_their_values_would(layout, options):
    """A step from codes is a step from the fp32 momentum that they stand for, and stores it to the error of a code."""
    shape, group = layout["shape"], {**layout, **options, "algorithm": "sinkgd", "momentum": 0.9}
    del group["shape"]
    params = [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1))) for _ in range(2)]
    eight, wide = (
        SinkGD([{"params": [param], **group, "momentum_dtype": dtype}], lr=0.1)
        for param, dtype in zip(params, (torch.int8, None), strict=True)
    )
    for step in range(3):
        for param in params:
            param.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step + 2))
        if step:
            wide.state[params[1]]["momentum_buffer"].copy_(values(eight, params[0], "momentum_buffer"))
        for optimizer in (eight, wide):
            optimizer.step()
        assert torch.equal(*params)
        stored, exact = values(eight, params[0], "momentum_buffer"), wide.state[params[1]]["momentum_buffer"]
        assert ((stored - exact).abs() <= (exact.abs() + exact.abs().amax() / 247) / 15).all()
        assert not torch.equal(stored, exact)
    assert eight.state[params[0]]["step"] == 3


def test_a_bad_gradient_leaves_its_block_and_a_momentum_of_8_bits():
    param = nn.Parameter(torch.randn(12, 150))
    optimizer = SinkGD(
        [{"params": [param], "algorithm": "sinkgd", "blocks": 4}], lr=0.1, momentum=0.9, momentum_dtype=torch.int8
    )
    param.grad = torch.randn(12, 150)
    optimizer.step()
    weight, momentum = param.detach().clone(), values(optimizer, param, "momentum_buffer")
    param.grad[5, 7] = float("nan")
    optimizer.step()
    assert torch.equal(param[4:8], weight[4:8])
    assert (param[:4] != weight[:4]).all() and (param[8:] != weight[8:]).all()
    after = values(optimizer, param, "momentum_buffer")
    torch.testing.assert_close(after[4:8], momentum[4:8], rtol=0.07, atol=1e-5)
    assert optimizer.nonfinite_count() == 1


def test_momenta_of_8_bits_may_be_decoded_one_matrix_at_a_time(monkeypatch):
    results = []
    for limit in (sinkgd_blocks._ENTRIES_TOGETHER, 1):
        monkeypatch.setattr(sinkgd_blocks, "_ENTRIES_TOGETHER", limit)
        params = [nn.Parameter(torch.randn(12, 150, generator=torch.Generator().manual_seed(i))) for i in range(3)]
        optimizer = SinkGD(
            [{"params": params, "algorithm": "sinkgd", "blocks": 4}], lr=0.1, momentum=0.9, momentum_dtype=torch.int8
        )
        for step in range(2):
            for i, param in enumerate(params):
                param.grad = torch.randn(12, 150, generator=torch.Generator().manual_seed(3 * step + i + 3))
            optimizer.step()
        results.append([*params, *(optimizer.state[p]["momentum_buffer"] for p in params)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("layout", WIDE[:2], ids=str)
def test_lanton_directs_blocks_by_its_momentum_of_8_bits(layout):
    """The weights move along O of the values that were stored; a block with a gradient of zeros keeps its G'."""
    shape, group = layout["shape"], {key: layout[key] for key in layout if key != "shape"}
    params = [nn.Parameter(torch.zeros(shape)) for _ in range(2)]
    dtypes = {"momentum_dtype": torch.int8, "noise_dtype": torch.int8}
    eight = LANTON([{"params": params[:1], "norm": "rms", **group, **dtypes}], lr=0.1)
    one_step = LANTON([{"params": params[1:], "norm": "rms", **group}], lr=0.1, betas=(0.0, 0.9), noise_adaptive=False)
    params[0].grad = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    eight.step()
    params[1].grad = values(eight, params[0], "momentum_buffer")
    one_step.step()
    torch.testing.assert_close(*params, rtol=1e-4, atol=1e-5)
    first = slice(0, group["blocks"] if isinstance(group["blocks"], int) else group["blocks"][0])
    rows = params[0].grad.mT if group.get("transposed") else params[0].grad
    stored = values(eight, params[0], "previous_grad")
    torch.testing.assert_close(stored, params[0].grad, rtol=0.07, atol=0.02)
    rows[first] = 0
    eight.step()
    again = values(eight, params[0], "previous_grad")
    stored, again = (t.mT if group.get("transposed") else t for t in (stored, again))
    torch.testing.assert_close(again[first], stored[first], rtol=0.07, atol=0.02)
    assert (stored[first].abs() > 0.1).any()


def test_rules_without_matrices_ignore_blocks():
    for cls, group in ((LANTON, {"norm": "sign"}), (SinkGD, {"algorithm": "adamw"})):
        params = [nn.Parameter(torch.ones(8, 6)) for _ in range(2)]
        for param, blocks in zip(params, (None, 5), strict=True):
            optimizer = cls([{"params": [param], **group, "blocks": blocks}], lr=0.1)
            for step in range(2):
                param.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
                optimizer.step()
        assert torch.equal(*params)


# ---- blocks of models

SMALL = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
GQA = {**SMALL, "num_key_value_heads": 2}
CONFIGS = {
    "llama": lambda: LlamaConfig(**GQA),
    "phi 3": lambda: Phi3Config(**GQA, pad_token_id=0),
    "gpt 2": lambda: GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=4),
    "gpt-neox": lambda: GPTNeoXConfig(**SMALL),
    "bloom": lambda: BloomConfig(vocab_size=32, hidden_size=32, n_layer=1, n_head=4),
    "persimmon": lambda: PersimmonConfig(**SMALL, qk_layernorm=False, partial_rotary_factor=0.5),
    "mpt": lambda: MptConfig(vocab_size=32, d_model=32, n_layers=1, n_heads=4),
    "dbrx": lambda: DbrxConfig(
        vocab_size=32, d_model=32, n_layers=1, n_heads=4,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1},
    ),
    "modernbert": lambda: ModernBertConfig(**SMALL, pad_token_id=0),
    "qwen 3": lambda: Qwen3MoeConfig(**GQA, head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2),
}  # fmt: skip
HEADS = {
    "llama": {"q_proj": 8, "k_proj": 8},
    "phi 3": {"qkv_proj": (8,) * 6 + (16,), "gate_up_proj": 48},
    "gpt 2": {"c_attn": (8,) * 8 + (32,)},
    "gpt-neox": {"query_key_value": 8},
    "bloom": {"query_key_value": 8},
    "persimmon": {"query_key_value": 8},
    "mpt": {"Wqkv": (8,) * 8 + (32,)},
    "dbrx": {"Wqkv": (8,) * 6 + (16,)},
    "modernbert": {"Wqkv": (8,) * 8 + (32,)},
    "qwen 3": {"q_proj": 8, "k_proj": 8, "gate_up_proj": 24},
}
FUSED = {
    "llama": {},
    "phi 3": {"qkv_proj": (32, 16, 16), "gate_up_proj": 48},
    "gpt 2": {"c_attn": 32},
    "mpt": {"Wqkv": 32},
    "modernbert": {"Wqkv": 32},
    "dbrx": {"Wqkv": (32, 16, 16)},
    "qwen 3": {"gate_up_proj": 24},
    "bloom": {},
}


def blocks_of(model, split):
    """Blocks by the last word of the parameter's name, ``weight`` left out."""
    return {
        name.removesuffix(".weight").rpartition(".")[2]: group["blocks"]
        for group in param_groups(model, split=split)
        for name, _ in group["params"]
        if "blocks" in group
    }


@pytest.mark.parametrize("family", HEADS)
def test_heads_are_those_of_the_config(family):
    with torch.device("meta"):
        model = AutoModel.from_config(CONFIGS[family]())
    assert blocks_of(model, "heads") == HEADS[family]
    assert blocks_of(model, "fused") == FUSED.get(family, {})
    assert blocks_of(model, None) == {}
    for cls in (LANTON, SinkGD):
        cls(param_groups(model, split="heads"))


@pytest.mark.parametrize("family", CONFIGS)
def test_the_rows_of_a_head_decide_its_attention_only(family):
    """Zero the rows of one head of Q or K: its attention changes, or that of its group, and no other head's."""
    model = AutoModel.from_config(CONFIGS[family](), attn_implementation="eager").eval()
    (layer,) = [module for module in model.modules() if attention_projections(module)]
    before, parts = attention_of(model), attention_projections(layer)
    for name in ("q", "k"):
        part, group = parts[name], parts["q"].heads // parts[name].heads
        weight = part.module.weight.detach()
        saved = weight.clone()
        for head in range(part.heads):
            (weight.mT if is_conv1d(part.module) else weight).narrow(0, part.start + head * part.stride, 8).zero_()
            changed = (attention_of(model) != before).flatten(1).any(dim=1)
            assert changed.nonzero().flatten().tolist() == [head * group + i for i in range(group)], (name, head)
            weight.copy_(saved)


def attention_of(model):
    """Attention weights of the first layer, [heads, L, L]."""
    with torch.no_grad():
        return model(torch.arange(6)[None], output_attentions=True).attentions[0][0]


def test_the_summary_prints_the_blocks():
    with torch.device("meta"):
        model = AutoModel.from_config(CONFIGS["phi 3"]())
    lines = param_groups(model, split="heads").summary().splitlines()
    assert lines[0].split()[6] == "rows"
    assert any("6 x 8 + 16" in line and "qkv_proj" in line for line in lines)
    assert any("48 each" in line and "gate_up_proj" in line for line in lines)
    assert "rows" not in param_groups(model).summary()


def test_torchs_attention_and_layers_of_unknown_layout():
    class Gated(nn.Module):
        """Queries and a gate in one weight, as in Qwen3-Next: the rows are not those of the heads alone."""

        num_heads, head_dim = 4, 8

        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(32, 64), nn.Linear(32, 32)

    assert blocks_of(nn.MultiheadAttention(32, 4), "heads") == {"in_proj_weight": (8,) * 8 + (32,)}
    assert blocks_of(nn.MultiheadAttention(32, 4), "fused") == {"in_proj_weight": 32}
    assert blocks_of(nn.Sequential(Gated()), "heads") == {}


def test_an_override_gives_blocks_and_split_is_checked():
    model = nn.Sequential(nn.Linear(6, 12))
    groups = param_groups(model, split="heads", overrides=[("0.weight", {"blocks": (4, 8)})])
    assert {group["name"]: group.get("blocks") for group in groups} == {"bias": None, "0.weight": (4, 8)}
    with pytest.raises(ValueError, match="expected split to be one of"):
        param_groups(model, split="head")
    with pytest.raises(ValueError, match="not Lion"):
        create(model, "lion", split="heads", say=None)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [LANTON, SinkGD])
def test_steps_compile_as_one_graph(cls):
    group = {"norm": "rms", "blocks": 4} if cls is LANTON else {"algorithm": "sinkgd", "blocks": 4, "momentum": 0.9}
    params = [nn.Parameter(torch.randn(8, 6, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
    optimizers = [cls([{"params": [param], **group}], lr=torch.tensor(0.1)) for param in params]
    steps = [optimizers[0].step, torch.compile(optimizers[1].step, backend="eager", fullgraph=True)]
    for param, step in zip(params, steps, strict=True):
        param.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
        step()
    torch.testing.assert_close(*params, rtol=1e-5, atol=1e-6)


def test_the_blocks_of_a_matrix_count_as_one_in_the_median_of_the_noise():
    """alpha="auto" is a size of noise of the model; the quiet heads of Q and K must not decide it by their number."""
    quiet, *loud = (nn.Parameter(torch.zeros(16, 8, dtype=torch.float64)) for _ in range(3))
    groups = [{"params": [quiet], "blocks": 2}, {"params": loud}]
    optimizer = LANTON(groups, lr=0.1, alpha="auto", norm="rms", nuclear="svd")
    for step in range(2):
        for param, scale in zip((quiet, *loud), (1e-3, 1.0, 1.0), strict=True):
            param.grad = scale * torch.randn(16, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.step()
    factors = [row["factor"] for row in optimizer.noise_report()]
    assert len(factors) == 10 and min(factors[:8]) > 0.99
    # one of them is the median, with f = 2^(-1/4); where blocks count one by one, both are below 0.04
    assert min(factors[8:]) > 0.7
