"""Settings of a file from which no layout is read: which are of no account, and which decide.

Three kinds. Those on data, logs and learning rates change neither time nor memory: their names are
one note. Those that decide what a GPU holds or computes in a way that is not predicted, such as
experts that ranks share, are refused, but for the values at which they change nothing. All others
are listed as not modelled, each with its value, but for the values at which a prediction is right
without them. A setting without a value says nothing.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from mist.errors import InputError
from mist.export.setting_lines import place_of
from mist.export.target import Configuration

NEVER: tuple[str, ...] = ()  # as the values of a setting that decides: there is none
ADAMW: Final = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw", "adam")
"""Names of transformers' optimizers whose states are two moments in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingKinds:
    """What a target's settings are.

    Args:
        read: those from which the layout is read.
        untouched: beginnings of the names of those that are of no account.
        decisive: those that decide, with the values, in lower case, that are predicted.
        usual: those of which these values are predicted, and others are not modelled.
        sign: what stands between a name and its value.
    """

    read: Container[str]
    untouched: tuple[str, ...] = ()
    decisive: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    usual: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
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
    _refuse_decisive(settings, kinds, text, path)
    unmodelled, untouched = [], []
    for name, value in settings.items():
        if name in kinds.read or name in kinds.decisive or value is None:
            continue
        if str(value).lower() in kinds.usual.get(name, ()):
            continue
        if name.startswith(kinds.untouched):
            untouched.append(name)
        else:
            unmodelled.append(f"{name}{kinds.sign}{value}".rstrip())
    return Unread(unmodelled=tuple(unmodelled), untouched=tuple(untouched))


def _refuse_decisive(
    settings: Mapping[str, Any], kinds: SettingKinds, text: str, path: str
) -> None:
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


def with_unread(said: Configuration, others: Unread) -> Configuration:
    """What a file says, with these settings behind those that it has already."""
    return replace(
        said,
        unmodelled=(*said.unmodelled, *others.unmodelled),
        untouched=(*said.untouched, *others.untouched),
    )
