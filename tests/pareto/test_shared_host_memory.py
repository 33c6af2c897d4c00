"""Host memory that stages share: against every layout, and against equal shares."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from mist.errors import Infeasible
from mist.pareto.layouts import stage_plans
from mist.pareto.shared_host_memory import stages_per_node
from mist.pareto.strategies import divisors, groups
from mist.plans.plan import Layout, Limits, fullest_host_bytes
from mist.plans.schedules import step_time
from mist.plans.search_space import NO_RATIOS, SPACES, SearchSpace
from mist.plans.workload import ScheduleKind
from mist.search.tune import Tuned, tune
from mist.symbolic.job import Job
from mist.symbolic.pipeline_costs import stage_outputs
from tests.judging import outputs
from tests.sample_plans import stage_plan
from tests.test_tune import SCHEDULES, options_of
from tests.toys import toy_graph, toy_job

RATIOS = {**NO_RATIOS, "optimizer": (0.0, 0.5, 1.0), "activations": (0.0, 1.0)}
SPACE = SearchSpace(
    refines=False, pp=(2,), zero=(0, 3), offload=RATIOS, schedules=(ScheduleKind.ONE_F_ONE_B,)
)


def tuned(job: Job, limits: Limits, **options: object) -> Tuned | None:
    try:
        return tune(
            job, SPACE, limits=limits, num_alternatives=0, progress=lambda _: None,
            **options,  # type: ignore[arg-type]
        )  # fmt: skip
    except Infeasible:
        return None


def stages_of(job: Job, g: int, position: int, run: range) -> np.ndarray:
    """Stable and lone seconds, peak and host bytes of all that a stage may do: [4, options]."""
    names = ("stable_s", "lone_s", "peak_bytes", "host_bytes")
    found = []
    options = options_of(job, SPACE, SCHEDULES[1][0], 2, g, (position, 1), run)
    for option in (option for option in options if option.zero in SPACE.zero):
        other = replace(option, devices=(1 - position, 1))
        pipeline = (option, other) if position == 0 else (other, option)
        columns = outputs(
            job, Layout(stages=pipeline, num_micro_batches=g, schedule=SCHEDULES[1][0])
        )
        found.append([columns[name][position] for name in names])
    return np.array(found).reshape(-1, 4).T


def fastest(job: Job, all_limits: list[Limits]) -> list[tuple[float, ...]]:
    """The least step of two stages of one GPU within each limits, by trying every pair.

    With host memory shared, and with an equal share for each.
    """
    best: list[tuple[float, ...]] = [(math.inf, math.inf)] * len(all_limits)
    for g, cut in itertools.product(divisors(job.workload.global_batch), range(1, job.num_layers)):
        first = stages_of(job, g, 0, range(cut))[:, :, None]
        second = stages_of(job, g, 1, range(cut, job.num_layers))[:, None, :]
        stable, lone, peak, host = (
            np.stack(np.broadcast_arrays(*both), axis=-1)
            for both in zip(first, second, strict=True)
        )
        step_s = step_time(g, stable, lone)
        for at, limits in enumerate(all_limits):
            fits = (peak <= limits.device_bytes).all(axis=-1)
            together = fits & (host.sum(axis=-1) <= 2 * limits.host_bytes)
            apart = fits & (host <= limits.host_bytes).all(axis=-1)
            both = zip((together, apart), best[at], strict=True)
            best[at] = tuple(float(step_s[kept].min(initial=known)) for kept, known in both)
    return best


SLOW = [((3,), 2), ((1, 2), 4), ((2, 1), 4), ((2, 1), 2)]


@pytest.mark.parametrize(
    ("counts", "batch"), [((3,), 4), *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW)]
)
def test_sharing_equals_exhaustive_search(counts: tuple[int, ...], batch: int) -> None:
    """Where an equal share lets nothing fit, where it only slows, and where it does not bind."""
    job = toy_job(toy_graph(counts, vocab=16384, hidden=1024), 2, global_batch=batch)
    limits = [
        Limits(device_bytes=device, host_bytes=host)
        for device, host in itertools.product((0.85e9, 1.05e9, 1.25e9), (0.1e9, 0.11e9, 0.2e9))
    ]
    want, solvers = fastest(job, limits), set()
    for within, (together_s, apart_s) in zip(limits, want, strict=True):
        found = tuned(job, within)
        if found is None:
            assert math.isinf(together_s)
            continue
        assert found.best.step_s == pytest.approx(together_s, rel=1e-9)
        assert found.lower_bound_s == pytest.approx(together_s, rel=1e-6)  # of HiGHS
        assert found.shares_host is (together_s < apart_s)
        solvers.add(found.solver)
    assert any(together_s < apart_s for together_s, apart_s in want)
    if (counts, batch) == ((3,), 4):  # elsewhere the relaxation may keep the limit
        assert "milp" in solvers


def test_a_node_never_holds_more_than_its_memory() -> None:
    """Four stages on a node: some hold more than an equal share, together they keep the limit."""
    job = toy_job(toy_graph((8,), hidden=1024, vocab=1024), 4, global_batch=16)
    limits = Limits(device_bytes=0.8e9, host_bytes=0.05e9)
    space = SearchSpace(pp=(4,))
    found = tune(job, space, limits=limits, num_alternatives=0, progress=lambda _: None)
    plans = stage_plans(job, found.best)
    columns = stage_outputs(
        job,
        Layout(
            stages=plans,
            num_micro_batches=found.best.num_micro_batches,
            schedule=found.best.schedule,
        ),
    )
    held = columns["host_bytes"].tolist()
    assert found.shares_host
    assert max(held) > limits.host_bytes
    assert fullest_host_bytes(plans, held, 4) <= 4 * limits.host_bytes
    assert found.statistics["groups_shared"] > 0


def test_nothing_is_shared_where_host_memory_is_ample() -> None:
    job = toy_job(toy_graph((3,), vocab=512, hidden=1024), 2, global_batch=2)
    found = tuned(job, Limits(device_bytes=0.45e9, host_bytes=1e12))
    assert found is not None
    assert "groups_shared" not in found.statistics
    assert not found.shares_host


def test_a_search_cut_short_before_sharing_says_so() -> None:
    job = toy_job(toy_graph((3,), vocab=16384, hidden=1024), 2, global_batch=4)
    limits = Limits(device_bytes=0.9e9, host_bytes=0.25e9)
    whole, seen = tuned(job, limits), []
    num_groups = len(list(groups(job, SPACE)))

    def asked() -> int:
        """How often the clock was looked at: as each group is listed, then as it is tried."""
        seen.append(1)
        return len(seen)

    cut = tuned(job, limits, is_late=lambda: asked() > 2 * num_groups, is_over=lambda: asked() < 0)
    assert whole is not None
    assert cut is not None
    assert cut.lower_bound_s <= whole.best.step_s < cut.best.step_s


def test_who_shares() -> None:
    job = toy_job(toy_graph((8,)), 16)
    found = {
        (group.num_stages, group.sizes): stages_per_node(job, group)
        for group in groups(job, SPACES["whole"])
    }
    assert {num for (_, sizes), num in found.items() if len(sizes) > 1} == {1}
    assert [found[pp, (16 // pp,)] for pp in (1, 2, 4, 8)] == [1, 1, 2, 4]


def test_the_fullest_host() -> None:
    spans = [(0, 2), (2, 4), (6, 2)]
    stages = [stage_plan(devices=span) for span in spans]
    assert fullest_host_bytes(stages, [1.0, 5.0, 20.0], 4) == 2 * 5 + 2 * 20
    assert fullest_host_bytes(stages, [1.0, 5.0, 20.0], 8) == 2 + 20 + 40
