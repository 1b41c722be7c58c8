"""Evaluation: every predicted token weighs the same, whatever the batches; the command and its refusals."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import texts
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from leanstep.recipes.config.schema import DataConfig
from leanstep.recipes.data import sources
from leanstep.recipes.data.sequences import IGNORED, load_data
from leanstep.recipes.evaluate import find_model_folder, main
from leanstep.recipes.training.validation import evaluate


def tiny_llama(vocab_size, **changes):
    settings = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**settings, **changes}))


def ragged(lengths, seq_len=16, vocab_size=50):
    """Sequences with so many labels that count, the others -100."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for length in lengths:
        input_ids = torch.randint(vocab_size, (seq_len,), generator=generator)
        labels = input_ids.clone()
        labels[length:] = IGNORED
        items.append({"input_ids": input_ids, "labels": labels})
    return items


def by_definition(model, items):
    """Mean over all predicted tokens in float64, one sequence at a time."""
    losses = []
    for item in items:
        logits = model(input_ids=item["input_ids"][None]).logits[0].double()
        for place in range(1, len(item["labels"])):
            if item["labels"][place] != IGNORED:
                losses.append(-torch.log_softmax(logits[place - 1], 0)[item["labels"][place]].item())
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4, 100])
def test_every_token_weighs_the_same_whatever_the_batches(micro_batch_size):
    model = tiny_llama(50)
    items = ragged([16, 16, 2, 9, 1, 16, 5])
    with torch.no_grad():
        expected, tokens = by_definition(model, items)
    found = evaluate(model, items, micro_batch_size=micro_batch_size)
    assert found.tokens == tokens == 15 + 15 + 1 + 8 + 0 + 15 + 4
    assert found.loss == pytest.approx(expected, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-6)
    assert found.bits_per_byte is None


def test_the_standard_error_is_that_of_resampled_sequences():
    model, items = tiny_llama(50), ragged([16] * 40 + [4] * 20)
    one, whole = (evaluate(model, items, micro_batch_size=size) for size in (1, 7))
    assert one.stderr == pytest.approx(whole.stderr, rel=1e-3)
    with torch.no_grad():
        rows = torch.tensor([(mean * count, count) for mean, count in (by_definition(model, [item]) for item in items)])
    generator = torch.Generator().manual_seed(0)
    drawn = rows[torch.randint(60, (4000, 60), generator=generator)].sum(1)
    assert whole.stderr == pytest.approx(float((drawn[:, 0] / drawn[:, 1]).std()), rel=0.06)
    assert evaluate(model, items[:1]).stderr is None


def test_padding_differs_from_the_mean_of_means():
    """What a careless mean over batches would give is far off, so that the test above can fail."""
    model = tiny_llama(50)
    items = ragged([16, 2])
    means = [evaluate(model, [item]).loss for item in items]
    found = evaluate(model, items, micro_batch_size=1).loss
    assert found == pytest.approx((15 * means[0] + means[1]) / 16, rel=1e-6)
    assert abs(found - sum(means) / 2) > 1e-3


def test_agrees_with_the_models_own_loss():
    items = ragged([16, 16, 16])
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)).eval()
    batch = torch.stack([item["input_ids"] for item in items])
    with torch.no_grad():
        expected = model(input_ids=batch, labels=batch).loss.item()
    assert evaluate(model, items).loss == pytest.approx(expected, rel=1e-6)


def test_mode_gradients_and_random_state_are_left_alone():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)).train()
    state = torch.get_rng_state()
    first = evaluate(model, ragged([16, 3]))
    assert torch.equal(torch.get_rng_state(), state)
    assert evaluate(model, ragged([16, 3])) == first, "dropout was on"
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bits_per_byte_batches_and_autocast():
    model = tiny_llama(50)
    items = ragged([16] * 6)
    found = evaluate(model, items, bytes_per_token=2.5)
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) / 2.5)
    assert evaluate(model, items, micro_batch_size=2, batches=2) == evaluate(model, items[:4], micro_batch_size=2)
    # bytes per token are those of the whole text
    assert evaluate(model, items, bytes_per_token=2.5, micro_batch_size=2, batches=2).bits_per_byte is None
    assert evaluate(model, items, bytes_per_token=2.5, micro_batch_size=2, batches=3) == found
    with torch.autocast("cpu", dtype=torch.bfloat16):
        in_bf16 = evaluate(model, items)
    assert in_bf16.loss != found.loss
    assert in_bf16.loss == pytest.approx(found.loss, rel=1e-2)


