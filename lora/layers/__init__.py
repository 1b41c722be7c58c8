"""Adapted layers: linear layers, embeddings, blocks of them, and their gradients."""
