"""Parts of ``sparsity/generation``: the engines it measures, and the tables of its results."""
