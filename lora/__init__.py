"""Low-rank adapters whose gradients are formed from their factors, and attention whose gradients are nearly linear."""

from leanstep.lora.apply import apply_lora, remove_lora, set_adapters
from leanstep.lora.config import LoraConfig
from leanstep.lora.memory import saved_bytes
from leanstep.lora.peft_bridge import Acceleration, accelerate_peft

__all__ = [
    "Acceleration",
    "LoraConfig",
    "accelerate_peft",
    "apply_lora",
    "remove_lora",
    "saved_bytes",
    "set_adapters",
]
