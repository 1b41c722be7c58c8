"""Sweeps: a grid of runs of one recipe, their ledger, and their results."""
