"""Accuracy on published runs, where their file lies beside the checkout: bars not to be lost.

Each is of the calibrated predictions: median and 90th percentile of the error of a step's time, and
what is lost by choosing by them.
"""

from functools import cache

import pytest

from mist.validate.results import Score
from mist.workflow.validating import validate
from tests.platform.samples import PUBLISHED

RUNS, STAGES = PUBLISHED / "measured_runs_dev.csv", PUBLISHED / "mist_l4_stages.csv"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not RUNS.is_file(), reason=f"no {RUNS.name}: it does not ship"),
]
TIMES = {
    "hf-playbook-sweep": (0.07, 0.25),
    "hagemann23": (0.04, 0.11),
    "llm-foundry": (0.05, 0.13),
    "vtrain-single": (0.07, 0.18),
    "torchtitan": (0.08, 0.20),
    "mist-l4": (0.08, 0.16),
    "sc21-megatron": (0.03, 0.08),
}
RANKINGS = {
    "hagemann23": (0.061, 0.70, 0.55),
    "vtrain-single": (0.04, 0.80, 0.2),
    "hf-playbook-sweep": (0.2, 0.65, 0.2),
}


@cache
def scores() -> dict[str, Score]:
    found = validate(RUNS, STAGES, calibrated=True, progress=lambda message: None)
    return {score.source: score for score in found.scores}


@pytest.mark.parametrize("source", TIMES)
def test_step_times(source: str) -> None:
    time, (median, p90) = scores()[source].time, TIMES[source]
    assert time is not None
    assert time.median <= median and time.p90 <= p90, time


@pytest.mark.parametrize("source", RANKINGS)
def test_choices(source: str) -> None:
    score, (regret, tau, of_naive) = scores()[source], RANKINGS[source]
    assert score.ranking is not None and score.naive is not None
    assert score.ranking.mean_regret <= regret
    assert score.ranking.mean_regret <= of_naive * score.naive.mean_regret
    assert score.ranking.tau >= tau


def test_what_fits() -> None:
    score = scores()["hagemann23"]
    assert score.precision is not None and score.recall is not None
    assert score.precision >= 0.94 and score.recall >= 0.96
    kept = scores()["hf-playbook-sweep"].kept_ratio
    assert kept is not None and kept >= 0.975


def test_peaks_of_memory() -> None:
    assert (memory := scores()["torchtitan"].memory) is not None and memory.median <= 0.05
    assert (stages := scores()["mist-l4"].stage_memory) is not None and stages.median <= 0.05
