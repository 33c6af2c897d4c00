"""Settings of a file from which no layout is read: which are of no account, and which decide.

Three kinds. Those on data, logs and learning rates change neither time nor memory: their names are
one note. Those that decide what a GPU holds or computes in a way that is not predicted, such as
experts that ranks share, are refused, but for the values at which they change nothing. All others
are listed as not modelled, each with its value.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from mist.errors import InputError
from mist.export.setting_lines import place_of

NEVER: tuple[str, ...] = ()  # as the values of a setting that decides: there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingKinds:
    """What a target's settings are.

    Args:
        read: those from which the layout is read.
        untouched: beginnings of the names of those that are of no account.
        decisive: those that decide, with the values, in lower case, that are predicted.
        sign: what stands between a name and its value.
    """

    read: Container[str]
    untouched: tuple[str, ...] = ()
    decisive: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sign: str = " = "


@dataclass(frozen=True, slots=True, kw_only=True)
class Unread:
    """Settings that are not modelled, as they stand in the file, and names of the untouched."""

    unmodelled: tuple[str, ...] = ()
    untouched: tuple[str, ...] = ()


def unread(settings: Mapping[str, Any], kinds: SettingKinds, text: str, path: str) -> Unread:
    """The settings of a file with `text` at `path` from which no layout is read.

    Raises InputError, with the line, for one that decides and is not predicted.
    """
    for name, predicted in kinds.decisive.items():
        if name in settings and str(settings[name]).lower() not in predicted:
            setting = f"{name}{kinds.sign}{settings[name]}".rstrip()
            known = (
                f"Predicted: {', '.join(filter(None, predicted))}." if predicted else "Remove it."
            )
            raise InputError(
                f"{place_of(name, text, path)}: {setting:.120} is not predicted, and it decides "
                f"what a GPU holds or computes. {known}"
            )
    others = [name for name in settings if name not in kinds.read and name not in kinds.decisive]
    untouched = tuple(name for name in others if name.startswith(kinds.untouched))
    known_names = {*untouched}
    return Unread(
        unmodelled=tuple(
            f"{name}{kinds.sign}{settings[name]}".rstrip()
            for name in others
            if name not in known_names
        ),
        untouched=untouched,
    )
