"""Polynomial attention, in C++."""
