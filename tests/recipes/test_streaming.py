"""Streaming a local copy of C4: the same sequences after a restart anywhere, and every document on one process only."""

import copy
import gzip
import json
import re
from dataclasses import replace

import pytest
import texts
import torch
import training
from forked import finish_code
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader

from leanstep.recipes.config.schema import DataConfig
from leanstep.recipes.data import streaming
from leanstep.recipes.data.sequences import IGNORED, load_data
from leanstep.recipes.data.sources import StreamError, open_stream
from leanstep.recipes.data.streaming import StreamedSequences
from leanstep.recipes.data.tokens import load_tokenizer

DOCUMENTS = texts.documents(90)
SHARDS = 5


@pytest.fixture(scope="module")
def c4(tmp_path_factory):
    folder = texts.write_c4(tmp_path_factory.mktemp("c4") / "en", DOCUMENTS, SHARDS)
    texts.write_c4(folder, texts.documents(20, seed=7), 1, split="validation")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer("train:400", lambda: DOCUMENTS, "documents", tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def stream(c4, tokenizer, tmp_path):
    """Make streams over the local copy, of small blocks so that several come and go."""
    config = DataConfig(source="local_c4", path=str(c4), streaming=True, cache_dir=str(tmp_path))

    def make(**changes):
        settings = {"seq_len": 32, "seed": 1, "rank": 0, "world_size": 1, "block_documents": 8, "epochs": 1}
        return StreamedSequences(open_stream(config), **{"tokenizer": tokenizer, **settings, **changes})

    return make


def take(stream, count=None):
    """Sequences as lists of token ids, up to ``count``."""
    found = []
    for item in stream:
        found.append(item["input_ids"].tolist())
        if count is not None and len(found) == count:
            break
    return found


def numbers(tokenizer, rows):
    """The document numbers that appear in sequences."""
    return [int(n) for row in rows for n in re.findall(r"Document (\d+):", tokenizer.decode(row))]


def test_an_epoch_holds_every_document_once(stream, tokenizer):
    one = stream(packing=False, seq_len=256)
    assert sorted(numbers(tokenizer, take(one))) == list(range(90))


def test_packed_tokens_are_those_of_the_documents(stream, tokenizer):
    given = take(stream())
    total = sum(len(tokenizer(text)["input_ids"]) + 1 for text in DOCUMENTS)
    assert len(given) == total // 32
    assert all(len(row) == 32 for row in given)


@pytest.mark.parametrize("packing", [True, False])
def test_sequences_begin_as_the_tokenizer_begins_a_text(stream, tokenizer, packing):
    begins = copy.deepcopy(tokenizer)
    begins.add_special_tokens({"bos_token": "<s>"})
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begins.bos_token_id)]
    )
    whole, rows = stream(packing=packing), stream(packing=packing, seq_len=33, tokenizer=begins)
    for expected, row in zip(whole, rows, strict=True):
        assert row["input_ids"].tolist() == [begins.bos_token_id, *expected["input_ids"].tolist()]
        assert row["labels"].tolist() == [IGNORED, *expected["labels"].tolist()]


def test_order_depends_on_seed_and_epoch_only(stream, tokenizer):
    settings = {"packing": False, "seq_len": 256}
    first = take(stream(**settings))
    torch.manual_seed(123)
    assert take(stream(**settings)) == first
    assert take(stream(**settings, seed=2)) != first
    two = numbers(tokenizer, take(stream(**{**settings, "epochs": 2})))
    assert [two.count(number) for number in range(90)] == [2] * 90
    assert two[:90] != two[90:]


def test_shuffled_within_blocks_and_across_shards(stream, tokenizer):
    order = numbers(tokenizer, take(stream(packing=False, seq_len=256)))
    assert [number % SHARDS for number in order[::18]] != list(range(SHARDS))
    # a block of 8 documents holds the first 8 of the first shard, in another order
    first = order[0] % SHARDS
    assert sorted(order[:8]) == [first + SHARDS * n for n in range(8)]
    assert order[:8] != sorted(order[:8])


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 3), (2, 3), (1, 8), (2, 8)])
def test_resume_anywhere_is_bit_for_bit(stream, packing, rank, world_size):
    settings = {"packing": packing, "rank": rank, "world_size": world_size, "epochs": None}
    count = 60
    whole = take(stream(**settings), count)
    for stop in (0, 1, 7, 8, 9, 23, 41, 59):
        first = stream(**settings)
        before = take(first, stop) if stop else []
        state = json.loads(json.dumps(first.state_dict()))  # plain enough for any checkpoint format
        second = stream(**settings)
        second.load_state_dict(state)
        assert before + take(second, count - stop) == whole, f"stopped after {stop}"


