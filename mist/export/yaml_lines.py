"""YAML with a comment on each line, which names the field of the plan that it carries."""

from collections.abc import Iterable, Iterator
from typing import Any

import yaml


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
