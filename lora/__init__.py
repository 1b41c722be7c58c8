"""Low-rank adapters whose gradients are formed from their factors, and attention whose gradients are nearly linear."""

from leanstep.lora.apply import apply_lora, remove_lora, set_adapters
from leanstep.lora.attention import LowRankAttentionError, low_rank_attention
from leanstep.lora.config import LoraConfig
from leanstep.lora.error_bounds import ErrorBounds, error_bounds
from leanstep.lora.gate import GateReport, LowRankGate
from leanstep.lora.memory import saved_bytes
from leanstep.lora.norms import HeadReport, NormMonitor
from leanstep.lora.peft_bridge import Acceleration, accelerate_peft

__all__ = [
    "Acceleration",
    "ErrorBounds",
    "GateReport",
    "HeadReport",
    "LoraConfig",
    "LowRankAttentionError",
    "LowRankGate",
    "NormMonitor",
    "accelerate_peft",
    "apply_lora",
    "error_bounds",
    "low_rank_attention",
    "remove_lora",
    "saved_bytes",
    "set_adapters",
]
