"""The observation of one rank in a dry run, and its comparison with a prediction. Torch-free.

An observation travels between processes as JSON.
"""

from dataclasses import dataclass
from typing import Final

from pydantic import TypeAdapter

MEMORY_TOLERANCE: Final = 0.08  # between the live bytes predicted and seen, of those seen
BYTES_TOLERANCE: Final = 0.01  # between the bytes of collectives charged and issued


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveTotal:
    """Collectives of one kind along one axis of a step: how many, bytes of whole buffers.

    Axes: dp, tp, pp, world; of dry runs also sums (of a few numbers, which nothing charges for).
    """

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
    collectives: tuple[CollectiveTotal, ...]
    timeline: tuple[Moment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveComparison:
    """Collectives of one kind along one axis: charged by the cost model, issued by the program."""

    axis: str
    kind: str
    charged: int
    charged_bytes: int
    issued: int
    issued_bytes: int

    @property
    def agrees(self) -> bool:
        """Equal in count, and in bytes within the tolerance."""
        difference = abs(self.charged_bytes - self.issued_bytes)
        return self.charged == self.issued and difference <= BYTES_TOLERANCE * self.issued_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StageVerified:
    """One stage. `predicted_bytes`: live, without the allocator's overhead.

    `allowance_bytes`: for what a dry run does not see.
    """

    seen: Seen
    predicted_bytes: int
    predicted_host_bytes: int
    allowance_bytes: int
    usable_bytes: int
    collectives: tuple[CollectiveComparison, ...]

    @property
    def difference_ratio(self) -> float:
        """Predicted less seen, of seen."""
        return self.predicted_bytes / self.seen.peak_bytes - 1

    @property
    def fits(self) -> bool:
        """Whether the observed peak and the allowance fit together."""
        return self.seen.peak_bytes + self.allowance_bytes <= self.usable_bytes

    @property
    def agrees(self) -> bool:
        """Whether prediction and program agree within the tolerances."""
        within = abs(self.difference_ratio) <= MEMORY_TOLERANCE
        return within and all(row.agrees for row in self.collectives)


_SEEN = TypeAdapter(Seen)


def to_json(observation: Seen) -> bytes:
    """One line."""
    return _SEEN.dump_json(observation)


def from_json(text: bytes) -> Seen:
    """The inverse of `to_json`."""
    return _SEEN.validate_json(text)
