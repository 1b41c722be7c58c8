"""Small models and training loops for the tests of N:M sparsity."""

import torch
from torch import nn

# layer name -> pattern of make_mlp
MLP = {"0": "2:4", "2": "1:4", "4": "2:4"}


def make_mlp(seed: int = 0) -> nn.Sequential:
    """8 -> 16 -> 16 -> 4, always the same weights for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def batch(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """32 inputs and targets that a linear map made."""
    source = torch.Generator().manual_seed(seed)
    inputs = torch.randn(32, 8, generator=source)
    return inputs, inputs @ torch.randn(8, 4, generator=source) / 3


def train(model, controller, *, steps, optimizer=None, micro_batches=1) -> float:
    """Take steps on one batch, attached if the controller is not yet; returns the last loss."""
    if optimizer is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    attach = controller is not None and not controller._hooks
    if attach:
        controller.attach(optimizer)
    inputs, targets = batch()
    for _ in range(steps):
        loss = 0.0
        for part in range(micro_batches):
            share = (model(inputs[part::micro_batches]) - targets[part::micro_batches]).square().mean() / micro_batches
            share.backward()
            loss += float(share.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    if attach:
        controller.detach()
    return loss
