"""The commands that shrink a checkpoint: prune and compress."""
