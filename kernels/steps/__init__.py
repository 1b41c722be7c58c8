"""Updates of parameters, a list of tensors at a time."""
