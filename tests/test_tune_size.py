"""The work of whole searches, counted, not timed, on two golden jobs; joins: milp/test_size.py.

Seconds are measured by benchmarks/search.py. What is counted here is what they depend on: groups
whose bound does not rule them out, stages priced, and points of frontiers.
"""

import pytest

from mist.plans.search_space import SPACES
from mist.search.tune import tune
from mist.symbolic.load_programs import quiet
from mist.workflow.request import limits_of, prepare
from tests.golden import JOBS, ROOT

# Golden job and space: what the search took when this was written.
SEARCHES = {
    ("gpt2-xl-2xl4", "paper"): (
        {"groups_solved": 12, "stages_evaluated": 1_082_662, "points": 852}
    ),
    ("gpt2-xl-8xa100-sxm-40", "whole"): (
        {"groups_solved": 55, "stages_evaluated": 5_372_480, "points": 4_247}
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "space"), SEARCHES)
def test_work_does_not_double(name: str, space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    job = prepare(JOBS[name])  # the trace of tests/test_golden.py
    limits = limits_of(job, JOBS[name])
    found = tune(
        job, SPACES[space], limits=limits, num_alternatives=5, progress=quiet, method="dp"
    ).statistics
    taken = SEARCHES[name, space]
    assert {key: found[key] for key in taken if found[key] > 2 * taken[key]} == {}
