"""Adapted models: what is trained, what runs fast, and that fused blocks and plain torch agree."""

import copy
import functools
import pickle
import re

import peft
import pytest
import torch
from architectures import make as make_architecture
from covering import meeting
from lora_models import (
    GPT2_TARGETS,
    LLAMA_TARGETS,
    loss_and_gradients,
    randomise,
    relative_error,
    slow_copy,
    tiny_gpt2,
    tiny_llama,
    tokens,
)
from pruned_models import VOCABULARY
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from leanstep.lora import (
    LoraConfig,
    accelerate_peft,
    apply_lora,
    keep_zeros,
    lora_groups,
    remove_lora,
    saved_bytes,
    set_adapters,
)
from leanstep.lora.layers import block
from leanstep.lora.layers.autograd import new_seed, seeded_dropout
from leanstep.lora.layers.contraction import ContractionPath

VARIANTS = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3},
    "dora": {"use_dora": True},
    "dora dropout": {"use_dora": True, "lora_dropout": 0.3},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "full": {"save": "full", "use_dora": True},
    "lora_fa": {"save": "lora_fa"},
    "patterns": {"rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 5}, "alpha_pattern": {"up_proj": 1}},
    "lora_bias": {"lora_bias": True},
}


def adapted(model=None, targets=None, **settings):
    model = tiny_llama(torch.float64) if model is None else model
    config = LoraConfig(**{"r": 4, "target_modules": targets or LLAMA_TARGETS, **settings})
    return randomise(apply_lora(model, config)).train()


@pytest.mark.parametrize("variant", VARIANTS)
def test_fast_fused_and_plain_agree(variant):
    fused = adapted(**VARIANTS[variant])
    apart = adapted(**VARIANTS[variant], fused_blocks=False)
    ids = tokens()
    wanted = loss_and_gradients(slow_copy(apart), ids)
    if VARIANTS[variant].get("lora_dropout"):
        # a group draws its seeds at once, in the order of its layers, which is that of the calls
        models = {"fused": fused, "apart": apart}
    else:
        models = {"fused": fused, "apart": apart, "eval": fused.eval()}
    for model in models.values():
        loss, gradients = loss_and_gradients(model, ids)
        torch.testing.assert_close(loss, wanted[0], rtol=1e-12, atol=0)
        assert gradients.keys() == wanted[1].keys()
        for name in gradients:
            assert relative_error(gradients[name], wanted[1][name]) < 1e-11, name


def test_conv1d_agrees_with_plain_torch():
    model = adapted(tiny_gpt2(torch.float64), GPT2_TARGETS, use_dora=True, lora_dropout=0.2)
    found, wanted = loss_and_gradients(model, tokens()), loss_and_gradients(slow_copy(model), tokens())
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-12, atol=0)
    for name in found[1]:
        assert relative_error(found[1][name], wanted[1][name]) < 1e-11


@pytest.mark.parametrize("dora", [False, True])
def test_embeddings_are_their_formula(dora):
    model = adapted(tiny_gpt2(torch.float64), ["wte"], use_dora=dora)
    layer = model.transformer.wte
    a, b = layer.lora_embedding_A, layer.lora_embedding_B
    ids = tokens()
    w = layer.weight + layer.lora.scale * (b @ a).t()
    if dora:
        w = w * (layer.lora_magnitude_vector / w.detach().norm(dim=0))
    torch.testing.assert_close(layer(ids), w[ids])
    found = torch.autograd.grad(layer(ids).square().sum(), [a, b])
    for x, y in zip(found, torch.autograd.grad(w[ids].square().sum(), [a, b]), strict=True):
        torch.testing.assert_close(x, y)
    assert layer.fast_path.on


def test_a_new_adapter_changes_nothing():
    model = tiny_llama()
    ids = tokens()
    before = model(ids).logits
    apply_lora(model, LoraConfig(target_modules="all-linear"))
    torch.testing.assert_close(model(ids).logits, before)
    apply_lora(model := tiny_llama(), LoraConfig(target_modules="all-linear", use_dora=True))
    torch.testing.assert_close(model(ids).logits, before)


