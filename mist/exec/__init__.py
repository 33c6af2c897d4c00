"""Trains what a plan says, on torch's own parallelism."""
