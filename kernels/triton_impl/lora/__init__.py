"""Products of low-rank adapters, in Triton."""
