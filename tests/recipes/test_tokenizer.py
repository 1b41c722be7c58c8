"""Tokenizers: training is deterministic and cached, any Unicode survives, and what cannot be used says why."""

import errno
import fcntl
import multiprocessing
import os

import numpy as np
import pytest
import texts
from transformers import AutoTokenizer

from leanstep.recipes.config.schema import DataConfig, trained_size
from leanstep.recipes.data import tokens as module
from leanstep.recipes.data.sources import open_corpus
from leanstep.recipes.data.tokens import encode, load_tokenizer, open_tokenizer, train_bpe

TEXT = texts.documents(40)


def trained(cache, size=400, fingerprint="made up"):
    return load_tokenizer(f"train:{size}", lambda: TEXT, fingerprint, cache)


def test_training_twice_gives_the_same_file():
    assert train_bpe(TEXT, 500).to_str() == train_bpe(TEXT, 500).to_str()


def test_special_tokens_and_size(tmp_path):
    tokenizer = trained(tmp_path)
    assert len(tokenizer) == 400
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == 0


def test_text_too_small_for_the_size_gives_a_smaller_vocabulary(tmp_path):
    tokenizer = load_tokenizer("train:4096", lambda: ["hello hello"], "tiny", tmp_path)
    assert 257 < len(tokenizer) < 300


@pytest.mark.parametrize(
    "text",
    [
        "plain words",
        "  two  spaces\t\ttabs\r\nlines\n\n",
        "Zażółć gęślą jaźń, Ελληνικά, 中文, العربية, ตัวอย่าง",
        "emoji 👩‍👩‍👧‍👦 and flags 🇵🇱",
        "\x00\x01\x7f\u200b\ufeff\ufffd\U0010ffff",
        "e\u0301 is not \u00e9",
        "inside <|endoftext|> the text",
        "",
    ],
)
def test_any_unicode_round_trips(tmp_path, text):
    tokenizer = trained(tmp_path)
    (tokens,) = encode(tokenizer, [text])
    assert tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False) == text


def test_end_of_text_inside_a_document_stays_text(tmp_path):
    tokenizer = trained(tmp_path)
    (tokens,) = encode(tokenizer, ["a <|endoftext|> b"])
    assert tokenizer.eos_token_id not in tokens
    # and the setting is left as it was
    assert tokenizer.eos_token_id in tokenizer("a <|endoftext|> b")["input_ids"]


@pytest.mark.parametrize("separator", [" ", "\n", "\n\n", "  ", " \n "])
def test_long_documents_are_cut_without_changing_tokens(tmp_path, monkeypatch, separator):
    tokenizer = trained(tmp_path)
    text = separator.join(TEXT)
    (whole,) = encode(tokenizer, [text])
    monkeypatch.setattr(module, "_PIECE", 50)
    assert len(module._pieces(text)) > 10
    (cut,) = encode(tokenizer, [text])
    np.testing.assert_array_equal(cut, whole)


def test_second_call_trains_nothing(tmp_path):
    first = trained(tmp_path)

    def no_texts():
        raise AssertionError("trained again")

    second = load_tokenizer("train:400", no_texts, "made up", tmp_path)
    assert second.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()


def test_other_text_or_size_is_another_entry(tmp_path):
    trained(tmp_path)
    trained(tmp_path, fingerprint="other")
    trained(tmp_path, size=300)
    assert len([entry for entry in tmp_path.iterdir() if entry.is_dir()]) == 3


@pytest.mark.parametrize("damage", ["truncate", "delete", "checksum"])
def test_damaged_cache_is_trained_again(tmp_path, damage):
    expected = trained(tmp_path).backend_tokenizer.to_str()
    (file,) = tmp_path.glob("tokenizer-*/tokenizer.json")
    if damage == "checksum":
        (file.parent / "sha256").write_bytes(b"\xff" * 64)
    else:
        file.write_bytes(file.read_bytes()[:1000]) if damage == "truncate" else file.unlink()
    assert trained(tmp_path).backend_tokenizer.to_str() == expected


def _train_and_count(cache, counter):
    def texts_and_count():
        with counter.get_lock():
            counter.value += 1
        return TEXT

    load_tokenizer("train:400", texts_and_count, "made up", cache)


@pytest.mark.skipif(os.name != "posix", reason="forks processes")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_processes_train_once_between_them(tmp_path):
    context = multiprocessing.get_context("fork")
    counter = context.Value("i", 0)
    processes = [context.Process(target=_train_and_count, args=(tmp_path, counter)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert counter.value == 1
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".lock"}


def test_a_file_system_without_locks_needs_none(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert len(trained(tmp_path)) == 400
    (tmp_path / "rows.jsonl").write_text('{"text": "words"}\n')
    config = DataConfig(source="json", path=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="the file system of the cache folder .*cache/datasets.* has no file locks"):
        open_corpus(config)


def test_saved_folder_opens_with_auto_tokenizer(tmp_path):
    tokenizer = trained(tmp_path / "cache")
    tokenizer.save_pretrained(tmp_path / "saved")
    for opened in (AutoTokenizer.from_pretrained(tmp_path / "saved"), open_tokenizer(str(tmp_path / "saved"))):
        assert opened("some words")["input_ids"] == tokenizer("some words")["input_ids"]
        assert opened.eos_token == "<|endoftext|>"


@pytest.mark.parametrize("spec", ["train:", "train:many", "train:256", "train:-5", "train:1.5"])
def test_bad_sizes(spec):
    with pytest.raises(ValueError, match="must be 'train:SIZE' with a size of at least 257.*got 'train:"):
        trained_size(spec)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(ValueError, match="folder './nowhere' does not exist"):
        open_tokenizer("./nowhere")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        open_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ValueError, match="could not open the folder"):
        open_tokenizer(str(tmp_path))


def test_hub_name_without_network():
    with pytest.raises(ValueError, match="could not open the hub's 'gpt2'.*data.tokenizer=train:4096"):
        open_tokenizer("gpt2")


def test_tokenizer_without_end_of_text(tmp_path):
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=train_bpe(TEXT, 300)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no end-of-text token"):
        open_tokenizer(str(tmp_path))
