"""N:M masks and products, in C++."""
