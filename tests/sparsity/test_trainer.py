"""transformers' Trainer with the callback: masks follow its steps, and a resumed training is the same training."""

import pytest
import torch
from sparse_models import batch, make_mlp
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from leanstep.sparsity import is_nm, sparsify, squash
from leanstep.sparsity.trainer import SparsityCallback


class Rows(Dataset):
    def __init__(self) -> None:
        self.inputs, self.targets = batch()

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index):
        return {"inputs": self.inputs[index], "labels": self.targets[index]}


class Regressor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_mlp()

    def forward(self, inputs, labels):
        output = self.net(inputs)
        return {"loss": (output - labels).square().mean(), "logits": output}


def trainer(folder, steps, **options):
    model = Regressor()
    controller = sparsify(
        model, {"net.0": "2:4", "net.2": "1:4"}, schedule=8, method="mdgf-exponential", srste_lambda=1e-3,
        measure_every=2,
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-2, save_steps=4, logging_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
        lr_scheduler_type="constant", dataloader_pin_memory=False, seed=0, **options,
    )  # fmt: skip
    made = Trainer(model, arguments, train_dataset=Rows(), callbacks=[SparsityCallback(controller)])
    return made, controller


def test_the_callback_counts_optimizer_steps_and_logs(tmp_path):
    run, controller = trainer(tmp_path, 8)
    run.train()
    assert controller.step_count == 8 and controller.finished
    weight = run.model.net[2].weight
    assert is_nm(weight, "1:4")
    logged = [row for row in run.state.log_history if "loss" in row]
    assert logged[-1]["sparse/sparsity/all"] == pytest.approx((128 * 0.5 + 256 * 0.75) / 384)
    assert logged[0]["sparse/alpha/2:4"] > logged[-1]["sparse/alpha/2:4"] and "sparse/flip_rate/net.0" in logged[0]
    squash(run.model)


@pytest.mark.slow
def test_a_resumed_training_is_the_same(tmp_path):
    straight, controller = trainer(tmp_path / "straight", 8)
    straight.train()
    broken, _ = trainer(tmp_path / "broken", 4)
    broken.train()
    again, resumed = trainer(tmp_path / "broken", 8)
    again.train(resume_from_checkpoint=True)
    assert resumed.step_count == 8
    for left, right in zip(controller.layers, resumed.layers, strict=True):
        assert torch.equal(left.transform.mask, right.transform.mask)
        assert torch.equal(left.weight, right.weight)


def test_masks_of_another_step_are_refused(tmp_path):
    run, controller = trainer(tmp_path, 4)
    for layer in controller.layers:
        layer.transform.steps = 3
    with pytest.raises(ValueError, match="begins at step 0, the masks are those of step 3"):
        run.train()
