"""N:M masks and products, in Triton."""