def test_what_is_trained():
    model = apply_lora(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"model.layers.{i}.self_attn.q_proj.lora_{factor}.weight" for i in range(2) for factor in ("A", "B")
    }
    gpt2 = apply_lora(tiny_gpt2(), LoraConfig(r=2, target_modules=["c_attn"], bias="lora_only"))
    biases = {name for name, p in gpt2.named_parameters() if p.requires_grad and name.endswith("bias")}
    assert biases == {f"transformer.h.{i}.attn.c_attn.bias" for i in range(2)}
    gpt2 = apply_lora(tiny_gpt2(), LoraConfig(r=2, target_modules=["c_attn"], bias="all", modules_to_save=["ln_f"]))
    assert all(p.requires_grad for name, p in gpt2.named_parameters() if name.endswith("bias"))
    assert gpt2.transformer.ln_f.weight.requires_grad
    assert not gpt2.transformer.wte.weight.requires_grad


@pytest.mark.filterwarnings("ignore:apply_lora. lm_head.weight was one parameter")
def test_a_tied_module_to_save_becomes_its_own():
    model = tiny_gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    apply_lora(model, LoraConfig(target_modules=["c_attn"], modules_to_save=["lm_head"]))
    assert model.lm_head.weight.requires_grad
    assert not model.transformer.wte.weight.requires_grad


def test_names_of_the_base_stay_and_state_dicts_load():
    model, plain = adapted(), tiny_llama(torch.float64)
    names = dict(plain.named_parameters())
    assert names.keys() <= dict(model.named_parameters()).keys()
    assert isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all("lora_" in name for name in missing)


def test_removing_gives_the_model_back():
    model = tiny_llama()
    classes = {name: type(module) for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    remove_lora(apply_lora(model, LoraConfig(target_modules="all-linear", use_dora=True)))
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert not hasattr(model, "lora_config")


def test_adapters_can_be_turned_off():
    plain, model = tiny_llama(torch.float64), adapted()
    ids = tokens()
    assert not torch.allclose(model(ids).logits, plain(ids).logits)
    set_adapters(model, False)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert model.model.layers[0].mlp.up_proj.fast_path == (False, "the adapter is disabled: the base layer runs")
    set_adapters(model, True)
    assert not torch.allclose(model(ids).logits, plain(ids).logits)


def test_every_layer_says_whether_it_is_fast():
    model = adapted()
    layer, block = model.model.layers[0].self_attn.q_proj, model.model.layers[0].mlp
    assert layer.fast_path.on and block.fast_path.on
    layer.weight.requires_grad_(True)
    assert layer.fast_path == (False, "the base weight is trained, and its gradient is a full matrix")
    x = torch.randn(3, 32, dtype=torch.float64)
    layer(x).sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape
    layer.lora.fast_path = True
    with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn\.q_proj: fast_path=True was asked for, but the base"):
        layer(x)
    block.up_proj.register_forward_hook(lambda *_: None)
    assert block.fast_path == (False, "up_proj has hooks, which one function for the block would skip")


def test_hooks_see_their_layers_output():
    model = adapted()
    seen = []
    for name in ("q_proj", "k_proj"):
        module = getattr(model.model.layers[0].self_attn, name)
        module.register_forward_hook(lambda m, args, y, name=name: seen.append((name, y.shape[-1])))
    model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda m, args, y: seen.append(("down_proj", y.shape[-1]))
    )
    model(tokens())
    assert seen == [("q_proj", 32), ("k_proj", 16), ("down_proj", 32)]


def test_layers_with_inputs_of_their_own_leave_the_group():
    model = adapted()
    attention = model.model.layers[0].self_attn
    x, other = torch.randn(3, 32, dtype=torch.float64), torch.randn(3, 32, dtype=torch.float64)
    group = attention.q_proj.siblings
    q, k = attention.q_proj(x), attention.k_proj(other)
    assert group.broken
    path = attention.v_proj.fast_path
    assert path.on and path.reason.endswith(
        "for this layer alone: its sibling layers got other inputs, so each layer saves its input"
    )
    assert "alone" not in adapted().model.layers[0].self_attn.v_proj.fast_path.reason
    plain = slow_copy(model).model.layers[0].self_attn
    torch.testing.assert_close(q, plain.q_proj(x))
    torch.testing.assert_close(k, plain.k_proj(other))


