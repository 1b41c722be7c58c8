"""LANTON with noise from the halves of a step in Lightning, with a scheduler; the callback marks the halves."""

import lightning
import torch

from leanstep.optimizers import create
from leanstep.optimizers.lightning import MarkHalves


class Regression(lightning.LightningModule):
    """A small network on random data."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
        self.losses: list[float] = []

    def training_step(self, batch, index):
        inputs, targets = batch
        loss = torch.nn.functional.mse_loss(self.net(inputs), targets)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = create(self, "lanton", lr=1e-2, noise="halves")
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)]


inputs = torch.randn(256, 16)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, inputs[:, :4].tanh()), batch_size=16)
trainer = lightning.Trainer(
    max_epochs=8, accumulate_grad_batches=4, callbacks=[MarkHalves()], accelerator="cpu", logger=False,
    enable_checkpointing=False, enable_progress_bar=False,
)  # fmt: skip
module = Regression()
trainer.fit(module, data)
losses = module.losses
