"""Calibrate: named constants of the profiles from measured runs, few and physical."""
