"""Matrix iterations and products, in Triton."""
