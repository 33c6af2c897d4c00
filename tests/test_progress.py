"""Progress of long work: a few lines, however many pieces there are."""

import pytest

from mist.plans.plan import Limits
from mist.plans.search_space import SearchSpace
from mist.progress import is_due
from mist.search.tune import tune
from tests.toys import toy_graph, toy_job


@pytest.mark.parametrize(
    ("total", "reports"),
    [(1, [1]), (3, [1, 2, 3]), (5, [1, 2, 3, 4, 5]), (20, [4, 8, 12, 16, 20])],
)
def test_when_a_report_is_due(total: int, reports: list[int]) -> None:
    assert [done for done in range(1, total + 1) if is_due(done, total)] == reports


@pytest.mark.parametrize("total", [11, 97, 366, 12_345])
def test_five_reports_and_the_last_at_the_end(total: int) -> None:
    reports = [done for done in range(1, total + 1) if is_due(done, total)]
    assert len(reports) == 5
    assert reports[-1] == total


def test_a_search_of_many_groups_reports_five_times() -> None:
    lines: list[str] = []
    found = tune(
        toy_job(toy_graph((6,)), 8, global_batch=64),
        SearchSpace(),
        limits=Limits(device_bytes=80e9, host_bytes=1e12),
        num_alternatives=3,
        progress=lines.append,
    )
    assert found.statistics["groups"] > 30
    assert len(lines) == 5
    assert lines[-1].startswith(f"group {found.statistics['groups']} of ")
