"""Polynomial attention."""
