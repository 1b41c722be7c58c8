"""Recipes: every mistake is found at once, on its line, with the nearest key; what is right loads and round-trips."""

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, is_dataclass, replace
from typing import get_args

import argument_table
import pytest

from leanstep.recipes.config.loader import ConfigError, dump, load
from leanstep.recipes.config.rules import TABLE_FILE, joint_problems, model_keys
from leanstep.recipes.config.schema import BatchConfig, DataConfig, RunConfig, accumulation_steps
from leanstep.recipes.config.values import check

BASE = """\
recipe: pretrain
steps: 10
model: {family: llama, config: {hidden_size: 64, num_attention_heads: 4}}
data: {source: sotu, seq_len: 64}
batch: {tokens_per_step: 1024, micro_batch_size: 16}
optimizer: {name: adamw, lr: 1e-3}
"""


def problems_of(path, overrides=(), **options):
    """Load, expect it to fail, and return the problems with the file's name cut off."""
    with pytest.raises(ConfigError) as caught:
        load(path, overrides, **options)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return [problem.replace(str(path), path.name) for problem in caught.value.problems]


@pytest.fixture
def recipe(tmp_path):
    def write(text=BASE, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


# -- what is right --------------------------------------------------------------------------------------------------


def test_values_overrides_and_defaults(recipe):
    config = load(recipe(), ["optimizer.args.betas=[0.9, 0.95]", "steps=20", "model.config.num_hidden_layers=2"])
    assert config.steps == 20
    assert config.optimizer.lr == 1e-3
    assert config.optimizer.args == {"betas": [0.9, 0.95]}
    assert config.model.config == {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    assert config.checkpoint == RunConfig().checkpoint
    assert (config.name, config.out) == ("mine", "runs/mine")
    assert config.source_file.endswith("mine.yaml")


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4", "+1e-4", ".0001"])
def test_numbers_in_every_notation(recipe, text):
    from_file = load(recipe(BASE.replace("lr: 1e-3", f"lr: {text}")))
    from_override = load(recipe(), [f"optimizer.lr={text}"])
    assert from_file.optimizer.lr == from_override.optimizer.lr == 1e-4


@pytest.mark.parametrize("text", ["*.txt", "notes #1.txt", "[x] book.txt", "{a,b}.txt", "@home.txt", "%x", "it's: a"])
def test_text_on_the_command_line_needs_no_yaml(recipe, text):
    for value in (text, json.dumps(text)):
        config = load(recipe(), ["data.source=text", f"data.path={value}"])
        assert config.data.path == text


def test_home_is_expanded_in_the_folders_of_a_run(recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load(recipe(), ["out=~/runs/a", "checkpoint.resume=~/runs/b"])
    assert (config.out, config.checkpoint.resume) == (f"{tmp_path}/runs/a", f"{tmp_path}/runs/b")


def test_an_override_replaces_the_value_at_its_path(recipe):
    path = recipe(BASE + "log: {every: 3, trackers: [tensorboard]}\n")
    assert load(path, ["log.trackers=[]"]).log.trackers == []
    assert load(path, ["model.config={hidden_size: 128}"]).model.config == {"hidden_size": 128}
    groups = "optimizer.groups=[{match: norm, lr: 0.1}, {role: head, weight_decay: 0.0}]"
    assert load(path, [groups, "optimizer.groups.1.lr=0.5"]).optimizer.groups[1] == {
        "role": "head",
        "weight_decay": 0.0,
        "lr": 0.5,
    }


def test_references_are_resolved(recipe, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch")
    config = load(recipe(BASE + "out: ${oc.env:SCRATCH}/${name}-${optimizer.name}-${seed}\n"))
    assert config.out == "/scratch/mine-adamw-0"
    assert load(recipe(BASE + "eval: {every: '${steps}'}\n")).eval.every == 10


def test_an_expectation_is_of_the_recipe_as_it_is_written(recipe):
    path = recipe(BASE + "expect: {val_loss: 4.5, source: measured}\nout: runs/${name}\n")
    for harmless in ("seed=7", "log.every=3", "batch.micro_batch_size=1", "out=elsewhere", "steps=10", "eval.every=5"):
        assert load(path, [harmless]).expect.val_loss == 4.5, harmless
    for change in ("steps=11", "optimizer.lr=1", "data.val_tokens=1000", "eval.batches=3", "precision=bf16-pure"):
        expect = load(path, [change]).expect
        assert expect.val_loss is None
        assert expect.source == f"the recipe expects 4.5 without these changes: {change.partition('=')[0]}"
    assert load(path, ["qk_clip.threshold=9"]).expect.source.endswith("these changes: qk_clip.threshold")
    assert load(path, ["steps=11", "expect.val_loss=4.8"]).expect.val_loss == 4.8
    source = "{source: text, path: '???', seq_len: 64}"
    open_path = recipe(BASE.replace("{source: sotu, seq_len: 64}", source) + "expect: {val_loss: 4.5}\n")
    assert load(open_path, ["data.path=mine.txt"]).expect.val_loss == 4.5


def test_dump_loads_back_to_an_equal_object(recipe, tmp_path):
    groups = "optimizer.groups=[{match: 'embed|norm', lr: 3e-5}]"
    config = load(recipe(), [groups, "stop.loss_above=1e3", "data.subset='1'", "description='1e-4'"])
    again = load(recipe(dump(config), "config.yaml"))
    assert replace(again, source_file=config.source_file) == config
    assert dump(again) == dump(config)
    assert again.name == "mine"  # and not config, the name of the file it was read from


def test_configs_are_frozen_and_checked_in_python():
    config = RunConfig()
    with pytest.raises(FrozenInstanceError):
        config.steps = 3
    with pytest.raises(ValueError, match=r"seq_len\s+Input should be greater than or equal to 2 .*input_value=1"):
        DataConfig(seq_len=1)


def test_every_number_of_the_schema_has_a_range():
    def numbers(schema):
        for name, item in schema.__pydantic_fields__.items():
            if is_dataclass(item.annotation):
                yield from numbers(item.annotation)
            elif {int, float} & {item.annotation, *get_args(item.annotation)}:
                yield f"{schema.__name__}.{name}", item.metadata

    found = dict(numbers(RunConfig))
    assert len(found) > 15
    assert [name for name, limits in found.items() if not limits] == []


def test_accumulation_follows_from_tokens_and_processes():
    config = RunConfig(data=DataConfig(seq_len=256), batch=BatchConfig(tokens_per_step=131072, micro_batch_size=64))
    assert [accumulation_steps(config, world) for world in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(ValueError, match=r"131072 does not divide into .* 256 \* .* 64 \* 3 processes = 49152 tokens"):
        accumulation_steps(config, 3)


# -- recipes that derive from others --------------------------------------------------------------------------------


def test_a_recipe_takes_from_its_base_what_it_does_not_say(recipe, tmp_path):
    recipe(BASE + "description: the base\nexpect: {val_loss: 3, source: measured}\n", "first.yaml")
    config = load(recipe("base: first.yaml\nsteps: 7\nmodel: {config: {num_hidden_layers: 3}}\n"))
    assert (config.steps, config.data.seq_len, config.optimizer.lr) == (7, 64, 1e-3)
    assert config.model.config == {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    assert (config.name, config.out, config.description, config.expect.val_loss) == ("mine", "runs/mine", "", None)
    assert load(recipe("base: llama-nano-adamw\nsteps: 9\n")).model == load("llama-nano-adamw").model
    (tmp_path / "last.yaml").write_text("base: mine.yaml\nseed: 3\n")
    assert replace(load(tmp_path / "last.yaml"), seed=0, name="mine", out="runs/mine", source_file="") == replace(
        load(tmp_path / "mine.yaml"), source_file=""
    )


def test_what_belongs_to_a_class_stays_with_it(recipe):
    recipe(BASE.replace("lr: 1e-3", "lr: 1e-3, args: {amsgrad: true}, groups: [{role: head, lr: 1}]"), "first.yaml")
    config = load(recipe("base: first.yaml\noptimizer: {name: lion}\n"))
    assert (config.optimizer.name, config.optimizer.lr) == ("lion", 1e-3)
    assert (config.optimizer.args, config.optimizer.groups) == ({}, [])
    assert load(recipe("base: first.yaml\noptimizer: {lr: 1}\n")).optimizer.args == {"amsgrad": True}
    assert load(recipe("base: first.yaml\nmodel: {family: gpt2}\n")).model.config == {}


def test_an_override_may_name_another_optimizer(recipe):
    config = load("llama-nano-balanced", ["optimizer.args.betas=[0.9, 0.98]", "optimizer.name=lion"])
    assert (config.optimizer.args, config.optimizer.embeddings) == ({"betas": [0.9, 0.98]}, "adamw")
    left_out, rates = config.notes
    assert left_out.startswith("optimizer.name=lion: left out what the recipe sets for sinkgd: args.scale, args.")
    assert "keeps lr=0.02 and weight_decay=0, which the recipe chose for sinkgd; give optimizer.lr" in rates
    (_, advice) = load("llama-nano-sinkgd", ["optimizer.name=lion"]).notes
    assert advice.endswith("llama-nano-lion has lr=0.001 and weight_decay=0.1")
    assert len(load("llama-nano-sinkgd", ["optimizer.name=lion", "optimizer.lr=1e-3"]).notes) == 1
    same = load("llama-nano-sinkgd", ["optimizer.name=sinkgd"])
    assert same.optimizer.args["num_iters"] == 5 and not same.notes
    # what the command line itself gives must fit
    for words in (["optimizer.args.beta=3", "optimizer.name=lion"], ["optimizer.name=lion", "optimizer.args.beta=3"]):
        (problem,) = problems_of(recipe(), words)
        assert "unknown key 'optimizer.args.beta'; did you mean 'optimizer.args.betas'?" in problem


def test_a_description_does_not_outlive_what_it_describes():
    described = load("llama-nano-sinkgd").description
    for unchanged in ("seed=3", "data.cache_dir=here", "optimizer.lr=1"):
        assert load("llama-nano-sinkgd", [unchanged]).description == described
    assert f"{load('llama-nano-sinkgd', ['steps=3']).description}; a few minutes on two CPU cores" == described
    changed = load("llama-nano-sinkgd", ["data.source=text", "data.path=mine.txt", "steps=3"]).description
    assert changed == "llama-nano-sinkgd with another data.path, data.source"
    assert load("llama-nano-sinkgd", ["optimizer.name=sgd", "description=mine"]).description == "mine"


def test_mistakes_of_a_base_are_told_in_its_file(recipe, tmp_path):
    recipe("stepz: 3\nseed: -1\nbatch: {tokens_per_step: 0}\n", "first.yaml")
    path = recipe("base: first.yaml\nseed: 1\noptimizer: {lr: -1}\n")
    assert [problem.replace(f"{tmp_path}/", "") for problem in problems_of(path, ["steps=x"])] == [
        "mine.yaml:3: optimizer.lr must be at least 0, got -1",
        "first.yaml:1: unknown key 'stepz'; did you mean 'steps'?",
        "first.yaml:3: batch.tokens_per_step must be at least 1, got 0",
        "override: steps must be a whole number, got 'x'",
    ]


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("mine.yaml", "mine.yaml:1: base: mine.yaml derives from itself"),
        ("other.yaml", "mine.yaml:1: base: other.yaml: no such file"),
        ("llama-nano-adamv", "mine.yaml:1: base: llama-nano-adamv: no recipe or file of that name; did you mean"),
        ("3", "mine.yaml:1: base: expected the name of a recipe or a file, got 3"),
    ],
)
def test_a_base_that_cannot_be_read_is_told(recipe, base, message):
    assert problems_of(recipe(f"base: {base}\nsteps: 3\n"))[0].startswith(message)


# -- what is wrong --------------------------------------------------------------------------------------------------


def test_everything_at_once_with_lines(recipe):
    path = recipe(
        "stepz: 10\n"
        "seed: -1\n"
        "lr: 1e-3\n"
        "optimizer:\n"
        "  lrr: 3\n"
        "  name: lionn\n"
        "model:\n"
        "  family: gpt2\n"
        "  config:\n"
        "    n_embd: 100\n"
        "    n_head: 3\n"
        "    n_layers: 2\n"
        "data: {source: text, seq_len: 4000}\n"
        "eval: {every: no}\n"
        "seed: 3\n"
        "schedule:\n"
        "  warmup_fraction: 2\n"
        "stop: null\n"
    )
    assert problems_of(path, ["optimizer.nam=lion", "steps=x"]) == [
        "mine.yaml:1: unknown key 'stepz'; did you mean 'steps'?",
        "mine.yaml:2: seed must be at least 0, got -1",
        "mine.yaml:3: unknown key 'lr'; did you mean 'optimizer.lr'?",
        "mine.yaml:5: unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?",
        "mine.yaml:6: optimizer.name must be 'adamw', 'lion', 'sinkgd', 'lanton', 'mfac', 'muon', 'scale' or 'sgd', "
        "got 'lionn'; did you mean 'lion'?",
        "mine.yaml:10: model.config.n_embd 100 must be a multiple of n_head 3",
        "mine.yaml:12: unknown key 'model.config.n_layers'; did you mean 'model.config.n_layer'?",
        "mine.yaml:13: batch.tokens_per_step 4096 does not divide into data.seq_len 4000 * batch.micro_batch_size 16 = "
        "64000 tokens; take 64000, or another micro_batch_size",
        "mine.yaml:13: data.path is needed by data.source 'text': a file, a folder or a pattern",
        "mine.yaml:13: data.seq_len must be at most the model's 1024 positions, got 4000; "
        "shorten it or set model.config.n_positions",
        "mine.yaml:14: eval.every must be a whole number, got false",
        "mine.yaml:15: duplicate key 'seed'; it is first on line 2",
        "mine.yaml:17: schedule.warmup_fraction must be at most 1, got 2",
        "mine.yaml:18: stop must be a mapping, got null",
        "override: steps must be a whole number, got 'x'",
        "override: unknown key 'optimizer.nam'; did you mean 'optimizer.name'?",
    ]


@pytest.mark.parametrize("family", ["llamma", "GPT"])
def test_what_follows_from_a_wrong_name_is_told_with_it(recipe, family):
    found = problems_of(
        recipe(),
        [
            f"model={{family: {family}, config: {{hiden_size: 64, n_layer: many, num_hidden_layers: 0}}}}",
            "optimizer={name: lionn, lr: -1, args: {beta: 1, momentum_dtype: fp7}, groups: [{role: heads, lr: -1}]}",
            "data.source=text",
        ],
    )
    told = "\n".join(found)
    assert "model.family must be 'llama' or 'gpt2'" in told
    assert "unknown key 'model.config.hiden_size'" in told
    assert ("model.config.num_hidden_layers must be at least 1, got 0" in told) == (family != "GPT")
    assert ("model.config.n_layer must be a whole number, got 'many'" in told) == (family == "GPT")
    assert "optimizer.name must be 'adamw', 'lion'" in told and "optimizer.lr must be at least 0" in told
    assert "unknown key 'optimizer.args.beta'; did you mean 'optimizer.args.betas'?" in told
    assert "optimizer.args.momentum_dtype must be" in told
    assert "optimizer.groups.0.role must be" in told and "optimizer.groups.0.lr must be at least 0" in told
    assert "data.path is needed by data.source 'text'" in told


WRONG = {
    "text for a number": ("optimizer.lr=fast", "optimizer.lr must be a number, got 'fast'"),
    "float for a count": ("steps=1e3", "steps must be a whole number, got 1000.0; write 1000"),
    "bool for a count": ("steps=true", "steps must be a whole number, got true"),
    "number for text": ("data.subset=10", "data.subset must be text, got 10; put it in quotes"),
    "null": ("steps=null", "steps must be a whole number, got null"),
    "empty": ("steps=", "steps must be a whole number, got null"),
    "scalar for a section": ("batch=3", "batch must be a mapping, got 3"),
    "list of numbers": ("log.trackers=[1]", "log.trackers.0 must be text, got 1; put it in quotes"),
    "infinite": ("optimizer.lr=.inf", "optimizer.lr must be a finite number, got inf"),
    "nan": ("optimizer.lr=.nan", "optimizer.lr must be a finite number, got nan"),
    "choice": ("precision=bf15", "precision must be 'bf16', 'fp32', 'fp16' or 'bf16-pure', got 'bf15'"),
    "reference": ("out=runs/${nam}", "out: 'runs/${nam}' cannot be resolved: Interpolation key 'nam' not found"),
    "missing": ("data.path=???", "data.path has no value yet ('???'); give it one"),
    "not a key": ("foo", "expected key.path=value, got 'foo'"),
    "empty key": (".steps=3", "expected key.path=value, got '.steps=3'"),
    "below a value": ("steps.x=3", "steps.x: steps is 10, which has no keys below it"),
    "not YAML": ("steps=[", "steps: not valid YAML"),
    "leading zero": ("steps=010", "steps must be a whole number, got '010'"),
    "minutes": ("steps=1:30", "steps must be a whole number, got '1:30'"),
    "no such position": ("optimizer.groups.0.lr=1", "optimizer.groups must be a list, got a mapping {'0': {'lr"),
    "tokenizer size": ("data.tokenizer=train:200", "data.tokenizer must be 'train:SIZE' with a size of at least 257"),
    "name with a slash": ("name=a/b", "name must be a plain name without slashes, got 'a/b'"),
    "empty text": ("out=''", "out must not be empty"),
    "indivisible batch": (
        "batch.micro_batch_size=12",
        "batch.tokens_per_step 1024 does not divide into data.seq_len 64 * batch.micro_batch_size 12 = 768 tokens; "
        "take 768 or 1536",
    ),
    "warm-up after the end": ("schedule.warmup_steps=11", "schedule.warmup_steps must be at most steps (10), got 11"),
    "no dataset": ("data.source=hf", "data.name is needed by data.source 'hf'"),
    "no file": ("data.source=json", "data.path is needed by data.source 'json'"),
    "stream of the sample": ("data.streaming=true", "data.streaming is not possible with data.source 'sotu'"),
    "small vocabulary": (
        "model.config.vocab_size=2000",
        "model.config.vocab_size must be at least the tokenizer's 2048 (data.tokenizer train:2048), got 2000",
    ),
    "too long": ("model.config.max_position_embeddings=32", "data.seq_len must be at most the model's 32 positions"),
    "folder and config": ("model.init_from=there", "model.config must be empty when model.init_from names a folder"),
    "zero layers": ("model.config.num_hidden_layers=0", "model.config.num_hidden_layers must be at least 1, got 0"),
    "heads": ("model.config.num_attention_heads=5", "model.config.hidden_size 64 must be a multiple of"),
    "model key": ("model.config.hiden_size=3", "unknown key 'model.config.hiden_size'; did you mean"),
    "model type": ("model.config.vocab_size=big", "model.config.vocab_size must be a whole number, got 'big'"),
    "argument": ("optimizer.args.beta=1", "unknown key 'optimizer.args.beta'; did you mean 'optimizer.args.betas'"),
    "key of its own": ("optimizer.args.lr=1", "unknown key 'optimizer.args.lr'; did you mean 'optimizer.lr'"),
    "argument type": ("optimizer.args.amsgrad=3", "optimizer.args.amsgrad must be true or false, got 3"),
    "argument length": (
        "optimizer.args.betas=[0.9]",
        "optimizer.args.betas must be a list of at least 2 items, not 1, got a list [0.9]",
    ),
    "argument range": ("optimizer.args.betas=[0, 1]", "optimizer.args.betas.1 must be less than 1, got 1"),
    "pattern": (
        "optimizer.groups=[{match: '[', lr: 1}]",
        "optimizer.groups.0.match must be a regular expression, got '['",
    ),
    "no selector": ("optimizer.groups=[{lr: 1}]", "optimizer.groups.0 must select parameters by 'match'"),
    "two selectors": ("optimizer.groups=[{match: a, role: head, lr: 1}]", "optimizer.groups.0 must select parameters"),
    "role": ("optimizer.groups=[{role: heads, lr: 1}]", "optimizer.groups.0.role must be 'hidden'"),
    "algorithm": ("optimizer.groups=[{role: head, algorithm: sinkd}]", "unknown key 'optimizer.groups.0.algorithm'"),
    "empty group": ("optimizer.groups=[{role: head}]", "optimizer.groups.0 selects parameters but sets nothing"),
    "group option": ("optimizer.groups=[{role: head, lrr: 1}]", "unknown key 'optimizer.groups.0.lrr'; did you mean"),
    "group range": ("optimizer.groups=[{role: head, lr: -1}]", "optimizer.groups.0.lr must be at least 0, got -1"),
}


@pytest.mark.parametrize(("override", "message"), WRONG.values(), ids=WRONG.keys())
def test_each_kind_of_mistake(recipe, override, message):
    found = problems_of(recipe(), [override])
    assert len(found) == 1, found
    assert message in found[0]
    assert found[0].startswith("override: ")


CHOICES = {
    "rounding=stochastik": "optimizer.args.rounding must be 'nearest', 'stochastic', 'kahan', 'master' or 'split', got "
    "'stochastik'; did you mean 'stochastic'?",
    "nonfinite=ignore": "optimizer.args.nonfinite must be 'skip', 'raise' or 'pass', got 'ignore'",
    "algorithm=sinkg": "optimizer.args.algorithm must be 'auto', 'sinkgd', 'balanced' or 'adamw', got 'sinkg'; "
    "did you mean 'sinkgd'?",
    "spectral=norm": "optimizer.args.spectral must be 'unit' or 'muon', got 'norm'",
    "momentum_order=before": "optimizer.args.momentum_order must be 'pre' or 'post', got 'before'",
    "num_iters=0": "optimizer.args.num_iters must be at least 1, got 0",
    "momentum_dtype=fp32": "optimizer.args.momentum_dtype must be 'int8', 'fp8', 'float16', 'bfloat16', 'float32' "
    "or 'float64'",
}


@pytest.mark.parametrize(("argument", "message"), CHOICES.items(), ids=CHOICES.keys())
def test_words_that_an_argument_may_be_are_those_of_the_class(recipe, argument, message):
    (found,) = problems_of(recipe(), ["optimizer={name: sinkgd, lr: 1e-2}", f"optimizer.args.{argument}"])
    assert message in found
    allowed = {"rounding": "kahan", "nonfinite": "raise", "algorithm": "balanced", "spectral": "muon"}
    key = argument.partition("=")[0]
    if key in allowed:
        load(recipe(), ["optimizer={name: sinkgd, lr: 1e-2}", f"optimizer.args.{key}={allowed[key]}"])


OTHER_CHOICES = {
    "lanton.alpha=big": "optimizer.args.alpha must be 'auto' or a number, got 'big'",
    "lanton.scaling=moun": "must be 'scion' or 'muon', got 'moun'; did you mean 'muon'?",
    "lanton.nuclear=exact": "optimizer.args.nuclear must be 'auto', 'sketch', 'polar', 'svd' or 'frobenius', got",
    "lanton.ns_coefficients=jordn": "did you mean 'jordan'?",
    "mfac.scaling=muon": "optimizer.args.scaling must be 'window' or 'count', got 'muon'",
    "mfac.scope=layers": "must be 'model', 'group' or 'layer' or a whole number, got 'layers'; did you mean",
    "mfac.storage=fp8": "must be 'fp32', 'bf16' or 'fp64', got 'fp8'",
    "mfac.compression=top-k": "must be 'topk', got 'top-k'; did you mean 'topk'?",
    "mfac.window=0": "optimizer.args.window must be at least 1, got 0",
    "mfac.damping=0": "optimizer.args.damping must be greater than 0, got 0",
}


@pytest.mark.parametrize(("argument", "message"), OTHER_CHOICES.items(), ids=OTHER_CHOICES.keys())
def test_words_and_ranges_of_lanton_and_mfac(recipe, argument, message):
    name, _, setting = argument.partition(".")
    (found,) = problems_of(recipe(), [f"optimizer={{name: {name}, lr: 1e-2}}", f"optimizer.args.{setting}"])
    assert message in found


def test_words_and_numbers_that_the_classes_take(recipe):
    for name, arguments in (("lanton", "{alpha: 2.0, scaling: muon}"), ("mfac", "{scope: 64, storage: null}")):
        load(recipe(), [f"optimizer={{name: {name}, lr: 1e-2, args: {arguments}}}"])


def test_an_override_of_a_whole_section_is_where_its_mistakes_are(recipe):
    (found,) = problems_of(recipe(), ["optimizer={name: sinkgd, lr: 1e-2, args: {num_iters: 0}}"])
    assert found == "override: optimizer.args.num_iters must be at least 1, got 0"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sparsity.method=srste", "override: sparsity.method has no effect without sparsity.patterns; give that too"),
        ("lora.r=4", "override: lora.r has no effect without lora.target_modules; give that too, or leave lora out"),
        ("pruning.include=['*']", "override: pruning.include has no effect without pruning.keep_masks"),
    ],
)
def test_settings_of_a_section_that_is_off_are_told(recipe, override, message):
    (found,) = problems_of(recipe(), [override])
    assert found.startswith(message)


def test_a_section_may_be_switched_off_by_its_key(recipe):
    assert load("llama-nano-sparse-1of16", ["sparsity.patterns={}"]).sparsity.patterns == {}
    assert load("llama-nano-sparse-1of16", ["sparsity=null"]) == load("llama-nano-sparse-1of16", ["sparsity={}"])
    assert load(recipe(BASE + "sparsity: null\nlora: null\n")).sparsity.patterns == {}
    assert load(recipe(), ["pruning.keep_masks=false", "pruning.exclude=['*']"]).pruning.keep_masks is False
    # a typo of the key is told, once
    (found,) = problems_of(recipe(), ["sparsity.paterns={}"])
    assert "did you mean 'sparsity.patterns'?" in found


def test_halves_need_two_passes_a_step(recipe):
    lanton = "optimizer={name: lanton, lr: 1e-2, args: {noise: halves}}"
    (found,) = problems_of(recipe(), [lanton])
    assert "optimizer.args.noise 'halves' compares two halves of a step's micro batches, and a step has one" in found
    load(recipe(), [lanton, "batch.micro_batch_size=8"])
    load(recipe(), [lanton, "optimizer.args.noise_adaptive=false"])
    (found,) = problems_of(recipe(), [lanton, "batch.micro_batch_size=7"])
    assert "does not divide" in found


def test_release_gradients_excludes_accumulation_and_clipping(recipe):
    path = recipe(BASE.replace("micro_batch_size: 16", "micro_batch_size: 8") + "release_gradients: true\n")
    (found,) = problems_of(path)
    assert found.startswith(
        "mine.yaml:7: release_gradients steps inside backward, and the 2 passes of a step can only "
    )
    load(path, ["optimizer={name: sinkgd, args: {momentum: 0.9}}"])
    load(path, ["optimizer={name: lion, args: {betas: [0.9, 0.9]}}"])
    for refused in (
        "{name: sinkgd}", "{name: sinkgd, args: {momentum: 0.9, nesterov: true}}", "{name: lion}",
        "{name: sinkgd, args: {momentum: 0.9, momentum_dtype: int8}}",
        "{name: lion, args: {betas: [0.9, 0.9], cautious: true}}",
    ):  # fmt: skip
        (found,) = problems_of(path, [f"optimizer={refused}"])
        assert "can only be summed in a momentum" in found
    (found,) = problems_of(path, ["batch.micro_batch_size=16", "max_grad_norm=1.0"])
    assert "release_gradients excludes max_grad_norm" in found
    (found,) = problems_of(path, ["batch.micro_batch_size=16", "stop.nan=false"])
    assert "stop.nan false leaves a step with a non-finite loss out, and release_gradients updates inside" in found


def test_balanced_embeddings_are_a_rule_of_sinkgd(recipe):
    (problem,) = problems_of(recipe(), ["optimizer.embeddings=balanced"])
    assert "optimizer.embeddings 'balanced' is a rule of sinkgd, and optimizer.name is 'adamw'" in problem
    load(recipe(), ["optimizer={name: sinkgd, lr: 1e-2, embeddings: balanced}"])


def test_split_is_for_rules_of_matrices(recipe):
    (problem,) = problems_of(recipe(), ["optimizer.split=heads"])
    assert "optimizer.split is for the rules of matrices of sinkgd and lanton" in problem
    for name in ("sinkgd", "lanton"):
        load(recipe(), [f"optimizer={{name: {name}, lr: 1e-2, split: heads}}"])


def test_like_adamw_keeps_the_rates_of_an_adamw_recipe(recipe):
    """Those of its groups, too, without a warning."""
    (problem,) = problems_of(recipe(), ["optimizer.like_adamw=true"])
    assert (
        "optimizer.like_adamw carries AdamW's rates over to lion, sinkgd or lanton, and optimizer.name is 'adamw'"
        in problem
    )
    config = load("llama-micro-adamw", ["optimizer.name=sinkgd", "optimizer.like_adamw=true"])
    adamw = load("llama-micro-adamw").optimizer
    assert (config.optimizer.lr, config.optimizer.groups) == (adamw.lr, adamw.groups) and adamw.groups
    assert [note for note in config.notes if "keeps lr" in note] == []


def test_qk_clip_needs_attention_in_sight(recipe):
    load(recipe(), ["qk_clip.threshold=100"])
    (problem,) = problems_of(recipe(), ["qk_clip.threshold=100", "compile=true"])
    assert "qk_clip.threshold looks into attention layers, which compile hides" in problem
    (problem,) = problems_of(recipe(), ["qk_clip={threshold: 100, alpha: 2}"])
    assert "qk_clip.alpha" in problem


def test_release_gradients_excludes_scaled_gradients(recipe):
    path = recipe(BASE + "release_gradients: true\n")
    load(path, ["precision=bf16"])
    (found,) = problems_of(path, ["precision=fp16"])
    assert "release_gradients steps inside backward, on gradients that fp16 has scaled up" in found


def test_processes_share_the_step(recipe, monkeypatch):
    path = recipe()
    load(path)
    (found,) = problems_of(path, world_size=2)
    assert found.startswith("mine.yaml:5: batch.tokens_per_step 1024 does not divide")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert problems_of(path) == [found]


def test_a_joint_rule_is_silent_about_keys_that_are_wrong_already(recipe):
    assert problems_of(recipe(), ["batch.tokens_per_step=many"]) == [
        "override: batch.tokens_per_step must be a whole number, got 'many'"
    ]


def test_joint_problems_are_found_on_objects_too():
    config = RunConfig(data=DataConfig(source="hf"))
    assert [keys[0] for keys, _ in joint_problems(config)] == ["data.name"]


FORMS = {
    "syntax": ("steps: [1\nseed: 2\n", ["mine.yaml:2: not valid YAML"]),
    "tab": ("model:\n\tfamily: llama\n", ["mine.yaml:2: not valid YAML"]),
    "control character": ("steps: \x00", ["mine.yaml:1: not valid YAML"]),
    "list": ("- 1\n", ["mine.yaml:1: not a recipe: expected a mapping"]),
    "empty": ("", ["mine.yaml:1: the file is empty"]),
    "comment only": ("# nothing\n", ["mine.yaml:1: the file is empty"]),
    "object": (
        "seed: !!python/name:os.system\n",
        ["mine.yaml:1: seed: not valid YAML: python/name:os.system is no text"],
    ),
    "binary": ("seed: !!binary aGVsbG8=\n", ["mine.yaml:1: seed: not valid YAML: binary is no text, number"]),
    "hidden key": ("source_file: mine.txt\n", ["mine.yaml:1: unknown key 'source_file'"]),
    "itself": ("log: &a {trackers: [*a]}\n", ["mine.yaml:1: log.trackers.0 contains itself"]),
    "nested duplicate": (
        "batch:\n  micro_batch_size: 16\n  micro_batch_size: 8\n",
        ["mine.yaml:3: duplicate key 'batch.micro_batch_size'; it is first on line 2"],
    ),
    "key of keys": ("? [1, 2]\n: 3\n", ["mine.yaml:1: keys must be plain words, got seq"]),
    "number as key": ("3: 4\n", ["mine.yaml:1: unknown key '3'"]),
    "key with a dot": ("steps: 0\na.b: 1\n", ["mine.yaml:1: steps must be", "mine.yaml:2: unknown key 'a.b'"]),
    "merge": ("<<: {steps: 3}\n", ["mine.yaml:1: unknown key '<<'"]),
}


@pytest.mark.parametrize(("text", "messages"), FORMS.values(), ids=FORMS.keys())
def test_files_that_are_not_recipes(recipe, text, messages):
    found = problems_of(recipe(text))
    for message in messages:
        assert any(problem.startswith(message) for problem in found), found


def test_files_that_cannot_be_read(tmp_path, recipe):
    binary = tmp_path / "mine.yaml"
    binary.write_bytes(b"\xff\xfe\x00steps")
    assert "cannot be read as a text file" in problems_of(binary)[0]
    assert "is a folder, not a recipe" in problems_of(tmp_path)[0]
    (tmp_path / "config.yaml").write_text(BASE)
    assert f"its recipe is {tmp_path.name}/config.yaml" in problems_of(tmp_path)[0]
    with pytest.raises(ConfigError, match="no such file"):
        load("missing.yaml")
    with pytest.raises(ConfigError, match="did you mean 'llama-nano-lion'"):
        load("llama-nano-lio")


# -- the classes behind the open parts ------------------------------------------------------------------------------


def test_the_table_of_arguments_is_that_of_the_classes():
    made, written = argument_table.table(), json.loads(TABLE_FILE.read_text())
    for name, arguments in made["optimizers"].items():
        assert written["optimizers"].get(name) == arguments, f"{name}: run python tests/helpers/argument_table.py"
    assert written["roles"] == made["roles"] and written["optimizers"].keys() == made["optimizers"].keys()


def test_the_table_knows_words_and_ranges():
    lanton, mfac = argument_table.table()["optimizers"]["lanton"], argument_table.table()["optimizers"]["mfac"]
    assert lanton["alpha"] == {"types": ["float"], "choices": ["auto"], "gt": 0}
    assert mfac["density"] == {"types": ["float"], "gt": 0, "le": 1}
    assert lanton["betas"] == {"items": "float", "length": 2, "ge": 0, "lt": 1}
    assert mfac["window"] == {"types": ["int"], "ge": 1}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_model_keys_are_those_of_the_class(family):
    import transformers

    cls = {"llama": transformers.LlamaConfig, "gpt2": transformers.GPT2Config}[family]
    known = set(model_keys(family).__annotations__)
    values = json.loads(json.dumps(cls().to_dict()))
    own = {key for key in values if not key.startswith("_")} - {"model_type", "output_attentions"}
    assert own <= known
    assert check(model_keys(family), {key: value for key, value in values.items() if key in known})[1] == []


# -- before torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statement", ["load('llama-60m')", "load('gpt2-124m', ['optimizer.arg.x=1', 'steps=x'])"])
def test_nothing_heavy_is_imported(statement):
    code = (
        "import sys\n"
        "from leanstep.recipes.config.loader import ConfigError, load\n"
        f"try:\n    {statement}\nexcept ConfigError as error:\n    print(error)\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'accelerate', 'datasets', 'triton'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
