"""Read and write folders of models that somebody else wrote, and tensors in files."""
