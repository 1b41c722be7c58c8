"""What pruning each matrix does to the model's output: curves, metrics, and the passes that measure them."""
