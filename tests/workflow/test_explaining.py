"""Searching again: more never slows the fastest plan, and a larger space neither."""

from dataclasses import replace
from itertools import pairwise

import pytest

from mist.plans.search_space import NO_RATIOS, SearchSpace
from mist.plans.space_ladder import LADDER
from mist.workflow.explaining import explanation
from mist.workflow.faster_links import faster_jobs
from mist.workflow.planning import make_plan
from mist.workflow.request import Question
from tests.toys import toy_graph, toy_job
from tests.workflow.answering import answer_with

QUESTION = Question(model="toy.py", num_gpus=8, gpu="l4", seq_len=2048, global_batch=16)


def narrow(space: SearchSpace) -> SearchSpace:
    """Few searches: what is found does not matter."""
    return replace(space, pp=(1, 2), tp=(1, 2), chunks=(1,), offload=NO_RATIOS, refines=False)


@pytest.mark.slow
def test_more_is_never_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(toy_graph((6,), hidden=2048), monkeypatch)
    space = narrow(SearchSpace())
    said: list[str] = []
    explained = explanation(QUESTION, make_plan(QUESTION, space), space, narrow, said.append)
    assert explained.now.step_s is not None
    names = [one.name for one in explained.marginals]
    assert names == [
        "1 GiB more memory per GPU",
        "10 % more bandwidth inside a node",
        "10 % more bandwidth to host memory",
        "one more node (16 GPUs)",
    ]
    for one in explained.marginals:
        assert one.step_s is not None
        # 1e-9: the same layout, its step summed in another order.
        assert one.tokens_per_s >= explained.now.tokens_per_s * (1 - 1e-9)
    steps = [one.step_s for one in explained.ladder if one.step_s is not None]
    assert len(steps) >= 5
    assert all(wider <= step * (1 + 1e-9) for step, wider in pairwise(steps))
    assert steps[-1] == pytest.approx(explained.now.step_s)
    assert len(said) == 1 + len(names) + len(LADDER)


@pytest.mark.slow
def test_a_batch_that_more_gpus_do_not_divide_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(toy_graph((4,)), monkeypatch)
    question = replace(QUESTION, num_gpus=8, global_batch=8)
    space = narrow(SearchSpace(dp=(8,)))
    explained = explanation(question, make_plan(question, space), space, lambda rung: space)
    last = explained.marginals[-1]
    assert last.step_s is None or last.words


def test_a_single_gpu_has_no_links_between_nodes() -> None:
    names = list(faster_jobs(toy_job(toy_graph((2,)), 1), 2.0))
    assert names == ["to host memory"]


def test_twice_the_bandwidth_halves_the_time_of_large_collectives() -> None:
    job = toy_job(toy_graph((2,)), 16)
    jobs = faster_jobs(job, 2.0)
    size = 2.0**30
    # Ends in a constant latency: at a GiB less than a tenth of the whole.
    for name, group, per_node in (("inside a node", 8, 8), ("between nodes", 16, 1)):
        known = float(job.laws.all_gather_s(size, group, per_node))
        faster = float(jobs[name].laws.all_gather_s(size, group, per_node))
        assert faster == pytest.approx(known / 2, rel=0.1)
