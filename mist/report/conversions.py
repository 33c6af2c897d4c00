"""What a memory level changes in a model: each kind of change once, with where."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from mist.report.tables import say, show

if TYPE_CHECKING:
    from mist.layers import Conversion

NUMBER: Final = re.compile(r"\.\d+(?=\.|$)")  # of a layer in a list


def print_conversion(conversion: "Conversion", meaning: str) -> None:
    """The changes by place and kind, then what stays as it is and why."""
    say(f"level {conversion.level}: {meaning}")
    changes = [(change.path, change.what) for change in conversion.changes]
    show("Changes (* is any number)", ("module", "count", "becomes"), _grouped(changes))
    if conversion.left_alone:
        reasons = [(each.path, each.reason) for each in conversion.left_alone]
        show("Stays as it is", ("module", "count", "because"), _grouped(reasons))


def conversion_json(conversion: "Conversion") -> dict[str, object]:
    """`changes` and `left_alone`, module by module."""
    return {
        "level": conversion.level,
        "changes": [{"module": each.path, "becomes": each.what} for each in conversion.changes],
        "left_alone": [
            {"module": each.path, "because": each.reason} for each in conversion.left_alone
        ],
    }


def _grouped(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """The same module of all layers as one row."""
    counts: dict[tuple[str, str], int] = {}
    for path, words in pairs:
        key = NUMBER.sub(".*", path), words
        counts[key] = counts.get(key, 0) + 1
    return [(path, str(count), words) for (path, words), count in counts.items()]
