"""Models that somebody else wrote: their code never runs, and a run starts from their weights or not at all."""

import json
import re
import shutil

import pytest
import texts
import torch
from forked import finish_code
from safetensors.torch import load_file, save_file
from training import write_recipe
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    Qwen3MoeConfig,
)

from leanstep._checkpoint.configuration import check_folder
from leanstep.cli import main
from leanstep.pruning.folder.loading import open_config, open_model, open_tokenizer
from leanstep.recipes.check.costs import estimate, saved_storages
from leanstep.recipes.config.loader import load
from leanstep.recipes.config.schema import DataConfig, ModelConfig
from leanstep.recipes.data.sequences import load_data
from leanstep.recipes.training.build import build_model
from leanstep.sparsity.inference.export import export_folder
from leanstep.sparsity.inference.load import load_sparse

CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
class Config(GPT2Config):
    model_type = "foreign"
class Model(GPT2LMHeadModel):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A text, a recipe over it, and a GPT-2 with its tokenizer in ``model``."""
    folder = tmp_path_factory.mktemp("foreign")
    recipe = write_recipe(folder)
    text = recipe.read_text().replace(f"path: {folder / 'text.txt'}", f"path: {folder / 'long.txt'}")
    (folder / "long.txt").write_text("\n".join(texts.documents(40)))
    recipe.write_text(text)
    config = DataConfig(source="text", path=str(folder / "long.txt"), tokenizer="train:300", seq_len=32, val_tokens=300)
    data = load_data(config, seed=0)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    model.save_pretrained(folder / "model")
    data.tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved / "model", tmp_path / "model")


def commands(saved, model, tmp_path):
    """Every command that opens a model or a tokenizer, by name, and its documented exit code for bad input."""
    text, out = str(saved / "long.txt"), str(tmp_path / "out")
    start = [str(saved / "tiny.yaml"), f"model.init_from={model}", "model.config={}", f"out={tmp_path / 'run'}"]
    prune = [
        "prune",
        str(model),
        "--out",
        out,
        "--data",
        text,
        "--sparsity",
        "0.5",
        "--samples",
        "4",
        "--levels",
        "0.5",
    ]
    return {
        "eval": (["eval", str(model), "--data", text, "--batches", "1"], 2),
        "bench": (["bench", str(model), "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1"], 2),
        "generate": (["generate", str(model), "a"], 2),
        "prune": ([*prune, "--curve-samples", "2", "--held-out", "2", "--seq-len", "16"], 2),
        "train": (["train", *start, "steps=1"], 2),
        "check": (["check", *start], 1),
        "tokenizer": (["check", str(saved / "tiny.yaml"), f"data.tokenizer={model}", f"out={tmp_path / 'run'}"], 1),
    }


def needs_code(folder, marker):
    (folder / "modeling_foreign.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "foreign", "architectures": ["Model"]}
    config["auto_map"] = {"AutoConfig": "modeling_foreign.Config", "AutoModelForCausalLM": "modeling_foreign.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": [None, "modeling_foreign.Tokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


@pytest.mark.slow
def test_code_in_a_folder_never_runs_whatever_is_typed(saved, folder, tmp_path):
    marker = tmp_path / "marker"
    needs_code(folder, marker)
    script = (
        "import sys, json\nfrom leanstep.cli import main\nsys.stdin = open(sys.argv[2])\n"
        "for name, (arguments, code) in json.loads(sys.argv[1]).items():\n"
        "    print('::', name, main(arguments) == code, flush=True)\n"
    )
    given = json.dumps(commands(saved, folder, tmp_path))
    (tmp_path / "typed").write_text("y\n" * 50)
    said = finish_code(script, given, tmp_path / "typed").stdout
    assert not marker.exists(), said
    assert said.count("::") == 7 and said.count("True") == 7, said
    assert "Do you wish" not in said and "trust_remote_code" not in said
    assert said.count("needs code of its own (modeling_foreign.py), which is never run here") >= 7


@pytest.fixture
def answered(monkeypatch, tmp_path):
    """Answer every question with yes; a list of the questions."""
    questions = []
    monkeypatch.setattr("builtins.input", lambda text="": questions.append(text) or "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return questions


def test_bench_asks_nobody(folder, tmp_path, answered, capsys):
    needs_code(folder, tmp_path / "marker")
    assert main(["bench", str(folder), "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1"]) == 2
    assert not answered and not (tmp_path / "marker").exists()
    assert "needs code of its own (modeling_foreign.py), which is never run here" in capsys.readouterr().err


def test_a_part_of_a_tokenizer_asks_nobody(folder, tmp_path, answered):
    part = folder / "question_encoder_tokenizer"
    shutil.copytree(folder, part)
    needs_code(part, tmp_path / "marker")
    parts = {name: {"model_type": "vit"} for name in ("question_encoder", "generator")}  # without tokenizers
    (folder / "config.json").write_text(json.dumps({"model_type": "rag", **parts}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RagTokenizer"}))
    with pytest.raises(ValueError, match="needs code of its own"):
        open_tokenizer(folder)
    assert not answered and not (tmp_path / "marker").exists()


def test_a_part_of_a_model_asks_nobody(folder, tmp_path, answered):
    needs_code(folder, tmp_path / "marker")
    text = {"model_type": "trocr", "auto_map": {"AutoModel": "modeling_foreign.Model"}, "_name_or_path": str(folder)}
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    with pytest.raises(ValueError, match="needs code of its own"):
        open_model(folder, LlavaForConditionalGeneration)
    export_folder(folder.parent / "model", tmp_path / "sparse")
    config = json.loads((tmp_path / "sparse" / "config.json").read_text())
    config = {"model_type": "llava", "text_config": text, "quantization_config": config["quantization_config"]}
    (tmp_path / "sparse" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cannot be loaded: .*custom code"):
        load_sparse(tmp_path / "sparse", LlavaForConditionalGeneration)
    assert not answered and not (tmp_path / "marker").exists()


def test_a_kernel_named_by_a_configuration_is_not_fetched(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "someone/kernels"}))
    with pytest.raises(ValueError, match="attn_implementation names code to fetch and run"):
        build_model(ModelConfig(init_from=str(folder)), 300)


@pytest.mark.parametrize("base", ["../elsewhere", "org/elsewhere"])
def test_an_adapter_beside_a_model_is_refused(base, saved, folder, tmp_path, capsys):
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["c_attn"], "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    for command in ("eval", "prune", "train"):
        arguments, code = commands(saved, folder, tmp_path)[command]
        assert main(arguments) == code
        assert "has an adapter (adapter_config.json): expected a model alone" in capsys.readouterr().err


IMPOSSIBLE = [
    ("activation_function", "nonsense", "'nonsense'"),
    ("n_head", 0, "zero"),
    ("n_positions", -1, "negative"),
    ("vocab_size", 2**62, "overflow"),
    ("n_layer", 10**9, "n_layer is 1,000,000,000, expected at most 1,000"),
]


@pytest.mark.parametrize(("key", "value", "message"), IMPOSSIBLE)
def test_impossible_configurations_are_told_before_anything_is_built(
    key, value, message, saved, folder, tmp_path, capsys
):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    for command in ("train", "check"):
        arguments, code = commands(saved, folder, tmp_path)[command]
        assert main(arguments) == code
        said = "".join(capsys.readouterr())
        assert message in said and "model" in said and "Traceback" not in said


def test_only_numbers_of_layers_and_experts_are_limited(tmp_path):
    file = tmp_path / "config.json"
    sizes = {"shared_expert_intermediate_size": 5632, "vocab_size_per_layer_input": 262144, "num_layers": 28}
    file.write_text(json.dumps(sizes | {"label2id": {"record player": 1100, "expert": 5000}}))
    check_folder(tmp_path)
    file.write_text(json.dumps({"n_layers": 12, "text_config": {"n_routed_experts": 100_000}}))
    with pytest.raises(ValueError, match="n_routed_experts is 100,000, in each of 12 layers; expected at most"):
        check_folder(tmp_path)


def change_weights(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


MATRIX = "transformer.h.1.mlp.c_fc.weight"
WRONG = {
    "a missing matrix": (lambda w: {n: t for n, t in w.items() if n != MATRIX}, f"1 missing ({MATRIX})"),
    "other names": (
        lambda w: {f"x.{n}": t for n, t in w.items()},
        "missing (lm_head.weight, transformer.h.0.attn.c_attn.bias, ",
    ),
    "no tensor": (lambda w: {}, "missing (lm_head.weight, transformer.h.0.attn.c_attn.bias, "),
    "another shape": (
        lambda w: w | {MATRIX: torch.zeros(16, 3)},
        f"1 of another shape ({MATRIX} (16, 3) instead of (16, 64))",
    ),
    "tokens": (lambda w: {n: t for n, t in w.items() if "wte" not in n}, "missing (lm_head.weight"),
}


@pytest.mark.parametrize("case", WRONG)
def test_weights_that_do_not_fit_are_refused_by_train_and_check(saved, folder, tmp_path, case, capsys):
    change, message = WRONG[case]
    change_weights(folder, lambda weights: dict(change(weights)))
    arguments, code = commands(saved, folder, tmp_path)["check"]
    assert main(arguments) == code
    assert message in capsys.readouterr().out
    with pytest.raises(ValueError, match="do not fit its config.json") as refusal:
        build_model(ModelConfig(init_from=str(folder)), 300)
    assert message in str(refusal.value)
    assert str(refusal.value).startswith("model.init_from: ")
    assert "model.new_heads" in str(refusal.value)
    for name in ("eval", "prune"):
        arguments, code = commands(saved, folder, tmp_path)[name]
        assert main(arguments) == code
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_train_refuses_with_exit_code_2_and_makes_no_step(saved, folder, tmp_path, capsys):
    change_weights(folder, lambda weights: {name: tensor for name, tensor in weights.items() if name != MATRIX})
    arguments, code = commands(saved, folder, tmp_path)["train"]
    assert main(arguments) == code == 2
    assert f"error: model.init_from: the weights in {folder} do not fit" in capsys.readouterr().err
    assert not (tmp_path / "run" / "final").exists()


def test_heads_named_in_the_recipe_are_drawn_anew_and_all_else_is_read(saved, folder, tmp_path, capsys):
    untied = GPT2LMHeadModel.from_pretrained(folder)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    untied.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    assert "lm_head.weight" in stored
    for change in (
        lambda w: {n: t for n, t in w.items() if "lm_head" not in n},
        lambda w: w | {"lm_head.weight": torch.zeros(7, 16)},
    ):
        change_weights(folder, lambda _, change=change: change(dict(stored)))
        with pytest.raises(ValueError, match=r"lm_head\.weight"):
            build_model(ModelConfig(init_from=str(folder)), 300)
        model = build_model(ModelConfig(init_from=str(folder), new_heads=["lm_head"]), 300)
        assert 0 < float(model.lm_head.weight.detach().std()) < 0.1
        assert torch.equal(model.transformer.h[1].mlp.c_fc.weight, stored[MATRIX])
    arguments, _ = commands(saved, folder, tmp_path)["check"]
    assert main([*arguments, "model.new_heads=[lm_head]"]) == 0
    assert "fit its config.json, but for lm_head, drawn anew" in capsys.readouterr().out
    with pytest.raises(ValueError, match="new_heads: score selects no tensor"):
        build_model(ModelConfig(init_from=str(folder), new_heads=["lm_head", "score"]), 300)


def test_check_says_when_weights_are_too_large_to_be_read(saved, folder, tmp_path, monkeypatch, capsys):
    arguments, _ = commands(saved, folder, tmp_path)["check"]
    for limit, said in ((2**30, "all finite"), (1000, "not read: NaN and infinity are refused when the run begins")):
        monkeypatch.setattr("leanstep.recipes.check.check._READ", limit)
        assert main(arguments) == 0
        assert said in capsys.readouterr().out


def test_tied_weights_are_not_missing(folder):
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = build_model(ModelConfig(init_from=str(folder)), 300)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(saved, folder, tmp_path, value, capsys):
    def spoil(weights):
        weights[MATRIX][3, 5] = value
        return weights

    change_weights(folder, spoil)
    for name in ("eval", "prune"):
        arguments, code = commands(saved, folder, tmp_path)[name]
        assert main(arguments) == code == 2
        assert f"{MATRIX} holds NaN or infinity" in capsys.readouterr().err
    arguments, code = commands(saved, folder, tmp_path)["check"]
    assert main(arguments) == code == 1
    assert f"{MATRIX} holds NaN or infinity" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"model.init_from: .*{MATRIX} holds NaN or infinity"):
        build_model(ModelConfig(init_from=str(folder)), 300)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("dtype", "form"), [(torch.int64, "safetensors"), (torch.bool, "bin"), (torch.complex64, "safetensors")], ids=str
)
def test_weights_that_are_not_floating_are_refused_by_name(saved, folder, tmp_path, dtype, form, capsys):
    """transformers converts them without a word, and drops the imaginary part."""
    change_weights(folder, lambda weights: weights | {MATRIX: weights[MATRIX].to(dtype)})
    if form == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    for name in ("eval", "prune", "train", "check"):
        arguments, code = commands(saved, folder, tmp_path)[name]
        assert main(arguments) == code
        said = capsys.readouterr()
        assert re.search(rf"{MATRIX} is of dtype .*: expected floating-point weights", said.err + said.out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["eval", "train", "check"])
def test_an_index_that_names_files_elsewhere_is_refused(saved, folder, tmp_path, name, capsys):
    tensors = load_file(folder / "model.safetensors")
    shutil.move(folder / "model.safetensors", tmp_path / "weights.safetensors")
    save_file({}, folder / "empty.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, "../weights.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    arguments, code = commands(saved, folder, tmp_path)[name]
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert "index.json names the file '../weights.safetensors': expected a plain name" in captured.out + captured.err


def test_a_folder_that_does_not_exist_is_told_as_such():
    with pytest.raises(ValueError, match=r"the folder runs/no/such does not exist: expected a Hugging Face folder"):
        open_config("runs/no/such")


SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
MIXTURES = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}

DENSE = LlamaConfig(**SIZES)
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
GEMMA = Gemma3Config(
    text_config=SIZES, vision_config={**VISION, "image_size": 16, "patch_size": 8}, mm_tokens_per_image=1
)


def start_from(saved, tmp_path, config):
    """Write a new model of a configuration; return the words after ``train`` and ``check`` that start from it."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    for file in (saved / "model").glob("*token*"):
        shutil.copy(file, tmp_path / "base")
    words = [f"model.init_from={tmp_path / 'base'}", "model.config={}", f"data.tokenizer={tmp_path / 'base'}"]
    return [str(saved / "tiny.yaml"), *words, f"out={tmp_path / 'run'}", "optimizer={name: adamw, lr: 1e-3}", "steps=2"]


