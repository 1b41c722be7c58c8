"""Polynomial attention, in Triton."""
