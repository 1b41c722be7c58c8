"""Unstructured sparse matrices as values and bit masks, and products with them."""
