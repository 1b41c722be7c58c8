"""Train a recipe."""