def test_a_uniform_model_has_the_entropy_of_its_vocabulary():
    model = tiny_llama(50)
    torch.nn.init.zeros_(model.lm_head.weight)
    found = evaluate(model, ragged([16, 7]))
    assert found.loss == pytest.approx(math.log(50), rel=1e-6)
    assert found.perplexity == pytest.approx(50, rel=1e-5)


def test_nothing_to_evaluate():
    model = tiny_llama(50)
    for dataset in ([], ragged([1, 0])):
        with pytest.raises(ValueError, match="nothing to evaluate"):
            evaluate(model, dataset)
    with pytest.raises(ValueError, match="must be at least 1, got 0 and None"):
        evaluate(model, ragged([16]), micro_batch_size=0)


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A text, and a run folder with a model and tokenizer for it in final/."""
    folder = tmp_path_factory.mktemp("eval")
    text = folder / "text.txt"
    text.write_text("\n".join(texts.documents(30)))
    config = DataConfig(source="text", path=str(text), tokenizer="train:300", seq_len=32, val_tokens=200)
    data = load_data(config, seed=0)
    model = tiny_llama(len(data.tokenizer))
    model.save_pretrained(folder / "run" / "final")
    data.tokenizer.save_pretrained(folder / "run" / "final")
    return folder


def test_eval_of_a_folder_without_a_tokenizer_says_where_one_belongs(trained, tmp_path, capsys):
    tiny_llama(300).save_pretrained(tmp_path / "bare")
    assert main([str(tmp_path / "bare"), "--data", str(trained / "text.txt")]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    # the key of a recipe would lead nowhere here
    assert "holds no tokenizer (no tokenizer.json). Save the model's own there" in message
    assert "data.tokenizer" not in message


def test_eval_of_a_file(trained, capsys):
    assert main([str(trained / "run"), "--data", str(trained / "text.txt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(trained / "run" / "final")
    config = DataConfig(source="text", val_path=str(trained / "text.txt"), path=str(trained / "text.txt"), seq_len=32)
    data = load_data(DataConfig(**{**vars(config), "tokenizer": str(trained / "run" / "final")}), seed=0)
    expected = evaluate(model, data.validation, bytes_per_token=data.bytes_per_token)
    assert found["seq_len"] == 32, "the length it was trained with"
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert found["tokens"] == expected.tokens
    size = len((trained / "text.txt").read_bytes())
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2) * found["tokens"] / size, rel=0.05)


def test_eval_packs_documents_as_the_run_did(of_a_run, trained, capsys):
    """Cut or padded documents have other losses than a packed stream, and the run printed theirs."""
    lines = trained / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts.documents(12)))
    measured = {}
    for packing in ("true", "false"):
        run = of_a_run(f"{{source: json, path: x, packing: {packing}}}")
        assert main([str(run), "--data", str(lines), "--json"]) == 0
        measured[packing] = json.loads(capsys.readouterr().out)
        folder = str(trained / "run" / "final")
        config = DataConfig(
            source="json", path=str(lines), val_path=str(lines), tokenizer=folder, seq_len=32, packing=packing == "true"
        )
        expected = evaluate(AutoModelForCausalLM.from_pretrained(folder), load_data(config, seed=0).validation)
        assert (measured[packing]["tokens"], measured[packing]["packing"]) == (expected.tokens, packing == "true")
        assert measured[packing]["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert measured["true"]["tokens"] != measured["false"]["tokens"]


def test_eval_prints_a_table(trained, capsys):
    argv = [str(trained / "run" / "final"), "--data", str(trained / "text.txt")]
    assert main([*argv, "--batches", "1"]) == 0
    assert "bits per byte" not in capsys.readouterr().out, "the bytes of a part are not known"
    assert main(argv) == 0
    out, shown = capsys.readouterr()
    for phase in ("loading torch", "reading the model", "reading and tokenising", "evaluating: 0/"):
        assert f"\n{phase}" in f"\n{shown}"
    for word in (
        "checkpoint",
        "targets (predicted tokens) in sequences of 32",
        "in training    not known",
        "loss",
        "(standard error over the sequences)",
        "perplexity",
        "bits per byte",
    ):
        assert word in out


@pytest.mark.slow
def test_eval_of_sotu(trained, capsys):
    argv = [str(trained / "run"), "--data", "sotu", "--val-tokens", "2000", "--seq-len", "64", "--json"]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 2000 - math.ceil(2000 / 64)
    assert "newer" not in found["data"]
    assert found["training"].startswith("not known: no run's config.yaml")


def described(folder, data, model="{init_from: null}"):
    """The trained model of ``folder`` in a run whose recipe has this ``data`` section."""
    run = folder / "run"
    step = run / "checkpoints" / "step-000004"
    step.mkdir(parents=True, exist_ok=True)
    for link in (run / "final", step / "hf"):
        if not link.exists():
            shutil.copytree(folder.parent / "trained", link)
    (run / "config.yaml").write_text(f"recipe: pretrain\nmodel: {model}\ndata: {data}\n")
    return run


@pytest.fixture
def of_a_run(trained, tmp_path):
    shutil.copytree(trained / "run" / "final", tmp_path / "trained")
    (tmp_path / "folder").mkdir()
    return lambda *arguments: described(tmp_path / "folder", *arguments)


SOTU = {
    "as held out": ("{source: sotu, val_tokens: 1000}", [], 1000, "held out, newer than all training text ("),
    "fewer": ("{source: sotu, val_tokens: 1000}", ["--val-tokens", "640"], 640, "held out, newer than all training"),
    "more": (
        "{source: sotu, val_tokens: 1000}",
        ["--val-tokens", "1200"],
        1200,
        "held out in part: the run kept the last 1,000 of these 1,200 tokens from training and was trained on the oth",
    ),
    "nothing": ("{source: sotu, val_tokens: 0}", ["--val-tokens", "640"], 640, "trained on all of this text: this is"),
    "other validation": (
        "{source: sotu, val_tokens: 1000, val_path: mine.txt}",
        ["--val-tokens", "640"],
        640,
        "trained on all of this text",
    ),
    "other text": ("{source: text, path: a.txt}", ["--val-tokens", "640"], 640, "trained on text a.txt, not on this"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("data", "argv", "tokens", "message"), SOTU.values(), ids=SOTU.keys())
def test_what_is_said_of_sotu_is_what_the_run_says(of_a_run, capsys, data, argv, tokens, message):
    run = of_a_run(data)
    for place in (run, run / "checkpoints" / "step-000004")[: 1 if argv else 2]:
        assert main([str(place), "--data", "sotu", "--seq-len", "64", "--json", "--batches", "1", *argv]) == 0
        found = json.loads(capsys.readouterr().out)
        assert f"last {tokens:,} tokens" in found["data"]
        assert found["training"].startswith(message) and str(run / "config.yaml") in found["training"]


def test_what_is_said_of_a_file_is_what_the_run_says(trained, of_a_run, capsys):
    text = trained / "text.txt"

    def said(data, *more):
        assert main([str(of_a_run(data, *more)), "--data", str(text), "--json", "--batches", "1"]) == 0
        return json.loads(capsys.readouterr().out)["training"]

    assert said(f"{{source: text, path: {text}}}").startswith(
        "trained on: the run's own data.path, all but its last 150,000 tokens"
    )
    assert said(f"{{source: text, path: a.txt, val_path: {text}}}").startswith("held out: the run's own data.val_path")
    assert "trained on text a.txt; whether it holds this file is not known" in said("{source: text, path: a.txt}")
    told = said("{source: sotu}", "{init_from: other/model}")
    assert told.endswith("; the training text of other/model, where its weights began, is not known")
    assert said("[no, section]").startswith("not known"), "a damaged file says nothing"
    pruned = of_a_run("[no, section]") / "final"
    (pruned / "sparsity.json").write_text('{"source": "runs/dense/final"}')
    assert main([str(pruned), "--data", str(text), "--json", "--batches", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["training"].startswith(
        "pruned from runs/dense/final, and `leanstep eval`"
    )


def test_errors_name_the_options_of_the_command(trained, tmp_path, capsys, monkeypatch):
    # the whole corpus takes seconds
    monkeypatch.setattr(sources, "sotu_corpus", lambda: sources.Corpus.of_texts("sotu", texts.documents(30)))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"body": "some text", "number": 3}\n')
    for argv, message in (
        (["--data", str(rows)], "set --text-key to one of them"),
        (["--data", str(rows), "--text-key", "number"], "--text-key 'number' must hold strings, got int: '3'"),
        (["--data", "sotu", "--val-tokens", "999999999"], "--val-tokens: "),
        (["--data", str(tmp_path / "no*.txt")], "--data: "),
    ):
        assert main([str(trained / "run"), *argv]) == 2
        error = capsys.readouterr().err
        assert message in error and "data.val" not in error and "data.text" not in error, error


def test_a_checkpoint_folder_is_a_model_too(trained, tmp_path):
    assert find_model_folder(trained / "run") == trained / "run" / "final"
    (tmp_path / "step-000100").mkdir()
    (tmp_path / "step-000100" / "hf").symlink_to(trained / "run" / "final")
    assert find_model_folder(tmp_path / "step-000100") == tmp_path / "step-000100" / "hf"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere", "--data", "TEXT"], "'nowhere' is not there; expected a Hugging Face folder"),
        (["TEXT", "--data", "TEXT"], "is a file; expected a Hugging Face folder"),
        (["EMPTY", "--data", "TEXT"], "is no Hugging Face model: expected config.json and model.safetensors"),
        (["BEGUN", "--data", "TEXT"], "BEGUN is a run that has no model yet"),
        (["NO_WEIGHTS", "--data", "TEXT"], "has a config.json but no weights"),
        (["BROKEN", "--data", "TEXT"], "could not open the model in"),
        (["OTHER_SHAPE", "--data", "TEXT"], "OTHER_SHAPE"),
        (["RUN", "--data", "missing.txt"], "error: --data: 'missing.txt' does not exist"),
        (["RUN", "--data", "TEXT", "--val-tokens", "9"], "--val-tokens is for --data sotu; a file is evaluated whole"),
        (["RUN", "--data", "TEXT", "--seq-len", "65"], "--seq-len must be from 2 to the model's 64 positions, got 65"),
        (["RUN", "--data", "TEXT", "--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["RUN", "--data", "TEXT", "--device", "meta"], "--device meta cannot be used"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_refusals(trained, tmp_path, capsys, argv, message):
    final = trained / "run" / "final"
    for name in ("EMPTY", "BEGUN", "NO_WEIGHTS", "BROKEN", "OTHER_SHAPE"):
        (tmp_path / name).mkdir()
    (tmp_path / "BEGUN" / "status.json").write_text('{"status": "running", "step": 6}')
    config = json.loads((final / "config.json").read_text())
    (tmp_path / "NO_WEIGHTS" / "config.json").write_text(json.dumps(config))
    (tmp_path / "BROKEN" / "config.json").write_text(json.dumps(config))
    (tmp_path / "BROKEN" / "model.safetensors").write_bytes(b"truncated")
    (tmp_path / "OTHER_SHAPE" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    (tmp_path / "OTHER_SHAPE" / "model.safetensors").symlink_to(final / "model.safetensors")
    places = {"TEXT": trained / "text.txt", "RUN": trained / "run"}
    argv = [str(places.get(word, tmp_path / word if (tmp_path / word).exists() else word)) for word in argv]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_help_needs_no_torch():
    code = (
        "import sys; from leanstep.recipes.evaluate import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as done: assert done.code == 0 and 'torch' not in sys.modules, 'torch was imported'"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--seq-len" in out


def test_unusable_numbers(trained):
    for argv in (["--batches", "0"], ["--seq-len", "-1"], ["--batch-size", "many"]):
        with pytest.raises(SystemExit):
            main([str(trained / "run"), "--data", "sotu", *argv])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "expected --data, --tasks, or both"),
        (["--data", "sotu", "--shots", "2"], "--shots goes with --tasks, which is missing"),
        (["--tasks", "quiz", "--seq-len", "8"], "--seq-len goes with --data, which is missing"),
    ],
)
def test_an_option_that_nothing_would_use_is_refused(capsys, argv, message):
    with pytest.raises(SystemExit, match="2"):
        main(["folder", *argv])
    assert message in capsys.readouterr().err


def test_tasks_without_the_harness_name_what_to_install(trained, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main([str(trained / "run"), "--tasks", "hellaswag"]) == 2
    assert "error: 'lm_eval' is not installed; it comes with: pip install 'leanstep[tasks]'" in capsys.readouterr().err
