"""Matrix iterations and products."""
