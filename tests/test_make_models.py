"""docs/models.md has the families that its script traces, and what a trace finds today."""

import re

import pytest

from mist.model.summary import Lengths
from tests import make_models

ROW = r"(?m)^\| .*\|$"
NEXT = "run `make models`"


def rows() -> dict[str, str]:
    """The first table of the page, by model."""
    table = make_models.PAGE.read_text().split(make_models.COSTS_HEAD)[0]
    found = {line.split(" | ")[0].removeprefix("| "): line for line in re.findall(ROW, table)}
    return {name: line for name, line in found.items() if name != "model"}


def test_the_page_has_every_family() -> None:
    assert list(rows()) == list(make_models.sources()), NEXT


def test_a_row_is_up_to_date() -> None:
    """Of the fastest one; the seconds are those of another machine."""
    graph, _ = make_models.traced(make_models.sources()["my-transformer"])
    assert rows()[graph.name].startswith(f"| {make_models.row(graph)} | "), NEXT
    assert make_models.costs(graph) in make_models.PAGE.read_text(), NEXT


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        (Lengths(), "all"),
        (Lengths(first=512, last=512), "512"),
        (Lengths(first=257, last=511), "all from 257 to 511"),
        (Lengths(first=64, last=4096, multiple=64), "multiples of 64 to 4096"),
    ],
)
def test_lengths_in_words(lengths: Lengths, words: str) -> None:
    assert make_models.words(lengths) == words
