"""Seeds of dropout masks, from torch's own generator."""

import torch
from torch import Tensor


def new_seed() -> Tensor:
    """A seed, int64 and 0-d, on the CPU.

    It is drawn from the CPU's global generator: ``torch.manual_seed`` makes a run repeatable, and activation
    checkpointing, which restores that generator, draws the same seed again. No device is waited for.
    """
    return torch.randint(0, 2**62, (), dtype=torch.int64, device="cpu")
