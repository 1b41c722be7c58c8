"""Evaluate the loss of a language model over held-out sequences, in a run and in ``leanstep eval``.

Every target weighs the same, whatever the batches and however they are dealt out to processes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate

from leanstep.recipes.data.sequences import IGNORED, LoadedData


@dataclass(frozen=True)
class EvalResult:
    """Result of an evaluation.

    Attributes:
        loss: mean negative log likelihood per target, in nats.
        perplexity: ``exp(loss)``.
        bits_per_byte: ``loss / ln 2 / bytes_per_token``, which compares models with different tokenizers; None when the
            number of bytes is not known.
        tokens: how many targets there were: tokens that were predicted.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int

    @classmethod
    def of(cls, loss_sum: float, tokens: int, bytes_per_token: float | None) -> "EvalResult":
        """From the sum of the losses of ``tokens`` targets."""
        loss = loss_sum / tokens
        bits = None if not bytes_per_token else loss / math.log(2) / bytes_per_token
        return cls(loss, math.exp(loss) if loss < 709 else math.inf, bits, tokens)


def evaluate(
    model: torch.nn.Module,
    dataset: Any,
    *,
    micro_batch_size: int = 8,
    device: torch.device | str | None = None,
    bytes_per_token: float | None = None,
    batches: int | None = None,
) -> EvalResult:
    """Compute the mean loss of a causal model over all labels of a dataset other than -100.

    ``loss = sum_i -log p(x_i | x_<i) / #i`` over the labels other than -100, the first of each sequence left out, since
    nothing comes before it. Logits are taken to fp32, sums are kept in fp64.

    Args:
        model: gives ``.logits`` ``[batch, seq_len, vocabulary]`` for ``input_ids``; its mode is put back afterwards.
        dataset: map-style; items with ``input_ids`` and ``labels``, both int64 ``[seq_len]``.
        micro_batch_size: sequences in a forward pass; decides memory and speed only.
        device: where to run; None is where the model's parameters are.
        bytes_per_token: UTF-8 bytes of text per token, for bits per byte.
        batches: evaluate so many batches only, from the first on.

    Raises:
        ValueError: nothing to evaluate, or a size below 1.
    """
    if micro_batch_size < 1 or (batches is not None and batches < 1):
        raise ValueError(f"micro_batch_size and batches must be at least 1, got {micro_batch_size} and {batches}")
    device = device or next(model.parameters()).device
    count = len(dataset) if batches is None else min(len(dataset), batches * micro_batch_size)
    sums = torch.zeros(2, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for first in range(0, count, micro_batch_size):
            batch = _batch(dataset, first, min(micro_batch_size, count - first), device)
            sums += _loss_sum(model, batch)
    finally:
        model.train(was_training)
    loss_sum, tokens = sums.tolist()
    if tokens == 0:
        raise ValueError(f"nothing to evaluate: the dataset of {len(dataset)} sequences has no token to predict")
    return EvalResult.of(loss_sum, int(tokens), bytes_per_token)


def validate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    data: LoadedData,
    *,
    micro_batch_size: int,
    batches: int | None,
    interrupted: Callable[[], bool],
) -> EvalResult | None:
    """:func:`evaluate` during a run: over the validation sequences, or over the first ``batches`` rounds of batches.

    Each round gives one batch to each process, so all make the same number of forward passes (sharded models need
    that); what is missing in the last round is filled with sequences that count nothing. No random numbers are drawn.

    Args:
        interrupted: Asked before each round; when it returns True in all processes, validation is given up.

    Returns None when it was given up.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    per_round = micro_batch_size * world
    rounds = math.ceil(len(data.validation) / per_round)
    rounds = rounds if batches is None else min(rounds, batches)
    sums = torch.zeros(2, dtype=torch.float64)
    model.eval()
    try:
        for number in range(rounds):
            if interrupted():
                return None
            first = number * per_round + rank * micro_batch_size
            sums += _loss_sum(model, _batch(data.validation, first, micro_batch_size, accelerator.device))
    finally:
        model.train()
    if world > 1:
        sums = accelerator.reduce(sums.to(accelerator.device), reduction="sum").cpu()
    loss_sum, tokens = sums.tolist()
    return EvalResult.of(loss_sum, int(tokens), data.bytes_per_token)


@torch.no_grad()
def _loss_sum(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(sum of the losses, number of targets) of a batch, fp64 on the CPU."""
    # use_cache: a cache of keys and values would be made for nothing
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    labels = batch["labels"][:, 1:]
    # one sequence at a time: the logits of a whole batch in fp32 would be the peak of memory
    losses = [
        cross_entropy(row[:-1].float(), target, ignore_index=IGNORED, reduction="sum")
        for row, target in zip(logits, labels, strict=True)
    ]
    # summed in fp64: the sum of many batches must not depend on how they were dealt out
    return torch.stack([torch.stack(losses).double().sum().cpu(), (labels != IGNORED).sum().double().cpu()])


def _batch(dataset: Any, first: int, size: int, device: torch.device | str) -> dict[str, torch.Tensor]:
    """``size`` sequences from ``first`` on; those past the end repeat the last one with no label counted."""
    last = len(dataset) - 1
    items = [dataset[min(index, last)] for index in range(first, first + size)]
    batch = default_collate(items)
    for row, index in enumerate(range(first, first + size)):
        if index > last:
            batch["labels"][row] = IGNORED
    return {key: value.to(device) for key, value in batch.items()}
