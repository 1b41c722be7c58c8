"""Windows of gradients and inverse Fisher matrices, in C++."""
