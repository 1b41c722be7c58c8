"""Model cards, as huggingface_hub reads them."""

import sys

import pytest
from huggingface_hub import ModelCard, constants
from pruned_models import make_llama, save_model
from transformers import AutoModelForCausalLM

from leanstep._checkpoint.card import write_card
from leanstep.cli import main
from leanstep.lora import LoraConfig, apply_lora, save_adapter
from leanstep.sparsity.inference import export_folder

BASE = "---\nlicense: apache-2.0\nbase_model: org/origin\n---\nThe words of the base.\n"


@pytest.fixture
def base(tmp_path):
    save_model(make_llama(1), tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text(BASE)
    return tmp_path / "base"


def metadata(folder):
    card = ModelCard.load(folder / "README.md")
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert "The words of the base" not in card.text
    return card.data.to_dict()


def test_pruned_and_exported_folders_have_cards_with_licence_and_base(base, tmp_path):
    out = tmp_path / "pruned"
    assert main(["prune", str(base), "--out", str(out), "--sparsity", "0.5", "--allocation", "uniform",
                 "--score", "magnitude"]) == 0  # fmt: skip
    assert metadata(out) == {
        "base_model": "org/origin", "base_model_relation": "finetune", "library_name": "transformers",
        "license": "apache-2.0", "pipeline_tag": "text-generation", "tags": ["leanstep", "pruned"],
    }  # fmt: skip
    assert "| Sparsity | 0.5" in (out / "README.md").read_text()
    export_folder(out, tmp_path / "sparse", values="int8")
    assert metadata(tmp_path / "sparse")["base_model_relation"] == "quantized"
    assert metadata(tmp_path / "sparse")["license"] == "apache-2.0"


def test_an_adapter_has_a_card_and_the_licence_of_its_base(base, tmp_path):
    (base / "LICENSE.txt").write_text("Do as you like.")
    model = apply_lora(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    folder = save_adapter(model, tmp_path / "adapter")
    assert metadata(folder) == {
        "base_model": "org/origin", "base_model_relation": "adapter", "library_name": "peft",
        "license": "apache-2.0", "pipeline_tag": "text-generation", "tags": ["leanstep", "lora"],
    }  # fmt: skip
    assert "| Adapter | LoRA, rank 2 |" in (folder / "README.md").read_text()
    assert (folder / "LICENSE.txt").read_text() == "Do as you like."


@pytest.mark.parametrize(
    "damaged", ["---\nlicense: [\n---", "---\nlicense: {a: b}\n---", "\x00", "---\n- a\n---", "---\n" + "[" * 5000]
)
def test_a_card_that_cannot_be_read_says_nothing(base, tmp_path, damaged):
    (base / "README.md").write_text(damaged)
    export_folder(base, tmp_path / "out")
    assert not {"license", "base_model"} & set(metadata(tmp_path / "out"))


def test_a_card_that_somebody_wrote_stays_and_ours_is_replaced(base):
    write_card(base, "A", {})
    assert (base / "README.md").read_text() == BASE
    (base / "README.md").unlink()
    for title in ("A", "B | C"):
        write_card(base, title, {"a | b": "c\nd"})
    text = (base / "README.md").read_text()
    assert "# B \\| C" in text and "# A" not in text and "| a \\| b | c d |" in text


def test_names_and_licences_of_hub_models_come_from_the_cache(base, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for source in ("org/model", str(snapshot)):
        (base / "README.md").unlink()
        write_card(base, "A", {}, base=source)
        card = metadata(base)
        assert (card["base_model"], card["license"], card["license_name"]) == ("org/model", "other", "own")
        assert "license_link" not in card


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (["python", "/bin/leanstep", "prune", "a b", "--out", "c"], "leanstep prune 'a b' --out c"),
        (["python", "-m", "leanstep.recipes.training.train", "r", "steps=3"], "leanstep train r steps=3"),
        (["python", "my/train.py", "--lr", "1"], None),
        (["python", "tool", "prune", "x"], None),
    ],
)
def test_the_command_is_that_of_leanstep_or_none(base, monkeypatch, line, shown):
    monkeypatch.setattr(sys, "orig_argv", line)
    (base / "README.md").unlink()
    write_card(base, "A", {})
    text = (base / "README.md").read_text()
    assert (f"\n{shown}\n" in text) if shown else ("Made by" not in text)
