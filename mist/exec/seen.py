"""What a dry run of one rank saw. Torch-free: it travels between processes as JSON."""

from dataclasses import dataclass

from pydantic import TypeAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """Collectives of one kind along one axis in a step: how many, bytes of whole buffers."""

    axis: str
    kind: str
    count: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The most that was held between two events of a step; `event`: the one that ended the time."""

    event: str
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One rank's step. `parts_bytes` sum to `peak_bytes`; `host_bytes`: the most in host memory.

    `static_bytes`: what lives between steps. `num_micro_batches`: how many were run; collectives
    are those of all of the plan's.
    """

    stage: int
    rank: int
    num_micro_batches: int
    peak_bytes: int
    host_bytes: int
    static_bytes: int
    parts_bytes: dict[str, int]
    phase: str
    module: str
    operation: str
    collectives: tuple[Issued, ...]
    timeline: tuple[Moment, ...]


_SEEN = TypeAdapter(Seen)


def to_json(seen: Seen) -> bytes:
    """One line."""
    return _SEEN.dump_json(seen)


def from_json(text: bytes) -> Seen:
    """The inverse of `to_json`."""
    return _SEEN.validate_json(text)
