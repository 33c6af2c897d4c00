"""The pool of a robust choice: which searches it is of."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from mist.errors import Infeasible
from mist.plans.search_space import SearchSpace
from mist.search.robust_choice import pessimistic_job
from mist.search.tune import Tuned, groups_within, tune
from mist.search.visits import Visit, listed_groups, priced_anew
from mist.symbolic.job import Job
from mist.workflow import robust_planning
from mist.workflow.robust_planning import Robust, chosen_robustly
from tests.fast_cases import first_fast
from tests.search.test_robust_choice import LIMITS, job


def host_link(one: Job) -> float:
    return one.platform.device.host_to_device_bytes_per_s.value


@pytest.mark.parametrize(
    ("tolerance_ratio", "shares"),
    first_fast(
        [
            (0.0, [1.0, 0.75, 1.0]),  # only the fastest is within the tolerance
            # What suits the worse ends is, too; then the group of the choice alone.
            (9.0, [1.0, 1.0]),
        ],
        width=2,
    ),
)
def test_less_is_feared_where_the_worse_ends_give_nothing(
    tolerance_ratio: float, shares: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    space, links, asked = SearchSpace(), [], []
    tuned = tune(job(), space, limits=LIMITS, num_alternatives=5, progress=lambda _: None)

    def watched(
        one: Job, *_: object, listed: Sequence[Visit] = tuned.listed, **__: object
    ) -> Tuned:
        links.append(host_link(one))
        asked.append([visit.group for visit in listed])
        return tuned  # whatever the platform: what is asked for is what is tested

    monkeypatch.setattr(robust_planning, "tune", watched)
    monkeypatch.setattr(robust_planning, "groups_within", lambda *_: tuned.listed)
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
    within = [*groups_within(job(), space, tuned.listed, within_s)]
    left = [visit for visit in tuned.listed if all(visit is not other for other in within)]
    assert within and left and any(visit.fits_from_s for visit in left)
    for visit in left:
        try:
            own = tune(job(), space, limits=LIMITS, num_alternatives=0, progress=lambda _: None,
                       listed=[visit])  # fmt: skip
        except Infeasible:
            continue
        assert own.best.step_s > within_s
        assert own.best.step_s >= visit.fits_from_s


def test_groups_priced_anew_are_those_listed_with_the_other_figures() -> None:
    space = SearchSpace()
    here, there = (
        listed_groups(one, space, LIMITS, lambda: False, ())[0]
        for one in (job(), pessimistic_job(job()))
    )
    for anew, known in zip(priced_anew(pessimistic_job(job()), space, here), there, strict=True):
        assert anew.bound_s == known.bound_s
        for name, term in known.group.strategies.terms.items():
            assert (anew.group.strategies.terms[name] == term).all()
