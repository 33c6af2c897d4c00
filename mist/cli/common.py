"""What commands share: the application, where output goes, which files may be written."""

import io
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

import typer

from mist.errors import OutputError

PLAN_SUFFIXES: Final = (".yaml", ".yml")

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
        print(message, file=sys.stderr or io.StringIO(), flush=True)


def print_json(data: object) -> None:
    """The result of a command with --json: JSON as its standard has it, without NaN.

    Raises OutputError for a number that JSON cannot say.
    """
    try:
        print(json.dumps(data, indent=2, allow_nan=False))
    except ValueError as error:
        raise OutputError("--json: the result has a number that is infinite or none.") from error


def check_out(out: Path | None) -> None:
    """Refuse before the work is done, not after it. None: a file in the current folder."""
    if out is None:
        if not os.access(".", os.W_OK):
            raise OutputError("cannot write into the current folder. Choose a file with --out.")
        return
    if out.suffix not in PLAN_SUFFIXES:
        raise OutputError(f"--out {out}: a plan file ends in .yaml.")
    if not out.parent.exists():
        raise OutputError(f"--out {out}: the folder {out.parent} does not exist. Create it first.")
    if not out.parent.is_dir():
        raise OutputError(f"--out {out}: {out.parent} is not a folder. Choose another file.")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise OutputError(f"--out {out}: cannot write there. Choose another file.")
