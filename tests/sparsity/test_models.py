"""The models people train: attention, GPT-2, LLaMA, ViT, convolutions; with AMP, checkpointing and torch.compile."""

import pytest
import torch
from sparse_models import MLP, batch, make_mlp, train
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from leanstep.sparsity import NM, Schedule, is_nm, s_ste_scale, sparsify, squash, verify


def gpt2():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 64}
    return GPT2LMHeadModel(
        GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    )


def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, vocab_size=64, max_position_embeddings=16, bos_token_id=0, eos_token_id=0)
    )


def vit():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=4))


def tokens():
    ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def images():
    source = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(4, 1, 8, 8, generator=source), "labels": torch.arange(4)}


FAMILIES = {
    "gpt2": (gpt2, {"*.mlp.*": NM(1, 8), "*.attn.c_attn": "2:4"}, tokens, 6),
    "llama": (llama, {"*.mlp.*": NM(1, 8), "*.q_proj": NM(2, 4)}, tokens, 8),
    "vit": (vit, {"*.mlp.*": "1:8", "*.[qkv]_proj": "2:4"}, images, 10),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_train_save_and_load(family, tmp_path):
    make, patterns, data, count = FAMILIES[family]
    model = make()
    controller = sparsify(model, patterns, schedule=4, method="mdgf-exponential", measure_every=1)
    assert len(controller.layers) == count, [layer.name for layer in controller.layers]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    controller.attach(optimizer)
    for _ in range(5):
        model(**data()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    expected = model(**data()).logits
    assert all(row["sparsity"] in (0.875, 0.5) for row in controller.statistics())
    squash(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**data()).logits, expected)
    # by the model's names: transformers stores ViT under older ones
    assert verify(again, patterns).ok and verify(tmp_path).tensors


def test_one_pattern_for_all_leaves_the_head_of_a_language_model_dense():
    model = llama()
    names = {layer.name for layer in sparsify(model, NM(2, 4)).layers}
    assert len(names) == 14 and "lm_head" not in names
    assert sparsify(model, {"lm_head": "2:4"}).layers[0].name == "lm_head"


def test_conv1d_of_transformers_has_its_groups_along_its_inputs():
    model = gpt2()
    controller = sparsify(model, {"*.mlp.c_fc": "1:8"})
    weight = controller.layers[0].uses[0][0].weight
    # stored (in, out): inputs are the rows
    assert weight.shape == (32, 128) and controller.layers[0].dim == 0
    assert is_nm(weight.T, "1:8") and not is_nm(weight, "1:8")
    along_outputs = sparsify(gpt2(), {"*.mlp.c_fc": "1:8"}, axis="out").layers[0]
    assert along_outputs.dim == 1


@pytest.mark.parametrize("separate", [False, True], ids=["one projection", "three"])
def test_multihead_attention(separate):
    sizes = {"kdim": 8, "vdim": 8} if separate else {}
    model = nn.MultiheadAttention(16, 2, batch_first=True, **sizes)
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"] if separate else ["in_proj_weight"]
    controller = sparsify(model, {"*proj*": "2:4"}, srste_lambda=1e-3)
    assert [layer.name for layer in controller.layers] == [*names, "out_proj"]
    query, memory = torch.randn(2, 5, 16), torch.randn(2, 5, 8 if separate else 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller.attach(optimizer)
    for _ in range(2):
        model(query, memory, memory)[0].square().sum().backward()
        optimizer.step()
    assert is_nm(model.out_proj.weight, "2:4") and all(is_nm(getattr(model, name), "2:4") for name in names)
    expected = model.eval()(query, memory, memory)[0]
    order = list(nn.MultiheadAttention(16, 2, **sizes).state_dict())
    assert list(squash(model).state_dict()) == order
    torch.testing.assert_close(model(query, memory, memory)[0], expected)


def test_convolutions_have_their_groups_along_in_channels_and_rows_may_end_short():
    model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.Conv1d(10, 4, 3))
    controller = sparsify(model, {"0": "2:4", "1": "2:4"}, pad="zero")
    kernels = model[0].weight.permute(0, 2, 3, 1)
    assert is_nm(kernels, "2:4") and int((kernels != 0).sum()) == kernels.numel() // 2
    rows = model[1].weight.movedim(1, -1)
    # ten in-channels: two groups of four, and one of two, which is kept whole
    assert (rows.unflatten(-1, (-1, 5))).shape[-2:] == (2, 5)
    assert ((rows[..., :8].unflatten(-1, (2, 4)) != 0).sum(-1) == 2).all() and (rows[..., 8:] != 0).all()
    assert controller.layers[0].dim == 1


def test_embeddings_and_norms_are_no_candidates():
    model = nn.ModuleDict({"embed": nn.Embedding(8, 8), "norm": nn.LayerNorm(8), "up": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match="the names are 'up'"):
        sparsify(model, {"embed": "2:4"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_masks_from_the_full_weights(dtype):
    model = make_mlp()
    controller = sparsify(model, MLP, srste_lambda=1e-3)
    # two weights that are equal in half precision, of which the larger one comes first
    with torch.no_grad():
        controller.layers[0].weight[0, :4] = torch.tensor([1.0000001, 1.0, 0.5, 3.0])
    controller.refresh()
    assert controller.layers[0].transform.mask[0, :4].tolist() == [True, False, False, True]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    controller.attach(optimizer)
    inputs, targets = batch()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype is torch.float16)
    for _ in range(2):
        with torch.autocast("cpu", dtype=dtype):
            loss = (model(inputs).float() - targets).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert controller.step_count == 2 and controller.layers[0].weight.dtype == torch.float32
    # what a scaler leaves out is no step
    if scaler.is_enabled():
        scaler.scale(model(inputs).sum() * float("inf")).backward()
        scaler.step(optimizer)
        assert controller.step_count == 2


def test_recomputed_activations_give_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    found = []
    for recompute in (False, True):
        model = make_mlp()
        controller = sparsify(model, MLP)
        inputs, _ = batch()
        outputs = checkpoint(model, inputs, use_reentrant=False) if recompute else model(inputs)
        outputs.square().sum().backward()
        found.append([layer.weight.grad for layer in controller.layers])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("method", ["mdgf-exponential", "srste", "s-ste"])
def test_torch_compile_sees_one_whole_program_and_compiles_it_once(method):
    torch._dynamo.reset()
    compiled, eager = make_mlp(), make_mlp()
    schedule = 6 if method.startswith("mdgf") else None
    controllers = [sparsify(net, MLP, schedule=schedule, method=method) for net in (compiled, eager)]
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(compiled, backend=counter, fullgraph=True)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (compiled, eager)]
    for controller, optimizer in zip(controllers, optimizers, strict=True):
        controller.attach(optimizer)
    inputs, targets = batch()
    for _ in range(5):
        for net, optimizer in ((fast, optimizers[0]), (eager, optimizers[1])):
            (net(inputs) - targets).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert counter.frame_count == 1
    for left, right in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    assert controllers[0].layers[0].transform.alpha == controllers[1].layers[0].transform.alpha
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_transformers_compile_whole_and_once_over_all_phases(family):
    torch._dynamo.reset()
    make, patterns, data, _ = FAMILIES[family]
    model = make()
    schedule = Schedule(kind="sdgf-stepwise+mdgf-linear", total_steps=4, dense=0.25, finetune=0.25)
    controller = sparsify(model, patterns, schedule=schedule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller.attach(optimizer)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    # the losses of transformers write to a log and to their configuration
    inputs = {name: value for name, value in data().items() if name != "labels"}
    phases = []
    for _ in range(4):
        phases.append(controller.stage().phase)
        compiled(**inputs).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert phases == ["dense", "sparse", "sparse", "finetune"] and counter.frame_count == 1
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_two_four_is_squashed_saved_opened_by_transformers_and_gives_the_same_logits(tmp_path):
    model = llama()
    controller = sparsify(model, NM(2, 4), method="srste")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    controller.attach(optimizer)
    for _ in range(3):
        model(**tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = model.eval()(**tokens()).logits
    squash(model).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**tokens()).logits, expected)
    found = verify(tmp_path, {"*_proj": "2:4"})
    assert found.ok and sum(report.ok is True for report in found.tensors) == 14


def test_train_helper_moves_every_layer():
    # the loops above rest on it
    model = make_mlp()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, None, steps=1)
    assert all(not torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_the_scale_of_s_ste_belongs_to_the_weights_that_replace_others():
    model = make_mlp()
    controller = sparsify(model, MLP, method="s-ste")
    layer = controller.layers[0]
    with torch.no_grad():
        layer.weight.pow_(3)
    controller.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch.equal(layer.transform.beta, s_ste_scale(layer.weight.detach(), layer.target))
    scale = layer.transform.beta.clone()
    train(model, controller, steps=2)
    assert torch.equal(layer.transform.beta, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_decay_keeps_its_digits_in_a_model_of_another_dtype(dtype):
    model = make_mlp()
    controller = sparsify(model, MLP, schedule=1000, method="mdgf-linear")
    model.to(dtype)
    controller.step()
    for layer in controller.layers:
        assert layer.weight.dtype == dtype and layer.transform.beta.dtype == torch.float32
        assert torch.equal(layer.transform.alpha, torch.tensor(1 - 1 / 1000))
    assert not any("alpha" in key for key in model.state_dict())
