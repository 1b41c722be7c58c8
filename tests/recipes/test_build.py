"""From configuration to objects."""

import copy
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM

import leanstep.optimizers
from leanstep import create, use_backend
from leanstep.recipes.config.schema import (
    OPTIMIZERS,
    BatchConfig,
    DataConfig,
    DistributedConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
)
from leanstep.recipes.training import build
from leanstep.recipes.training.build import (
    build_accelerator,
    build_model,
    build_optimizer,
    build_schedule,
    missing_here,
    optimizer_class,
    trackers_of,
)

INSTALLED = [name for name, spec in OPTIMIZERS.items() if find_spec(spec.partition(":")[0])]
LLAMA = ModelConfig(
    config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
)
GPT2 = ModelConfig(family="gpt2", config={"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32})


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch, fresh_accelerate):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def test_families_and_dtypes():
    llama = build_model(LLAMA, 300, end_token=0)
    assert isinstance(llama, LlamaForCausalLM) and llama.config.vocab_size == 300 and llama.config.eos_token_id == 0
    gpt2 = build_model(GPT2, 300, torch.bfloat16)
    assert isinstance(gpt2, GPT2LMHeadModel) and gpt2.config.n_layer == 2
    assert {parameter.dtype for parameter in gpt2.parameters()} == {torch.bfloat16}


def test_random_weights_follow_the_seed():
    torch.manual_seed(5)
    first = build_model(LLAMA, 300)
    torch.manual_seed(5)
    second = build_model(LLAMA, 300)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_weights_from_a_folder(tmp_path):
    model = build_model(GPT2, 300)
    model.save_pretrained(tmp_path)
    again = build_model(ModelConfig(init_from=str(tmp_path)), 300)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight) and again.config.n_layer == 2
    with pytest.raises(ValueError, match=r"the model has 300 tokens, the tokenizer produces 301"):
        build_model(ModelConfig(init_from=str(tmp_path)), 301)


def test_vocabulary_and_unknown_keys():
    assert build_model(ModelConfig(config={**LLAMA.config, "vocab_size": 320}), 300).config.vocab_size == 320
    with pytest.raises(ValueError, match=r"model.config.vocab_size: the model has 200 tokens.* produces 300"):
        build_model(ModelConfig(config={**LLAMA.config, "vocab_size": 200}), 300)
    with pytest.raises(ValueError, match=r"LlamaConfig has no key 'hidden_sizes'"):
        build_model(ModelConfig(config={"hidden_sizes": 32}), 300)


