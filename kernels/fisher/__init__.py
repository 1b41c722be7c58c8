"""Windows of gradients and inverse Fisher matrices."""
