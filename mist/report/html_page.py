"""The report as one page that opens from disk: text and tables as HTML, pictures drawn in place.

Nothing is fetched, which its Content-Security-Policy makes sure of. Observable Plot and d3 stand in
the page (`page/vendor`, with their licences). What comes from a plan is escaped: it is somebody's
file.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from typing import Final, get_args

from mist.plans.plan import Alternative, Plan
from mist.report.judgement_pictures import judgement_pictures
from mist.report.pictures import PALETTE, Picture, ShapeKind
from mist.report.plan_pictures import plan_pictures
from mist.report.plan_report import PlanReport
from mist.report.plan_screen import verdict_lines
from mist.report.plan_words import head_lines
from mist.units import format_bytes, format_seconds, six_digits

MARK: Final = "<!-- written by `mist report` -->"
MOST_LISTED: Final = 60  # shapes of a picture in its table
VENDORED: Final = ("d3.min.js", "plot.umd.min.js")
ZOOMS: Final = {
    "in": "Zoom in",
    "out": "Zoom out",
    "left": "Left",
    "right": "Right",
    "whole": "All of it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TableCell:
    """Text of a table's cell, and the number that it sorts by; None: by its text."""

    text: str
    value: float | None = None


def pictures_of(report: PlanReport) -> tuple[Picture, ...]:
    """Every picture that a report has."""
    pictures = plan_pictures(report.plan, report.sheet.limits)
    if report.judgement is None:
        return pictures
    return (*pictures, *judgement_pictures(report.plan, report.sheet.limits, report.judgement))


def page_of(report: PlanReport) -> str:
    """The page, whole."""
    pictures = pictures_of(report)
    plan = report.plan
    title = f"{plan.model.name} on {plan.cluster.num_gpus} x {plan.cluster.device}"
    named = {each.name: each.title for each in pictures}
    sections = [_figure(each) for each in pictures]
    sections += [_layouts(plan), _sources(report)]
    links = {**named, "others": "Other layouts", "sources": "Sources"}
    parts = {
        "title": escape(title),
        "style": _asset("page.css"),
        "policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'",
        "verdict": "".join(f"<p>{escape(line)}</p>\n" for line in _verdict(report)),
        "what": "".join(
            f'<p class="soft">{escape(line)}</p>\n' for line in head_lines(report.plan)
        ),
        "links": "".join(
            f'<li><a href="#{name}">{escape(text)}</a></li>\n' for name, text in links.items()
        ),
        "sections": "\n".join(sections),
        "data": _data(pictures),
        "vendored": "\n".join(f"<script>{_asset(f'vendor/{name}')}</script>" for name in VENDORED),
        "script": _asset("page.js"),
        "licences": escape(_asset("vendor/LICENSES.txt")),
        "mist": escape(plan.provenance.mist),
    }
    page = _asset("page.html")
    # Texts are put in one by one and never read again, whatever signs they hold.
    pieces = page.split("@@")
    return (
        MARK
        + "\n"
        + "".join(piece if index % 2 == 0 else parts[piece] for index, piece in enumerate(pieces))
    )


def _verdict(report: PlanReport) -> list[str]:
    lines = verdict_lines(report.sheet)
    if not report.sheet.cost:
        lines.append("Cost per token: no price is known; mist report --price takes one.")
    return lines


@cache
def _asset(name: str) -> str:
    return files("mist.report").joinpath("page", *name.split("/")).read_text(encoding="utf-8")


def _data(pictures: Sequence[Picture]) -> str:
    """The pictures as JSON that may stand in a page: `</` would end the element."""
    data = {
        "kinds": get_args(ShapeKind),
        "palette": PALETTE,
        "pictures": [_columns(picture) for picture in pictures],
    }
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _columns(picture: Picture) -> dict[str, object]:
    kinds, series = get_args(ShapeKind), {name: i for i, name in enumerate(picture.series)}
    shapes = picture.shapes

    def numbers(field: str) -> list[float | None]:
        values = (getattr(shape, field) for shape in shapes)
        return [None if math.isnan(value) else six_digits(value) for value in values]

    return {
        "name": picture.name,
        "title": picture.title,
        "caption": picture.caption,
        "xLabel": picture.x_label,
        "yLabel": picture.y_label,
        "rows": picture.row_names,
        "zooms": picture.zooms,
        "series": picture.series,
        "columns": {
            "kind": [kinds.index(shape.kind) for shape in shapes],
            "series": [series.get(shape.series, -1) for shape in shapes],
            **{field: numbers(field) for field in ("x1", "x2", "y1", "y2")},
            "words": [shape.words for shape in shapes],
        },
    }


