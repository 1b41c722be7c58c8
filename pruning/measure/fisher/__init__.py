"""Curves to second order, and their scaling to measurements."""
