"""What to change in a file of a target, line by line, so that it says another layout.

Both layouts are written as the target has them; what differs is a setting to change, to add or to
remove. The line is that of the user's own file, found by the name of the setting.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Final

from mist.export.setting_lines import line_of
from mist.export.target import Written

NAME: Final = re.compile(r'^"?([\w.-]+)"?')
MOST_EDITS: Final = 6  # a change of more is no small one
# A comment, and in JSON the table of fields: what is behind them is about the plan.
ABOUT_PLAN: Final = re.compile(r'^#|": "(stages|workload|num_micro|schedule|model)')


def settings_of(written: Written) -> tuple[str, ...]:
    """Lines of the files that set something, without comments and what ends a line."""
    lines = (line.strip() for text in written.files.values() for line in text.splitlines())
    kept = (line.partition("  # ")[0].rstrip(",; ") for line in lines)
    found = (line for line in kept if NAME.match(line) and not ABOUT_PLAN.search(line))
    return tuple(line.removeprefix("cfg.") for line in found)


def edits_of(path: str, text: str, before: Sequence[str], after: Sequence[str]) -> tuple[str, ...]:
    """How a file at `path` with `text` comes to say `after`; none where that is no small change."""
    edits = tuple(_edits(path, text, before, after))
    return edits if len(edits) <= MOST_EDITS else ()


def _edits(path: str, text: str, before: Sequence[str], after: Sequence[str]) -> Iterator[str]:
    for line in after:
        if line not in before:
            place = line_of(_name(line), text)
            yield f"{path}, line {place}: {line}" if place else f"add {line} to {path}"
    names = {_name(line) for line in after}
    for line in before:
        place = line_of(_name(line), text)
        if _name(line) not in names and place:
            yield f"remove {_name(line)} ({path}, line {place})"


def _name(line: str) -> str:
    """The option, key or field that a line sets."""
    found = NAME.match(line)
    assert found is not None, "lines that set nothing were left out"
    return found[1]
