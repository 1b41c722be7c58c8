"""Read and write checkpoint folders."""
