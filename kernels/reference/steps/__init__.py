"""Updates of parameters, a list of tensors at a time, in plain torch."""
