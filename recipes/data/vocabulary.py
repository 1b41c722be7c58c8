"""How many token ids a model needs for a tokenizer."""

from typing import Any

__all__ = ["vocabulary_size"]


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id that data can contain: an ordinary token, or end of text, padding or unknown.

    Other special tokens do not count, since encoding plain text never produces them. T5's tokenizer has 100 sentinels
    above its 32,000 tokens, and the published LLaMA runs on C4 give their models 32,000.
    """
    special = set(tokenizer.all_special_ids)
    used = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id} - {None}
    ordinary = (index for index in tokenizer.get_vocab().values() if index not in special)
    return 1 + max(max(ordinary, default=0), *used, 0)