def test_resume_twice_and_across_epochs(stream):
    settings = {"epochs": None, "block_documents": 13}
    whole = take(stream(**settings), 700)
    pieces, state = [], None
    for size in (150, 1, 300, 249):
        part = stream(**settings)
        if state is not None:
            part.load_state_dict(state)
        pieces += take(part, size)
        state = copy.deepcopy(part.state_dict())
    assert pieces == whole
    assert state["epoch"] >= 1


def test_a_block_of_long_documents_ends_after_a_number_of_characters(stream):
    settings = {"epochs": None, "block_characters": 3 * len(DOCUMENTS[0])}
    one = stream(**settings)
    _, after = one._prepare(one._texts(), one._block)
    assert 1 <= after["row"] < 8
    whole = take(stream(**settings), 200)
    for stop in (1, 17, 60, 199):
        first, second = stream(**settings), stream(**settings)
        before = take(first, stop)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert before + take(second, 200 - stop) == whole
    with pytest.raises(ValueError, match="block_characters was"):
        stream().load_state_dict(first.state_dict())


def test_one_long_document_does_not_fill_a_block_of_its_repetitions(tokenizer, tmp_path):
    (tmp_path / "book.txt").write_text("word " * 200)
    config = DataConfig(source="text", path=str(tmp_path / "book.txt"), streaming=True, cache_dir=str(tmp_path))
    rows = open_stream(config)
    one = StreamedSequences(rows, tokenizer, seq_len=32, text_key=config.text_key, block_characters=500)
    _, after = one._prepare(one._texts(), one._block)
    assert (after["epoch"], after["block"]) == (0, 1)


def test_state_survives_a_checkpoint_and_is_small(stream, tmp_path):
    one = stream()
    take(one, 30)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state == one.state_dict()
    assert len(json.dumps(state)) < 1000


def test_a_state_is_not_changed_by_going_on(stream):
    one = stream()
    take(one, 10)
    state = one.state_dict()
    copied = copy.deepcopy(state)
    take(one, 25)
    assert state == copied


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 6, 8])
def test_processes_share_documents_out(stream, tokenizer, world_size):
    seen = [
        numbers(tokenizer, take(stream(rank=rank, world_size=world_size, packing=False, seq_len=256)))
        for rank in range(world_size)
    ]
    assert all(seen)
    together = sorted(number for part in seen for number in part)
    assert together == list(range(90))
    assert stream(rank=0, world_size=world_size).by_shards == (world_size <= SHARDS)


def test_a_process_without_text_is_an_error(tokenizer, tmp_path):
    folder = texts.write_c4(tmp_path / "en", DOCUMENTS[:2], 2)
    config = DataConfig(source="local_c4", path=str(folder), streaming=True, cache_dir=str(tmp_path / "cache"))
    stream = StreamedSequences(open_stream(config), tokenizer, seq_len=32, rank=2, world_size=3)
    with pytest.raises(ValueError, match="no text for process 2 of 3 in 2 shards"):
        next(iter(stream))


def test_a_process_whose_shards_are_blank_reads_others_in_the_next_epoch(tokenizer, tmp_path):
    for number, text in enumerate((DOCUMENTS[0], " ")):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    config = DataConfig(source="json", path=str(tmp_path), streaming=True, cache_dir=str(tmp_path / "cache"))
    for rank in (0, 1):
        settings = {"seq_len": 32, "rank": rank, "world_size": 2, "block_documents": 2}
        one = StreamedSequences(open_stream(config), tokenizer, **settings)
        assert one.by_shards and len(take(one, 10)) == 10
    (tmp_path / "0.jsonl").write_text(json.dumps({"text": ""}) + "\n")
    with pytest.raises(ValueError, match="no text for process 0 of 2 in 2 shards"):
        next(iter(StreamedSequences(open_stream(config), tokenizer, seq_len=32, rank=0, world_size=2)))


def test_state_of_another_stream_is_refused(stream):
    state = stream(world_size=2).state_dict()
    with pytest.raises(ValueError, match="another stream .world_size was 2, is 1"):
        stream().load_state_dict(state)
    with pytest.raises(ValueError, match="seed was 5, is 1"):
        stream().load_state_dict(stream(seed=5).state_dict())
    with pytest.raises(ValueError, match="not the state of a stream: it has no seed"):
        stream().load_state_dict({"step": 3})


