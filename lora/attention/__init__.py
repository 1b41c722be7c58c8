"""Low-rank attention, the gate that decides where it runs, and the norms behind that decision."""

from leanstep.lora.attention.attention import LowRankAttentionError, low_rank_attention

__all__ = ["LowRankAttentionError", "low_rank_attention"]
