"""Matrix iterations and products, in plain torch."""
