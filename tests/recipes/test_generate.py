"""The commands generate and bench, on dense and sparse folders."""

import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import texts
import torch
from pruned_models import make_llama, save_model, save_tokenizer
from sparse_folders import save_sparse
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from leanstep.cli import main
from leanstep.lora import LoraConfig, apply_lora, merge, remove_lora, save_adapter
from leanstep.recipes import bench, generate
from leanstep.recipes.data.tokens import decode_halves
from leanstep.recipes.report.samples import sample
from leanstep.sparsity import export_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("generate")
    save_sparse(root / "dense", make_llama(hidden_size=64, intermediate_size=96), dtype=torch.float32)
    save_tokenizer(root / "dense")
    export_folder(root / "dense", root / "sparse")
    save_sparse(root / "small", make_llama(hidden_size=64, intermediate_size=96, vocab_size=30), dtype=torch.float32)
    save_tokenizer(root / "small")
    save_sparse(root / "bare", make_llama(hidden_size=64, intermediate_size=96), dtype=torch.float32)
    return root


TEMPLATE = """\
{% for message in messages %}{% if message['role'] == 'system' and message['content'] == 'Refuse.' %}\
{{ raise_exception('no such system') }}{% endif %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model whose next token depends on the last one alone: it answers "A model." and goes on after its turn."""
    tokenizer = texts.chat_tokenizer(TEMPLATE, "<|endoftext|>", 320)
    size = len(tokenizer) + len(tokenizer) % 2
    model = make_llama(vocab_size=size, hidden_size=size, num_attention_heads=1, num_key_value_heads=1, layers=1)
    chain = tokenizer("<|assistant|>A model.<|end|>Boo", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()[chain[1:], chain[:-1]] = 1
    folder = tmp_path_factory.mktemp("talker")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_answers_by_its_chat_template_and_stops_at_the_end_of_its_turn(talker, tmp_path, capsys):
    export_folder(talker, tmp_path / "sparse")
    for folder in (talker, tmp_path / "sparse"):
        assert main(["generate", str(folder), "--chat", "Who?"]) == 0
        assert capsys.readouterr().out == "A model.\n"


def test_a_sample_of_a_conversation_ends_its_turn(talker):
    tokenizer = AutoTokenizer.from_pretrained(talker)
    prompt = tokenizer("<|user|>Who?<|end|>\n<|assistant|>", add_special_tokens=False)["input_ids"]
    assert [*sample(talker, [prompt], 0, torch.device("cpu"), answers=True)] == ["Who?\nA model."]


@pytest.mark.parametrize("terminal", [False, True])
def test_turns_are_read_until_the_input_ends(talker, capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n\nAgain?\n"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal)
    assert main(["generate", str(talker), "--chat", "--json", "--system", "Be brief."]) == 0
    result = json.loads(capsys.readouterr().out.rpartition("> ")[2])
    assert [turn["content"] for turn in result["messages"]] == ["Be brief.", "Who?", "A model.", "Again?", "A model."]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--system", "Refuse."), "the chat template cannot render the conversation: no such system"),
        (("--system", "word " * 64), "and the model 64 positions; begin a new one"),
    ],
)
def test_a_conversation_that_cannot_be_answered_is_told_in_one_line(talker, capsys, arguments, message):
    assert main(["generate", str(talker), "Who?", "--chat", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A base, an adapter of it that changes every answer, and the merged model, each in a folder."""
    root = tmp_path_factory.mktemp("adapted")
    model = make_llama(hidden_size=32, intermediate_size=48)
    save_model(model, root / "base")
    save_tokenizer(root / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], base_model_name_or_path=str(root / "base"))
    apply_lora(model, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save_adapter(model, root / "adapter")
    merge(model)
    remove_lora(model)
    save_model(model, root / "merged")
    save_tokenizer(root / "merged")
    return root


def test_an_adapter_answers_as_the_merged_model(adapted, capsys):
    options = ["the", "--max-new-tokens", "12", "--json"]
    base, adapter, merged = (answer(capsys, "generate", adapted / n, *options) for n in ("base", "adapter", "merged"))
    assert adapter["text"] == merged["text"] != base["text"]
    (adapted / "text.txt").write_text("the cat and the dog " * 40)
    options = ["--data", str(adapted / "text.txt"), "--seq-len", "16", "--json"]
    base, adapter, merged = (answer(capsys, "eval", adapted / n, *options) for n in ("base", "adapter", "merged"))
    assert adapter["loss"] == pytest.approx(merged["loss"], rel=1e-5) and abs(adapter["loss"] - base["loss"]) > 1e-3


def test_an_adapter_of_a_base_that_is_not_there_or_another_is_told_in_one_line(adapted, tmp_path, capsys):
    shutil.copytree(adapted / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    save_model(make_llama(hidden_size=64, intermediate_size=96), tmp_path / "other")
    save_tokenizer(tmp_path / "other")
    for base, message in (
        ("./nowhere", "its base model './nowhere' is not there"),
        ("", "names no base model"),
        (str(tmp_path / "other"), "does not fit"),
        ("nobody/model", "could not open the tokenizer in nobody/model"),
    ):
        file.write_text(json.dumps(settings | {"base_model_name_or_path": base}))
        assert main(["generate", str(tmp_path / "adapter"), "the"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error and error.startswith("error: "), error


def answer(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_dense_and_sparse_folders_continue_a_prompt_alike(folders, capsys):
    answers = [
        answer(capsys, "generate", folders / kind, "Hello", "--max-new-tokens", 12, "--json")
        for kind in ("sparse", "dense")
    ]
    assert answers[0]["text"] == answers[1]["text"] and answers[0]["tokens"] == 12
    assert main(["generate", str(folders / "sparse"), "Hello", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out == "Hello" + answers[0]["text"] + "\n"


def test_a_sparse_folder_is_evaluated_like_its_dense_one(folders, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Hello world. This is a text, and there is more of it. " * 20)
    options = ("--data", text, "--seq-len", 16, "--json")
    sparse, dense = (answer(capsys, "eval", folders / kind, *options) for kind in ("sparse", "dense"))
    assert sparse["parameters"] == dense["parameters"]
    assert sparse["loss"] == pytest.approx(dense["loss"], rel=1e-5)


def test_the_rate_does_not_include_the_first_pass(folders, capsys, monkeypatch):
    opened, passes = generate.open_generator, [0]
    # a clock of passes: the first one takes 100, as if kernels were compiled, and every other one 1
    monkeypatch.setattr(generate, "time", SimpleNamespace(perf_counter=lambda: float(passes[0])))

    def count(*_):
        passes[0] += 1 if passes[0] else 100

    def open_counted(*arguments):
        model = opened(*arguments)
        model.register_forward_pre_hook(count)
        return model

    monkeypatch.setattr(generate, "open_generator", open_counted)
    result = answer(capsys, "generate", folders / "dense", "Hello", "--max-new-tokens", 2, "--json")
    assert result["tokens"] == 2 and result["seconds"] == 2.0


def test_samples_come_from_the_seed(folders, capsys):
    options = ("--temperature", 2, "--max-new-tokens", 20, "--json")
    texts = [
        answer(capsys, "generate", folders / "dense", "Hello", *options, "--seed", seed)["text"] for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("nowhere", "x"), "'nowhere' is not there"),
        (("dense", ""), "the prompt has no tokens"),
        (("bare", "x"), "holds no tokenizer (no tokenizer.json); save the model's own there by save_pretrained"),
        (("small", "Hello"), "its tokenizer has more tokens than the model, which has 30"),
        (("dense", "Hello", "--max-new-tokens", "60"), "has 5 tokens, 60 are asked for, and the model has 64"),
        (("dense", "Hello", "--chat"), "its tokenizer has no chat template; leave --chat out"),
        (("dense", "Hello", "--device", "pdp11"), "--device pdp11 cannot be used"),
    ],
)
def test_what_cannot_be_generated_is_told_in_one_line(folders, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(folders)
    assert main(["generate", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--temperature", "1e-45", "expected 0, or a number from 1e-06, got '1e-45'"),
        ("--temperature", "inf", "expected 0, or a number from 1e-06"),
        ("--system", "Be brief.", "--system is for --chat"),
        ("--seed", "99999999999999999999", "expected a whole number from 0 to 2^63 - 1"),
    ],
)
def test_options_out_of_range_are_told_in_one_line(folders, capsys, option, value, expected):
    with pytest.raises(SystemExit) as error:
        main(["generate", str(folders / "dense"), "Hello", option, value])
    assert error.value.code == 2 and expected in capsys.readouterr().err


def test_the_least_temperature_samples_the_likeliest(folders, capsys):
    options = ("--max-new-tokens", 5, "--json")
    likeliest = answer(capsys, "generate", folders / "dense", "Hello", *options)
    sampled = answer(capsys, "generate", folders / "dense", "Hello", *options, "--temperature", "1e-6")
    assert sampled["text"] == likeliest["text"]


def test_the_text_of_a_sentencepiece_tokenizer_keeps_the_space_before_it():
    text = "the quick brown fox jumps over the lazy dog"
    model = Tokenizer(models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    model.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    model.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>"], show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", bos_token="<s>")
    tokens = tokenizer(text)["input_ids"]
    count = len(tokenizer("the quick brown")["input_ids"])
    assert decode_halves(tokenizer, tokens, count) == ("the quick brown", " fox jumps over the lazy dog")
    assert decode_halves(tokenizer, torch.tensor([1, *tokens]), count + 1)[1] == " fox jumps over the lazy dog"
    assert decode_halves(tokenizer, tokens, len(tokens)) == (text, "")


@pytest.mark.slow
def test_a_benchmark_measures_every_folder_in_turns(folders, capsys):
    sizes = ("--prompt-tokens", 8, "--new-tokens", 4, "--repeats", 2)
    result = answer(capsys, "bench", folders / "sparse", "--against", folders / "dense", *sizes, "--json")
    sparse, dense = result["checkpoints"]
    for row in (sparse, dense):
        assert len(row["prompt_seconds"]) == len(row["generation_seconds"]) == 2
        assert row["prompt_tokens_per_second"] > 0 and row["generation_tokens_per_second"] > 0
    assert sparse["weight_bytes"] < 0.6 * dense["weight_bytes"] and sparse["file_bytes"] < 0.6 * dense["file_bytes"]
    assert main(["bench", str(folders / "dense"), *map(str, sizes)]) == 0
    text, shown = capsys.readouterr()
    assert "reading the model\nmeasuring: 0/3 turns\n" in shown
    assert text.startswith("FOLDER") and "1.00" in text and "load" in text
    assert "a prompt of 8 tokens; 4 new ones after a prompt of 1" in text
    assert main(["bench", str(folders / "dense"), "--prompt-tokens", "80"]) == 2
    assert "sequences of 80 tokens are asked for and the model has 64 positions" in capsys.readouterr().err


@pytest.mark.parametrize(("prompt", "new", "fits"), [(60, 8, True), (64, 63, True), (65, 1, False), (1, 64, False)])
def test_a_benchmark_needs_positions_for_prompt_and_generation_apart(prompt, new, fits):
    model = make_llama(hidden_size=64, intermediate_size=96)
    with nullcontext() if fits else pytest.raises(ValueError, match="the model has 64 positions"):
        bench._check_positions(model, SimpleNamespace(prompt_tokens=prompt, new_tokens=new))


def test_a_benchmark_draws_its_table(folders, tmp_path, capsys):
    run = tmp_path / "a <run> & more, with a name of many characters"
    run.mkdir()
    (run / "final").symlink_to(folders / "dense", target_is_directory=True)
    picture = tmp_path / "bench.svg"
    sizes = ("--prompt-tokens", 8, "--new-tokens", 2, "--repeats", 1, "--picture", picture, "--json")
    result = answer(capsys, "bench", folders / "sparse", "--against", run / "final", *sizes)
    root = ElementTree.parse(picture).getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for row in result["checkpoints"]:
        assert f"{row['generation_tokens_per_second']:.1f}" in texts
    assert "a prompt of 8 tokens; 2 new ones after a prompt of 1" in texts
    rects = [element for element in root.iter("{http://www.w3.org/2000/svg}rect") if element.get("class") != "page"]
    width, height = (float(root.get(key)) for key in ("width", "height"))
    assert len(rects) == 8
    for rect in rects:
        x, y, wide, high = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
        assert 0 < x < x + wide <= width - 100 and 0 < y < y + high < height
    files = [float(rect.get("width")) for rect in rects[-2:]]
    sparse, dense = (row["file_bytes"] for row in result["checkpoints"])
    assert files[0] / files[1] == pytest.approx(sparse / dense, abs=2e-3)
    notes = " ".join(texts)
    assert re.search(r"sparse generates (slower|faster) than|about as fast as", notes)
    assert re.search(r"times its speed, with 0\.\d\d of its bytes in memory\.", notes)
    assert re.search(r"\d+% of the bytes of .*sparse's weights are dense, as embeddings are, and save nothing\.", notes)


def test_a_benchmark_says_in_words_what_is_slower_and_why(folders, tmp_path):
    rows = [
        {"folder": str(folders / name), "generation_tokens_per_second": speed, "why_slow": why, **sizes}
        for name, speed, why, sizes in (
            ("sparse", 5.0, "these matrices are small", {"weight_bytes": 60, "dense_bytes": 15}),
            ("dense", 10.0, None, {"weight_bytes": 100, "dense_bytes": 100}),
        )
    ]
    slow = "sparse generates slower than dense: 0.50 times its speed, with 0.60 of its bytes in memory. Why: these "
    fast = "dense generates faster than sparse: 2.00 times its speed, with 1.67 of its bytes in memory. Why: these "
    dense = "25% of the bytes of sparse's weights are dense, as embeddings are, and save nothing."
    assert bench._verdict({"checkpoints": rows, "load": 0.0}) == [f"{slow}matrices are small.", dense]
    assert bench._verdict({"checkpoints": rows[::-1], "load": 0.0}) == [f"{fast}matrices are small."]
    assert "busy (load 900.0)" in bench._verdict({"checkpoints": rows, "load": 900.0})[0]
    rows[0]["generation_tokens_per_second"] = 10.2
    level = "sparse generates about as fast as dense: 1.02 times its speed, with 0.60 of its bytes in memory."
    assert bench._verdict({"checkpoints": rows, "load": 0.0}) == [level, dense]
    assert bench._verdict({"checkpoints": rows[:1], "load": 0.0}) == []


@pytest.mark.slow
def test_what_a_process_loads_first_does_not_count_as_memory_of_the_first_folder(folders):
    sizes = ["--prompt-tokens", "8", "--new-tokens", "1", "--repeats", "1", "--json"]
    command = [sys.executable, "-m", "leanstep", "bench", folders / "sparse", "--against", folders / "sparse", *sizes]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second = (row["resident_bytes"] for row in json.loads(run.stdout)["checkpoints"])
    assert abs(first - second) < 2**22


@pytest.mark.parametrize(
    "name, message", [("bench.png", "must be the path of an .svg file"), ("none/bench.svg", "is not there")]
)
def test_a_picture_that_cannot_be_written_is_told_before_measuring(folders, monkeypatch, capsys, name, message):
    monkeypatch.chdir(folders)
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "dense", "--picture", name])
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_folders_of_one_name_are_told_apart(folders, tmp_path, capsys):
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "final").symlink_to(folders / "dense", target_is_directory=True)
    sizes = map(str, ("--prompt-tokens", 8, "--new-tokens", 2, "--repeats", 1))
    assert main(["bench", str(tmp_path / "first"), "--against", str(tmp_path / "second"), *sizes]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("first/final ") and lines[2].startswith("second/final ")
