"""Files of PEFT's that differ from what this package writes: which open, and which are refused in which words."""

import copy
import json
import warnings
from collections import OrderedDict

import peft
import pytest
import torch
import transformers
from lora_models import randomise, tiny_llama, tiny_t5, tokens
from safetensors.torch import load_file, save_file

from leanstep.lora import LoraConfig, apply_lora, load_adapter, merge, remove_lora, save_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following .* did not match any targeted module:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]


def written(folder, model=None, **settings):
    """A model that PEFT adapted, with its adapter in a folder."""
    theirs = peft.get_peft_model(
        model or tiny_llama(), peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
    )
    randomise(theirs, scale=0.2).save_pretrained(folder)
    return theirs.eval()


def edit(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


CHANGED = ["pissa_niter_4", "olora", "corda", "loftq", "lora_ga"]


@pytest.mark.parametrize("start", CHANGED)
def test_an_adapter_that_changed_its_base_is_refused(start, tmp_path):
    written(tmp_path)
    edit(tmp_path, init_lora_weights=start)
    model = tiny_llama()
    with pytest.raises(ValueError, match=f"{start}.*changes the base.*path_initial_model_for_weight_conversion"):
        load_adapter(model, tmp_path)
    assert not any("lora" in name for name in model.state_dict())


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_how_factors_began_does_not_matter_otherwise(start, tmp_path):
    theirs = written(tmp_path)
    edit(tmp_path, init_lora_weights=start)
    model = load_adapter(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(model(tokens()).logits, theirs(tokens()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("value", "message", "adapted"),
    [(float("nan"), "NaN", False), (-float("inf"), "infinity", True), (1, "is int64", False)],
)
def test_tensors_that_are_no_weights_are_refused(value, message, adapted, tmp_path):
    written(tmp_path, lora_alpha=8)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    key = next(key for key in state if "layers.1.self_attn.q_proj.lora_B" in key)
    state[key] = torch.full_like(state[key], value, dtype=torch.int64 if value == 1 else None)
    save_file(state, path)
    model = tiny_llama()
    if adapted:
        randomise(apply_lora(model, LoraConfig(r=2, target_modules=["q_proj"])), seed=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"layers\.1\.self_attn\.q_proj\.lora_B\.weight .*{message}"):
        load_adapter(model, tmp_path)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def tiny_bert(labels=3, seed=0):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(vocab_size=61, max_position_embeddings=64, num_labels=labels, **sizes, **drop)
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification(config)


def tiny_distilbert(seed=0):
    """A classifier of two layers, ``pre_classifier`` and ``classifier``: PEFT trains both whole."""
    sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
    drop = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    torch.manual_seed(seed)
    return transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(vocab_size=61, num_labels=3, **sizes, **drop)
    )


ODD = {
    "embedding": (tiny_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": (tiny_llama, {"target_modules": ["lm_head", "q_proj"], "use_dora": True}),
    "biases of a head": (tiny_bert, {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "all"}),
    "all but some": (tiny_llama, {"target_modules": "all-linear", "exclude_modules": ["k_proj"]}),
    "all but the head": (tiny_bert, {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    "a task": (tiny_bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "a task with two heads": (tiny_distilbert, {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
    "all of a task": (tiny_bert, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "rank of what is left out": (
        tiny_llama,
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"], "rank_pattern": {"k_proj": 3}},
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_what_peft_writes_besides_is_understood(case, tmp_path):
    build, settings = ODD[case]
    theirs = written(tmp_path, build(), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = load_adapter(build(), tmp_path).eval()
    torch.testing.assert_close(model(tokens()).logits, theirs(tokens()).logits, rtol=1e-5, atol=1e-5)
    # and into a model that is adapted already, from what we write of it
    save_adapter(model, tmp_path / "again")
    other = load_adapter(apply_lora(build(), model.lora_config), tmp_path / "again").eval()
    assert torch.equal(other(tokens()).logits, model(tokens()).logits)
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "again").eval()
    torch.testing.assert_close(again(tokens()).logits, theirs(tokens()).logits, rtol=1e-5, atol=1e-5)


def test_the_base_embedding_of_a_file_replaces_the_models(tmp_path):
    theirs = written(tmp_path, tiny_llama(), target_modules=["embed_tokens", "q_proj"])
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[3] += 1
    with pytest.warns(
        UserWarning, match="base weight of model.embed_tokens that differs from the model's; it replaces the model's"
    ):
        load_adapter(model, tmp_path)
    torch.testing.assert_close(model.eval()(tokens()).logits, theirs(tokens()).logits, rtol=1e-5, atol=1e-5)
    assert not model.model.embed_tokens.weight.requires_grad
    with pytest.raises(ValueError, match=r"embed_tokens.* has shape .*, the model needs \(2, 59\)"):
        load_adapter(tiny_llama(vocab_size=59), tmp_path)


def test_names_that_the_model_lacks_are_told(tmp_path):
    settings = {"rank_pattern": {"nowhere": 3}, "alpha_pattern": {"elsewhere": 3}}
    theirs = written(tmp_path, target_modules=["q_proj", "value"], **settings)
    message = "target_modules 'value', rank_pattern 'nowhere', alpha_pattern 'elsewhere' fits nothing in this model"
    with pytest.warns(UserWarning, match=message):
        model = load_adapter(tiny_llama(), tmp_path)
    torch.testing.assert_close(model.eval()(tokens()).logits, theirs(tokens()).logits, rtol=1e-5, atol=1e-5)
    edit(tmp_path, target_modules=["value", "key"])
    with pytest.raises(ValueError, match="'value' fits no module"):
        load_adapter(tiny_llama(), tmp_path)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", None])
def test_the_head_of_a_task_is_trained_and_saved(task, tmp_path):
    settings = LoraConfig(r=2, target_modules=["query"], task_type=task)
    model = apply_lora(tiny_bert(), settings)
    heads = ["classifier"] if task in ("SEQ_CLS", "TOKEN_CLS") else None
    assert model.lora_config.modules_to_save == heads and settings.modules_to_save is None
    assert model.classifier.weight.requires_grad == bool(heads)
    if task != "SEQ_CLS":
        return
    save_adapter(randomise(model), tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    torch.testing.assert_close(theirs(tokens()).logits, model.eval()(tokens()).logits, rtol=1e-5, atol=1e-5)
    # a file without a head, as transformers' add_adapter writes it, opens too
    plain = apply_lora(tiny_bert(), LoraConfig(r=2, target_modules=["query"]))
    save_adapter(plain, tmp_path / "plain")
    edit(tmp_path / "plain", task_type="SEQ_CLS")
    assert not load_adapter(tiny_bert(), tmp_path / "plain").classifier.weight.requires_grad


@pytest.mark.parametrize("targets", [["q_lin"], "all-linear"], ids=str)
def test_modules_are_trained_whole_by_the_ends_of_their_names(targets, tmp_path):
    model = apply_lora(tiny_distilbert(), LoraConfig(r=2, target_modules=targets, task_type="SEQ_CLS"))
    whole = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert whole == {f"{head}.{end}" for head in ("pre_classifier", "classifier") for end in ("weight", "bias")}
    save_adapter(randomise(model), tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_distilbert(), tmp_path).eval()
    torch.testing.assert_close(theirs(tokens()).logits, model.eval()(tokens()).logits, rtol=1e-5, atol=1e-5)


def normalised(seed=0):
    """A layer and a BatchNorm, whose running statistics are buffers."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(OrderedDict(layer=torch.nn.Linear(8, 8), norm=torch.nn.BatchNorm1d(8)))


def test_buffers_of_modules_trained_whole_are_saved_with_them(tmp_path):
    settings, x = {"r": 2, "target_modules": ["layer"], "modules_to_save": ["norm"]}, torch.randn(16, 8) * 5 + 3
    theirs = peft.get_peft_model(normalised(), peft.LoraConfig(**settings))
    ours = apply_lora(normalised(), LoraConfig(**settings))
    for name, model in (("theirs", theirs), ("ours", ours)):
        model.train()(x)
        model.save_pretrained(tmp_path / name) if name == "theirs" else save_adapter(model, tmp_path / name)
        wanted = model.eval()(x)
        torch.testing.assert_close(load_adapter(normalised(), tmp_path / name).eval()(x), wanted)
        torch.testing.assert_close(peft.PeftModel.from_pretrained(normalised(), tmp_path / name).eval()(x), wanted)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    other = load_adapter(apply_lora(normalised(), LoraConfig(**settings)), tmp_path / "ours")
    assert other.norm.num_batches_tracked == 1 and torch.equal(other.norm.running_mean, ours.norm.running_mean)


@pytest.mark.parametrize("backup", [False, True])
def test_a_merged_model_is_saved_with_the_bias_that_was_trained(backup, tmp_path):
    settings = {"r": 2, "target_modules": ["layer"], "bias": "lora_only", "lora_bias": True}
    model, x = randomise(apply_lora(normalised(), LoraConfig(**settings))).eval(), torch.randn(3, 8)
    wanted, bias = model(x), model.layer.bias.detach().clone()
    merge(model, backup=backup)
    save_adapter(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.layer.base_layer.bias"]
    torch.testing.assert_close(saved, bias, **({"rtol": 0, "atol": 0} if backup else {}))
    torch.testing.assert_close(load_adapter(normalised(), tmp_path).eval()(x), wanted)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_are_saved_of_a_frozen_model_too(bias, tmp_path):
    model = randomise(apply_lora(normalised(), LoraConfig(r=2, target_modules=["layer"], bias=bias))).eval()
    save_adapter(model.requires_grad_(False), tmp_path)
    x = torch.randn(3, 8)
    assert torch.equal(load_adapter(normalised(), tmp_path).eval()(x), model(x))


def test_biases_of_any_name_are_saved(tmp_path):
    def build():
        return torch.nn.ModuleDict({"attention": torch.nn.MultiheadAttention(8, 2), "mlp": torch.nn.Linear(8, 8)})

    model = randomise(apply_lora(build(), LoraConfig(r=2, target_modules=["mlp"], bias="all")))
    assert model.attention.in_proj_bias.requires_grad
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(build(), tmp_path).attention.in_proj_bias, model.attention.in_proj_bias)


def test_settings_that_an_adapted_model_does_not_have_are_refused(tmp_path):
    settings = {"r": 2, "target_modules": ["layer"]}
    save_adapter(randomise(apply_lora(normalised(), LoraConfig(**settings))), tmp_path)
    model = apply_lora(normalised(), LoraConfig(**settings, lora_dropout=0.2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for changes in ({"lora_dropout": 0.3}, {"lora_dropout": 0.2, "save": "full"}):
        name, value = list(changes.items())[-1]
        with pytest.raises(
            ValueError, match=rf"got {name}={value!r}, and the model is adapted.*remove_lora\(model\) first"
        ):
            load_adapter(model, tmp_path, **changes)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    load_adapter(model, tmp_path, lora_dropout=0.2, target_modules=("layer",))
    assert load_adapter(normalised(), tmp_path, lora_dropout=0.3).layer.lora.dropout == 0.3


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["shared", "q"]}, {"target_modules": ["q"], "trainable_token_indices": [3, 63]}]
)
def test_a_module_with_many_names_has_one_adapter(settings, tmp_path):
    model = randomise(apply_lora(tiny_t5(resized=True), LoraConfig(r=2, **settings)), scale=0.2).eval()
    assert model.encoder.embed_tokens is model.shared
    call = {"input_ids": tokens(vocabulary=64), "decoder_input_ids": tokens(seed=1, vocabulary=64)}
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    written = load_file(path)
    assert not any("embed_tokens" in key for key in written)
    # files may have the tensors under every name
    again = {key.replace(".shared.", ".decoder.embed_tokens."): value.clone() for key, value in written.items()}
    for state in (written, written | again):
        save_file(state, path)
        other = load_adapter(tiny_t5(resized=True), tmp_path).eval()
        assert torch.equal(other(**call).logits, model(**call).logits)
        assert torch.equal(load_adapter(other, tmp_path)(**call).logits, model(**call).logits)
    changed = {key: value + (key not in written) for key, value in (written | again).items()}
    save_file(changed, path)
    with pytest.raises(ValueError, match="keys are not of this model"):
        load_adapter(tiny_t5(resized=True), tmp_path)


def test_a_start_that_changes_the_base_is_refused_over_the_factors_of_a_file(tmp_path):
    save_adapter(randomise(apply_lora(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))), tmp_path)
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="init_lora_weights='pissa' moves some of the base into the factors"):
        load_adapter(model, tmp_path, init_lora_weights="pissa")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    load_adapter(model, tmp_path, init_lora_weights="gaussian")


class Nested(torch.nn.Module):
    """A head whose name ends like that of a hidden layer."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = torch.nn.Linear(32, 32), torch.nn.ModuleDict({"layer": torch.nn.Linear(32, 4)})

    def forward(self, x):
        return self.head["layer"](self.layer(x))


@pytest.mark.filterwarnings("ignore:apply_lora. 'all-linear' leaves out head.layer. narrower than the rank")
def test_a_layer_whose_name_ends_like_an_adapted_one_stays_out(tmp_path):
    model = Nested()
    ours = randomise(apply_lora(model, LoraConfig(r=8, target_modules="all-linear")))
    x, plain = torch.randn(3, 32), Nested()
    plain.load_state_dict({k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "lora_" not in k})
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    torch.testing.assert_close(theirs(x), ours(x))
    torch.testing.assert_close(load_adapter(plain, tmp_path)(x), ours(x))


@pytest.mark.parametrize("task", ["QUESTION_ANS", None])
def test_the_head_of_question_answering_is_trained_whole_as_by_peft(task, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    base = transformers.BertForQuestionAnswering(transformers.BertConfig(vocab_size=30, **sizes)).eval()
    plain = copy.deepcopy(base)
    config = LoraConfig(r=2, target_modules=["query"] if task else "all-linear", task_type=task)
    if task is None:
        with pytest.warns(UserWarning, match="qa_outputs keeps its weights .* task_type='QUESTION_ANS'"):
            apply_lora(base, config)
        return
    ours = randomise(apply_lora(base, config)).eval()
    assert {name for name, p in ours.named_parameters() if p.requires_grad and "lora_" not in name} == {
        "qa_outputs.weight", "qa_outputs.bias",
    }  # fmt: skip
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    x = torch.arange(12).view(2, 6)
    torch.testing.assert_close(theirs(input_ids=x).start_logits, ours(input_ids=x).start_logits)
    torch.testing.assert_close(load_adapter(plain, tmp_path)(input_ids=x).end_logits, ours(input_ids=x).end_logits)


@pytest.mark.slow
def test_a_compiled_model_is_adapted_saved_and_merged_as_the_one_inside(tmp_path):
    base, plain = tiny_llama(), tiny_llama()
    plain.load_state_dict(base.state_dict())
    trainable = {name for name, p in base.named_parameters() if p.requires_grad}
    compiled = torch.compile(base, backend="eager")
    assert apply_lora(compiled, LoraConfig(r=2, target_modules=["q_proj"])) is compiled
    randomise(base).eval()
    save_adapter(compiled, tmp_path)
    assert not any("_orig_mod" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    expected = base(tokens()).logits
    torch.testing.assert_close(compiled(tokens()).logits, expected)
    torch.testing.assert_close(load_adapter(plain.eval(), tmp_path)(tokens()).logits, expected)
    assert load_adapter(compiled, tmp_path) is compiled
    merge(compiled)
    assert remove_lora(compiled) is compiled
    assert {name for name, p in base.named_parameters() if p.requires_grad} == trainable
    torch.testing.assert_close(base(tokens()).logits, expected, rtol=1e-4, atol=1e-5)
