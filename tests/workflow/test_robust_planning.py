"""The pool of a robust choice: which searches it is of."""

from dataclasses import replace

import pytest

from mist.plans.search_space import SearchSpace
from mist.search.robust_choice import pessimistic_job
from mist.search.tune import Tuned, tune
from mist.symbolic.job import Job
from mist.workflow import robust_planning
from mist.workflow.robust_planning import Robust, chosen_robustly
from tests.search.test_robust_choice import LIMITS, job


def host_link(one: Job) -> float:
    return one.platform.device.host_to_device_bytes_per_s.value


@pytest.mark.parametrize(
    ("tolerance_ratio", "shares"),
    [
        (9.0, [1.0]),  # what suits the worse ends is within the tolerance
        (0.0, [1.0, 0.75]),  # only the fastest is
    ],
)
def test_less_is_feared_where_the_worse_ends_give_nothing(
    tolerance_ratio: float, shares: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    space, links = SearchSpace(), []
    tuned = tune(job(), space, limits=LIMITS, num_alternatives=5, progress=lambda _: None)

    def watched(one: Job, *_: object, **__: object) -> Tuned:
        links.append(host_link(one))
        return tuned  # whatever the platform: what is asked for is what is tested

    monkeypatch.setattr(robust_planning, "tune", watched)
    how = Robust(
        progress=lambda _: None,
        can_load=lambda _: True,
        is_late=lambda: False,
        tolerance_ratio=tolerance_ratio,
    )
    slower = replace(tuned, best=replace(tuned.best, step_s=0.99 * tuned.best.step_s))
    chosen_robustly(job(), space, LIMITS, slower, how)
    own = host_link(job())
    assert [link for link in links if link != own] == [
        host_link(pessimistic_job(job(), share)) for share in shares
    ]
