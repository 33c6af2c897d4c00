"""Re-planned, the golden plans are byte-identical; judged again, their predictions stand."""

import pytest

from mist.plans.file import dump_plan, load_plan
from mist.workflow.checking import check_plan
from tests.golden import JOBS, ROOT, golden, path_of


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


FAST = "llama3-8b-16xh100-sxm"
NAMES = [pytest.param(n, marks=[pytest.mark.slow] * (n != FAST)) for n in sorted(JOBS)]


@pytest.mark.parametrize("name", NAMES)
def test_plan_is_byte_identical(name: str) -> None:
    assert golden(name) == path_of(name).read_text(), "if meant: make golden, and show the diff"


@pytest.mark.parametrize("name", NAMES)
def test_plan_loads_saves_and_checks_unchanged(name: str) -> None:
    plan = load_plan(path_of(name))
    assert dump_plan(plan) == path_of(name).read_text()
    checked = check_plan(path_of(name))
    assert checked.fits
    assert not [note for note in checked.notes if note.startswith("profile")]
    assert checked.plan.estimate == plan.estimate


def test_every_golden_plan_has_its_job() -> None:
    assert {path.stem for path in (ROOT / "plans").glob("*.yaml")} == set(JOBS)
