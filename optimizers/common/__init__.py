"""Shared by all optimizers: the base class, checks of settings, rounding, sharding, loading."""
