"""Model cards, as huggingface_hub reads them, and as it sends them to the hub's check."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import InferenceClient, ModelCard, constants, metadata_load
from huggingface_hub.utils import validate_repo_id
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


class Hub(BaseHTTPRequestHandler):
    """Answers ``ModelCard.validate`` as the hub does: 400 with the reason for metadata that are not legal."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            assert self.path == "/api/validate-yaml" and asked["repoType"] == "model"
            self.check(asked["content"])
            status, text = 200, "{}"
        except (AssertionError, ValueError) as error:
            status, text = 400, str(error)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def check(self, content):
        self.server.file.write_text(content)
        data = metadata_load(self.server.file)
        for name in ("license", "license_name", "library_name", "pipeline_tag", "base_model"):
            assert isinstance(data.get(name, ""), str), name
        assert data.get("license") != "other" or "license_name" in data, "license other has a name"
        assert data.get("base_model_relation", "merge") in ("adapter", "finetune", "merge", "quantized"), "relation"
        assert ("base_model" in data) == ("base_model_relation" in data), "a relation has a base"
        validate_repo_id(data.get("base_model", "a/b"))
        task = data.get("pipeline_tag", "text-generation").replace("-", "_")
        assert hasattr(InferenceClient, task), "a task is one of the hub's"
        assert all(isinstance(tag, str) and tag for tag in data["tags"]), "tags are texts"

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.file = tmp_path / "sent.md"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield
    server.shutdown()
    server.server_close()


def metadata(folder):
    card = ModelCard.load(folder / "README.md")
    card.validate()
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


@pytest.mark.parametrize(
    "wrong", ["license: other", "pipeline_tag: talk", "base_model: a/b", "base_model: a b\nbase_model_relation: merge"]
)
def test_metadata_that_are_not_legal_are_refused(wrong):
    ModelCard("---\ntags: [a]\n---\n").validate()
    with pytest.raises(ValueError, match=r"has a name|one of the hub|has a base|Repo id"):
        ModelCard(f"---\ntags: [a]\n{wrong}\n---\n").validate()


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
