"""What operations compute and move."""
