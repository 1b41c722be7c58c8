"""Evaluate the loss of a language model on held-out sequences, in a run and in ``leanstep eval``.

Every target has the same weight, for any batch size and number of processes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate

from leanstep.recipes.data.sequences import IGNORED


@dataclass(frozen=True)
class EvalResult:
    """Result of an evaluation.

    Attributes:
        loss: mean negative log likelihood per target, in nats.
        perplexity: ``exp(loss)``.
        bits_per_byte: ``loss / ln 2 / bytes_per_token``, comparable across tokenizers; None without bytes_per_token.
        tokens: number of targets.
        stderr: standard error of ``loss`` over the sequences, as drawn at random, for this one model; None for one
            sequence.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    stderr: float | None = None


class Interrupted(Exception):
    """Ends an evaluation because of a signal."""

    def __init__(self, number: int) -> None:
        self.signal = number
        super().__init__(f"signal {number}")


def evaluate(
    model: torch.nn.Module,
    dataset: Any,
    *,
    micro_batch_size: int = 8,
    device: torch.device | str | None = None,
    bytes_per_token: float | None = None,
    batches: int | None = None,
    accelerator: Accelerator | None = None,
    before_round: Callable[[int, int], object] = lambda done, rounds: None,
) -> EvalResult:
    """Compute the mean loss of a causal model over the targets of a dataset.

    ``loss = sum_i -log p(x_i | x_<i) / #i`` over the labels other than -100, without the first of each sequence. Logits
    are converted to fp32 and summed in fp64. Draws no random numbers.

    Each round has one batch per process, so all processes make the same number of forward passes, as sharded models
    need. The last round is filled up with sequences without labels.

    Args:
        model: gives ``.logits`` ``[batch, seq_len, vocabulary]`` for ``input_ids``; training mode is restored.
        dataset: map-style; items with ``input_ids`` and ``labels``, both int64 ``[seq_len]``.
        micro_batch_size: sequences per forward pass; affects memory and speed only.
        device: None takes the device of the parameters.
        bytes_per_token: UTF-8 bytes of text per token, for bits per byte.
        batches: evaluate only the first ``batches`` rounds.
        accelerator: shares the batches among its processes; None is one process.
        before_round: is called with the rounds done and their number before each round in every process; it may raise
            :class:`Interrupted`.

    Raises:
        ValueError: nothing to evaluate, or a size below 1.
    """
    if micro_batch_size < 1 or (batches is not None and batches < 1):
        raise ValueError(f"micro_batch_size and batches must be at least 1, got {micro_batch_size} and {batches}")
    device = device or next(model.parameters()).device
    world, rank = (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
    whole = math.ceil(len(dataset) / (micro_batch_size * world))
    rounds = whole if batches is None else min(whole, batches)
    sums = torch.zeros(6, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for number in range(rounds):
            before_round(number, rounds)
            first = (number * world + rank) * micro_batch_size
            sums += _loss_sums(model, _batch(dataset, first, micro_batch_size, device))
    finally:
        model.train(was_training)
    if accelerator is not None and world > 1:
        sums = accelerator.reduce(sums.to(accelerator.device), reduction="sum").cpu()
    loss_sum, tokens, *moments = sums.tolist()
    if tokens == 0:
        raise ValueError(f"nothing to evaluate: the dataset of {len(dataset)} sequences has no token to predict")
    loss = loss_sum / tokens
    # bytes per token are those of all the text, and the first part of it may have others
    bits = None if not bytes_per_token or rounds < whole else loss / math.log(2) / bytes_per_token
    perplexity = math.exp(loss) if loss < 709 else math.inf
    return EvalResult(loss, perplexity, bits, int(tokens), _standard_error(loss, tokens, *moments))


def _standard_error(
    loss: float, tokens: float, losses_squared: float, products: float, tokens_squared: float, sequences: float
) -> float | None:
    """Standard error of the ratio ``sum L / sum n`` over sequences with the losses L and n targets."""
    if sequences < 2:
        return None
    residuals = losses_squared - 2 * loss * products + loss**2 * tokens_squared
    # rounding can make a sum of equal losses negative
    return math.sqrt(max(residuals, 0.0) * sequences / (sequences - 1)) / tokens


@torch.no_grad()
def _loss_sums(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sums over a batch's sequences with the losses L and n targets: L, n, L^2, L n, n^2, 1; fp64 on the CPU."""
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    labels = batch["labels"][:, 1:]
    # one sequence at a time: the fp32 logits of a whole batch would be the peak of memory
    losses = [
        cross_entropy(row[:-1].float(), target, ignore_index=IGNORED, reduction="sum")
        for row, target in zip(logits, labels, strict=True)
    ]
    # fp64: the sum must not depend on the distribution of batches over processes
    loss, tokens = torch.stack(losses).double().cpu(), (labels != IGNORED).sum(1).double().cpu()
    return torch.stack([loss, tokens, loss**2, loss * tokens, tokens**2, (tokens > 0).double()]).sum(1)


def _batch(dataset: Any, first: int, size: int, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Batch ``size`` sequences from ``first`` on. Those past the end repeat the last one, without labels."""
    last = len(dataset) - 1
    batch = default_collate([dataset[min(index, last)] for index in range(first, first + size)])
    batch["labels"][max(0, last + 1 - first) :] = IGNORED
    return {key: value.to(device) for key, value in batch.items()}
