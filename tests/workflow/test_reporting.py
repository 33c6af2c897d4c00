"""What a report judges anew, against the plan file that it is about."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mist.plans.file import save_plan
from mist.plans.objectives import Objective
from mist.plans.plan import Plan
from mist.plans.search_space import NO_RATIOS, SearchSpace
from mist.report.plan_report import Judgement
from mist.workflow.plan_model import TRUSTED
from mist.workflow.planning import Effort, make_plan
from mist.workflow.reporting import MOST_POINTS, report_of
from mist.workflow.request import Question
from tests.toys import toy_graph
from tests.workflow.answering import answer_with

QUESTION = Question(model="toy.py", num_gpus=16, seq_len=2048, global_batch=32)
# A search of a second: what is found does not matter.
SPACE = SearchSpace(pp=(1, 2), tp=(1, 2), chunks=(1,), offload=NO_RATIOS)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Judgement, str]:
    """A plan, what its report judges, and its sentence on the cost."""
    path = tmp_path_factory.mktemp("report") / "plan.yaml"
    with pytest.MonkeyPatch.context() as patch:
        answer_with(toy_graph((8,), hidden=4096), patch)
        plan = make_plan(QUESTION, SPACE).plan
        save_plan(plan, path)
        report = report_of(path, price="2", access=TRUSTED)
    assert report.judgement is not None
    assert report.plan.estimate == plan.estimate
    return plan, report.judgement, report.sheet.cost


def test_paces_sum_to_the_stages_of_the_plan(reported: tuple[Plan, Judgement, str]) -> None:
    plan, known, _ = reported
    for pace, stage in zip(known.paces, plan.estimate.stages, strict=True):
        forward_s, backward_s = sum(pace.forward_s.values()), sum(pace.backward_s.values())
        # Estimates carry six digits.
        assert forward_s + backward_s == pytest.approx(stage.stable_s, rel=1e-5)
        assert pace.once_s == pytest.approx(stage.delta_s, rel=1e-4)
        # Products take twice as long backward; what is memory-bound, about once to twice.
        assert 1.0 < pace.backward_s["compute"] / pace.forward_s["compute"] < 2.2


def test_draws_are_those_of_the_plan(reported: tuple[Plan, Judgement, str]) -> None:
    plan, known, _ = reported
    robust = plan.robustness
    assert robust is not None
    steps = known.draws[0].steps_s
    assert len(steps) == robust.num_draws
    assert float(np.median(steps)) == pytest.approx(robust.median_step_s, rel=1e-5)
    assert max(steps) == pytest.approx(robust.worst_step_s, rel=1e-5)


def test_the_plan_is_among_the_ways_to_run_each_stage(
    reported: tuple[Plan, Judgement, str],
) -> None:
    plan, known, _ = reported
    for points, stage in zip(known.stage_points, plan.estimate.stages, strict=True):
        own = points[0]
        assert own.words == "the plan"
        assert own.stable_s == pytest.approx(stage.stable_s, rel=1e-5)
        assert own.peak_bytes == pytest.approx(stage.peak_bytes, abs=1)
        # 4 ZeRO levels x (1 + 4 + 4 mixes of memory levels) x 3 shares of the optimizer.
        assert len(points) == 1 + 108


def test_what_is_better_never_slows_the_plan(reported: tuple[Plan, Judgement, str]) -> None:
    plan, known, _ = reported
    first, *others = known.what_ifs
    assert first.tokens_per_s == pytest.approx(plan.estimate.tokens_per_s)
    by_change = {each.change: each for each in others}
    assert "twice the bandwidth between nodes" in by_change
    for each in others[:-1]:
        assert each.tokens_per_s >= first.tokens_per_s
        assert each.best_tokens_per_s >= each.tokens_per_s * (1 - 1e-5)
    half = by_change["half the sequence (1024)"]
    assert half.peak_bytes < first.peak_bytes


def test_a_plot_has_room_for_its_points(reported: tuple[Plan, Judgement, str]) -> None:
    _, known, _ = reported
    assert 10 < len(known.points) <= MOST_POINTS


def test_the_cost_follows_from_the_price(reported: tuple[Plan, Judgement, str]) -> None:
    plan, _, cost = reported
    # 16 GPUs at $2 per hour, over the tokens of an hour.
    usd = 16 * 2 / 3600 / plan.estimate.tokens_per_s * 1e6
    digits = f"{usd:.3g}"
    assert cost.startswith(f"${digits}") and "--price" in cost


@pytest.mark.slow
def test_a_step_of_one_gpu_has_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(toy_graph((2,)), monkeypatch)
    path = tmp_path / "plan.yaml"
    nominal = Effort(objective=Objective.NOMINAL)
    save_plan(make_plan(replace(QUESTION, num_gpus=1), SPACE, nominal).plan, path)
    known = report_of(path, access=TRUSTED).judgement
    assert known is not None
    assert not [each for each in known.what_ifs if "nodes" in each.change]
