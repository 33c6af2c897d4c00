"""Training: ranks, steps, logs, checkpoints."""
