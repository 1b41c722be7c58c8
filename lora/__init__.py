"""Low-rank adapters whose gradients are formed from their factors, and attention whose gradients are nearly linear."""

from leanstep.lora.apply import apply_lora, remove_lora, set_adapters
from leanstep.lora.attention.attention import LowRankAttentionError, low_rank_attention
from leanstep.lora.attention.clip import QKClip
from leanstep.lora.attention.error_bounds import ErrorBounds, error_bounds
from leanstep.lora.attention.gate import LowRankGate
from leanstep.lora.attention.gate_state import GateReport
from leanstep.lora.attention.monitor import HeadReport, NormMonitor
from leanstep.lora.config import LoraConfig
from leanstep.lora.layers.pruned import keep_zeros
from leanstep.lora.memory import saved_bytes
from leanstep.lora.merge import MergeReport, merge, unmerge
from leanstep.lora.param_groups import lora_groups
from leanstep.lora.peft.bridge import Acceleration, accelerate_peft
from leanstep.lora.peft.files import load_adapter, save_adapter

__all__ = [
    "Acceleration",
    "ErrorBounds",
    "GateReport",
    "HeadReport",
    "LoraConfig",
    "LowRankAttentionError",
    "LowRankGate",
    "MergeReport",
    "NormMonitor",
    "QKClip",
    "accelerate_peft",
    "apply_lora",
    "error_bounds",
    "keep_zeros",
    "load_adapter",
    "lora_groups",
    "low_rank_attention",
    "merge",
    "remove_lora",
    "save_adapter",
    "saved_bytes",
    "set_adapters",
    "unmerge",
]
