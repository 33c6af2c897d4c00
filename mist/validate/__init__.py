"""Validate: predictions against published measured runs, row by row, and how good they are."""