def test_through_a_data_loader(stream, monkeypatch):
    batches = list(DataLoader(stream(), batch_size=4, drop_last=True))
    rows = [row.tolist() for batch in batches for row in batch["input_ids"]]
    assert rows == take(stream())[: len(rows)]
    monkeypatch.setattr(streaming, "get_worker_info", lambda: "as in a worker process")
    with pytest.raises(RuntimeError, match="num_workers=0"):
        next(iter(stream()))


@pytest.mark.parametrize(("rank", "world_size"), [(1, 1), (-1, 2), (3, 2)])
def test_bad_ranks(stream, rank, world_size):
    with pytest.raises(ValueError, match=r"rank must be in \[0, world_size\)"):
        stream(rank=rank, world_size=world_size)


def test_load_data_streams_a_local_copy_as_published(c4, tmp_path):
    config = DataConfig(
        source="local_c4",
        path=str(c4),
        streaming=True,
        packing=False,
        seq_len=48,
        tokenizer="train:400",
        val_tokens=300,
        cache_dir=str(tmp_path),
    )
    data = load_data(config, seed=0, rank=1, world_size=2)
    assert data.stream
    assert (data.train.rank, data.train.world_size, data.train.seed) == (1, 2, 0)
    item = next(iter(data.train))
    assert item["input_ids"].shape == item["labels"].shape == (48,)
    shown = item["labels"][item["labels"] != IGNORED]
    assert shown[-1] == data.tokenizer.eos_token_id
    assert "streamed: 5 shards" in data.summary()
    assert "split by shards" in data.summary()
    assert data.tokenizer.decode(data.validation[0]["input_ids"][:4].tolist()).startswith("Doc")
    assert 1 < data.bytes_per_token < 8


def test_load_data_needs_validation_text_for_a_stream(tmp_path):
    folder = texts.write_c4(tmp_path / "en", DOCUMENTS, 2)
    settings = {"source": "local_c4", "path": str(folder), "streaming": True, "tokenizer": "train:300", "seq_len": 32}
    config = DataConfig(**settings, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="no validation text is held out from a stream.*data.val_path"):
        load_data(config, seed=0)
    without = DataConfig(**settings, cache_dir=str(tmp_path / "cache"), val_tokens=0)
    assert len(load_data(without, seed=0).validation) == 0


def test_sotu_cannot_be_streamed():
    with pytest.raises(ValueError, match="read whole and cannot be streamed"):
        load_data(DataConfig(streaming=True), seed=0)


@pytest.mark.parametrize("source", ["text", "json", "parquet"])
def test_other_file_formats_stream_too(tokenizer, tmp_path, source):
    from datasets import Dataset

    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(3):
        part = DOCUMENTS[number::3]
        if source == "text":
            for place, text in enumerate(part):
                # a byte-order mark is no text
                (folder / f"{number}-{place}.txt").write_text(text, encoding="utf-8-sig")
        elif source == "json":
            (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        else:
            Dataset.from_dict({"text": part}).to_parquet(folder / f"{number}.parquet")
    config = DataConfig(source=source, path=str(folder), streaming=True, cache_dir=str(tmp_path / "cache"))
    stream = StreamedSequences(
        open_stream(config), tokenizer, seq_len=256, packing=False, rank=0, world_size=1, epochs=1
    )
    rows = take(stream)
    assert sorted(numbers(tokenizer, rows)) == list(range(90))
    assert not any("\ufeff" in tokenizer.decode(row) for row in rows)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"content": "other"}\n', "Couldn't cast content: string"),
        ('{"text": "one"}\n{"text": "cut', "JSON parse error"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tokenizer, tmp_path, content, problem):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "word " * 40}) + "\n")
    (tmp_path / "b.jsonl").write_text(content)
    config = DataConfig(source="json", path=str(tmp_path), streaming=True, cache_dir=str(tmp_path / "cache"))
    stream = StreamedSequences(open_stream(config), tokenizer, seq_len=32, epochs=1)
    with pytest.raises(StreamError, match=f"shard 2 of 2, .* beyond 0 rows: {problem}"):
        take(stream)
    with pytest.raises(StreamError, match=f"the stream cannot be read beyond 1 rows: {problem}"):
        load_data(replace(config, tokenizer="train:300", val_tokens=0), seed=0)


