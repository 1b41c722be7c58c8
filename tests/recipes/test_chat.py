"""Fine-tuning data: what is learned is the answers, and lines that cannot be used are told with their place."""

import gzip
import json

import numpy as np
import pytest
import texts
from tokenizers.processors import TemplateProcessing
from training import read_log, run
from transformers import PreTrainedTokenizerFast

from leanstep import cli
from leanstep.recipes.check.check import Check
from leanstep.recipes.config.loader import ConfigError, load
from leanstep.recipes.config.schema import DataConfig
from leanstep.recipes.data.chat import ChatSequences, Example, encode_row, read_rows
from leanstep.recipes.data.sequences import IGNORED, load_data
from leanstep.recipes.data.sources import look
from leanstep.recipes.report.samples import held_out_prompts
from leanstep.recipes.training.build import build_run_model

TEMPLATE = """\
{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "Say it again, a model."},
    {"role": "assistant", "content": "A model, again."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small tokenizer that has a chat template."""
    tokenizer = texts.chat_tokenizer(TEMPLATE, "<|end|>")
    where = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def tokenizer(folder):
    return PreTrainedTokenizerFast.from_pretrained(folder)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data_config(path, folder, **settings):
    return DataConfig(source="chat", path=str(path), tokenizer=str(folder), **{"val_tokens": 0, **settings})


def learned(tokenizer, sequence):
    """The text of the labels, a bar between stretches."""
    stretches, before = [], False
    for token, label in zip(sequence["input_ids"].tolist(), sequence["labels"].tolist(), strict=True):
        if label != IGNORED:
            assert label == token
            stretches.append([token]) if not before else stretches[-1].append(token)
        before = label != IGNORED
    return [tokenizer.decode(stretch) for stretch in stretches]


def test_the_answers_of_a_conversation_are_learned_with_the_end_of_their_turn(tokenizer, folder, tmp_path):
    data = load_data(data_config(write(tmp_path / "a.jsonl", [{"messages": TALK}]), folder), seed=0)
    (sequence,) = [data.train[index] for index in range(len(data.train))]
    assert learned(tokenizer, sequence) == ["A model.<|end|>\n", "A model, again.<|end|>\n"]
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    count = len(tokenizer(whole, add_special_tokens=False)["input_ids"])
    assert tokenizer.decode(sequence["input_ids"][:count]) == whole
    assert (sequence["input_ids"].shape, sequence["labels"].shape) == ((256,), (256,))
    assert data.tokenizer.model_max_length > 10**6  # the length of sequences would cut others' texts
    assert data.bytes_per_token is None and "1 examples" in data.facts["data"]


def test_prompt_and_completion(tokenizer, folder, tmp_path):
    rows = [
        {"prompt": "2 and 2 are", "completion": " 4"},
        {"prompt": TALK[:2], "completion": TALK[2:3]},
        {"prompt": "", "completion": "a text alone"},
    ]
    data = load_data(data_config(write(tmp_path / "a.jsonl", rows), folder, packing=False), seed=0)
    assert learned(tokenizer, data.train[0]) == [" 4<|end|>"]
    assert learned(tokenizer, data.train[1]) == ["A model.<|end|>\n"]
    # nothing stands before the first token, which could predict it
    first = tokenizer("a text alone")["input_ids"][0]
    assert tokenizer.decode([first]) + learned(tokenizer, data.train[2])[0] == "a text alone<|end|>"


@pytest.mark.parametrize(("post", "before"), [("<|user|> $A", 1), ("$A <|end|>", 0), ("<|user|> $A <|end|>", 1)])
def test_a_prompt_begins_as_the_tokenizer_begins_a_text(folder, post, before):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<|user|>", "<|end|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=post, special_tokens=ids)
    example = encode_row({"prompt": "2 and 2", "completion": " are 4"}, "here", tokenizer)
    plain = tokenizer("2 and 2", add_special_tokens=False)["input_ids"]
    assert example.tokens[: before + len(plain)].tolist() == tokenizer("2 and 2")["input_ids"][: before + len(plain)]
    assert example.is_answer.tolist().index(True) == before + len(plain)


