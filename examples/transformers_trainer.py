"""SinkGD in transformers' Trainer, which makes the optimizer itself: this form works on one device, DDP and FSDP2."""

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from leanstep.optimizers import create

sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
sequences = [[(i + j) % 64 for j in range(16)] for i in range(64)]
arguments = TrainingArguments(
    "runs/trainer", max_steps=20, per_device_train_batch_size=8, logging_steps=1, save_strategy="no", report_to=[]
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=[{"input_ids": ids, "labels": ids} for ids in sequences],
    optimizer_cls_and_kwargs=(lambda: create, {"name": "sinkgd", "lr": 2e-2}),
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
