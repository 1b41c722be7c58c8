"""Measure how pruning each matrix changes the model's output."""