def groups_of(optimizer, model) -> dict[str, dict]:
    """The group of each parameter, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group for group in optimizer.param_groups for parameter in group["params"]}


def test_the_table_of_optimizers_is_that_of_the_package():
    assert optimizer_class("adamw") is torch.optim.AdamW and optimizer_class("sgd") is torch.optim.SGD
    own = {cls for name, cls in vars(leanstep.optimizers).items() if isinstance(cls, type)}
    own = {cls for cls in own if issubclass(cls, torch.optim.Optimizer)}
    assert own <= {optimizer_class(name) for name in INSTALLED} and own
    assert set(INSTALLED) == set(OPTIMIZERS)


@pytest.mark.parametrize("tied", [True, False])
def test_scale_has_a_rule_for_each_role_and_momentum_on_the_head_alone(tied):
    model = build_model(replace(LLAMA, config={**LLAMA.config, "tie_word_embeddings": tied}), 300)
    optimizer = build_optimizer(OptimizerConfig(name="scale", lr=1e-2), model)
    algorithms = {name: group["algorithm"] for name, group in groups_of(optimizer, model).items()}
    hidden = {name for name, p in model.named_parameters() if "layers" in name and p.dim() == 2}
    assert {name for name, algorithm in algorithms.items() if algorithm == "rows"} == hidden
    table = {"model.embed_tokens.weight": "head" if tied else "columns", **({} if tied else {"lm_head.weight": "head"})}
    assert {name: algorithms[name] for name in table} == table
    assert {a for name, a in algorithms.items() if "norm" in name} == {"adamw"}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    with_momentum = [p for p in model.parameters() if "momentum_buffer" in optimizer.state[p]]
    assert len(with_momentum) == 1 and with_momentum[0] is model.lm_head.weight


def test_scale_steps_the_transposed_matrices_of_gpt2_by_their_rows():
    model = build_model(ModelConfig(family="gpt2", config={"n_embd": 16, "n_layer": 1, "n_head": 2}), 300)
    optimizer = build_optimizer(OptimizerConfig(name="scale", lr=1.0), model)
    weight = model.transformer.h[0].attn.c_attn.weight  # (in, out)
    before, weight.grad = weight.detach().clone(), torch.randn_like(weight)
    optimizer.step()
    torch.testing.assert_close(before - weight, weight.grad / weight.grad.square().mean(dim=0).sqrt())


def test_muon_refuses_a_rate_by_the_shape_of_matrices_that_are_stored_transposed():
    for adjust in ("original", None):
        config = OptimizerConfig(name="muon", args={"adjust_lr_fn": adjust})
        with pytest.raises(ValueError, match=f"adjust_lr_fn={adjust!r} depends on which side .* is the output"):
            build_optimizer(config, build_model(GPT2, 300))
        build_optimizer(config, build_model(LLAMA, 300))


def test_muon_is_torchs_muon_for_hidden_matrices_and_adamw_for_the_rest():
    model, other = build_model(LLAMA, 300), build_model(LLAMA, 300)
    other.load_state_dict(model.state_dict())
    optimizer = build_optimizer(OptimizerConfig(name="muon", lr=1e-2, weight_decay=0.1), model)
    groups = groups_of(optimizer, model)
    matrices = {name for name, group in groups.items() if group["algorithm"] == "muon"}
    assert matrices == {name for name, p in model.named_parameters() if "layers" in name and p.dim() == 2}
    named = dict(other.named_parameters())
    peers = [
        torch.optim.Muon([named[n] for n in matrices], 1e-2, 0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": [named[n]], "weight_decay": groups[n]["weight_decay"]} for n in set(groups) - matrices],
            lr=1e-2,
            betas=(0.9, 0.95),
            fused=True,
        ),
    ]
    for step in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            named[name].grad = parameter.grad.clone()
        optimizer.step()
        for peer in peers:
            peer.step()
        if step == 0:  # what a checkpoint, a copy and a pickle keep is enough to go on
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = build_optimizer(OptimizerConfig(name="muon", lr=1e-2, weight_decay=0.1), model)
            optimizer.load_state_dict(state)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, named[name]), name
    with pytest.raises(ValueError, match="expected algorithm 'muon' or 'adamw', got 'sinkgd'"):
        build_optimizer(OptimizerConfig(name="muon", groups=[{"role": "hidden", "algorithm": "sinkgd"}]), model)


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("family", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_every_optimizer_steps_every_parameter(name, family):
    model = build_model(family, 300)
    optimizer = build_optimizer(OptimizerConfig(name=name, lr=1e-2, weight_decay=0.1), model)
    assert type(optimizer) is optimizer_class(name)
    found = groups_of(optimizer, model)
    assert set(found) == {name for name, _ in model.named_parameters()}
    for parameter_name, group in found.items():
        decayed = "layers" in parameter_name or ".h." in parameter_name or parameter_name == "lm_head.weight"
        decayed &= "norm" not in parameter_name and "ln_" not in parameter_name and "bias" not in parameter_name
        assert group["weight_decay"] == (0.1 if decayed else 0.0), parameter_name
    before = {parameter_name: parameter.detach().clone() for parameter_name, parameter in model.named_parameters()}
    ids = torch.randint(300, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    with use_backend("reference"):
        optimizer.step()
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n]) and p.grad.abs().sum() > 0]
    assert not still


def test_adamw_is_fused_unless_told_otherwise():
    model = build_model(LLAMA, 300)
    assert build_optimizer(OptimizerConfig(), model).defaults["fused"] is True
    assert build_optimizer(OptimizerConfig(args={"fused": False}), model).defaults["fused"] is False


def test_arguments_reach_the_class():
    model = build_model(LLAMA, 300)
    lion = build_optimizer(
        OptimizerConfig(name="lion", args={"betas": [0.95, 0.98], "momentum_dtype": "bfloat16"}), model
    )
    assert lion.defaults["betas"] == (0.95, 0.98) and lion.defaults["momentum_dtype"] is torch.bfloat16
    fp8 = build_optimizer(OptimizerConfig(name="lion", args={"momentum_dtype": "fp8"}), model)
    assert fp8.defaults["momentum_dtype"] is torch.float8_e4m3fn
    with pytest.raises(ValueError, match=r"Lion takes no argument 'momentun'"):
        build_optimizer(OptimizerConfig(name="lion", args={"momentun": 0.9}), model)
    with pytest.raises(ValueError, match=r"torch has no dtype 'bfloat'"):
        build_optimizer(OptimizerConfig(name="lion", args={"momentum_dtype": "bfloat"}), model)


def test_groups_override_by_name_and_role_and_the_first_wins():
    model = build_model(GPT2, 300)
    rules = [{"match": r"h\.0\.attn", "lr": 1e-5}, {"role": "hidden", "lr": 1e-3, "weight_decay": 0.5}]
    found = groups_of(build_optimizer(OptimizerConfig(lr=1e-2, groups=rules), model), model)
    assert found["transformer.h.0.attn.c_attn.weight"]["lr"] == 1e-5
    assert found["transformer.h.0.attn.c_attn.bias"]["lr"] == 1e-5
    assert found["transformer.h.1.attn.c_attn.weight"]["lr"] == 1e-3
    assert found["transformer.h.1.attn.c_attn.weight"]["weight_decay"] == 0.5
    assert found["transformer.wte.weight"]["lr"] == 1e-2


def test_balanced_embeddings_are_one_key():
    model = build_model(LLAMA, 300)
    rules = [{"role": "embedding", "lr": 1e-3}]
    groups = groups_of(
        build_optimizer(OptimizerConfig(name="sinkgd", embeddings="balanced", groups=rules), model), model
    )
    table = groups["model.embed_tokens.weight"]
    assert (table["algorithm"], table["momentum"], table["lr"]) == ("balanced", 0.95, 1e-3)
    assert groups["model.norm.weight"]["algorithm"] == "adamw"
    assert groups["model.layers.0.mlp.up_proj.weight"]["algorithm"] == "sinkgd"


@pytest.mark.parametrize("name", ["lion", "sinkgd", "lanton"])
def test_like_adamw_is_what_create_does(name):
    """The rates of groups are AdamW's, too."""
    model = build_model(LLAMA, 300)
    config = OptimizerConfig(
        name=name, lr=1e-3, weight_decay=0.1, like_adamw=True, groups=[{"role": "embedding", "lr": 1e-2}]
    )
    built = groups_of(build_optimizer(config, model), model)
    created = groups_of(
        create(
            model, name, like_adamw={"lr": 1e-3, "weight_decay": 0.1}, settings={"embedding": {"lr": 1e-2}}, say=None
        ),
        model,
    )
    for key in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        rates = [
            {k: group.get(k) for k in ("lr", "weight_decay", "radius", "scale")} for group in (built[key], created[key])
        ]
        assert rates[0] == rates[1]
    with pytest.raises(ValueError, match="optimizer.like_adamw: leave out radius|no argument 'radius'"):
        build_optimizer(replace(config, args={"radius": 2.0}), model)


