"""Command line: parse, call, print. Results on stdout, progress and errors on stderr."""

import sys
from typing import NoReturn

from mist.cli import plan_commands as planning
from mist.cli import run_commands as running
from mist.cli import show_commands as showing
from mist.cli.common import app
from mist.errors import MistError, printable

__all__ = ["app", "main", "planning", "running", "showing"]

INTERRUPTED = 130  # exit code of typer, and of shells, after Ctrl-C


def main() -> NoReturn:
    """Run the command line; every refusal is one message and an exit code, never a traceback."""
    try:
        app()
    except MistError as error:
        lines = map(printable, str(error).split("\n"))
        print("mist: " + "\n".join(lines), file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("mist: interrupted. No file is half written.", file=sys.stderr)
        raise
    raise SystemExit(0)
