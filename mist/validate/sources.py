"""Which profiles and habits stand for a source and a GPU name: `profiles/validation/sources.yaml`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mist.platform.profiles import load_shipped
from mist.platform.quantity import Record

MemoryKind = Literal["allocated", "reserved", "active"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware(Record):
    """Profiles of a GPU as the files name it."""

    device: str
    cluster: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Source(Record):
    """The framework of a source.

    `memory`: what its peaks are. `zero`, `checkpoint`: where a row says nothing. `dropout`:
    whether its GPT models drop activations out.
    """

    runtime: str
    memory: MemoryKind
    zero: int | None = None
    checkpoint: str = ""
    dropout: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources(Record):
    """The table."""

    schema: Literal["mist.sources/1"]
    gpus: Mapping[str, Hardware]
    sources: Mapping[str, Source]


def load_sources() -> Sources:
    """The shipped table. Raises PlatformError when it is broken."""
    return load_shipped("validation/sources.yaml", Sources)
