"""Values of settings in files of other frameworks, by their dotted keys."""

from collections.abc import Iterator, Mapping
from typing import Any

from mist.errors import InputError


def leaves(data: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value below a mapping, by its dotted key."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def whole_at(keys: Mapping[str, Any], key: str, path: str, least: int = 1) -> int | None:
    """The whole number of a key, from `least` up; None without it.

    Raises InputError naming the file at `path` and the key.
    """
    value = keys.get(key)
    if value is not None and (type(value) is not int or value < least):
        raise InputError(f"{path}: {key} {value!r:.40} is no whole number from {least} up.")
    return value
