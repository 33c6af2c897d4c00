"""A picture as data: the page draws it with Observable Plot, a file with matplotlib.

Shapes have numbers in the units of the axes. Rows with names, as stages have, lie at y = 0, 1, ...
from the top. So a picture is computed once, and both ways of drawing know shapes only.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

ShapeKind = Literal["rect", "dot", "mark", "line", "area", "limit", "text"]
HALF_ROW: Final = 0.4  # of the height of a row with a name, on either side of its middle

PALETTE: Final = (
    "#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951",
    "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0",
)  # fmt: skip
"""Colours of the series in their order; told apart by people who do not see all colours too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One shape. `words`: what it is, for a reader who points at it, and for the table.

    rect: x1..x2 by y1..y2. dot, mark (a dot that stands out) and text: at x1, y1. line: all of a
    series, in their order. area: all of a series, from y1 to y2 at x1. limit: a line across at x1,
    or at y1. NaN stands for a number that a shape does not have.
    """

    kind: ShapeKind
    series: str
    x1: float = math.nan
    x2: float = math.nan
    y1: float = math.nan
    y2: float = math.nan
    words: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """Shapes with axes and a title; `caption` says how to read it.

    `row_names`: of the rows at y = 0, 1, ...; none where y is a number. `zooms`: whether a reader
    looks at a part of x.
    """

    name: str
    title: str
    caption: str
    x_label: str
    y_label: str = ""
    row_names: tuple[str, ...] = ()
    zooms: bool = False
    shapes: tuple[Shape, ...]

    @property
    def series(self) -> tuple[str, ...]:
        """Names of the series, as they first appear; text has the colour of all text."""
        shapes = (shape for shape in self.shapes if shape.kind != "text")
        return tuple(dict.fromkeys(shape.series for shape in shapes))

    @property
    def listed(self) -> tuple[Shape, ...]:
        """The shapes that say what they are."""
        return tuple(shape for shape in self.shapes if shape.words and shape.kind != "text")


def row_rect(row: int, span: tuple[float, float], series: str, words: str = "") -> Shape:
    """A bar in a row with a name, from and to these x."""
    return Shape(
        kind="rect",
        series=series,
        x1=span[0],
        x2=span[1],
        y1=row - HALF_ROW,
        y2=row + HALF_ROW,
        words=words,
    )


def end_to_end(
    row: int, parts: Iterable[tuple[str, float, str]], start: float = 0.0
) -> Iterator[Shape]:
    """Bars of a row, each where the one before ends: series, length and words."""
    for series, length, words in parts:
        yield row_rect(row, (start, start + length), series, words)
        start += length
