"""N:M masks and products."""
