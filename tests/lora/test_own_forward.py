"""Layers that are more than they seem: subclasses and blocks with a forward of their own compute what they say."""

import copy
import functools

import peft
import pytest
import torch
from lora_models import randomise, relative_error, tiny_llama, tokens
from torch import nn

from leanstep.lora import LoraConfig, accelerate_peft, apply_lora, keep_zeros, remove_lora
from leanstep.lora.layers.frozen import dequantizer


class QAT(nn.Linear):
    """Rounds its weight to 4 bits in forward, as torchao's quantisation-aware training does."""

    def forward(self, x):
        step = self.weight.abs().amax(1, keepdim=True) / 7
        return nn.functional.linear(x, (self.weight / step).round() * step, self.bias)


class BitNet(nn.Linear):
    """Ternary weights and inputs in 8 bits."""

    def forward(self, x):
        scale, step = self.weight.abs().mean(), x.abs().amax(-1, keepdim=True) / 127
        weight = (self.weight / scale).round().clamp(-1, 1) * scale
        return nn.functional.linear((x / step).round() * step, weight, self.bias)


class Float8(nn.Linear):
    """Weight and input in 8-bit floats."""

    def forward(self, x):
        weight = self.weight.to(torch.float8_e4m3fn).to(x.dtype)
        return nn.functional.linear(x.to(torch.float8_e4m3fn).to(x.dtype), weight, self.bias)


class Wrapped(nn.Linear):
    """A decorator keeps the name of what it wraps."""

    @functools.wraps(nn.Linear.forward)
    def forward(self, x):
        return nn.Linear.forward(self, x) * 2


class Router(nn.Linear):
    """Returns two tensors, as Llama 4's router does."""

    def forward(self, x):
        logits = super().forward(x)
        return logits.sigmoid(), logits


