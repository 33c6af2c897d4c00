"""Showing: tables, JSON objects and plots of plans, checks, traces and profiles."""

from mist.report.costs import (
    print_profiles,
    print_trace,
    profiles_json,
    trace_json,
)
from mist.report.plans import check_json, plan_json, print_check, print_plan
from mist.report.plot import save_plot

__all__ = [
    "check_json",
    "plan_json",
    "print_check",
    "print_plan",
    "print_profiles",
    "print_trace",
    "profiles_json",
    "save_plot",
    "trace_json",
]
