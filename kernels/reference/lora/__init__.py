"""Products of low-rank adapters, in plain torch."""
