"""Traces kept between runs, as JSON, so that planning again needs no torch.

An entry is found by a digest of everything a trace depends on: the source, the versions of torch
and transformers, the tracer's own source and the setting. A model that runs otherwise at other
sequence lengths has an entry for each such regime, which says for which lengths it holds. It also
names the local modules that the model file imported, with their digests, and holds only while they
are unchanged. An entry that cannot be read counts as missing. `codec` turns graphs into the JSON of
an entry and back.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import platformdirs

from mist.errors import InputError
from mist.files import digest, parse_entry, read_bytes, read_entry, write_entry
from mist.model.summary import Lengths, ModelFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A cached trace that holds: its name, its fields for `codec`, and the digest of all of it."""

    name: str
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


def entry_name(key: str, seq_len: int | None) -> str:
    """The name of what was traced at a sequence length (None: the usual one)."""
    return key if seq_len is None else f"{key}-{seq_len}"


def load(key: str, seq_len: int | None) -> Entry | None:
    """The entry of that key that holds for a sequence length (None: the usual one), if any."""
    usual = _entry(cache_folder() / f"{key}.json", seq_len)
    if usual is not None or seq_len is None:
        return usual
    others = sorted(cache_folder().glob(f"{key}-*.json"))
    return next((each for each in (_entry(path, seq_len) for path in others) if each), None)


def _entry(path: Path, seq_len: int | None) -> Entry | None:
    """The entry in a file, if it can be read and holds."""
    try:
        text = read_entry(path) or ""
        entry = parse_entry(text)
        longest, lengths = entry["longest"], Lengths(**entry["lengths"])
        asked = seq_len if None in (seq_len, longest) else min(seq_len, longest)
        if asked is not None and asked not in lengths:
            return None
        for module, known in entry["modules"].items():
            if file_digest(Path(module)) != known:
                return None
    except (InputError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return Entry(name=path.stem, fields=entry, digest=digest(text))


def store(
    name: str,
    facts: ModelFacts,
    fields: Mapping[str, object],
    listing: str,
    modules: Sequence[Path],
) -> None:
    """Keep a graph's fields and the listing of its operations, under the name of its regime.

    A folder that cannot be written is no fault: the next run traces again.
    """
    entry = {
        "modules": {str(path): file_digest(path) for path in modules},
        "longest": facts.max_seq_len,
        "lengths": asdict(facts.lengths),
        **fields,
    }
    write_entry(cache_folder() / f"{name}.listing", json.dumps(listing))
    write_entry(cache_folder() / f"{name}.json", json.dumps(entry, separators=(",", ":")))


def forget(name: str) -> None:
    """Drop the entry of that name, so that it is traced again."""
    with suppress(OSError):
        (cache_folder() / f"{name}.json").unlink(missing_ok=True)


def load_listing(name: str) -> str | None:
    """The listing of the operations of the entry of that name, or None."""
    text = read_entry(cache_folder() / f"{name}.listing")
    try:
        listing = parse_entry(text or "")
    except (ValueError, RecursionError):
        return None
    return listing if isinstance(listing, str) else None


def file_digest(path: Path) -> str:
    """The digest of a file's text. Raises InputError where it cannot be read as one."""
    return digest(read_bytes(path).decode())
