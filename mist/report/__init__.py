"""Showing: tables, JSON objects and plots of plans, checks, traces and profiles."""
