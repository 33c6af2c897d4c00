"""What the ranks measured, and what they were asked for. Torch-free; both cross as JSON."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from mist.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to measure: `device` cpu or cuda, `num_ranks` at once, about `seconds` in all.

    Raises InputError for what cannot be measured.
    """

    device: str
    num_ranks: int
    seconds: float

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise InputError(f"--device {self.device}: this machine is measured as cpu or cuda.")
        if self.num_ranks < 1 or self.num_ranks & (self.num_ranks - 1):
            raise InputError(f"--ranks {self.num_ranks} is no power of 2. Try 2.")
        if not 1 <= self.seconds <= 3600:
            raise InputError(f"--seconds {self.seconds:g} is not between 1 and 3600.")

    def dump(self) -> str:
        """As one argument of a command."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> "Request":
        """What `dump` gave."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Seconds of one operation at one size: the median of `count` samples on the slowest rank.

    `spread_ratio`: interquartile range over the median. `others_ratio`: share of the processors
    that other programs had meanwhile. `sizes`: numbers by name, as each operation's function says.
    """

    op: str
    sizes: Mapping[str, float]
    seconds: float
    spread_ratio: float
    others_ratio: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """Everything that was measured. `about`: the machine in words and bytes."""

    about: Mapping[str, str | float]
    rows: tuple[Reading, ...]

    def of(self, op: str) -> Iterator[Reading]:
        """The readings of one operation, in the order in which they were taken."""
        return (row for row in self.rows if row.op == op)

    @property
    def others_ratio(self) -> float:
        """Share of the processors that other programs had while all this was measured."""
        return float(self.about["others_ratio"])

    def dump(self) -> str:
        """As the text of a file."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> "Readings":
        """What `dump` gave."""
        data = json.loads(text)
        return cls(about=data["about"], rows=tuple(Reading(**row) for row in data["rows"]))
