"""Train with masks: prune while training, and recover a pruned model."""
