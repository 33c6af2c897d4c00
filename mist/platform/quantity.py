"""A number with its origin: what every figure of a profile is.

The unit is in the key that holds the number (`memory_bytes`, `hop_s`); `unit_of_key` reads it back.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Final

from mist.plans.provenance import Kind


class Record:
    """Base of everything that a profile file may hold: unknown keys are errors."""

    __slots__ = ()
    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid", "strict": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity(Record):
    """One number: `value` in the unit of its key, where it comes from, and how sure it is.

    Raises ValueError when the value is not finite, is negative, or has no source.
    """

    value: float
    source: str
    kind: Kind

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or self.value < 0:
            raise ValueError(f"value {self.value} is not a finite number from 0 up")
        if not self.source.strip():
            raise ValueError("source is empty: say where the number comes from")

    def times(self, factor: float) -> "Quantity":
        """The number scaled, of the same source."""
        return replace(self, value=self.value * factor)


# Longest first: `_bytes_per_s` also ends in `_s`.
_UNITS: Final = (
    ("_bytes_per_param", "B/param"),
    ("_bytes_per_s", "B/s"),
    ("_flop_per_s", "FLOP/s"),
    ("_bytes", "B"),
    ("_tokens", "tokens"),
    ("_per_gpu_hour_usd", "USD/(GPU h)"),
    ("_us", "us"),
    ("_s", "s"),
)


def unit_of_key(key: str) -> str:
    """The unit in the end of a key: "hbm_bytes_per_s" -> "B/s"; "" for counts and ratios."""
    return next((unit for ending, unit in _UNITS if f"_{key}".endswith(ending)), "")


def unit_of_path(path: str) -> str:
    """The unit of a figure by its path ("transients.reduce_bytes_per_param.bf16" -> "B/param")."""
    # Of a figure by precision the last key is the precision, the one before has the unit.
    return next(filter(None, map(unit_of_key, reversed(path.split(".")))), "")
