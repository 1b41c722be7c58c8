"""On a language model that has learned something, dynamic programming beats uniform sparsity on text neither saw."""

import math
from pydoc_data.topics import topics

import pytest
import torch
from pruned_models import make_llama

from leanstep.pruning import measure_curves, prune

LENGTH, SYMBOLS = 64, 128


@pytest.fixture(scope="module")
def trained():
    """A small LLaMA over the characters of Python's manual, and sequences of it to calibrate with and held out."""
    text = "\n".join(topics[name] for name in sorted(topics))
    codes = torch.tensor([min(ord(letter), SYMBOLS - 1) for letter in text])
    rows = codes[: len(codes) // LENGTH * LENGTH].view(-1, LENGTH)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    training, held_out = rows[order[:-64]], rows[order[-64:]]
    model = make_llama(
        3, vocab_size=SYMBOLS, hidden_size=64, intermediate_size=160, max_position_embeddings=LENGTH
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        batch = training[torch.randint(len(training), (16,), generator=generator)]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), training, held_out


@torch.no_grad()
def perplexity(model, rows):
    return math.exp(float(model(rows, labels=rows).loss))


@pytest.mark.slow
def test_the_allocation_beats_uniform_in_at_least_four_of_five_seeds(trained):
    model, training, held_out = trained
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert perplexity(model, held_out) < 12  # of 128 symbols
    better = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(10 + seed)
        data = training[torch.randint(len(training), (16,), generator=generator)]
        curves = measure_curves(model, data[:8], score="wanda", score_data=data, levels=(0.3, 0.5, 0.7, 0.85))
        found = {}
        for allocation in ("uniform", "dp"):
            given = curves if allocation == "dp" else None
            prune(model, data, sparsity=0.65, allocation=allocation, curves=given, held_out=False)
            found[allocation] = perplexity(model, held_out)
            model.load_state_dict(dense)
        better.append(found["uniform"] - found["dp"])
    assert sum(difference > 0 for difference in better) >= 4, better
