"""Calibration text: the sequences that a seed draws, and the memory that drawing them takes."""

import random
import tracemalloc
import weakref

import pytest
import torch
from pruned_models import make_llama, save_model
from texts import sentences

from leanstep.pruning import CalibrationText
from leanstep.pruning.folder.files import open_checkpoint
from leanstep.pruning.folder.text import sequences_of, token_sequences
from leanstep.recipes.data.sources import Corpus
from leanstep.recipes.shrink import prune as command


def drawn_from_a_list(encode, texts, count, length, *, begin, end, seed):
    """The definition: all tokens in one list, cut into pieces, of which some are drawn."""
    tokens = []
    for text in texts:
        tokens += encode(text)
        if end is not None:
            tokens.append(end)
    width = length - len(begin)
    pieces = len(tokens) // width
    drawn = torch.randperm(pieces, generator=torch.Generator().manual_seed(seed))[:count]
    cut = torch.tensor(tokens[: pieces * width], dtype=torch.int64).view(pieces, width)[drawn]
    return torch.cat([torch.tensor(begin, dtype=torch.int64).expand(count, len(begin)), cut], dim=1)


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
@pytest.mark.parametrize("begin, end", [((), None), ((), 250_000), ((3,), 0), ((3, 4), 2**31 - 1)])
def test_a_seed_draws_the_same_sequences_as_from_a_list(begin, end, seed):
    numbers = random.Random(seed)
    texts = [[numbers.randrange(256_000) for _ in range(numbers.randrange(90))] for _ in range(40)]
    settings = {"begin": begin, "end": end, "seed": seed}
    for length in (5, 16, 33):
        got = token_sequences(lambda tokens: tokens, texts, 12, length, **settings)
        assert got.dtype == torch.int64
        assert torch.equal(got, drawn_from_a_list(lambda tokens: tokens, texts, 12, length, **settings))


def test_a_token_of_the_text_takes_four_bytes():
    documents, length = 200, 2_000

    def peak(count):
        tracemalloc.start()
        try:
            # numbers beyond those that Python stores once
            token_sequences(lambda index: list(range(1_000, 1_000 + length)), range(count), 8, 64, end=0, seed=0)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # a list takes 36 bytes a token; the array has room for a sixteenth more than it holds
    assert (peak(2 * documents) - peak(documents)) / (documents * length) < 5


def test_documents_are_read_one_at_a_time(monkeypatch, tmp_path):
    alive = weakref.WeakSet()

    class Text(str):
        """A string that counts while it is referenced."""

    def documents():
        for index in range(50):
            alive.add(text := Text(f"document {index}"))
            yield text

    save_model(make_llama(1), tmp_path / "model")
    monkeypatch.setattr("leanstep.recipes.data.sources.open_file", lambda *_: Corpus("text", "", documents))
    arguments = [str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--data", "text.txt", "--sparsity", "0.5"]
    text = command._text(command._parser().parse_args(arguments))
    most = 0
    for _ in text.documents:
        most = max(most, len(alive))
    assert 1 <= most <= 2
    assert sum(1 for _ in text.documents) == 50


@pytest.mark.parametrize("rows", ['{"text": 5}\n{"text": 6}\n', '{"text": "a"}\n{"text": ["b"]}\n'])
def test_errors_of_every_row_name_the_option(rows, tmp_path, capsys):
    save_model(make_llama(1), tmp_path / "model")
    (tmp_path / "text.jsonl").write_text(rows)
    arguments = [str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--sparsity", "0.5"]
    assert command.main([*arguments, "--data", str(tmp_path / "text.jsonl")]) == 2
    assert "error: --text-key 'text' must hold strings" in capsys.readouterr().err


def test_text_in_one_tuple_and_text_that_is_read_draw_the_same(tmp_path):
    save_model(make_llama(1), tmp_path / "model")
    texts, settings = (
        (sentences(60), sentences(60, 1)),
        {"samples": 6, "curve_samples": 3, "held_out": 2, "seq_len": 24},
    )

    class Read:
        def __iter__(self):
            return iter(texts)

    checkpoint = open_checkpoint(tmp_path / "model")
    whole, read = (sequences_of(checkpoint, CalibrationText(each, **settings)) for each in (texts, Read()))
    assert all(map(torch.equal, whole, read))


def test_an_iterator_of_documents_serves_every_pass_and_one_text_is_refused():
    text = CalibrationText(iter(["a", "b"]), held_out_documents=(one for one in ["c"]))
    assert (text.documents, text.held_out_documents) == (("a", "b"), ("c",))
    with pytest.raises(ValueError, match=r"^documents: expected a sequence of texts, got one text"):
        CalibrationText("a text")
