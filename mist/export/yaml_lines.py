"""YAML with a comment on each line, which names the field of the plan that it carries."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from mist.errors import InputError


def yaml_lines(rows: Iterable[tuple[str, Any, str]]) -> Iterator[str]:
    """Each key ("name", or "section.name" with those of a section in a row), value and comment."""
    section = ""
    for key, value, field in rows:
        above, _, name = key.rpartition(".")
        if above != section:
            section = above
            yield f"{above}:"
        # Written as YAML writes a single value, without the end of the document.
        text = yaml.safe_dump(value).removesuffix("\n...\n").strip()
        yield f"{'  ' if above else ''}{name}: {text}  # {field}"


def whole_at(keys: Mapping[str, Any], key: str, path: str) -> int | None:
    """The whole number of a key, from 1 up; None without it. Raises InputError naming the key."""
    value = keys.get(key)
    if value is not None and (type(value) is not int or value < 1):
        raise InputError(f"{path}: {key} {value!r:.40} is no whole number from 1 up.")
    return value
