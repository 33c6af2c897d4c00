"""How numbers are shown: three digits, a unit, never an exponent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist.units import (
    GB,
    GIB,
    MIB,
    TB,
    TFLOP,
    TIB,
    format_bytes,
    format_count,
    format_seconds,
    parse_bytes,
)


def test_binary_and_decimal_units() -> None:
    assert (MIB, GIB, GB, TFLOP) == (1_048_576, 1_073_741_824, 1_000_000_000, 1_000_000_000_000)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1.5 * MIB, "1.5 MiB"),
        (43.14 * GIB, "43.1 GiB"),
        (2048 * GIB, "2048.0 GiB"),
        (-3 * GIB, "-3.0 GiB"),
    ],
)
def test_format_bytes(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (4.2149, "4.21 s"),
        (5400.4, "5400 s"),
        (0.0352, "35.2 ms"),
        (0.9997, "1000 ms"),
        (12e-6, "12.0 us"),
        (5e-9, "0.00500 us"),
        (-0.0352, "-35.2 ms"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (7, "7"),
        (0.25, "0.250"),
        (3.14159, "3.14"),
        (31.4, "31"),
        (1_557_611_200, "1.56 B"),
        (8_030_261_248, "8.03 B"),
        (70e9, "70.0 B"),
        (405_853_388_800, "406 B"),
        (999_999_999, "1000 M"),
        (3.2e15, "3200 T"),
        (262_144, "262 K"),
    ],
)
def test_format_count(count: float, text: str) -> None:
    assert format_count(count) == text


@given(seconds=st.floats(1e-12, 1e9))
def test_seconds_read_back_within_half_a_unit_of_the_third_digit(seconds: float) -> None:
    number, unit = format_seconds(seconds).split()
    read = float(number) * {"s": 1.0, "ms": 1e-3, "us": 1e-6}[unit]
    assert "e" not in number
    assert read == pytest.approx(seconds, rel=0.5e-2)  # half of 1 in the third of three digits


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("31GB", 31 * GB),
        ("31 GiB", 31 * GIB),
        ("2tb", 2 * TB),
        ("0.5TiB", TIB // 2),
        (" .5 gb ", GB // 2),
        ("1000TB", 1000 * TB),
    ],
)
def test_sizes_of_memory(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text",
    ["", "GB", "31", "31G", "31B", "31 MB", "-1GB", "1e3GB", "nanGB", "infGB", "1.2.3GB", "31GBs"],
)
def test_what_is_no_size_of_memory(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number with GB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["0GB", "0.0000000001GB", "1000.1TB", "1" + "0" * 400 + "GB"])
def test_sizes_that_no_machine_has(text: str) -> None:
    with pytest.raises(ValueError, match="expected more than zero"):
        parse_bytes(text)
