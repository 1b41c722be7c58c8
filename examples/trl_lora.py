"""TRL's SFTTrainer on a model with leanstep's adapters: the loss falls, and PEFT opens what is saved."""

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from leanstep import SinkGD
from leanstep.lora import LoraConfig, apply_lora, lora_groups, merge, remove_lora, save_adapter

words = ["<pad>", "<eos>", *(f"w{i}" for i in range(62))]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
model.save_pretrained("runs/base")
apply_lora(model, LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"]))
arguments = SFTConfig(  # max_grad_norm=0: SinkGD's matrices do not depend on the norm
    "runs/sft-lora", max_steps=20, per_device_train_batch_size=8, max_grad_norm=0,
    logging_steps=1, save_strategy="no", report_to=[], bf16=False,
)  # fmt: skip
trainer = SFTTrainer(
    model,
    arguments,
    train_dataset=Dataset.from_dict({"text": [" ".join(words[2 + i % 8 :][:16]) for i in range(64)]}),
    processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
    optimizers=(SinkGD(lora_groups(model, lr=1e-1, lr_ratio=2, rest={"algorithm": "adamw", "lr": 1e-2})), None),
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
save_adapter(model, "runs/sft-lora/adapter")  # opens in PEFT
merge(model)
remove_lora(model).save_pretrained("runs/sft-lora/merged")  # opens in transformers
