"""TRL's DPOTrainer on a model with leanstep's adapters; the reference is the same model before its first step."""

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from leanstep import SinkGD
from leanstep.lora import LoraConfig, apply_lora, lora_groups

words = ["<pad>", "<eos>", *(f"w{i}" for i in range(62))]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
apply_lora(model, LoraConfig(r=4, target_modules="all-linear"))
arguments = DPOConfig(
    "runs/dpo", max_steps=20, beta=0.5, per_device_train_batch_size=8, precompute_ref_log_probs=True, max_grad_norm=0,
    logging_steps=1, save_strategy="no", report_to=[], bf16=False,
)  # fmt: skip
texts = [(f"w{i % 8}", f"w{8 + i % 8} w16 w17", f"w{32 + i % 8} w40 w41") for i in range(64)]
trainer = DPOTrainer(
    model,
    args=arguments,
    train_dataset=Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in texts]),
    processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
    optimizers=(SinkGD(lora_groups(model, lr=2e-1)), None),
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
