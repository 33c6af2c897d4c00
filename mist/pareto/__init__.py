"""Intra-stage tuning: candidates as columns, what fits of them, and their exact frontiers."""
