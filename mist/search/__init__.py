"""The search: frontiers of stages, their joining, and the refinement of offloads."""
