"""What commands print with --json against their types, and the published schemas against these."""

import json
from pathlib import Path
from typing import Any

import pytest

from mist.plans.objectives import Candidate
from mist.report.explanation import explanation_json
from mist.report.gpu_count_tables import candidates_json
from mist.report.json_schemas import PLAN, RESULTS, json_schema
from mist.report.plan_report import sheet_of
from mist.report.plan_tables import check_json, plan_json
from mist.report.side_by_side import side_by_side_json, subject_of_sheet
from tests.report.json_faults import faults_of
from tests.report.test_explanation import EXPLAINED
from tests.sample_plans import HOST, LIMITS, sample_plan

SCHEMAS = Path(__file__).parents[2] / "docs" / "schema"


def printed(schema: str, data: dict[str, Any]) -> dict[str, Any]:
    """As it is read again from what was printed."""
    found: dict[str, Any] = json.loads(json.dumps({"schema": schema, **data}))
    return found


def plan_result() -> dict[str, Any]:
    plan = sample_plan()
    candidate = Candidate(
        num_gpus=8,
        cluster="dgx-h100",
        device="h100-sxm",
        price_usd=2.0,
        price_source="--price",
        estimate=plan.estimate,
        why="",
    )
    found = plan_json(plan, {"search": 1.5}, HOST, ["a note"])
    rows = candidates_json([candidate], 0, 1e9)
    return {**found, "candidates": rows, "explanation": explanation_json(EXPLAINED)}


RESULTS_BY_NAME = {
    PLAN: plan_result(),
    "mist.check/1": check_json(sample_plan(), LIMITS, HOST, ["a note"]),
    "mist.compare/1": side_by_side_json([subject_of_sheet("a", "plan", sheet_of(sample_plan()))]),
    "mist.report/1": {"files": ["a.html"], "verdict": ["FITS"]},
}


@pytest.mark.parametrize("name", RESULTS_BY_NAME)
def test_a_result_is_what_its_schema_says(name: str) -> None:
    assert faults_of(printed(name, RESULTS_BY_NAME[name])) == ""


@pytest.mark.parametrize("name", RESULTS_BY_NAME)
def test_a_field_too_many_and_one_too_few_are_faults(name: str) -> None:
    right = printed(name, RESULTS_BY_NAME[name])
    assert "surprise" in faults_of({**right, "surprise": 1})
    *_, last = (key for key in right if key not in ("schema", "explanation", "overrides"))
    assert last in faults_of({key: value for key, value in right.items() if key != last})


@pytest.mark.parametrize("name", [PLAN, *RESULTS])
def test_the_published_schema_is_that_of_the_code(name: str) -> None:
    """`make docs` writes them."""
    published = json.loads((SCHEMAS / f"{name.replace('/', '-')}.json").read_text())
    assert published == json.loads(json.dumps(json_schema(name)))


def test_no_schema_is_published_that_no_command_has() -> None:
    names = {f"{name.replace('/', '-')}.json" for name in (PLAN, *RESULTS)}
    assert {path.name for path in SCHEMAS.glob("*.json")} == names
