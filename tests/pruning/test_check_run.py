"""``leanstep prune`` refuses what cannot be done before it loads or copies a model, and so does its dry run."""

import json
import re
from dataclasses import replace

import pytest
from architectures import make
from pruned_models import images, save_model, tokens
from safetensors.torch import save_file
from texts import sentences

from leanstep.cli import main
from leanstep.pruning import PruneConfig, Recovery, find_targets
from leanstep.pruning.folder import run
from leanstep.pruning.folder.files import open_checkpoint

AMOUNTS = ["--samples", "6", "--curve-samples", "3", "--held-out", "2"]
OF_IMAGES = ("vit", "vit_base", "resnet")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with small models by name, a text, and images."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text(sentences(60))
    save_file({"pixel_values": images(20)}, folder / "images.safetensors")
    return folder


def command_for(base, name, out, *more):
    """The command for a model, which is saved first if it is not there."""
    if not (base / name).exists():
        save_model(make(name), base / name)
    data = ["images.safetensors"] if name in OF_IMAGES else ["text.txt", "--seq-len", "24"]
    return [
        *("prune", str(base / name), "--out", str(out), *AMOUNTS, "--sparsity", "0.5"),
        *("--data", str(base / data[0]), *data[1:], *more),
    ]


def refusal(command, capsys, monkeypatch, dry):
    """The message of a command that loads no model."""
    monkeypatch.setattr(run, "load_model", lambda *given: pytest.fail("a model was loaded"))
    capsys.readouterr()
    assert main([*command, *(["--dry-run"] if dry else [])]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and error.count("error: ") == 1, error
    return error


UNRECOVERABLE = {
    "without a head": ("bert_base", [], "recovery compares logits: expected .* logits .* got BertModel"),
    "decoder without a head": ("gpt2_base", [], r"got GPT2Model; leave out recovery \(--recover\)"),
    "images without a head": ("vit_base", [], "recovery compares logits: .* got ViTModel"),
    "masked tokens": ("bert", ["--no-distill"], "predicts the next token, and this model .*without --no-distill"),
    "images": ("vit", ["--no-distill"], "predicts the next token, and this model .*without --no-distill"),
    "convolutions": ("resnet", ["--recover-rank", "2"], "ResNetForImageClassification has none .*leave out --recover-"),
    "perplexity": ("bert", ["--eval"], r"perplexity needs a model .* which BertForMaskedLM does not; leave out"),
}


@pytest.mark.parametrize("case", UNRECOVERABLE)
@pytest.mark.parametrize("dry", [True, False])
def test_a_model_without_a_loss_is_refused_before_it_is_loaded(case, dry, base, tmp_path, capsys, monkeypatch):
    name, more, message = UNRECOVERABLE[case]
    command = command_for(base, name, tmp_path / "out", "--recover", "3", *more)
    error = refusal(command, capsys, monkeypatch, dry)
    assert re.search(message, error), error
    assert not list(tmp_path.iterdir())


BEYOND_REACH = {
    "levels": ("llama", ["--levels", "0.2,0.4"], "a sparsity of 0.5 is out of reach: .* ask for less .--sparsity., or"),
    "levels of a pattern": ("llama", ["--sparsity", "0.9", "--pattern", "N:8"], "of 0.9 is out of reach: .* 0 to 0.75"),
    "levels of bytes": ("llama", ["--levels", "0.2,0.4", "--budget", "bytes"], r"cost \(bytes\) is out of reach"),
    "levels of blocks": ("llama", ["--levels", "0.3", "--granularity", "block"], "of 0.5 is out of reach"),
    "a pattern that does not fit": ("llama", ["--pattern", "N:12"], "has 16 inputs, which groups of 12 do not fill"),
    "a fixed one": ("llama", ["--sparsity", "0.4", "--pattern", "3:5"], "has 16 inputs, which groups of 5 do not fill"),
    "short text": ("llama", ["--samples", "5000"], "the text is too short: 5002 sequences of 24 tokens"),
    "long sequences": ("llama", ["--seq-len", "65"], "seq_len must be from 2 to the model's 64 positions, got 65"),
    "no file": ("llama", ["--data", "nowhere.txt"], "--data: 'nowhere.txt' does not exist"),
    "few images": ("vit", ["--samples", "19"], "has 20 images; --held-out 2, --samples 19 take 21"),
    "table": ("llama", ["--budget", "latency"], "--budget latency goes with a --latency-table FILE"),
    "batch": ("llama", ["--batch-size", "0"], "batch_size must be at least 1, got 0"),
    "device": ("llama", ["--device", "nowhere"], "the device 'nowhere' is not available"),
    "another model's data": (
        "llama",
        ["--data", "{images}"],
        "LlamaForCausalLM takes token numbers, got torch.float32",
    ),
}


@pytest.mark.parametrize("case", BEYOND_REACH)
@pytest.mark.parametrize("dry", [True, False])
def test_what_is_beyond_reach_is_refused_before_the_model_is_loaded(case, dry, base, tmp_path, capsys, monkeypatch):
    name, more, message = BEYOND_REACH[case]
    command = command_for(
        base, name, tmp_path / "out", *(text.format(images=base / "images.safetensors") for text in more)
    )
    if more[0] == "--data":
        command = [text for text in command if text not in ("--seq-len", "24")]
    error = refusal(command, capsys, monkeypatch, dry)
    assert re.search(message, error), error
    assert not list(tmp_path.iterdir())


MESSAGES = {
    "search with a fixed pattern": (
        "llama",
        ["--refine", "1", "--pattern", "2:4"],
        r"got the pattern 2:4, by which every matrix keeps 2 of 4 weights\. Leave out refine \(--refine, .* --pattern",
    ),
    "no sparsity": ("llama", ["--sparsity"], r"expected a sparsity, such as 0\.6 \(--sparsity 0\.6\), .* got neither"),
    "text for images": (
        "vit",
        ["--data", "{text}"],
        "ViTForImageClassification takes pixel_values, and the .* is text .* .--data FILE.safetensors.",
    ),
    "text for sounds": (
        "whisper",
        [],
        "WhisperFor.* takes input_features, and the calibration data is text .* or prune without data .--score magn",
    ),
    "images for sounds": ("whisper", ["--data", "{images}"], "Python takes such batches, the command does not"),
    "weights as data": (
        "llama",
        ["--data", "{weights}", "--seq-len", "24"],
        r"expected a floating tensor pixel_values .* got none among lm_head\.weight, .* more\. A language model",
    ),
    "length of images": (
        "vit",
        ["--seq-len", "24"],
        "--seq-len: for text alone, and --data .* has images; leave out --seq-len, or name a text",
    ),
    "no place": ("llama", ["--out", "{no}/out"], "no/out cannot be made: .*/no does not exist; make it, or"),
}


@pytest.mark.parametrize("case", MESSAGES)
@pytest.mark.parametrize("dry", [True, False])
def test_a_message_says_what_to_do_in_terms_of_the_options(case, dry, base, tmp_path, capsys, monkeypatch):
    name, more, message = MESSAGES[case]
    paths = {"text": base / "text.txt", "images": base / "images.safetensors", "no": tmp_path / "no"}
    paths["weights"] = base / name / "model.safetensors"
    command = command_for(base, name, tmp_path / "out")
    if more == ["--sparsity"]:
        at = command.index("--sparsity")
        command, more = command[:at] + command[at + 2 :], []
    if "{images}" in more:
        command = [text for text in command if text not in ("--seq-len", "24")]
    error = refusal([*command, *(text.format(**paths) for text in more)], capsys, monkeypatch, dry)
    assert re.search(message, error), error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dry", [True, False])
def test_a_missing_table_row_and_text_for_perplexity_are_told_at_the_start(dry, base, tmp_path, capsys, monkeypatch):
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"levels": [0, 0.5], "seconds": {"other": [2.0, 1.0]}}))
    latency = ["--budget", "latency", "--latency-table", str(table)]
    command = command_for(base, "llama", tmp_path / "out", *latency)
    assert "the latency table has no row for model.layers.0" in refusal(command, capsys, monkeypatch, dry)
    command = command_for(base, "llama", tmp_path / "out", "--eval", "--allocation", "erk", "--score", "magnitude")
    for text in ("--data", str(base / "text.txt"), "--seq-len", "24"):
        command.remove(text)
    error = refusal(command, capsys, monkeypatch, dry)
    assert "--eval measures the model on held-out samples of --data, which is missing" in error
    assert list(tmp_path.iterdir()) == [table]


