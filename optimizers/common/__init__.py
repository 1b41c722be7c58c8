"""What all optimizers share: the frame of a step, rounding, sharding."""