def test_role_tokens_that_the_model_does_not_have_are_counted(folder, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    path = write(tmp_path / "a.jsonl", [{"messages": TALK}] * 3)
    data = load_data(data_config(path, folder, seq_len=64), seed=0)
    assert data.vocabulary == len(tokenizer)
    recipe = tmp_path / "chat.yaml"
    recipe.write_text(RECIPE.format(path=path, folder=folder))
    count = len(tokenizer)
    config = load(recipe, ["data.val_tokens=0", f"model.config.vocab_size={count - 3}"])
    told = [problem for part in Check(config).sections() if part.title == "Data" for problem in part.problems]
    assert told == [
        f"the tokenizer {folder} produces {count} tokens, model.config.vocab_size is {count - 3}; raise it, or "
        "leave it out to take the tokenizer's"
    ]
    with pytest.raises(ValueError, match=f"the model has {count - 3} tokens, the tokenizer produces {count}"):
        build_run_model(config, data.tokenizer, data.vocabulary)


def test_packed_examples_are_whole_and_do_not_predict_each_other():
    examples = [Example(np.arange(length) + 100 * length, np.arange(length) >= 0) for length in (3, 4, 5, 8, 2)]
    packed = ChatSequences(examples, 8, pad_id=7, packing=True)
    assert packed.rows == [[0, 1], [2], [3], [4]]
    assert packed[0]["input_ids"].tolist() == [300, 301, 302, 400, 401, 402, 403, 7]
    assert packed[0]["labels"].tolist() == [-100, 301, 302, -100, 401, 402, 403, -100]
    assert [len(row) for row in ChatSequences(examples, 8, pad_id=7, packing=False).rows] == [1] * 5
    with pytest.raises(IndexError):
        packed[4]


def test_long_examples_are_cut_and_those_without_an_answer_left_out(folder, tmp_path):
    rows = [{"prompt": "word " * 100, "completion": "far"}, {"prompt": "near", "completion": " word" * 100}]
    data = load_data(data_config(write(tmp_path / "a.jsonl", rows), folder, seq_len=32), seed=0)
    assert len(data.train) == 1 and int((data.train[0]["labels"] != IGNORED).sum()) > 20
    assert data.facts["left out"].startswith("1 examples without an answer in their first 32 tokens")
    assert data.facts["cut"] == "1 examples lose part of their answers, behind 32 tokens"
    # the tokens that were cut off do not stay in memory
    assert all(example.tokens.base is None and example.is_answer.base is None for example in data.train.examples)
    with pytest.raises(ValueError, match="no answer lies within data.seq_len 32"):
        load_data(data_config(write(tmp_path / "b.jsonl", rows[:1]), folder, seq_len=32), seed=0)


def test_the_last_examples_are_held_out(tokenizer, folder, tmp_path):
    rows = [{"prompt": f"number {number}:", "completion": f" {number}"} for number in range(20)]
    path = write(tmp_path / "a.jsonl", rows)
    data = load_data(data_config(path, folder, val_tokens=20, packing=False), seed=0)
    size = len(encode_row(rows[-1], "", tokenizer).tokens)
    held_out = -(-20 // size)
    assert (len(data.train), len(data.validation)) == (20 - held_out, held_out)
    assert learned(tokenizer, data.validation[held_out - 1]) == [" 19<|end|>"]
    other = write(tmp_path / "b.jsonl", rows[:3])
    data = load_data(data_config(path, folder, val_path=str(other), packing=False), seed=0)
    assert (len(data.train), len(data.validation)) == (20, 3)
    with pytest.raises(ValueError, match="data.val_tokens: 150,000 tokens cannot be held out"):
        load_data(data_config(path, folder, val_tokens=150_000), seed=0)


def test_the_template_sees_the_tools_of_a_line_and_its_settings(folder):
    """As transformers renders them; a template that does not show tools would teach calls of unknown ones."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    row = {"messages": TALK, "tools": [{"type": "function", "function": {"name": "clock"}}]}
    with pytest.raises(ValueError, match="here: the chat template of .* does not show tools, so the model would learn"):
        encode_row(row, "here", tokenizer)
    shown = "{% if tools %}{{ tools[0].function.name }}{{ style }}{% endif %}"
    tokenizer.chat_template = shown + TEMPLATE
    for name in ("tokenize", "chat_template", "tools"):
        with pytest.raises(ValueError, match=f"here: chat_template_kwargs: expected variables .*, got '{name}'"):
            encode_row({**row, "chat_template_kwargs": {name: "x"}}, "here", tokenizer)
    row["chat_template_kwargs"] = {"style": " briefly "}
    text = tokenizer.apply_chat_template(TALK, tools=row["tools"], style=" briefly ", tokenize=False)
    assert text.startswith("clock briefly <|system|>")
    example = encode_row(row, "here", tokenizer)
    assert example.tokens.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(example.tokens[example.is_answer]) == "A model.<|end|>\nA model, again.<|end|>\n"


def test_an_answer_of_weight_0_is_a_prompt(tokenizer):
    talk = [*TALK[:2], {**TALK[2], "weight": 0}, TALK[3], {**TALK[4], "weight": 1}]
    for row in ({"messages": talk}, {"prompt": talk[:2], "completion": talk[2:3] + TALK[4:]}):
        example = encode_row(row, "here", tokenizer)
        assert tokenizer.decode(example.tokens[example.is_answer]) == "A model, again.<|end|>\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected 'messages', or 'prompt' and 'completion' in an object, got list"),
        ('{"text": "a", "label": 1}', "or 'prompt' and 'completion', got the keys text, label"),
        ('{"\\u200bmessages": [], "a\\nb": 1}', r"got the keys \u200bmessages, a b"),
        ("{}", "got the keys of an empty object"),
        ('{"messages": []}', "messages: expected a list of messages, got"),
        ('{"messages": [{"role": "assistant"}]}', "expected objects with 'role' and 'content'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message has the role 'assistant'"),
        ('{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}', "and a weight other than 0"),
        ('{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}', "weight: expected 0 or 1, got 0.5"),
        ('{"prompt": "a", "completion": "b", "tools": "x"}', "tools: expected a list, got 'x'"),
        ('{"prompt": "a", "completion": "b", "chat_template_kwargs": []}', "chat_template_kwargs: expected an object"),
        ('{"prompt": "a", "completion": ["b"]}', "must be two texts or two lists of messages"),
        ('{"prompt": 3, "completion": "b"}', "must be two texts or two lists of messages"),
        ("[" * 100_000, "not JSON"),
        (r'{"prompt": "a \ud83d", "completion": "b"}', r"half of a surrogate pair, \ud83d; remove it"),
        (r'{"messages": [{"role": "assistant", "content": "\uDE00"}]}', r"half of a surrogate pair, \ude00"),
    ],
)
def test_a_line_that_is_no_example_is_told_with_its_place(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n' + line + "\n")
    with pytest.raises(ValueError) as caught:
        list(read_rows(str(path), "data.path"))
    assert f"{path}:3: " in str(caught.value) and message in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_compressed_folders_and_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\n'))
    write(tmp_path / "b.jsonl", [{"prompt": "c", "completion": "d"}])
    assert [row["prompt"] for _, row in read_rows(str(tmp_path), "data.path")] == ["a", "c"]
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match=r"b.jsonl:1: not UTF-8 text"):
        list(read_rows(str(tmp_path), "data.path"))
    (tmp_path / "b.jsonl").write_text("\n")
    assert look(DataConfig(source="chat", path=str(tmp_path / "a.jsonl.gz")))[0].startswith("data.path: ")


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"prompt": "\ud83d\ude00", "completion": "b"}')
    assert [row["prompt"] for _, row in read_rows(str(path), "data.path")] == ["\U0001f600"]


@pytest.mark.parametrize(
    "damage", [lambda packed: packed[: len(packed) // 2], lambda packed: packed[:30] + b"\xff" * 40]
)
def test_a_damaged_archive_is_told_with_its_name(tmp_path, damage):
    rows = "".join(json.dumps({"prompt": f"{number**5}", "completion": "b"}) + "\n" for number in range(500))
    (tmp_path / "a.jsonl.gz").write_bytes(damage(gzip.compress(rows.encode())))
    with pytest.raises(ValueError, match=r"a.jsonl.gz is damaged: .*; copy or download it again"):
        list(read_rows(str(tmp_path / "a.jsonl.gz"), "data.path"))


def test_templates_that_cannot_be_used_are_told(folder, tmp_path):
    row = {"messages": TALK}
    other = PreTrainedTokenizerFast.from_pretrained(folder)
    other.chat_template = None
    with pytest.raises(ValueError, match=r"FILE:1: data.tokenizer '.*' has no chat template, which messages need"):
        encode_row(row, "FILE:1", other)
    other.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="FILE:1: the chat template cannot render it: roles must alternate"):
        encode_row(row, "FILE:1", other)
    # as templates do that show the thoughts of the last answer only
    other.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(ValueError, match="changes earlier messages, so the answers cannot be told from the prompts"):
        encode_row(row, "FILE:1", other)


FAMILIES = {
    "headers": (
        "{{ '<s>' }}{% for m in messages %}<h>{{ m.role }}</h>\n\n{{ m.content }}<eot>{% endfor %}"
        "{% if add_generation_prompt %}<h>assistant</h>\n\n{% endif %}",
        ["A model.<eot>", "A model, again.<eot>"],
    ),
    "no generation prompt": (
        "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>"
        "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
        [" A model.</s>", " A model, again.</s>"],
    ),
    "plain lines": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        [" A model.\n", " A model, again.\n"],
    ),
}


@pytest.mark.parametrize(("template", "answers"), FAMILIES.values(), ids=FAMILIES.keys())
def test_the_answers_of_other_kinds_of_templates(folder, template, answers):
    other = PreTrainedTokenizerFast.from_pretrained(folder)
    other.chat_template = template
    data = ChatSequences([encode_row({"messages": TALK}, "", other)], 256, pad_id=0, packing=False)
    assert learned(other, data[0]) == answers


def test_settings_that_do_not_go_with_it(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data: {source: chat, streaming: true}\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    text = str(caught.value)
    assert "data.path is needed by data.source 'chat'" in text
    assert "data.streaming is not possible with data.source 'chat'" in text
    assert "data.tokenizer must be that of the model with data.source 'chat'" in text


RECIPE = """\
recipe: pretrain
steps: 8
model: {{family: gpt2, config: {{n_embd: 32, n_layer: 2, n_head: 2, n_positions: 64}}}}
data: {{source: chat, path: {path}, tokenizer: {folder}, seq_len: 64, val_tokens: 100}}
batch: {{tokens_per_step: 256, micro_batch_size: 4}}
optimizer: {{name: adamw, lr: 1e-2}}
precision: fp32
log: {{every: 1}}
"""


def test_a_run_learns_the_answers_and_continues_held_out_prompts(folder, tmp_path, capsys):
    rows = [{"messages": [TALK[1], {"role": "assistant", "content": f"Model {n % 3}."}]} for n in range(40)]
    recipe = tmp_path / "chat.yaml"
    recipe.write_text(RECIPE.format(path=write(tmp_path / "a.jsonl", rows), folder=folder))
    training = run(recipe, [], tmp_path / "out")
    assert training.codes == [0], training.text()
    losses = [entry["loss"] for entry in read_log(tmp_path / "out") if entry["kind"] == "train"]
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert "count targets, the tokens of answers, prompts and padding left out" in training.text()
    assert "in answers" in training.text() and "Who are you?" in training.text()
    data = load_data(load(recipe).data, seed=0)
    prompts = held_out_prompts(data.validation, data.tokenizer.eos_token_id)
    assert data.tokenizer.decode(prompts[0]) == "<|user|>Who are you?<|end|>\n<|assistant|>"
    # `eval` of the held-out conversations is the run's own loss
    held_out = write(tmp_path / "held-out.jsonl", rows[-len(data.validation.examples) :])
    command = ["eval", str(tmp_path / "out"), "--data", str(held_out), "--seq-len"]
    assert cli.main([*command, "64", "--json"]) == 0
    judged, status = json.loads(capsys.readouterr().out), json.loads((tmp_path / "out" / "status.json").read_text())
    assert judged["loss"] == pytest.approx(status["val_loss"], rel=1e-5)
    assert "in answers; 0 cut, 0 left out" in judged["data"]
    assert cli.main([*command, "2"]) == 2
    assert "no answer in" in capsys.readouterr().err
