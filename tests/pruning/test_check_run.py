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
from leanstep.pruning import Recovery
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
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


UNRECOVERABLE = {
    "without a head": (
        "bert_base",
        [],
        "recovery compares logits: expected .* logits .* got BertModel",
    ),
    "decoder without a head": ("gpt2_base", [], r"got GPT2Model; leave out recovery \(--recover\)"),
    "images without a head": ("vit_base", [], "recovery compares logits: .* got ViTModel"),
    "masked tokens": ("bert", ["--no-distill"], "predicts the next token, and this model .*without --no-distill"),
    "images": ("vit", ["--no-distill"], "predicts the next token, and this model .*without --no-distill"),
    "convolutions": ("resnet", ["--recover-rank", "2"], "ResNetForImageClassification has none .*leave out --recover-"),
    "perplexity": ("bert", ["--eval"], r"perplexity is of a model .* which BertForMaskedLM does not; leave it out"),
}


@pytest.mark.parametrize("case", UNRECOVERABLE)
@pytest.mark.parametrize("dry", [True, False])
def test_a_model_without_a_loss_is_refused_before_it_is_loaded(case, dry, base, tmp_path, capsys, monkeypatch):
    name, more, message = UNRECOVERABLE[case]
    command = command_for(base, name, tmp_path / "out", "--recover", "3", *more)
    error = refusal(command, capsys, monkeypatch, dry)
    assert re.search(message, error), error
    assert not list(tmp_path.iterdir())


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
        run.check_run(open_checkpoint(tmp_path / name), data, recovery=one, evaluate=False, settings={})
