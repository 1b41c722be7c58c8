"""transformers' Trainer with the callback: masks follow its steps, and a resumed training is the same training."""

import pytest
import torch
from sparse_models import batch, make_mlp
from torch import nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

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


def test_steps_that_a_gradient_scaler_skips_count(tmp_path):
    run, controller = trainer(tmp_path, 8, max_grad_norm=0.0, optim="adamw_torch")
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    stepped = []
    run.create_optimizer().register_step_post_hook(lambda *_: stepped.append(run.state.global_step))
    # the gradients of fp16 overflow at the first scales
    run.model.net[4].bias.register_hook(lambda grad: grad * float("inf") if run.state.global_step < 3 else grad)
    run.train()
    assert stepped == [3, 4, 5, 6, 7]
    assert controller.step_count == 8 and controller.finished
    squash(run.model)


class Sequences(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index):
        ids = (torch.arange(12) + index) % 32
        return {"input_ids": ids, "labels": ids}


def tied_trainer(folder, steps):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=True, **sizes))
    controller = sparsify(model, {"lm_head": "2:4", "*.mlp.*": "2:4"}, schedule=4, method="mdgf-linear")
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=2, report_to=[],
        use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant", dataloader_pin_memory=False, seed=0,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Sequences(), callbacks=[SparsityCallback(controller)])


def test_checkpoints_hold_a_sparse_weight_that_is_tied(tmp_path):
    straight = tied_trainer(tmp_path / "straight", 4)
    straight.train()
    tied_trainer(tmp_path / "broken", 2).train()
    resumed = tied_trainer(tmp_path / "broken", 4)
    resumed.train(resume_from_checkpoint=True)
    states = [run.model.state_dict() for run in (straight, resumed)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    model = squash(resumed.model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and is_nm(model.lm_head.weight, "2:4")
    model.save_pretrained(tmp_path / "plain")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_masks_of_another_step_are_refused(tmp_path):
    run, controller = trainer(tmp_path, 4)
    for layer in controller.layers:
        layer.transform.steps = 3
    with pytest.raises(ValueError, match="begins at step 0, the masks are those of step 3"):
        run.train()
