"""Low-rank adapters whose gradients are formed from their factors, and attention whose gradients are nearly linear."""

from leanstep.lora.adapters import load_adapter, save_adapter
from leanstep.lora.apply import apply_lora, remove_lora, set_adapters
from leanstep.lora.attention import LowRankAttentionError, low_rank_attention
from leanstep.lora.config import LoraConfig
from leanstep.lora.error_bounds import ErrorBounds, error_bounds
from leanstep.lora.gate import LowRankGate
from leanstep.lora.gate_state import GateReport
from leanstep.lora.memory import saved_bytes
from leanstep.lora.merge import MergeReport, merge, unmerge
from leanstep.lora.norms import HeadReport, NormMonitor
from leanstep.lora.peft_bridge import Acceleration, accelerate_peft
from leanstep.lora.pruned import keep_zeros
from leanstep.lora.routing import lora_groups

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
