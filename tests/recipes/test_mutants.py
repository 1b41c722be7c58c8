"""Damaged folders of models and adapters: every command ends in one line about the file, or in the right result."""

import json
import random
import shutil
from pathlib import Path

import pytest
import texts
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from leanstep.cli import main
from leanstep.lora import LoraConfig, apply_lora, load_adapter, save_adapter
from leanstep.recipes.config.schema import DataConfig, ModelConfig
from leanstep.recipes.data.sequences import load_data
from leanstep.recipes.data.tokens import open_tokenizer
from leanstep.recipes.training.build import build_model

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
INSERTS = (b"\x00", b"\xff", b'"', b"{", b"}", b"[", b"9" * 30, b"-1", b"1e999", b"\\ud800", b"NaN", b"null", b"../")


def mutant(data: bytes, chance: random.Random) -> bytes:
    """One change of a file: a flipped bit, a cut, inserted bytes, or a piece that is doubled."""
    # the head of a weight file and all of a small file are where most is decided
    place = chance.randrange(min(len(data), 4000) if chance.random() < 0.8 else len(data))
    kind = chance.randrange(5)
    if kind == 0:
        return data[:place]
    if kind == 1:
        insert = chance.choice(INSERTS)
        return data[:place] + insert + data[place:]
    if kind == 2:
        return data[:place] + data[max(0, place - 40) :]
    changed = bytearray(data)
    changed[place] ^= 1 << chance.randrange(8)
    return bytes(changed)


def one_line_or_right(run, right) -> bool:
    """Run a reader of a mutant; whether it refused. A refusal is a ValueError of one printable line."""
    try:
        result = run()
    except (ValueError, OSError) as error:
        text = str(error)
        assert text and len(text.splitlines()) == 1, text
        assert "weights_only" not in text and "trust_remote_code" not in text, text
        return True
    right(result)
    return False


def finite(opened) -> None:
    if isinstance(opened, torch.nn.Module):
        assert all(bool(tensor.isfinite().all()) for tensor in opened.state_dict().values())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants")
    (folder / "long.txt").write_text("\n".join(texts.documents(40)))
    config = DataConfig(source="text", path=str(folder / "long.txt"), tokenizer="train:300", seq_len=32, val_tokens=300)
    data = load_data(config, seed=0)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=2, n_positions=32))
    model.save_pretrained(folder / "model")
    data.tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODEL_FILES)
def test_mutants_of_a_model_start_a_run_or_are_refused_in_one_line(saved, tmp_path, name):
    folder = shutil.copytree(saved / "model", tmp_path / "model")
    whole, chance, refused = (folder / name).read_bytes(), random.Random(name), 0
    read = open_tokenizer if "tokenizer" in name else lambda path: build_model(ModelConfig(init_from=path), 300)

    for _ in range(60):
        (folder / name).write_bytes(mutant(whole, chance))
        refused += one_line_or_right(lambda: read(str(folder)), finite)
    if name != "generation_config.json":
        assert refused > 15


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", ["eval", "prune"])
def test_commands_end_in_an_answer_or_in_one_line_and_the_documented_code(saved, tmp_path, command, capsys):
    folder, chance, codes = shutil.copytree(saved / "model", tmp_path / "model"), random.Random(command), []
    arguments = {
        "eval": ["eval", str(folder), "--data", str(saved / "long.txt"), "--batches", "1", "--json"],
        "prune": ["prune", str(folder), "--out", str(tmp_path / "out"), "--sparsity", "0.5", *PLAIN, "--json"],
    }[command]
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        whole = (folder / name).read_bytes()
        for _ in range(12):
            (folder / name).write_bytes(mutant(whole, chance))
            codes.append(main(arguments))
            captured = capsys.readouterr()
            last = captured.err.strip().splitlines()[-1:] or [""]
            if codes[-1]:
                assert codes[-1] == 2 and last[0].startswith("error: "), captured.err
                assert not (tmp_path / "out").exists()
            else:
                json.loads(captured.out)
                shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (folder / name).write_bytes(whole)
    assert 10 < codes.count(2) < len(codes)


PLAIN = ["--score", "magnitude", "--allocation", "uniform"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_mutants_of_an_adapter_are_loaded_whole_or_refused_in_one_line(tmp_path, name):
    def base():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=32))

    adapted = apply_lora(base(), LoraConfig(r=2, target_modules=["c_attn", "c_fc"]))
    save_adapter(adapted, tmp_path / "adapter")
    file = tmp_path / "adapter" / name
    whole, chance, refused = file.read_bytes(), random.Random(name), 0
    for _ in range(80):
        file.write_bytes(mutant(whole, chance))
        model = base()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        if one_line_or_right(lambda model=model: load_adapter(model, tmp_path / "adapter"), finite):
            refused += 1
            assert model.state_dict().keys() == before.keys()
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert refused > 20


def test_files_of_torch_run_nothing_and_say_nothing_of_weights_only(saved, tmp_path, capsys):
    folder, marker = shutil.copytree(saved / "model", tmp_path / "model"), tmp_path / "marker"
    (folder / "model.safetensors").unlink()
    torch.save({"w": _Touch(str(marker))}, folder / "pytorch_model.bin")
    (tmp_path / "adapter").mkdir()
    shutil.copyfile(folder / "pytorch_model.bin", tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "target_modules": ["c_fc"]})
    )
    text = ["--data", str(saved / "long.txt")]
    assert main(["eval", str(folder), *text]) == 2
    assert main(["prune", str(folder), "--out", str(tmp_path / "out"), "--sparsity", "0.5", *PLAIN]) == 2
    assert main(["verify", str(folder)]) == 2
    printed = capsys.readouterr().err
    for read in (
        lambda: build_model(ModelConfig(init_from=str(folder)), 300),
        lambda: load_adapter(GPT2LMHeadModel.from_pretrained(saved / "model"), tmp_path / "adapter"),
    ):
        with pytest.raises(ValueError, match="nothing in it is run") as refusal:
            read()
        printed += str(refusal.value)
    assert "weights_only" not in printed
    assert printed.count("nothing in it is run") == 5
    assert not marker.exists()


class _Touch:
    """Pickled, it makes a file when it is unpickled by a loader that runs code."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)
