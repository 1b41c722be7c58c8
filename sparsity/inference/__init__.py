"""Sparse checkpoints: weight files without zeros, and models that compute from them."""

from leanstep.sparsity.inference.dense import FewTokenLinear, to_few_token_linear
from leanstep.sparsity.inference.export import Export, export_folder
from leanstep.sparsity.inference.linear import SparseLinear
from leanstep.sparsity.inference.load import load_sparse

__all__ = ["Export", "FewTokenLinear", "SparseLinear", "export_folder", "load_sparse", "to_few_token_linear"]
