"""Products of low-rank adapters, in C++."""