@pytest.mark.parametrize("command", ["train", "check"])
def test_a_start_with_another_tokenizer_than_the_models_is_refused(saved, tmp_path, capsys, command):
    """A recipe's train:SIZE would train a model on tokens that mean something else."""
    recipe, start, empty, own, *words = start_from(saved, tmp_path, DENSE)
    other = "data.tokenizer=train:280"
    assert main([command, recipe, start, empty, other, *words]) in (1, 2)
    said = "".join(capsys.readouterr())
    assert "data.tokenizer: 'train:280' makes other tokens than the model of model.init_from" in said
    assert f"take its own, {own}" in said


@pytest.mark.parametrize("adapters", [[], ["lora.target_modules=[all-linear]", "lora.r=2"]])
@pytest.mark.parametrize("command", ["train", "check"])
def test_weights_in_sparse_form_are_no_start(saved, tmp_path, capsys, command, adapters):
    """Its matrices are buffers, which no optimizer sees, and no adapter can be merged into them."""
    recipe, _, empty, _, *words = start_from(saved, tmp_path, DENSE)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[torch.rand_like(parameter) < 0.6] = 0
    model.save_pretrained(tmp_path / "base")
    export_folder(tmp_path / "base", tmp_path / "sparse")
    start = [f"model.init_from={tmp_path / 'sparse'}", f"data.tokenizer={tmp_path / 'sparse'}"]
    assert main([command, recipe, *start, empty, *words, *adapters]) in (1, 2)
    said = "".join(capsys.readouterr())
    assert "stores its weights sparse, and a run can neither train them nor merge adapters into them" in said
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize("config", [*MIXTURES.values(), GEMMA], ids=lambda config: config.model_type)
def test_models_that_transformers_stores_in_another_form_resume(saved, tmp_path, config, capsys):
    words = start_from(saved, tmp_path, config)
    assert main(["train", *words, "stop.max_hours=1e-9"]) == 143, capsys.readouterr().err
    assert main(["train", *words]) == 0, capsys.readouterr().err
    assert "resuming from" in (said := capsys.readouterr().out), said
    assert main(["train", *words, f"out={tmp_path / 'whole'}"]) == 0
    resumed, whole = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("run", "whole"))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_memory_of_a_mixture_of_experts_is_that_of_a_real_pass(saved, tmp_path, name, precision):
    recipe, *words = start_from(saved, tmp_path, MIXTURES[name])
    config = load(recipe, [*words, f"precision={precision}"])
    estimated = estimate(config, 300)
    model = build_model(config.model, 300)
    ids = torch.randint(300, (config.batch.micro_batch_size, config.data.seq_len))
    with saved_storages(model) as saved_bytes, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        model(input_ids=ids, labels=ids, use_cache=False)
    assert estimated.weights == sum(parameter.nbytes for parameter in model.parameters())
    real = sum(storage.nbytes() for storage in saved_bytes.values())
    assert estimated.activations == pytest.approx(real, rel=0.05)


def test_a_model_of_text_and_images_is_evaluated_checked_and_trained(saved, tmp_path, capsys):
    words = start_from(saved, tmp_path, GEMMA)
    assert main(["check", *words]) == 0, capsys.readouterr().out
    assert main(["train", *words]) == 0, capsys.readouterr().err
    base = str(tmp_path / "base")
    assert main(["eval", base, "--data", str(saved / "long.txt"), "--batches", "1"]) == 0, capsys.readouterr().err
    assert main(["eval", base, "--data", str(saved / "long.txt"), "--seq-len", "65"]) == 2
    assert "--seq-len must be from 2 to the model's 64 positions" in capsys.readouterr().err
    assert main(["generate", base, "Document", "--max-new-tokens", "100"]) == 2
    assert "the model has 64 positions" in capsys.readouterr().err
    assert main(["train", *words, f"out={tmp_path / 'long'}", "data.seq_len=128", "batch.tokens_per_step=1024"]) == 2
    assert "the model has 64 positions" in capsys.readouterr().err
