"""Choose which weights of a matrix are pruned."""
