"""Units and their conversions: the only place where a factor between units is written.

GiB and MiB are binary; GB, TB/s and TFLOP are decimal, as vendors print them.
"""

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

KIB: Final = 1024
MIB: Final = 1024**2
GIB: Final = 1024**3
GB: Final = 10**9
TIB: Final = 1024**4
TB: Final = 10**12
TFLOP: Final = 10**12
MICROSECOND: Final = 1e-6
MILLISECOND: Final = 1e-3
HOUR_S: Final = 3600
DAY_S: Final = 24 * HOUR_S
MILLION: Final = 10**6
LARGEST_INTEGER: Final = 2**63 - 1  # of 64 bits: what numpy, JSON readers and databases hold
LARGEST_BYTES: Final = 1000 * TB  # no machine has more: what is larger is a slip of the hand
BYTE_UNITS: Final[Mapping[str, int]] = MappingProxyType(
    {"gb": GB, "gib": GIB, "tb": TB, "tib": TIB}
)


def parse_bytes(text: str) -> int:
    """Bytes from a number and its unit: "31GB", "0.5 TiB".

    Raises ValueError, with what is wrong and what to try, for anything else.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*", text)
    unit = BYTE_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError("expected a number with GB, GiB, TB or TiB. Try 64GB.")
    return whole_bytes(float(match[1]) * unit)


RATE_UNITS: Final[Mapping[str, Mapping[str, float]]] = MappingProxyType(
    {
        "B/s": MappingProxyType(
            {"GB/s": GB, "TB/s": TB, "GiB/s": GIB, "Gb/s": GB / 8, "Gbit/s": GB / 8}
        ),
        "FLOP/s": MappingProxyType({"TFLOP/s": TFLOP}),
        "s": MappingProxyType({"s": 1.0, "ms": MILLISECOND, "us": MICROSECOND}),
    }
)
"""Units that a figure may be given in, by the unit of its key; Gb/s is gigabits, GB/s gigabytes."""


def parse_number(text: str, unit: str) -> float:
    """A number in `unit`, from text without a unit or with one of the same kind: "100Gb/s".

    Raises ValueError, with what is wrong and what to try, for anything else.
    """
    match = re.fullmatch(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*(\S*)\s*", text, re.I)
    known = RATE_UNITS.get(unit, {})
    if match is None or not (match[2] in ("", unit) or match[2] in known or unit == "B"):
        with_units = f", in {unit} or with {', '.join(known) or unit}" if unit else ""
        raise ValueError(f"expected a number{with_units}.")
    if unit == "B" and match[2] not in ("", unit):
        return float(parse_bytes(text))
    return float(match[1]) * known.get(match[2], 1.0)


def parse_whole(text: str) -> int:
    """A whole number within 64 bits, as a user types it. Raises ValueError for anything else.

    Python itself refuses to read thousands of digits, and numpy to hold more than 19.
    """
    if not re.fullmatch(r"-?[0-9]{1,19}", text) or abs(int(text)) > LARGEST_INTEGER:
        raise ValueError("expected a whole number within 64 bits")
    return int(text)


def whole_bytes(num_bytes: float) -> int:
    """A size of memory as a whole number of bytes. Raises ValueError for one that cannot be."""
    if not 1 <= num_bytes <= LARGEST_BYTES:
        raise ValueError("expected more than zero and at most 1000 TB. Try 64GB.")
    return round(num_bytes)


def format_bytes(num_bytes: float) -> str:
    """Bytes for a reader: three digits that matter, binary units ("43.1 GiB")."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (1024, "KiB")):
        if abs(num_bytes) >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """Seconds for a reader: "4.21 s", "35.2 ms", "12.0 us", "5400 s"."""
    for unit, name in ((1.0, "s"), (MILLISECOND, "ms")):
        if abs(seconds) >= unit:
            return f"{_three_digits(seconds / unit)} {name}"
    return f"{_three_digits(seconds / MICROSECOND)} us" if seconds else "0 s"


def format_count(count: float) -> str:
    """A count for a reader: 8030261248 as "8.03 B", 1557611200 as "1.56 B", 0.25 as "0.250"."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(count) >= unit:
            return f"{_three_digits(count / unit)} {name}"
    is_fine = abs(count) < 10 and count % 1  # "0 tokens/s" would say that nothing happens
    return _three_digits(count) if is_fine else f"{count:.0f}"


def format_usd(usd: float) -> str:
    """US dollars for a reader: "$0.138", "$42.5", "$1.25 M"."""
    if abs(usd) >= 1000:
        return f"${format_count(usd)}"
    return f"${_three_digits(usd)}" if usd else "$0"


def format_days(seconds: float) -> str:
    """A long time for a reader, in days: "0.521 days", "81.4 days"."""
    return f"{_three_digits(seconds / DAY_S)} days" if seconds else "0 days"


def _three_digits(value: float) -> str:
    """Three significant digits, more before the point, and no exponent."""
    decimals = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(decimals, 0)}f}"


def six_digits(value: float) -> float:
    """A number as predictions are written: with all the digits that one can mean."""
    return float(f"{value:.6g}")
