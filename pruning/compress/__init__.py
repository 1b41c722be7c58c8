"""Levels of bits, and of zeros with bits, beside those of zeros alone."""
