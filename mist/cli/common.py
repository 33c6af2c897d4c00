"""What commands share: the application, and where output goes."""

import io
import json
import sys
from contextlib import suppress

import typer

from mist.errors import OutputError, printable

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
    """One line on stderr, if it is open; a run does not end because nobody listens."""
    with suppress(OSError):
        print(printable(message), file=sys.stderr or io.StringIO(), flush=True)


def print_json(data: object) -> None:
    """The result of a command with --json: JSON as its standard has it, without NaN.

    Raises OutputError for a number that JSON cannot say.
    """
    try:
        print(json.dumps(data, indent=2, allow_nan=False))
    except ValueError as error:
        raise OutputError("--json: the result has a number that is infinite or none.") from error
