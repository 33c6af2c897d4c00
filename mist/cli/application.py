"""The application with all of its commands: importing them adds each to it."""

from mist.cli import export_commands, plan_commands, report_commands, run_commands, show_commands
from mist.cli.common import app

__all__ = [
    "app",
    "export_commands",
    "plan_commands",
    "report_commands",
    "run_commands",
    "show_commands",
]
