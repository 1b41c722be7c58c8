"""Adapted layers and their gradients."""
