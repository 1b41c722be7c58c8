"""Levels of bits in place of counts of weights, and GGUF files of them."""
