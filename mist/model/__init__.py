"""A traced model as facts, without torch."""
