"""Showing: tables, JSON objects, pictures and pages of plans, checks, traces and profiles.

In a notebook `mist.report.show(plan)` draws a plan.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mist.report.notebook import show

__all__ = ["show"]


def __getattr__(name: str) -> object:
    """`show`, imported when it is first used: commands that draw nothing answer at once."""
    if name != "show":
        raise AttributeError(f"module 'mist.report' has no attribute {name!r}")
    from mist.report.notebook import show

    return show
