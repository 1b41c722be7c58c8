"""Matrix iterations and products, in C++."""
