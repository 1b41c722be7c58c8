"""What a checkpoint keeps beside the weights: the position in a stream and the gate's decisions, valid or refused."""

import pytest
import texts
import torch
from fuzzing import VALUES, edits, fuzz, judged
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from leanstep.lora import LowRankGate
from leanstep.recipes.config.schema import DataConfig
from leanstep.recipes.data.sources import open_stream
from leanstep.recipes.data.streaming import StreamedSequences
from leanstep.recipes.data.tokens import load_tokenizer, vocabulary_size

TENSORS = st.sampled_from(((), (3,), (2, 4), (2, 4, 1))).map(torch.zeros)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """Make streams, each at its beginning."""
    root = tmp_path_factory.mktemp("stream")
    documents = texts.documents(12)
    folder = texts.write_c4(root / "en", documents, 2)
    rows = open_stream(DataConfig(source="local_c4", path=str(folder), streaming=True, cache_dir=str(root)))
    tokenizer = load_tokenizer("train:300", lambda: documents, "documents", root / "tokenizer")
    return lambda: StreamedSequences(rows, tokenizer, seq_len=16, block_documents=4, epochs=2)


@given(data=st.data())
@fuzz(50)
def test_positions_in_a_stream(stream, data):
    """Another position of the same stream is another place in it."""
    first = stream()
    items = iter(first)
    for _ in range(3):
        next(items)
    state, expected = first.state_dict(), next(items)["input_ids"].tolist()
    items.close()
    changed = data.draw(edits(state))

    def read():
        other = stream()
        other.load_state_dict(changed)
        if other._block["epoch"] > 1 or other._block["row"] > 1000:
            return []  # beyond the end
        return next((item["input_ids"].tolist() for item in other), [])

    def right(tokens):
        assert all(0 <= token < vocabulary_size(first.tokenizer) for token in tokens)
        return tokens == expected

    judged("positions in streams", read, right)


@pytest.fixture(scope="module")
def gated():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=8, n_layer=2, n_head=2, n_positions=32))


IDS = torch.arange(20).view(1, 20)


@given(data=st.data())
@fuzz(50)
def test_decisions_of_the_gate(gated, data):
    """Other decisions of the right types are other decisions; a refused state leaves the gate as it was."""
    with LowRankGate(gated, "force") as gate, torch.no_grad():
        gated(IDS)
        state, before = gate.state_dict(), repr(gate.state_dict())
        changed = data.draw(edits(state, VALUES | TENSORS))

        def right(_):
            assert gated(IDS).logits.isfinite().all()
            gate.report()
            return repr(changed) == before

        if not judged("decisions of the gate", lambda: gate.load_state_dict(changed), right):
            assert repr(gate.state_dict()) == before
