"""Every shipped recipe loads, is what its name says, and counts its weights as the model does."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers

from leanstep.recipes.config.catalog import describe, parameter_count
from leanstep.recipes.config.loader import ALIASES, ConfigError, dump, find_recipe, load, recipe_names
from leanstep.recipes.config.schema import ModelConfig, accumulation_steps, trained_size
from leanstep.recipes.data.chat import read_rows

NAMES = recipe_names()
NANO = [f"{family}-nano-{optimizer}" for family in ("llama", "gpt") for optimizer in ("adamw", "lion", "sinkgd")]
# hidden, MLP, layers, heads, steps, millions of weights: Zhao et al. 2024, arXiv 2403.03507
PUBLISHED = {
    "60m": (512, 1376, 8, 8, 10_000, 58.1),
    "130m": (768, 2048, 12, 12, 20_000, 134.1),
    "350m": (1024, 2736, 24, 16, 60_000, 368.0),
    "1b": (2048, 5461, 24, 32, 100_000, 1339.1),
}


def built(model):
    """The model of a recipe on the meta device, where it takes no memory."""
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    }[model.family]
    with torch.device("meta"):
        return model_class(config_class(**model.config))


def test_the_recipes_that_are_promised_are_there():
    sizes = [f"llama-{size}-{optimizer}" for size in PUBLISHED for optimizer in ("adamw", "sinkgd")]
    assert set(NAMES) >= {*NANO, *sizes, "gpt2-124m"}
    for alias, name in ALIASES.items():
        assert find_recipe(alias) == find_recipe(name)
        assert load(alias) == load(name)
    with pytest.raises(ConfigError, match="no recipe or file of that name"):
        find_recipe("nothing")


@pytest.mark.parametrize("name", NANO)
def test_a_first_run_prints_a_loss_before_it_evaluates_anything(name):
    config = load(name)
    assert not config.eval.at_start and config.eval.every > 0


@pytest.mark.parametrize("name", NAMES)
def test_each_recipe_loads_describes_itself_and_round_trips(name, tmp_path):
    config = load(name)
    text = find_recipe(name).read_text()
    assert config.name == name
    assert text.startswith(f"# {name}: ")
    assert f"leanstep train {name}" in text
    assert config.description and len(config.description) < 100
    assert config.out == f"runs/{name}"
    assert (config.expect.val_loss is None) == (config.expect.source == "")
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert replace(load(path), source_file=config.source_file) == config
    facts = describe(config)
    assert json.loads(json.dumps(facts.network)) is (config.data.source == "hf")


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_counted_as_the_model_has_them(name):
    config = load(name)
    if config.model.init_from is not None:  # the checkpoint knows
        assert parameter_count(config.model) is None and describe(config).parameters is None
        return
    vocabulary = trained_size(config.data.tokenizer) or 2048
    model = replace(config.model, config={"vocab_size": vocabulary, **config.model.config})
    assert parameter_count(model) == built(model).num_parameters()
    assert describe(config).parameters == parameter_count(model)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 24, "tie_word_embeddings": True}),
        ("gpt2", {"n_inner": 100, "tie_word_embeddings": False, "n_positions": 77}),
    ],
)
def test_the_count_holds_for_other_shapes(family, sizes):
    small = {
        "llama": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    }[family]
    model = ModelConfig(family=family, config={"vocab_size": 300, **small, **sizes})
    assert parameter_count(model) == built(model).num_parameters()
    assert parameter_count(replace(model, config=small)) is None  # without a vocabulary there is no telling


@pytest.mark.parametrize("name", NANO)
def test_nano_recipes_need_nothing_and_differ_in_the_optimizer_only(name):
    config, facts = load(name), describe(load(name))
    assert not facts.network and not facts.gpu
    assert 1_000_000 < facts.parameters < 1_200_000
    assert config.optimizer.name == name.rpartition("-")[2]
    other = load(name.rpartition("-")[0] + "-adamw")
    neutral = {"name": "any", "description": "", "out": "any", "source_file": "", "expect": other.expect}
    assert replace(config, optimizer=other.optimizer, **neutral) == replace(other, **neutral)
    assert accumulation_steps(config, 2) == 1  # the same file runs on two processes


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("optimizer", ["adamw", "sinkgd"])
def test_sizes_and_protocol_are_the_published_ones(size, optimizer):
    hidden, mlp, layers, heads, steps, millions = PUBLISHED[size]
    config, facts = load(f"llama-{size}-{optimizer}"), describe(load(f"llama-{size}-{optimizer}"))
    model = config.model.config
    assert (model["hidden_size"], model["intermediate_size"]) == (hidden, mlp)
    assert (model["num_hidden_layers"], model["num_attention_heads"]) == (layers, heads)
    assert (model["vocab_size"], model["tie_word_embeddings"], model["rms_norm_eps"]) == (32000, False, 1e-6)
    assert round(facts.parameters / 1e6, 1) == millions
    assert facts.network and facts.gpu
    assert (config.steps, config.schedule.warmup_fraction, config.schedule.final_fraction) == (steps, 0.1, 0.1)
    assert config.batch.tokens_per_step == 512 * config.data.seq_len == 512 * 256
    assert (config.data.name, config.data.subset, config.data.tokenizer) == ("allenai/c4", "en", "t5-base")
    assert (config.precision, config.max_grad_norm, config.optimizer.weight_decay) == ("bf16-pure", None, 0.0)
    assert not config.data.packing and load(config.name, ["data.packing=true"]).data.packing
    if optimizer == "adamw":
        # the only published numbers here: perplexities of Adam, said to be published
        perplexity = {"60m": 30.05, "130m": 23.13, "350m": 18.77, "1b": 16.52}[size]
        assert config.expect.val_loss == pytest.approx(math.log(perplexity), abs=1e-3)
        assert config.expect.source.startswith(f"published: perplexity {perplexity}")
    else:
        assert config.expect.val_loss is None


def test_sixty_million_is_58_07_million():
    assert parameter_count(load("llama-60m").model) == 58_073_600


def test_the_conversations_that_the_chat_recipe_names_are_made_by_its_command(tmp_path):
    lines = [line[4:] for line in find_recipe("smollm-chat-lora").read_text().splitlines() if line.startswith("#   ")]
    (first,) = (number for number, line in enumerate(lines) if line.startswith("python -c"))
    command = "\n".join(lines[first:]).replace("python", f"'{sys.executable}'", 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    rows = [row for _, row in read_rows(str(tmp_path / "talks.jsonl"), "data.path")]
    assert len(rows) > 100 and all(row["messages"][1]["content"] for row in rows)