def test_split_is_one_key():
    model = build_model(LLAMA, 300)
    groups = groups_of(build_optimizer(OptimizerConfig(name="lanton", split="heads"), model), model)
    blocks = {name.split(".")[-2]: group["blocks"] for name, group in groups.items() if "layers.1" in name}
    assert {name for name, rows in blocks.items() if rows} == {"q_proj", "k_proj"}
    assert blocks["q_proj"] == 16


def test_groups_that_select_nothing_or_say_nothing():
    model = build_model(LLAMA, 300)
    with pytest.raises(ValueError, match=r"optimizer.groups\[0\]: match 'embedd' selects no parameter"):
        build_optimizer(OptimizerConfig(groups=[{"match": "embedd", "lr": 1.0}]), model)
    with pytest.raises(ValueError, match=r"optimizer.groups\[0\]: expected either 'match' or 'role'"):
        build_optimizer(OptimizerConfig(groups=[{"lr": 1.0}]), model)


def test_the_schedule_multiplies_each_groups_rate():
    model = build_model(LLAMA, 300)
    rules = [{"role": "embedding", "lr": 5e-3}]
    optimizer = build_optimizer(OptimizerConfig(lr=1e-2, groups=rules), model)
    schedule = build_schedule(ScheduleConfig(name="linear", warmup_steps=1, final_fraction=0.0), optimizer, 5)
    seen = []
    for _ in range(5):
        seen.append({group["name"].split("/")[0]: group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        schedule.step()
    factors = [0.5, 1, 2 / 3, 1 / 3, 0]
    assert [rates["hidden"] for rates in seen] == pytest.approx([1e-2 * factor for factor in factors])
    assert [rates["embedding"] for rates in seen] == pytest.approx([5e-3 * factor for factor in factors])


@pytest.mark.parametrize(("precision", "mixed"), [("bf16", "bf16"), ("fp32", "no"), ("bf16-pure", "no")])
def test_the_recipe_decides_the_precision(monkeypatch, precision, mixed):
    # what an accelerate config file would hand down
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    accelerator = build_accelerator(RunConfig(precision=precision, device="cpu"))
    assert accelerator.mixed_precision == mixed and accelerator.device.type == "cpu"


def test_accumulation_follows_from_tokens_per_step():
    batch = BatchConfig(tokens_per_step=4096, micro_batch_size=2)
    config = RunConfig(batch=batch, data=DataConfig(seq_len=256), device="cpu")
    assert build_accelerator(config).gradient_accumulation_steps == 8


def test_what_this_machine_cannot_do(monkeypatch):
    monkeypatch.setattr(build.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device: 'cuda' was asked for.*device=cpu"):
        build_accelerator(RunConfig(device="cuda"))
    with pytest.raises(ValueError, match=r"precision: fp16 needs a GPU.*precision=bf16"):
        build_accelerator(RunConfig(device="cpu", precision="fp16"))
    with pytest.raises(ValueError, match=r"fsdp2 needs GPUs.*strategy=ddp"):
        build_accelerator(RunConfig(device="cpu", distributed=DistributedConfig(strategy="fsdp2")))
    with pytest.raises(ValueError, match=r"log.trackers: 'comet_ml' is not available here"):
        build_accelerator(RunConfig(device="cpu", log=LogConfig(trackers=["comet_ml"])))


@pytest.mark.parametrize("installed", [True, False])
def test_tensorboard_is_the_default_where_it_can_be_imported(installed, monkeypatch):
    monkeypatch.setattr(build, "has_tensorboard", lambda: installed)
    assert trackers_of(RunConfig()) == (["tensorboard"] if installed else [])
    assert trackers_of(RunConfig(log=LogConfig(trackers=[]))) == []
    monkeypatch.setattr(build.tracking, "get_available_trackers", lambda: ["tensorboard"])
    problems = list(missing_here(RunConfig(log=LogConfig(trackers=["tensorboard"])), cpu=True))
    # Accelerate finds a package that lacks those it needs itself, too
    assert problems == [] if installed else "pip install tensorboard" in problems[0]
