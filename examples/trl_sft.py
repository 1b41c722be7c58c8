"""LANTON with noise from the halves of a step in TRL's SFTTrainer; the callback marks the halves."""

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from leanstep.optimizers import LANTON, param_groups
from leanstep.optimizers.trainer import MarkHalves

words = ["<pad>", "<eos>", *(f"w{i}" for i in range(62))]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
arguments = SFTConfig(
    "runs/sft", max_steps=10, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_grad_norm=0,
    logging_steps=1, save_strategy="no", report_to=[], bf16=False,
)  # fmt: skip
trainer = SFTTrainer(
    model,
    arguments,
    train_dataset=Dataset.from_dict({"text": [" ".join(words[2 + i % 8 :][:16]) for i in range(64)]}),
    processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
    optimizers=(LANTON(param_groups(model), lr=2e-2, noise="halves"), None),
    callbacks=[MarkHalves()],
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
