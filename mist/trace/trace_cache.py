"""Traces kept between runs, as JSON, so that planning again needs no torch.

An entry is found by a digest of everything a trace depends on: the source, the versions of torch
and transformers, the tracer's own source and the setting. It also names the local modules that the
model file imported, with their digests, and holds only while they are unchanged. An entry that
cannot be read counts as missing. `codec` turns graphs into the JSON of an entry and back.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import platformdirs

from mist.files import digest, read_entry, write_entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A cached trace that holds: its fields for `codec`, and the digest of all of it."""

    fields: Mapping[str, object]
    digest: str


def cache_folder() -> Path:
    """Where traces are kept."""
    return Path(platformdirs.user_cache_dir("mist")) / "traces"


def cache_key(content: str, setting: Sequence[str]) -> str:
    """The digest of everything that a trace depends on, apart from local modules."""
    here = Path(__file__).parent
    ours = (*sorted(here.rglob("*.py")), *sorted((here.parent / "model").glob("*.py")))
    tracer = digest(*(path.read_text(encoding="utf-8") for path in ours))
    return digest(content, version("torch"), version("transformers"), tracer, *setting)


def load(key: str) -> Entry | None:
    """The entry of that key, or None when there is none that holds."""
    try:
        text = read_entry(cache_folder() / f"{key}.json") or ""
        entry = json.loads(text)
        for path, known in entry["modules"].items():
            if file_digest(Path(path)) != known:
                return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return Entry(fields=entry, digest=digest(text))


def store(key: str, fields: Mapping[str, object], listing: str, modules: Sequence[Path]) -> None:
    """Keep a graph's fields and the listing of its operations.

    A folder that cannot be written is no fault: the next run traces again.
    """
    entry = {"modules": {str(path): file_digest(path) for path in modules}, **fields}
    write_entry(cache_folder() / f"{key}.listing", json.dumps(listing))
    write_entry(cache_folder() / f"{key}.json", json.dumps(entry, separators=(",", ":")))


def forget(key: str) -> None:
    """Drop the entry of that key, so that it is traced again."""
    with suppress(OSError):
        (cache_folder() / f"{key}.json").unlink(missing_ok=True)


def load_listing(key: str) -> str | None:
    """The listing of the operations of that key's entry, or None."""
    text = read_entry(cache_folder() / f"{key}.listing")
    return json.loads(text) if text else None


def file_digest(path: Path) -> str:
    """The digest of a file's text."""
    return digest(path.read_text(encoding="utf-8"))
