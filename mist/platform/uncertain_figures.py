"""What is not known well of a platform, and platforms drawn from what it may be.

`profiles/ranges.yaml` says how far each figure may lie from what the profiles say. A draw sets all
of them at once. Draws are the points of a rank-1 lattice (Korobov): of N + 1, a prime, figure j
takes the place k * j mod (N + 1) of N in draw k. So each figure takes each of its N places once, as
in a Latin hypercube; the draws are the same on every machine.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from mist.plans.provenance import Kind
from mist.platform.calibration import Profiles, figure_at, with_values
from mist.platform.profiles import load_shipped
from mist.platform.quantity import Quantity, Record

NUM_DRAWS: Final = 10  # one less than a prime, and at least as many as there are figures


@dataclass(frozen=True, slots=True, kw_only=True)
class UncertainFigure(Record):
    """How far a figure of the profiles may lie from what they say.

    Args:
        name: as reports write it.
        paths: the fields, named as in a calibration; they move together.
        kinds: of which origin a figure must be for this row to speak of it.
        ends: the least and the most that it may be: times what the profile says (`by` factor), or
            as they stand (`by` value).
        spread: evenly, or evenly in the logarithm (a latency may be some times as long).
        worse: which end slows a step down.
        unless_contention: measured tables of streams that run at once say it better.
        most: that the figure can be at all.
    """

    name: str
    paths: tuple[str, ...]
    kinds: tuple[Kind, ...]
    by: Literal["factor", "value"]
    ends: tuple[float, float]
    worse: Literal["low", "high"]
    source: str
    kind: Kind
    spread: Literal["even", "logarithm"] = "even"
    unless_contention: bool = False
    most: float | None = None

    def __post_init__(self) -> None:
        low, high = self.ends
        if not 0 <= low < high or (self.spread == "logarithm" and low == 0):
            raise ValueError(f"ends must rise from 0 or more, found {list(self.ends)}")

    def at(self, place: float) -> float:
        """The factor or value at a place of 0..1 between its ends."""
        low, high = self.ends
        if self.spread == "logarithm":
            return float(low * (high / low) ** place)
        return low + place * (high - low)


@dataclass(frozen=True, slots=True, kw_only=True)
class UncertainFigures(Record):
    """The rows of `profiles/ranges.yaml`."""

    schema: Literal["mist.ranges/1"]
    figures: tuple[UncertainFigure, ...]

    def __post_init__(self) -> None:
        if len(self.figures) > NUM_DRAWS:
            raise ValueError(f"{NUM_DRAWS} draws are too few for {len(self.figures)} figures")


def drawn_profiles(profiles: Profiles) -> list[Profiles]:
    """Profiles with their uncertain figures drawn, `NUM_DRAWS` times."""
    figures = _uncertain(profiles)
    return [
        _at(profiles, {j: _place(k, j) for j in range(len(figures))}, figures)
        for k in range(1, NUM_DRAWS + 1)
    ]


def pessimistic_profiles(profiles: Profiles, share: float = 1.0) -> Profiles:
    """Profiles with every uncertain figure at its worse end; `share` of the way there."""
    figures = _uncertain(profiles)
    places = {
        j: share if figure.worse == "high" else 1.0 - share for j, figure in enumerate(figures)
    }
    return _at(profiles, places, figures)


@dataclass(frozen=True, slots=True, kw_only=True)
class VariedFigure:
    """Profiles with one figure at an end of what it may be; `value` and `known` of its first path.

    `value`: what it is there, `known`: what the profiles say, both in the unit of `path`.
    """

    name: str
    path: str
    value: float
    known: float
    profiles: Profiles


def varied_profiles(profiles: Profiles) -> Iterator[VariedFigure]:
    """Profiles with each uncertain figure at each of its ends, the others as they stand."""
    figures = _uncertain(profiles)
    for j, row in enumerate(figures):
        path, known = next(_found(profiles, row))
        for place in (0.0, 1.0):
            moved = _at(profiles, {j: place}, figures)
            _, quantity = next(_found(moved, row))
            yield VariedFigure(
                name=row.name, path=path, value=quantity.value, known=known.value, profiles=moved
            )


def _place(draw: int, figure: int) -> float:
    return (draw * (figure + 1) % (NUM_DRAWS + 1) - 0.5) / NUM_DRAWS


def _uncertain(profiles: Profiles) -> tuple[UncertainFigure, ...]:
    """The rows that speak of these profiles."""
    rows = load_shipped("ranges.yaml", UncertainFigures).figures
    contended = profiles[1].contention is not None
    return tuple(
        row
        for row in rows
        if not (contended and row.unless_contention)
        and all(quantity.kind in row.kinds for _, quantity in _found(profiles, row))
    )


def _found(profiles: Profiles, row: UncertainFigure) -> Iterator[tuple[str, Quantity]]:
    """The figures of a row, with their paths."""
    return ((path, figure_at(profiles, path)) for path in row.paths)


def _at(
    profiles: Profiles, places: dict[int, float], figures: tuple[UncertainFigure, ...]
) -> Profiles:
    """The profiles with figures, by their row, at places of 0..1."""
    values = {}
    for j, place in places.items():
        row, drawn = figures[j], figures[j].at(place)
        for path, quantity in _found(profiles, row):
            value = quantity.value * drawn if row.by == "factor" else drawn
            value = value if row.most is None else min(value, row.most)
            values[path] = Quantity(value=value, source=row.source, kind=row.kind)
    return with_values(profiles, values)
