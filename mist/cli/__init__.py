"""Command line: parse, call, print. Results on stdout, progress and errors on stderr.

What a command prints is kept until it has ended, and then written at once: a result is whole or
not there. Every end is an exit code of docs/cli.md and, where it is not 0, a line that says why.
"""

import io
import os
import sys
from contextlib import redirect_stdout, suppress
from typing import NoReturn

# Nothing else is imported here: Ctrl-C while the commands load must meet the handlers of main().

INTERRUPTED = 130  # exit code of typer, and of shells, after Ctrl-C
LOST_OUTPUT = 1
NO_MEMORY = 2
INTERNAL_ERROR = 70  # EX_SOFTWARE of sysexits.h
LONGEST_LINE = 2000  # of a message: names may have thousands of characters


def main() -> NoReturn:
    """Run the command line; every refusal is one message and an exit code, never a traceback."""
    answer = _Answer()
    try:
        with redirect_stdout(answer):
            code = _run()
    except KeyboardInterrupt:
        code = INTERRUPTED
        _say("interrupted. No file is half written.")
    raise SystemExit(_write(answer.getvalue(), code))


class _Answer(io.StringIO):
    """What is to be printed; looks to those who print like the standard output that it goes to."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(sys.__stdout__, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return sys.__stdout__ is not None and sys.__stdout__.isatty()


def _run() -> int:
    """Run the command; its exit code."""
    from mist.errors import MistError

    try:
        _refuse_lost_folder()
        from mist.cli.application import app

        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            raise KeyboardInterrupt from None
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except MistError as error:
        _say(str(error))
        return error.exit_code
    except MemoryError:
        _say("out of memory: this machine has too little for what was asked. Ask for less.")
        return NO_MEMORY
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # what a model's file defines may be no Exception
        _say(f"internal error: {type(error).__name__}: {error}. {_report()}")
        return INTERNAL_ERROR
    return 0


def _refuse_lost_folder() -> None:
    """Raise InputError where the current folder was removed: torch ends the process there."""
    from mist.errors import InputError

    try:
        os.getcwd()
    except OSError as error:
        raise InputError(
            f"the current folder cannot be used: {error.strerror}. Change to one that exists."
        ) from error


def _report() -> str:
    """Where the traceback of an error that nobody foresaw was written, and what to do with it."""
    import tempfile
    import traceback

    words = f"{sys.argv}\n{traceback.format_exc()}"
    with suppress(OSError):
        handle, name = tempfile.mkstemp(prefix="mist-error-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(words)
        return f"This is a fault of Mist: please report it, with {name}."
    return f"This is a fault of Mist: please report it.\n{words}"


def _write(text: str, code: int) -> int:
    """Write the result; the exit code, which is another one where that fails."""
    if not text:
        return code
    try:
        if sys.stdout is None:  # closed before Python started
            raise OSError("it is closed")
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A name may have characters that the terminal's encoding lacks.
            sys.stdout.reconfigure(errors="backslashreplace")
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _say(f"the standard output cannot be written: {error.strerror or error}.")
        # Python writes what is left once more at its end, and would complain of it.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return LOST_OUTPUT
    return code


def _say(message: str) -> None:
    """A message on stderr, its lines cut where they are absurd; where that is closed, nothing."""
    from mist.errors import printable

    with suppress(OSError):
        text = "\n".join(printable(_cut(line)) for line in message.split("\n"))
        print(f"mist: {text}", file=sys.stderr or io.StringIO(), flush=True)


def _cut(line: str) -> str:
    most = LONGEST_LINE
    return line if len(line) <= most else f"{line[:most]} ... ({len(line):,} characters)"
