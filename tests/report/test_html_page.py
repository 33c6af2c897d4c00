"""The page: nothing from outside, everything of the plan in it, no text of a plan read as HTML."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from mist.plans.plan import ModelRef
from mist.report.html_page import page_of, pictures_of
from mist.report.plan_report import PlanReport
from mist.units import format_bytes, format_seconds
from tests.report.sample_reports import sample_report

MOST_BYTES = 3_000_000


class Elements(HTMLParser):
    """Start tags with their attributes, and the text of scripts by their order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data: list[str] = []
        self._in_data = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_data = dict(attrs).get("id") == "report"

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data.append(data)


@pytest.fixture(scope="module")
def report() -> PlanReport:
    return sample_report()


@pytest.fixture(scope="module")
def page(report: PlanReport) -> str:
    return page_of(report)


def test_nothing_is_loaded_from_anywhere(page: str) -> None:
    tags = Elements(page).tags
    links = {value for _, each in tags for name, value in each.items() if name in ("src", "href")}
    assert {link for link in links if link and not link.startswith("#")} == set()
    assert not {tag for tag, _ in tags} & {"link", "img", "iframe", "object", "base"}
    (policy,) = [each["content"] for tag, each in tags if "http-equiv" in each]
    assert policy is not None and policy.startswith("default-src 'none'")
    assert len(page.encode()) < MOST_BYTES


def test_every_link_leads_somewhere_and_names_are_unique(page: str) -> None:
    tags = Elements(page).tags
    names = [each["id"] for _, each in tags if "id" in each]
    assert len(names) == len(set(names))
    links = {str(each["href"])[1:] for tag, each in tags if tag == "a"}
    assert links <= set(names)


def test_every_picture_has_a_place_data_and_a_text(report: PlanReport, page: str) -> None:
    elements = Elements(page)
    data = json.loads("".join(elements.data))
    places = [each["data-picture"] for _, each in elements.tags if "data-picture" in each]
    pictures = pictures_of(report)
    assert places == [each.name for each in pictures] == [each["name"] for each in data["pictures"]]
    for picture, drawn in zip(pictures, data["pictures"], strict=True):
        assert len(drawn["columns"]["x1"]) == len(picture.shapes)
        assert f"{picture.title}, as text" in page


def test_the_figures_are_those_of_the_plan(report: PlanReport, page: str) -> None:
    estimate = report.plan.estimate
    text = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert format_seconds(estimate.step_s) in text
    assert format_bytes(max(stage.peak_bytes for stage in estimate.stages)) in text
    for other in (*report.plan.alternatives, *report.plan.excluded):
        assert other.layout in text
        assert other.reason in text
    for row in estimate.op_costs:
        assert row.source in text


def test_names_of_a_plan_are_text(report: PlanReport) -> None:
    name = "</script><script>alert(1)</script><b>@@script@@"
    model = ModelRef(source="x", name=name, params=1, fingerprint="sha256:1")
    sheet = replace(report.sheet, plan=replace(report.plan, model=model), notes=[name])
    known = report.judgement
    assert known is not None
    points = tuple(replace(point, layout=name) for point in known.points)
    hostile = PlanReport(sheet=sheet, judgement=replace(known, points=points))
    before, after = Elements(page_of(report)), Elements(page_of(hostile))
    assert [tag for tag, _ in before.tags if tag in ("script", "b")] == [
        tag for tag, _ in after.tags if tag in ("script", "b")
    ]
    json.loads("".join(after.data))


def test_a_plan_alone_has_the_pictures_that_it_gives(report: PlanReport) -> None:
    names = [each.name for each in pictures_of(PlanReport(sheet=report.sheet))]
    assert names == ["devices", "layers", "memory", "waterfall"]
