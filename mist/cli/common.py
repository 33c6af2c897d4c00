"""What commands share: the application, and where output goes."""

import json
import sys

import typer

from mist.errors import printable

app = typer.Typer(
    name="mist",
    help="Plan how to train a PyTorch model on a cluster: "
    "parallelism, memory and schedule together.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def progress(message: str) -> None:
    """One line on stderr."""
    print(printable(message), file=sys.stderr, flush=True)


def print_json(data: object) -> None:
    """The result of a command with --json."""
    print(json.dumps(data, indent=2))
