"""Products of low-rank adapters."""
