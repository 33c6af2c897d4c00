"""The operations of a traced model as a picture: one row each, arcs from results to their uses.

Reads the listing that a trace leaves beside itself, one section a block:

    # name
    node = target(inputs) -> dtype[shape] flop=... bytes=... phase=... module=...
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from math import sqrt
from typing import Final

LINE: Final = re.compile(
    r"(?P<name>\S+) = (?P<target>\S+?)\((?P<inputs>[^()]*)\) -> (?P<result>.*) "
    r"flop=(?P<flop>.+) bytes=(?P<bytes>.+) phase=(?P<phase>\S+) module=(?P<module>.*)"
)
ROW, ARCS, WIDTH = 15, 190, 1180  # pixels
COLOURS: Final = {"product": "#c2410c", "memory": "#2563eb", "view": "#cbd5e1"}
STYLE: Final = (
    "text{font:11px monospace;fill:#0f172a}.head{font-weight:bold;font-size:13px}"
    ".back{fill:#64748b}path{fill:none;stroke:#94a3b8;stroke-width:.7}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One operation of the listing."""

    name: str
    target: str
    inputs: tuple[str, ...]
    result: str
    flop: str
    bytes: str
    phase: str
    module: str

    @property
    def kind(self) -> str:
        """What the operation does: a product, memory traffic, or nothing (a view)."""
        if self.flop != "0":
            return "product"
        return "memory" if self.bytes != "0" else "view"


def rows_of(listing: str) -> dict[str, list[Row]]:
    """The operations of a listing by block."""
    blocks: dict[str, list[Row]] = {}
    for line in listing.splitlines():
        if line.startswith("# "):
            rows = blocks.setdefault(line[2:], [])
        elif found := LINE.fullmatch(line):
            fields = found.groupdict()
            inputs = tuple(name for name in fields.pop("inputs").split(", ") if name)
            rows.append(Row(inputs=inputs, **fields))
    return blocks


def graph_svg(listing: str) -> str:
    """The listing as an SVG document: a section a block, forward before backward."""
    parts, top = list[str](), ROW
    for name, rows in rows_of(listing).items():
        parts += [_text(10, top + ROW, name, "head"), *_section(rows, top + 2 * ROW)]
        top += (len(rows) + 4) * ROW
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}">\n'
        f'<style>{STYLE}</style>\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _section(rows: list[Row], top: int) -> Iterator[str]:
    place = {row.name: top + i * ROW + ROW // 2 for i, row in enumerate(rows)}
    for row in rows:
        middle = place[row.name]
        for name in row.inputs:
            if name in place:
                yield _arc(place[name], middle)
        yield _operation(row, middle)


def _arc(start: int, end: int) -> str:
    """Longer arcs bulge further to the left."""
    left = ARCS - 8 - min(8 * sqrt(abs(end - start) / ROW), ARCS - 20)
    return f'<path d="M{ARCS - 8} {start}C{left:.0f} {start} {left:.0f} {end} {ARCS - 8} {end}"/>'


def _operation(row: Row, middle: int) -> str:
    size = 4 if row.kind == "view" else 8
    square = (
        f'<rect x="{ARCS - size // 2}" y="{middle - size // 2}" width="{size}" height="{size}" '
        f'fill="{COLOURS[row.kind]}"/>'
    )
    title = f"{row.name}: {row.result}; {row.flop} FLOPs, {row.bytes} bytes, {row.phase}"
    shade = "back" if row.phase == "backward" else "fore"
    texts = (
        _text(ARCS + 12, middle + 4, _short(row.target, 52), shade),
        _text(ARCS + 380, middle + 4, _short(row.result, 62), shade),
        _text(ARCS + 820, middle + 4, _short(row.module, 24), shade),
    )
    return f'<g class="{row.kind}"><title>{escape(title)}</title>{square}{"".join(texts)}</g>'


def _text(x: int, y: int, text: str, style: str) -> str:
    return f'<text x="{x}" y="{y}" class="{style}">{escape(text)}</text>'


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
