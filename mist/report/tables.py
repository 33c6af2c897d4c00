"""Plain tables on stdout, wide enough for their content whether or not a terminal is there."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from mist.errors import printable

_NARROWEST = 120


def say(text: str = "") -> None:
    """A line of plain text, never wrapped or marked up."""
    _console().print(printable(text), markup=False, highlight=False, soft_wrap=True)


def say_note(text: str) -> None:
    """A remark about the input, as a sentence."""
    say(f"Note: {text.removesuffix('.')}.")


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table; columns after the first are right-aligned, the last is left for words."""
    table = Table(
        title=printable(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    for index, name in enumerate(header):
        words = index in (0, len(header) - 1)
        table.add_column(name, justify="left" if words else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    _console().print(table, markup=False, highlight=False)


def _console() -> Console:
    console = Console()
    return Console(width=max(console.width, _NARROWEST))
