"""Training: steps, optimiser, checkpoints, metrics."""
