"""Checks of compiled kernels: offsets in 64 bits, and freedom from races."""