SUBCLASSES = [QAT, BitNet, Float8, Wrapped]


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = kind(12, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.last(self.first(x))


def inputs():
    return torch.randn(7, 12, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", SUBCLASSES)
def test_a_subclass_with_a_forward_of_its_own_computes_it(kind, dora):
    model = Model(kind)
    wanted = model(inputs())
    apply_lora(model, LoraConfig(r=2, target_modules="all-linear", use_dora=dora))
    torch.testing.assert_close(model(inputs()), wanted, rtol=1e-5, atol=1e-6)
    on, reason = model.first.fast_path
    assert not on and reason.startswith(f"{kind.__name__} has a custom forward")
    assert model.last.fast_path.on


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_the_adapter_is_added_to_the_subclasss_output(kind):
    model = Model(kind)
    base = copy.deepcopy(model)
    randomise(apply_lora(model, LoraConfig(r=2, target_modules=["first"])))
    a, b = model.first.lora_A.weight, model.first.lora_B.weight
    update = model.first.lora.scale * inputs() @ a.t() @ b.t()
    torch.testing.assert_close(model.first(inputs()), base.first(inputs()) + update)


def test_doras_magnitude_scales_the_subclasss_product():
    model = Model(QAT)
    base = copy.deepcopy(model)
    apply_lora(model, LoraConfig(r=2, target_modules=["first"], use_dora=True))
    with torch.no_grad():
        model.first.lora_magnitude_vector *= 1.5
    product = base.first(inputs()) - base.first.bias
    torch.testing.assert_close(model.first(inputs()), 1.5 * product + base.first.bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_an_accelerated_peft_layer_computes_the_subclasss_forward(kind):
    model = Model(kind)
    wanted = model(inputs())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["first", "last"]))
    acceleration = accelerate_peft(adapted)
    torch.testing.assert_close(adapted(inputs()), wanted)
    reasons = acceleration.fast_path()
    assert "custom forward" in reasons["base_model.model.first"].reason
    assert reasons["base_model.model.last"].on


def test_a_subclass_that_was_asked_to_be_fast_is_refused():
    model = Model(QAT)
    with pytest.raises(ValueError, match="first cannot run on the fast path: QAT has a custom forward"):
        apply_lora(model, LoraConfig(r=2, target_modules=["first"], fast_path=True))
    assert type(model.first) is QAT
    apply_lora(model, LoraConfig(r=2, target_modules=["first"]))
    with pytest.raises(ValueError, match="keep_zeros: first is a QAT"):
        keep_zeros(model, ["first"])


def test_a_weight_of_a_class_of_its_own_is_multiplied_by_that():
    class Halved(torch.Tensor):
        """As quantised weights do, multiplies by something else than its entries."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is nn.functional.linear:
                x, weight, bias = args
                return nn.functional.linear(x, weight.as_subclass(torch.Tensor) / 2, bias)
            return super().__torch_function__(func, types, args, kwargs or {})

    model = Model(nn.Linear)
    model.first.weight = nn.Parameter(model.first.weight.detach().as_subclass(Halved))
    wanted = model(inputs())
    apply_lora(model, LoraConfig(r=2, target_modules="all-linear"))
    torch.testing.assert_close(model(inputs()), wanted)
    assert model.first.fast_path == (False, "the base weight is a Halved, which defines its own products")


def test_a_subclass_without_a_forward_of_its_own_is_fast():
    class Named(nn.Linear):
        pass

    model = apply_lora(Model(Named), LoraConfig(r=2, target_modules=["first"]))
    assert model.first.fast_path.on


def test_a_layer_that_returns_no_tensor_is_left_out_or_refused():
    model = Model(Router)
    with pytest.raises(ValueError, match="first cannot be adapted: Router returns a tuple"):
        apply_lora(model, LoraConfig(r=2, target_modules=["first", "last"]))
    with pytest.warns(UserWarning, match="'all-linear' leaves out first: Router returns a tuple"):
        apply_lora(model, LoraConfig(r=2, target_modules="all-linear"))
    assert type(model.first) is Router and hasattr(model.last, "lora")


def test_llama4s_router_is_left_out():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Llama4ForCausalLM(config).eval()
    wanted = model(tokens()).logits
    with (
        pytest.warns(UserWarning, match="router: Llama4Router returns a tuple"),
        pytest.warns(UserWarning, match="name fused experts in target_parameters"),
    ):
        apply_lora(model, LoraConfig(r=2, target_modules="all-linear"))
    torch.testing.assert_close(model(tokens()).logits, wanted, rtol=1e-4, atol=1e-5)


def test_a_forward_that_returns_no_tensor_after_all_says_so():
    class Moody(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.is_meta else (super().forward(x),)

    model = apply_lora(Model(Moody), LoraConfig(r=2, target_modules=["first"]))
    with pytest.raises(TypeError, match="first: expected a tensor from Moody.forward.*got a tuple"):
        model.first(inputs())


class Block(nn.Module):
    """A SwiGLU block, word for word."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 10), nn.Linear(8, 10), nn.Linear(10, 8)
        self.act_fn = nn.SiLU()

    def forward(self, states):
        return self.down_proj(self.act_fn(self.gate_proj(states)) * self.up_proj(states))


class Scaled(Block):
    def forward(self, x):
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj * 0.5


class Residual(Block):
    def forward(self, x):
        x = x + 1
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Branched(Block):
    def forward(self, x):
        if x.shape[-1] == 8:
            return x + self.up_proj(x).sum()
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Decorated(Block):
    @functools.wraps(Block.forward)
    def forward(self, x):
        return -Block.forward(self, x)


class Activation(nn.SiLU):
    def forward(self, x):
        return super().forward(x) + 1


class OtherActivation(Block):
    def __init__(self):
        super().__init__()
        self.act_fn = Activation()


@pytest.mark.parametrize("kind", [Scaled, Residual, Branched, Decorated, OtherActivation])
@pytest.mark.parametrize("package", ["leanstep", "peft"])
def test_a_block_that_does_more_is_not_replaced(kind, package):
    block = nn.Sequential(kind())
    x = torch.randn(5, 8)
    wanted = block(x)
    if package == "leanstep":
        apply_lora(block, LoraConfig(r=2, target_modules="all-linear"))
        assert type(block[0]) is kind
        found = block(x)
    else:
        adapted = peft.get_peft_model(block, peft.LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"]))
        accelerate_peft(adapted)
        found = adapted(x)
    torch.testing.assert_close(found, wanted)


def test_a_block_that_is_the_formula_is_fused_whatever_its_variables_are_called():
    block = apply_lora(nn.Sequential(Block()), LoraConfig(r=2, target_modules="all-linear"))
    assert block[0].fast_path.on
    block[0].act_fn.register_forward_hook(lambda *_: None)
    assert not block[0].fast_path.on and "act_fn has hooks" in block[0].fast_path.reason
    assert type(remove_lora(block)[0]) is Block


def test_transformers_blocks_are_fused():
    model = apply_lora(tiny_llama(), LoraConfig(r=2, target_modules="all-linear"))
    assert all(layer.mlp.fast_path.on for layer in model.model.layers)


@pytest.mark.parametrize("nested", [False, True])
def test_a_4_bit_weight_that_was_packed_for_the_cpu_is_dequantised_as_what_it_is(nested):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(
        128, 64, bias=False, compute_dtype=torch.float32, compress_statistics=nested, quant_type="nf4"
    ).to("cpu")
    dense = dequantizer(layer)(layer.weight).float()
    layer.weight.data, layer.weight.quant_state = bitsandbytes.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    codes = layer.weight.data.clone()
    # packing keeps the scales in bf16
    assert relative_error(dequantizer(layer)(layer.weight).float(), dense) < 2**-8
    assert torch.equal(layer.weight.data, codes) and layer.weight.quant_state.packing_format_for_cpu
    assert relative_error(dequantizer(layer)(layer.weight).float(), dense) < 2**-8


def test_an_adapted_4_bit_layer_trains_after_an_evaluation_pass():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type="nf4").to("cpu"))
    x = torch.randn(3, 128)
    wanted = model.train()(x)
    model.eval()(x)
    apply_lora(model.train(), LoraConfig(r=2, target_modules=["0"]))
    assert model[0].fast_path.on
    assert relative_error(model(x).detach(), wanted.detach()) < 2e-2