def _figure(picture: Picture) -> str:
    """A section: what it shows, the place of the picture, and the same as a table."""
    name, title = picture.name, escape(picture.title)
    controls = ""
    if picture.zooms:
        buttons = "".join(
            f'<button type="button" data-of="{name}" data-zoom="{zoom}" '
            f'aria-label="{words}: {title}">{words}</button>'
            for zoom, words in ZOOMS.items()
        )
        controls = f'<div class="controls">{buttons}</div>'
    listed = picture.listed
    rows = [[TableCell(text=shape.words)] for shape in listed[:MOST_LISTED]]
    more = len(listed) - len(rows)
    note = f"<p>and {more} more</p>" if more > 0 else ""
    table = _table(f"table-{name}", ["What the picture shows"], rows, sorts=False)
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">\n'
        f'<h2 id="{name}-title">{title}</h2>\n'
        f"<figure><figcaption>{escape(picture.caption)}</figcaption>{controls}\n"
        f'<div class="plot" data-picture="{name}"></div></figure>\n'
        f"<details><summary>{title}, as text</summary>{table}{note}</details>\n</section>"
    )


def _layouts(plan: Plan) -> str:
    """Every other layout of the plan file, with why it loses: sorted and filtered by the reader."""
    peak_bytes = max(stage.peak_bytes for stage in plan.estimate.stages)
    step_s = plan.estimate.step_s
    rows = [
        [
            TableCell(text="the plan"),
            TableCell(text=format_seconds(step_s), value=step_s),
            TableCell(text="", value=0.0),
            TableCell(text=format_bytes(peak_bytes), value=peak_bytes),
            TableCell(text="chosen"),
            TableCell(text=""),
        ]
    ]
    others = [(other, "fits") for other in plan.alternatives]
    others += [(other, "too large") for other in plan.excluded]
    rows += [_layout_row(other, verdict, step_s) for other, verdict in others]
    header = ["Layout", "Step", "Slower", "Peak per GPU", "Fits", "Why not, and what it would need"]
    table = _table("layouts", header, rows, sorts=True)
    return (
        '<section id="others" aria-labelledby="others-title">\n'
        '<h2 id="others-title">Other layouts</h2>\n'
        '<div class="controls"><label for="filter">Show rows with</label>'
        '<input id="filter" type="search" autocomplete="off">'
        f'<span id="shown" role="status">{len(rows)} of {len(rows)} shown</span></div>\n'
        f"{table}\n</section>"
    )


def _layout_row(other: Alternative, verdict: str, step_s: float) -> list[TableCell]:
    slower = other.step_s / step_s - 1
    return [
        TableCell(text=other.layout),
        TableCell(text=format_seconds(other.step_s), value=other.step_s),
        TableCell(text=f"{slower:+.1%}", value=slower),
        TableCell(text=format_bytes(other.peak_bytes), value=other.peak_bytes),
        TableCell(text=verdict),
        TableCell(text=f"{other.reason}; {other.needs}"),
    ]


def _sources(report: PlanReport) -> str:
    """Where the numbers come from, how sure they are, and what is not modelled."""
    plan = report.plan
    estimate, provenance = plan.estimate, plan.provenance
    costs = [
        [TableCell(text=word) for word in (row.what, row.how, row.kind, row.source)]
        for row in estimate.op_costs
    ]
    searched: Iterable[tuple[str, object]] = [
        ("Mist", provenance.mist),
        ("solver", provenance.solver),
        ("optimality gap", f"{provenance.gap:.2g} of the step"),
        *provenance.search.items(),
        *((f"profile {name}", digest) for name, digest in provenance.profiles.items()),
        *((f"your own {name}", value) for name, value in plan.overrides.items()),
    ]
    rows = [[TableCell(text=name), TableCell(text=str(value))] for name, value in searched]
    notes = [*report.sheet.notes, *estimate.extrapolated]
    return (
        '<section id="sources" aria-labelledby="sources-title">\n'
        '<h2 id="sources-title">Sources and uncertainty</h2>\n'
        f"<p>{escape(estimate.uncertainty.basis)}: a measured step lies "
        f"{escape(estimate.uncertainty.step_words)} of the predicted one, a peak within "
        f"{estimate.uncertainty.memory_ratio:.0%}.</p>\n"
        f"<p>Not modelled: {escape('; '.join(estimate.not_modelled))}.</p>\n"
        + "".join(f"<p>Note: {escape(note)}.</p>\n" for note in notes)
        + _table("costs", ["Operation", "By", "Kind", "Source"], costs, sorts=True)
        + _table("provenance", ["Of the search", "Value"], rows, sorts=False)
        + "</section>"
    )


def _table(
    name: str, header: Sequence[str], rows: Sequence[Sequence[TableCell]], *, sorts: bool
) -> str:
    heads = "".join(
        f'<th scope="col"><button type="button">{escape(text)}</button></th>'
        if sorts
        else f'<th scope="col">{escape(text)}</th>'
        for text in header
    )
    body = "\n".join(f"<tr>{''.join(_cells(row))}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table: {escape(header[0])}">'
        f'<table id="{name}"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>\n'
    )


def _cells(row: Sequence[TableCell]) -> Iterator[str]:
    for cell in row:
        value = "" if cell.value is None else f' data-value="{cell.value:.12g}"'
        yield f"<td{value}>{escape(cell.text)}</td>"
