"""Sparse checkpoints: weight files without zeros, and models that compute from them."""

from leanstep.sparsity.inference.export import Export, export_folder

__all__ = ["Export", "export_folder"]
