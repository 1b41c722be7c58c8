"""Adapted linear layers, embeddings and blocks, and their gradients."""
