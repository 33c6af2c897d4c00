"""The pool of a robust choice: which searches it is of."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from mist.errors import Infeasible
from mist.pareto.strategies import Group
from mist.plans.search_space import SearchSpace
from mist.search.robust_choice import pessimistic_job
from mist.search.tune import Tuned, groups_within, tune
from mist.symbolic.job import Job
from mist.workflow import robust_planning
from mist.workflow.robust_planning import Robust, chosen_robustly
from mist.workflow.robust_planning import _name as group_name
from tests.search.test_robust_choice import LIMITS, job


def host_link(one: Job) -> float:
    return one.platform.device.host_to_device_bytes_per_s.value


@pytest.mark.parametrize(
    ("tolerance_ratio", "shares"),
    [
        # What suits the worse ends is within the tolerance; then the group of the choice alone.
        pytest.param(9.0, [1.0, 1.0], marks=pytest.mark.slow),
        (0.0, [1.0, 0.75, 1.0]),  # only the fastest is
    ],
)
def test_less_is_feared_where_the_worse_ends_give_nothing(
    tolerance_ratio: float, shares: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    space, links, asked = SearchSpace(), [], []
    tuned = tune(job(), space, limits=LIMITS, num_alternatives=5, progress=lambda _: None)

    def watched(
        one: Job, *_: object, is_worth: Callable[[Group], bool] = lambda _: True, **__: object
    ) -> Tuned:
        links.append(host_link(one))
        asked.append([visit.group for visit in tuned.listed if is_worth(visit.group)])
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
    (own_group,) = asked[-1]
    assert own_group.num_stages == len(tuned.best.stages)


@pytest.mark.slow  # a search of each group by itself
def test_groups_that_are_left_out_have_nothing_within_the_tolerance() -> None:
    space, most_ratio = SearchSpace(refines=False), 1.03
    tuned = tune(job(), space, limits=LIMITS, num_alternatives=0, progress=lambda _: None)
    within_s = most_ratio * tuned.best.step_s
    within = {group_name(one) for one in groups_within(job(), space, tuned.listed, within_s)}
    left = {group_name(visit.group) for visit in tuned.listed} - within
    assert within and left
    for name in left:
        try:
            own = tune(job(), space, limits=LIMITS, num_alternatives=0, progress=lambda _: None,
                       is_worth=lambda one, name=name: group_name(one) == name)  # fmt: skip
        except Infeasible:
            continue
        assert own.best.step_s > within_s
