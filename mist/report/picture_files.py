"""The pictures of a report as one PNG or SVG file, by matplotlib."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from mist.report.pictures import PALETTE, Picture, Shape
from mist.report.png_file import png_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES: Final = 11.0
HEIGHT_INCHES: Final = 3.0  # of a picture, at the least
ROW_INCHES: Final = 0.35


def pictures_png(pictures: Sequence[Picture]) -> bytes:
    """One below the other; the same pictures give the same bytes."""
    return png_of(drawn(pictures))


def pictures_svg(pictures: Sequence[Picture]) -> bytes:
    """The same as SVG, without the time at which it was written."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # Names of elements are random unless they are salted; text stays text, so that it is found.
    with rc_context({"svg.hashsalt": "mist", "svg.fonttype": "none"}):
        drawn(pictures).savefig(buffer, format="svg", metadata={"Creator": "Mist", "Date": None})
    return buffer.getvalue()


def drawn(pictures: Sequence[Picture]) -> "Figure":
    """A figure with a panel for each picture."""
    from matplotlib.figure import Figure

    heights = [max(HEIGHT_INCHES, ROW_INCHES * len(each.row_names) + 1.5) for each in pictures]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights)), layout="constrained")
    panels = figure.subplots(len(pictures), squeeze=False, height_ratios=heights)[:, 0]
    for axes, picture in zip(panels, pictures, strict=True):
        _draw(axes, picture)
    return figure


def _draw(axes: "Axes", picture: Picture) -> None:
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(picture.series)}
    for name, colour in colours.items():
        _draw_series(axes, [one for one in picture.shapes if one.series == name], name, colour)
    for shape in picture.shapes:
        if shape.kind == "text":
            at = (shape.x1, shape.y1)
            axes.annotate(shape.words, at, ha="center", va="center", fontsize=7, parse_math=False)
    if picture.row_names:
        axes.set_yticks(range(len(picture.row_names)), picture.row_names)
        axes.set_ylim(len(picture.row_names) - 0.5, -0.5)
    axes.set(xlabel=picture.x_label, ylabel=picture.y_label)
    axes.set_title(picture.title, loc="left", parse_math=False)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_series(axes: "Axes", shapes: Sequence[Shape], name: str, colour: str) -> None:
    """Every shape of a series, with one row in the legend."""
    kinds: Mapping[str, list[Shape]] = {shape.kind: [] for shape in shapes}
    for shape in shapes:
        kinds[shape.kind].append(shape)
    for kind, own in kinds.items():
        x, y = [one.x1 for one in own], [one.y1 for one in own]
        if kind == "rect":
            size = [one.x2 - one.x1 for one in own]
            height = [one.y2 - one.y1 for one in own]
            axes.barh(y, size, height, left=x, align="edge", color=colour, label=name)
        elif kind == "dot":
            axes.scatter(x, y, s=14, color=colour, label=name, zorder=3)
        elif kind == "mark":
            axes.scatter(x, y, s=130, marker="*", color=colour, label=name, zorder=4)
        elif kind == "line":
            axes.plot(x, y, color=colour, label=name)
        elif kind == "area":
            axes.fill_between(x, y, [one.y2 for one in own], color=colour, alpha=0.4, label=name)
        else:
            _draw_limits(axes, own, name, colour)


def _draw_limits(axes: "Axes", shapes: Sequence[Shape], name: str, colour: str) -> None:
    for shape in shapes:
        if math.isnan(shape.y1):
            axes.axvline(shape.x1, color=colour, label=name, ls="--")
        else:
            axes.axhline(shape.y1, color=colour, label=name, ls="--")