def test_a_dry_run_refuses_an_output_that_the_run_refuses_and_changes_nothing(base, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    command = command_for(base, "llama", out)
    out.mkdir()
    assert "exists already" in refusal(command, capsys, monkeypatch, dry=True)
    out.rmdir()
    (tmp_path / "out.curves.jsonl").write_text("")
    assert "go on with it (--resume)" in refusal(command, capsys, monkeypatch, dry=True)
    assert main([*command, "--dry-run", "--resume"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.curves.jsonl"]


def test_zeros_of_the_weights_decide_what_is_in_reach(base, tmp_path, capsys, monkeypatch):
    model = make("llama")
    targets = find_targets(model)
    for target in targets[::2]:
        target.weight[:, ::8] = 0
        target.weight[:, 1::2] = 0
    save_model(model, tmp_path / "model")
    few = sum(int((target.weight != 0).sum()) for target in targets) / sum(target.layer.numel for target in targets)
    command = command_for(base, "llama", tmp_path / "out", "--levels", "0.2,0.5")
    command[1] = str(tmp_path / "model")
    within = [*command, "--sparsity", "0.52"]  # more than the largest level, by matrices that have more zeros
    assert main([*within, "--dry-run"]) == 0
    monkeypatch.setattr(run, "map_weights", lambda *given: pytest.fail("the files were copied"))
    for sparsity, message in ((str(0.9 * (1 - few)), "the model already has"), ("0.8", "of 0.8 is out of reach")):
        capsys.readouterr()
        assert main([*command, "--sparsity", sparsity]) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    monkeypatch.undo()
    assert main(within) == 0


def test_experts_that_a_rank_leaves_out_are_named_in_the_output_and_the_report(base, tmp_path, capsys):
    rank = ["--recover", "2", "--recover-rank", "2", "--allocation", "uniform", "--score", "magnitude"]
    assert main(command_for(base, "mixtral", tmp_path / "out", *rank)) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if "not trained" in line]
    notes = json.loads((tmp_path / "out" / "sparsity.json").read_text())["recovery"]["notes"]
    [note] = [note for note in notes if "not trained" in note]
    assert re.match(r"\d+ of \d+ pruned matrices were not trained: model\.layers\.0\.mlp\.experts\.", note)
    assert printed == [f"note           {note}"]
    assert "pruned matrices were not trained" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "t5", "mixtral", "resnet"])
def test_a_model_with_a_loss_passes(name, tmp_path):
    save_model(make(name), tmp_path / name)
    data = images(4) if name in OF_IMAGES else tokens(4)
    recovery = Recovery(2, distill=None if name in ("bert", *OF_IMAGES) else False)
    for one in [recovery] + [replace(recovery, rank=2)] * (name != "resnet"):
        config = PruneConfig(sparsity=0.5)
        run.check_run(open_checkpoint(tmp_path / name), data, config, recovery=one, evaluate=False)
