"""Validation loss during a run: held-out sequences dealt out to the processes, and a way out when a signal comes."""

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import default_collate

from leanstep.recipes.batches import count_targets
from leanstep.recipes.data import IGNORED, LoadedData

__all__ = ["validate"]


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    data: LoadedData,
    *,
    micro_batch_size: int,
    batches: int | None,
    interrupted: Callable[[], bool],
) -> dict[str, Any] | None:
    """Mean loss per predicted token over the validation sequences, or over the first ``batches`` rounds of batches.

    Each round gives one batch to each process, so all make the same number of forward passes (sharded models need
    that); what is missing in the last round is filled with sequences that count nothing. No random numbers are drawn.

    Args:
        interrupted: Asked before each round; when it returns True in all processes, validation is given up.

    Returns:
        ``{"loss", "perplexity", "bits_per_byte", "tokens"}``, bits per byte None when unknown; None when given up.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    per_round = micro_batch_size * world
    rounds = math.ceil(len(data.validation) / per_round)
    rounds = rounds if batches is None else min(rounds, batches)
    # summed in fp64: the sum of many batches must not depend on how they were dealt out
    sums = torch.zeros(2, dtype=torch.float64)
    model.eval()
    try:
        for number in range(rounds):
            if interrupted():
                return None
            first = number * per_round + rank * micro_batch_size
            batch = _batch(data.validation, first, micro_batch_size, accelerator.device)
            tokens = count_targets([batch])
            loss = model(**batch, use_cache=False, num_items_in_batch=tokens.clamp(min=1)).loss
            sums += torch.stack([loss.double() * tokens, tokens.double()]).cpu()
    finally:
        model.train()
    if world > 1:
        sums = accelerator.reduce(sums.to(accelerator.device), reduction="sum").cpu()
    loss_sum, tokens_seen = sums.tolist()
    mean = loss_sum / tokens_seen
    per_byte = data.bytes_per_token
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "bits_per_byte": None if not per_byte else mean / math.log(2) / per_byte,
        "tokens": int(tokens_seen),
    }


def _batch(dataset: Any, first: int, size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """``size`` sequences from ``first`` on; those past the end repeat the last one with no label counted."""
    last = len(dataset) - 1
    items = [dataset[min(index, last)] for index in range(first, first + size)]
    batch = default_collate(items)
    for row, index in enumerate(range(first, first + size)):
        if index > last:
            batch["labels"][row] = IGNORED
    return {key: value.to(device) for key, value in batch.items()}
