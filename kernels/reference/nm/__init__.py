"""N:M masks and products, in plain torch."""