def test_a_compressed_shard_that_was_cut_and_one_without_the_column_are_named(tokenizer, tmp_path):
    rows = "".join(json.dumps({"text": text, "url": "u"}) + "\n" for text in DOCUMENTS)
    whole = gzip.compress(rows.encode())
    for name, content in (("a", whole), ("b", whole[: len(whole) // 2])):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(content)
    config = DataConfig(source="json", path=str(tmp_path), streaming=True, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(StreamError, match="shard 2 of 2, .* cannot be read beyond"):
        take(StreamedSequences(open_stream(config), tokenizer, seq_len=32, epochs=1))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"url": "u"}\n{"url": "v"}\n'))
    with pytest.raises(StreamError, match="shard 2 of 2, .* has no text in column 'text' in 2 rows"):
        take(StreamedSequences(open_stream(config), tokenizer, seq_len=32, epochs=1))


def test_a_run_whose_stream_breaks_tells_the_shard_and_how_to_continue(tokenizer, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    (folder / "b.jsonl").write_text('{"content": "other"}\n')
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = [
        "steps=100",
        f"data={{source: json, path: {folder}, streaming: true, tokenizer: {tmp_path / 'tokenizer'}, seq_len: 32, "
        f"val_tokens: 0, cache_dir: {tmp_path / 'cache'}}}",
    ]
    run = training.run(training.write_recipe(tmp_path), options, tmp_path / "run", prepare=texts.small_blocks)
    assert run.codes == [1], run.text()
    assert "error: data: shard 2 of 2, in the order of their names, cannot be read beyond 0 rows" in run.text()
    assert "Once that is repaired, the same command continues the run" in run.text()
    assert "Traceback" not in run.text()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed:data"


@pytest.mark.slow
def test_another_process_gives_the_same_sequences(stream, c4, tmp_path):
    """No hash seed, thread or global random state of this process has a part in the order."""
    code = f"""
from leanstep.recipes.config.schema import DataConfig
from leanstep.recipes.data.sources import StreamError, open_stream
from leanstep.recipes.data.streaming import StreamedSequences
from leanstep.recipes.data.tokens import load_tokenizer
import sys; sys.path.insert(0, {str(texts.__file__.rsplit("/", 1)[0])!r}); import texts
tokenizer = load_tokenizer("train:400", lambda: texts.documents(90), "documents", {str(tmp_path)!r})
config = DataConfig(source="local_c4", path={str(c4)!r}, streaming=True, cache_dir={str(tmp_path)!r})
stream = StreamedSequences(open_stream(config), tokenizer, seq_len=32, seed=1, rank=0, world_size=1, block_documents=8)
it = iter(stream)
print([next(it)["input_ids"].tolist() for _ in range(40)])
"""
    assert json.loads(finish_code(code).stdout) == take(stream(), 40)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "packing"), [(1, "true"), (2, "false")])
def test_a_killed_run_continues_in_mid_stream(c4, tmp_path, world, packing):
    """Real training processes, killed by ``kill -9``: every later loss is that of the run that was never stopped."""
    recipe = training.write_recipe(tmp_path)
    options = [
        "steps=12",
        f"data={{source: local_c4, path: {c4}, streaming: true, packing: {packing}, tokenizer: 'train:300', "
        f"seq_len: 32, val_tokens: 300, cache_dir: {tmp_path / 'cache'}}}",
        f"batch.micro_batch_size={4 // world}",
    ]
    whole = training.run(recipe, options, tmp_path / "whole", world=world, prepare=texts.small_blocks)
    assert whole.codes == [0] * world, whole.text()
    assert "streamed: 5 shards" in whole.text()
    broken = training.Training(recipe, options, tmp_path / "broken", world=world, prepare=texts.small_blocks)
    broken.wait_for(lambda run: run.last_step() >= 7)
    broken.kill()
    assert broken.wait() == [-9] * world
    again = training.run(recipe, options, tmp_path / "broken", world=world, prepare=texts.small_blocks)
    assert again.codes == [0] * world, again.text()
    assert "resuming from" in again.text()
    assert training.numbers(tmp_path / "broken") == training.numbers(tmp_path / "whole")
    assert len(training.numbers(tmp_path / "whole")) >= 12
    if world == 2:
        (tmp_path / "broken" / "status.json").write_text('{"status": "running"}')
        alone = training.run(recipe, [*options, "checkpoint.every=0"], tmp_path / "broken")
        assert alone.codes == [2] and "continue it with --nproc 2" in alone.text()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("given", "3"),
        ("epoch", -1),
        ("row", 2**70),
        ("left_over", [10**6]),
        ("left_over", ["a"]),
        ("left_over", [0] * 32),
    ],
)
def test_a_damaged_position_is_refused(stream, key, value):
    state = {**stream().state_dict(), key: value}
    with pytest.raises(ValueError, match="the saved position is damaged"):
        stream().load_state_dict(state)
