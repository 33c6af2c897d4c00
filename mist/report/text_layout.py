"""Plain text in the width that there is: lines that break between words, columns, bars.

Only ASCII and no colour, so that a pipe, a log and a terminal show the same. A word is never
broken: one that is wider than the screen, as a path may be, has a line of its own.
"""

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Final

from mist.errors import printable

WITHOUT_TERMINAL: Final = 100  # columns, where neither a terminal nor COLUMNS says how many
NARROWEST: Final = 40  # below it nothing is readable, and lines go on to this width
GAP: Final = "  "  # between columns


def screen_width() -> int:
    """Columns of the terminal, or what COLUMNS says."""
    return max(NARROWEST, shutil.get_terminal_size((WITHOUT_TERMINAL, 0)).columns)


def wrapped(text: str, width: int, indent: int = 0) -> list[str]:
    """A text as lines of at most `width`; all but the first begin with `indent` blanks."""
    return textwrap.wrap(
        printable(text),
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def columns(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Rows below each other, as many cells in each; the last cell goes on below itself."""
    cells = [[printable(cell) for cell in row] for row in rows]
    sizes = [max(map(len, column)) for column in zip(*cells, strict=True)][:-1]
    lines: list[str] = []
    for row in cells:
        head = GAP.join(cell.ljust(size) for cell, size in zip(row, sizes, strict=False))
        # Where the columns leave no room for words, the last cell begins below them.
        room = width - len(head) - len(GAP)
        longest = max(map(len, row[-1].split()), default=0)
        if longest > room:
            lines += [
                *wrapped(head.rstrip(), width, 4),
                *wrapped(f"    {row[-1]}", width, indent=4),
            ]
        else:
            indent = len(head) + len(GAP)
            lines += wrapped_after(head + GAP, row[-1], width, indent)
    return lines


def wrapped_after(head: str, text: str, width: int, indent: int) -> list[str]:
    """`text` behind a head that keeps its blanks."""
    first, *others = wrapped(text, width - indent) or [""]
    return [(head + first).rstrip(), *(" " * indent + line for line in others)]


def bar(shares: Mapping[str, float], width: int) -> str:
    """Letters in proportion: {"C": 3, "D": 1} in eight columns is "CCCCCCDD".

    `shares` sum to the whole bar; negative ones take no room.
    """
    total = sum(max(0.0, share) for share in shares.values())
    line, end = "", 0.0
    for letter, share in shares.items():
        end += max(0.0, share)
        line += letter * (round(width * end / total) - len(line)) if total else ""
    return line


def with_marks(line: str, marks: Mapping[int, str]) -> str:
    """A bar with signs set between its letters; `marks`: sign by the letters that lie before."""
    for place in sorted(marks, reverse=True):
        line = line[:place] + marks[place] + line[place:]
    return line
