"""A number with its origin: what every figure of a profile is.

The unit is in the key that holds the number (`memory_bytes`, `hop_s`); `unit_of_key` reads it back.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Final

from mist.plans.provenance import Kind
from mist.units import GB, format_bytes, format_seconds

# No figure of a machine is smaller or larger: seconds of a launch are 1e-9, FLOP/s 1e18.
LEAST_FIGURE: Final = 1e-15
LARGEST_FIGURE: Final = 1e21
LEAST_EXPONENT: Final = 0.1
LARGEST_EXPONENT: Final = 32.0


class Record:
    """Base of everything that a profile file may hold: unknown keys are errors.

    `not_zero`: figures that cannot be 0: rates, efficiencies, and scales of times. `exponents`:
    powers that sizes or times are raised to, or their inverse, which must not overflow. Raises
    ValueError for a figure that is so.
    """

    __slots__ = ()
    __pydantic_config__: ClassVar[dict[str, object]] = {
        "extra": "forbid",
        "strict": False,
        "allow_inf_nan": False,  # tables of numbers are no quantities
    }
    not_zero: ClassVar[tuple[str, ...]] = ()
    exponents: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name in (*self.not_zero, *self.exponents):
            if getattr(self, name).value == 0:
                raise ValueError(f"{name} is 0: with it, time would be infinite or none")
        for name in self.exponents:
            if not LEAST_EXPONENT <= getattr(self, name).value <= LARGEST_EXPONENT:
                limits = f"{LEAST_EXPONENT:g} and {LARGEST_EXPONENT:g}"
                raise ValueError(f"{name} is not between {limits}, for a power")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity(Record):
    """One number: `value` in the unit of its key, where it comes from, and how sure it is.

    Raises ValueError when the value is not finite, is negative or absurd, or has no source.
    """

    value: float
    source: str
    kind: Kind

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or self.value < 0:
            raise ValueError(f"value {self.value} is not a finite number from 0 up")
        if self.value and not LEAST_FIGURE <= self.value <= LARGEST_FIGURE:
            raise ValueError(
                f"value {self.value:g} is neither 0 nor between {LEAST_FIGURE:g} and "
                f"{LARGEST_FIGURE:g}: look at its unit"
            )
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


def figure_words(path: str, value: float, *, num_digits: int = 6) -> str:
    """A figure by its path for people: "25 GB/s", "10 us", "64 GiB", "0.85".

    `num_digits`: of what has no unit of its own kind.
    """
    match unit := unit_of_path(path):
        case "B":
            return format_bytes(value)
        case "B/s":
            return f"{value / GB:.3g} GB/s"
        case "s":
            return format_seconds(value)
    return f"{value:.{num_digits}g} {unit}".rstrip()


def unit_of_path(path: str) -> str:
    """The unit of a figure by its path ("transients.reduce_bytes_per_param.bf16" -> "B/param")."""
    # Of a figure by precision the last key is the precision, the one before has the unit.
    return next(filter(None, map(unit_of_key, reversed(path.split(".")))), "")
