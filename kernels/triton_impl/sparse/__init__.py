"""Unstructured sparse matrices and products with them, in Triton."""
