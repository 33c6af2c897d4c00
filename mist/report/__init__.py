"""Showing: tables, JSON objects and plots of plans, checks, traces and profiles."""

from mist.report.costs import (
    outside_trace,
    print_profiles,
    print_trace,
    profiles_json,
    trace_json,
)
from mist.report.plans import check_json, plan_json, print_check, print_plan
from mist.report.plot import plot_png

__all__ = [
    "check_json",
    "outside_trace",
    "plan_json",
    "plot_png",
    "print_check",
    "print_plan",
    "print_profiles",
    "print_trace",
    "profiles_json",
    "trace_json",
]