def test_an_input_that_was_changed_in_place_is_another_input():
    attention = adapted().model.layers[0].self_attn
    x = torch.randn(3, 32, dtype=torch.float64)
    attention.q_proj(x)
    x.mul_(2)
    torch.testing.assert_close(attention.k_proj(x), slow_copy(attention.k_proj)(x))


class Mixed(torch.nn.Module):
    """Attention whose queries are of another width than keys and values."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(n, 8) for n in (10, 6, 6))

    def forward(self, x, context):
        return self.q_proj(x) + self.k_proj(context) * self.v_proj(context)


@pytest.mark.parametrize("accelerated", [False, True])
def test_projections_of_other_widths_are_no_siblings(accelerated):
    torch.manual_seed(0)
    model, settings = Mixed(), {"r": 2, "target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False}
    inputs = torch.randn(3, 10), torch.randn(3, 6)
    if accelerated:
        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
        wanted = model(*inputs)
        accelerate_peft(model)
    else:
        wanted = slow_copy(apply_lora(model, LoraConfig(**settings)))(*inputs)
        assert model.q_proj.siblings is None
        assert model.k_proj.siblings is model.v_proj.siblings is not None
    torch.testing.assert_close(model(*inputs), wanted)


def write_factor(layer):
    with torch.no_grad():
        layer.lora_B.weight.mul_(100)


def write_base(layer):
    with torch.no_grad():
        layer.weight.mul_(100)


def swap_factor(layer):
    layer.lora_A.weight = torch.nn.Parameter(100 * layer.lora_A.weight.detach())


def change_magnitude(layer):
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(100)


def change_scale(layer):
    layer.lora.scale *= 100


def turn_dropout_off(layer):
    layer.eval()


@pytest.mark.parametrize(
    "change",
    [write_factor, write_base, swap_factor, change_magnitude, change_scale, turn_dropout_off],
    ids=lambda f: f.__name__,
)
def test_a_layer_that_changed_returns_no_output_of_before(change):
    settings = {"use_dora": change is change_magnitude, "lora_dropout": 0.5 if change is turn_dropout_off else 0.0}
    attention = adapted(**settings).model.layers[0].self_attn
    x = torch.randn(3, 32, dtype=torch.float64)
    attention.q_proj(x)
    change(attention.k_proj)
    torch.testing.assert_close(attention.k_proj(x), slow_copy(attention.k_proj)(x))
    assert attention.v_proj(x).shape == (3, 16)


@pytest.mark.parametrize("fused", [False, True])
def test_a_layer_outside_of_autocast_returns_no_output_of_inside(fused):
    model = apply_lora(tiny_llama(layers=1), LoraConfig(r=2, target_modules=LLAMA_TARGETS, fused_blocks=fused))
    attention, x = model.model.layers[0].self_attn, torch.randn(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        q = attention.q_proj(x)
        with torch.autocast("cpu", enabled=False):
            k = attention.k_proj(x)
        v = attention.v_proj(x)
    assert [y.dtype for y in (q, k, v)] == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_copies_and_pickles_are_whole():
    model = adapted()
    ids = tokens()
    wanted = model(ids).logits
    other = copy.deepcopy(model)
    torch.testing.assert_close(other(ids).logits, wanted)
    group = other.model.layers[0].self_attn.q_proj.siblings
    assert group.layers[1] is other.model.layers[0].self_attn.k_proj
    layer = pickle.loads(pickle.dumps(model.model.layers[0].self_attn.o_proj))
    x = torch.randn(3, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x), model.model.layers[0].self_attn.o_proj(x))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_whole_models_are_pickled(make):
    model = make(torch.float64)
    targets = GPT2_TARGETS if make is tiny_gpt2 else [*LLAMA_TARGETS, "embed_tokens"]
    randomise(apply_lora(model, LoraConfig(r=2, target_modules=targets)))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    remove_lora(again)
    assert [type(m) for m in again.modules()] == [type(m) for m in make(torch.float64).modules()]


@pytest.mark.parametrize("save", ["min", "full"])
@pytest.mark.parametrize("activation", [torch.nn.ReLU, torch.nn.SiLU])
def test_a_dora_output_may_be_changed_in_place(activation, save):
    def gradients(inplace):
        torch.manual_seed(0)
        layers = torch.nn.Linear(8, 6, bias=False), activation(inplace=inplace), torch.nn.Linear(6, 2)
        model = torch.nn.Sequential(*layers).double()
        config = LoraConfig(r=2, target_modules=["0"], use_dora=True, save=save, init_lora_weights=False)
        apply_lora(model, config)
        assert model[0].fast_path.on
        model(torch.randn(4, 8, dtype=torch.float64)).square().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    for changed, unchanged in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(changed, unchanged, rtol=1e-12, atol=1e-12)


def test_a_changed_dora_output_of_which_no_input_was_saved_is_an_error_that_says_what_to_do():
    layers = torch.nn.Linear(8, 6, bias=False), torch.nn.ReLU(inplace=True), torch.nn.Linear(6, 2)
    model = apply_lora(torch.nn.Sequential(*layers), LoraConfig(r=2, target_modules=["0"], use_dora=True))
    model[0].lora_A.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r'changed in place .*save="full"'):
        model(torch.randn(4, 8)).sum().backward()


@pytest.mark.parametrize("name", ["bart", "whisper"])
@pytest.mark.parametrize("fused", [True, False])
def test_cross_attention_under_activation_checkpointing_gives_the_same_gradients(name, fused, monkeypatch):
    if not fused:  # a module whose name does not say that it is one of cross-attention
        monkeypatch.setattr(block, "_CROSS_ATTENTION", re.compile("(?!)"))
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    features = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    batch = {"input_features": features, "labels": ids} if name == "whisper" else {"input_ids": ids, "labels": ids}

    def gradients(checkpointed):
        model = make_architecture(name).train()
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(0)
        apply_lora(model, config)
        for module in model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        for _ in range(2):  # the first pass finds that queries have another input
            model.zero_grad()
            model(**batch).loss.backward()
        return {key: value.grad for key, value in model.named_parameters() if value.requires_grad}

    checkpointed, plain = gradients(True), gradients(False)
    for key, value in plain.items():
        torch.testing.assert_close(checkpointed[key], value)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_gives_the_same_gradients(dropout):
    model = adapted(lora_dropout=dropout, use_dora=True)
    wanted = loss_and_gradients(model, tokens())
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    found = loss_and_gradients(model, tokens())
    assert torch.equal(found[0], wanted[0])
    for name in wanted[1]:
        torch.testing.assert_close(found[1][name], wanted[1][name])


def products_only(_, op, *args, **kwargs):
    """Keeps what matrix products return, whichever library they are of."""
    kept = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) or "_linear_pointwise" in str(op)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.MUST_RECOMPUTE


def everything(*_, **__):
    return CheckpointPolicy.MUST_SAVE


SELECTIVE = {key: VARIANTS[key] for key in ("plain", "dropout", "dora", "dora dropout", "full", "lora_bias")}
SELECTIVE |= {"zeros": {}, "not fast": {"fast_path": False}}


@pytest.mark.parametrize(
    ("variant", "dtype", "policy", "training"),
    meeting(SELECTIVE, (torch.float64, torch.float32, torch.bfloat16), (products_only, everything), (True, False)),
)
def test_selective_activation_checkpointing_gives_the_same_gradients(variant, dtype, policy, training):
    """Whose cache holds the very tensors that products return: nothing may be added to them in place."""
    model = tiny_llama(dtype, layers=1, attention_bias=True)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[::2] = 0
    model = adapted(model, **SELECTIVE[variant])
    if variant == "zeros":
        keep_zeros(model)
    model.train(training)
    block, x = model.model.layers[0], torch.randn(5, 32, dtype=dtype, requires_grad=True)
    attention = block.self_attn

    def function(x):
        q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        return attention.o_proj(torch.cat([k, v], -1) * q) + block.mlp(x)

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    leaves, results = [x, *(p for p in block.parameters() if p.requires_grad)], []
    for kept in (False, True):
        torch.manual_seed(5)
        y = checkpoint(function, x, use_reentrant=False, context_fn=contexts) if kept else function(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    assert all(torch.equal(found, wanted) for found, wanted in zip(*results, strict=True))


@pytest.mark.parametrize("dora", [False, True])
def test_inference_mode(dora):
    model = adapted(use_dora=dora).eval()
    wanted = model(tokens()).logits
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(model(tokens()).logits, wanted.detach())
    loss_and_gradients(model, tokens())


def test_generation_uses_the_adapter():
    model = adapted(tiny_llama()).eval()
    # none of them is a padding token, which would be masked
    prompt = tokens(1, 4).clamp(min=3)
    found = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    ids = prompt
    for _ in range(5):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert found.tolist() == ids.tolist()


def test_dropout_drops_in_training_only_and_by_the_seed():
    model = adapted(lora_dropout=0.4)
    ids = tokens()
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    torch.manual_seed(3)
    first = model(ids).logits
    assert not torch.equal(model(ids).logits, first)
    torch.manual_seed(3)
    assert torch.equal(model(ids).logits, first)


@pytest.mark.parametrize("fused", [False, True])
def test_autocast_computes_in_its_dtype(fused):
    model = apply_lora(tiny_llama(), LoraConfig(r=4, target_modules=LLAMA_TARGETS, fused_blocks=fused))
    randomise(model, scale=0.1).train()
    layer = model.model.layers[0].self_attn.o_proj
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(3, 32))
        assert y.dtype == torch.bfloat16
        fast = loss_and_gradients(model, tokens())
        slow = loss_and_gradients(slow_copy(model), tokens())
    torch.testing.assert_close(fast[0], slow[0], rtol=1e-2, atol=0)
    for name in fast[1]:
        assert fast[1][name].dtype == torch.float32
        assert relative_error(fast[1][name], slow[1][name]) < 0.1


@pytest.mark.parametrize("fast_path", [None, False])
def test_autocast_leaves_fp64(fast_path):
    model = apply_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)).double(), LoraConfig(r=2, target_modules=["0"]))
    model[0].lora.fast_path = fast_path
    x = torch.randn(3, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert torch.equal(output, model(x))


def test_autocast_does_not_round_an_embedding():
    model, ids = torch.nn.Sequential(torch.nn.Embedding(20, 16)), torch.arange(20)
    base = model(ids)
    apply_lora(model, LoraConfig(r=4, target_modules=["0"]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(ids), base)


def test_torch_func_transforms_a_layer_with_dropout():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8)).double()
    apply_lora(model, LoraConfig(r=2, target_modules=["0"], lora_dropout=0.5, init_lora_weights=False)).train()
    x = torch.randn(3, 8, dtype=torch.float64)

    def loss(parameters):
        torch.manual_seed(3)
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})
    loss(dict(model.named_parameters())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.allclose(gradients[name], parameter.grad), name


def test_plain_torch_has_second_derivatives_with_dropout():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8)).double()
    settings = {"lora_dropout": 0.5, "fast_path": False, "init_lora_weights": False}
    layer = apply_lora(model, LoraConfig(r=2, target_modules=["0"], **settings)).train()[0]
    x, a, b = torch.randn(5, 8, dtype=torch.float64, requires_grad=True), layer.lora_A.weight, layer.lora_B.weight
    torch.manual_seed(3)
    dropped = x * seeded_dropout(torch.ones_like(x), 0.5, new_seed())
    wanted = torch.nn.functional.linear(x, layer.weight, layer.bias) + layer.lora.scale * dropped @ a.t() @ b.t()
    torch.manual_seed(3)
    seconds = []
    for y in (model(x), wanted):
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), [x, a, b]))
    for found, expected in zip(*seconds, strict=True):
        torch.testing.assert_close(found, expected)


def test_groups_name_every_trained_parameter_once():
    model = apply_lora(tiny_llama(), LoraConfig(target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head"]))
    groups = lora_groups(model, a={"lr": 1e-3}, b={"lr": 1e-2}, rest={"weight_decay": 0.0})
    assert [(g["name"], len(g["params"])) for g in groups] == [("lora_A", 2), ("lora_B", 2), ("rest", 3)]
    assert [g.get("lr") for g in groups] == [1e-3, 1e-2, None]
    named = {name for g in groups for name, _ in g["params"]}
    assert named == {name for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    assert optimizer.param_groups[1]["lr"] == 1e-2
    with pytest.raises(ValueError, match="no parameter of the model needs a gradient"):
        lora_groups(model.requires_grad_(False))


def test_groups_know_pefts_names():
    model = torch.nn.Sequential(torch.nn.Embedding(9, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 9))
    config = peft.LoraConfig(target_modules=["0", "1"], modules_to_save=["2"], use_dora=True)
    model = peft.get_peft_model(model, config, adapter_name="mine")
    groups = lora_groups(model, a={"lr": 1e-3}, b={"lr": 1e-2})
    names = {group["name"]: [name for name, _ in group["params"]] for group in groups}
    assert all(name.endswith(("lora_A.mine.weight", "lora_embedding_A.mine")) for name in names["lora_A"])
    assert all(name.endswith(("lora_B.mine.weight", "lora_embedding_B.mine")) for name in names["lora_B"])
    assert [len(names[name]) for name in ("lora_A", "lora_B")] == [2, 2]
    assert [name.removeprefix("base_model.model.") for name in names["rest"]] == [
        "0.lora_magnitude_vector.mine.weight",
        "1.lora_magnitude_vector.mine.weight",
        "2.modules_to_save.mine.weight",
        "2.modules_to_save.mine.bias",
    ]
    config = peft.LoraConfig(target_modules=["c_attn"], lora_bias=True, fan_in_fan_out=True)
    groups = lora_groups(peft.get_peft_model(tiny_gpt2(), config))
    assert [name.rsplit(".", 3)[1:] for name, _ in groups[2]["params"]] == [["lora_B", "default", "bias"]] * 2


def test_lora_plus_gives_b_a_multiple_of_the_rate():
    ours = apply_lora(tiny_llama(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"], use_dora=True))
    for model in (ours, theirs):
        groups = lora_groups(model, lr=1e-3, lr_ratio=16)
        rates = {"lora_A": 1e-3, "lora_B": 16e-3, "rest": 1e-3}
        assert {group["name"]: group["lr"] for group in groups} == rates
        assert [len(group["params"]) for group in groups] == [2, 2, 2]
    assert [group["lr"] for group in lora_groups(ours, lr=1e-3)] == [1e-3] * 3
    assert lora_groups(ours, lr=1e-3, lr_ratio=16, b={"lr": 0.5})[1]["lr"] == 0.5
    for wrong in ({"lr_ratio": 16}, {"lr": 1e-3, "lr_ratio": 0.5}, {"lr": 1e-3, "lr_ratio": float("nan")}):
        with pytest.raises(ValueError, match=r"expected lr, and lr_ratio >= 1 \(LoRA\+\), got"):
            lora_groups(ours, **wrong)
    only_a = torch.nn.Module()
    only_a.lora_A = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match="the model trains no lora_B"):
        lora_groups(only_a, lr=1e-3, lr_ratio=4)


def test_groups_say_what_was_not_found():
    with pytest.raises(ValueError, match=r"expected trained parameters called lora_A or lora_B, got 21 others"):
        lora_groups(tiny_llama(), b={"lr": 1e-2})
    model = apply_lora(tiny_llama(), LoraConfig(target_modules=["q_proj"], save="lora_fa"))
    with pytest.warns(UserWarning, match="ignored the options for lora_A, rest"):
        groups = lora_groups(model, a={"lr": 1e-3}, b={"lr": 1e-2}, rest={"lr": 1.0})
    assert [group["name"] for group in groups] == ["lora_B"]
    lora_groups(model, b={"lr": 1e-2})


@pytest.mark.parametrize("materialized", [True, False])
def test_large_batches_take_the_materialised_sum_and_agree(materialized, monkeypatch):
    if not materialized:
        monkeypatch.setattr("leanstep.lora.layers.linear.contraction_path", lambda *_: ContractionPath())
    model = adapted(fused_blocks=materialized)
    path = model.model.layers[0].mlp.down_proj.operands(torch.randn(240, 48, dtype=torch.float64))[0].path
    assert path == ContractionPath(materialized, materialized)
    found, wanted = (loss_and_gradients(one, tokens(8, 30)) for one in (model, slow_copy(model)))
    torch.testing.assert_close(found[0], wanted[0])
    for name in wanted[1]:
        torch.testing.assert_close(found[1][name], wanted[1][name])


def test_fused_blocks_keep_less():
    def kept(**settings):
        model = apply_lora(tiny_llama(), LoraConfig(r=4, target_modules=LLAMA_TARGETS, **settings)).train()
        x = torch.randn(1, 40, 32, requires_grad=True)
        return saved_bytes(lambda: model.model(inputs_embeds=x).last_hidden_state, model.parameters())

    # silu(gate) and the input of down, 48 wide, in each of two blocks; the attention's own softmax statistics stay
    assert kept(fused_blocks=False) - kept() == 2 * 2 * 40 * 48 * 4


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"lora_dropout": 0.3}, {"use_dora": True}], ids=str)
def test_torch_compile_traces_through_without_a_graph_break(settings):
    torch.compiler.reset()
    layer = adapted(tiny_llama(torch.float64, layers=1), **settings).model.layers[0]

    def function(x):
        # not q_proj, which in eager mode draws the seeds of its siblings too
        return layer.mlp(x) + layer.self_attn.o_proj(x)

    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    leaves = [x, layer.mlp.down_proj.lora_A.weight, layer.mlp.up_proj.lora_B.weight]
    leaves += [layer.self_attn.o_proj.lora_A.weight, layer.self_attn.o_proj.lora_B.weight]
    results = []
    for run in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(5)
        y = run(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("how", [True, False, "gaussian", "orthogonal"])
def test_factors_begin_as_they_are_told(how):
    config = LoraConfig(r=8, target_modules=["up_proj"], init_lora_weights=how)
    layer = apply_lora(tiny_llama(layers=1), config).model.layers[0].mlp.up_proj
    a, b = layer.lora_A.weight.detach(), layer.lora_B.weight.detach()
    assert bool(b.any()) == (how is False)
    if how == "orthogonal":
        torch.testing.assert_close(a @ a.t(), torch.eye(8), rtol=0, atol=1e-5)
    elif how == "gaussian":
        assert a.std() == pytest.approx(1 / 8, rel=0.2)
    else:
        assert a.abs().max() <= 32**-0.5


def test_layers_are_left_out_by_name_and_by_number():
    def adapted(**settings):
        model = apply_lora(tiny_llama(layers=3), LoraConfig(r=4, **settings))
        return {name for name, module in model.named_modules() if hasattr(module, "lora")}

    names = {f"model.layers.{i}.self_attn.{end}" for i in range(3) for end in ("q_proj", "v_proj")}
    assert adapted(target_modules=["q_proj", "v_proj"]) == names
    found = adapted(target_modules=["q_proj", "v_proj"], exclude_modules=["model.layers.1.self_attn.q_proj"])
    assert found == names - {"model.layers.1.self_attn.q_proj"}
    found = adapted(target_modules=["q_proj", "v_proj"], exclude_modules=r".*\.[02]\..*")
    assert found == {name for name in names if ".1." in name}
    found = adapted(target_modules=["q_proj"], layers_to_transform=[0, 2], layers_pattern="layers")
    assert found == {"model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"}
    # groups of the expression are not taken for the number of the layer
    assert adapted(target_modules=["q_proj"], layers_to_transform=[0, 2], layers_pattern="(h|layers)") == found
