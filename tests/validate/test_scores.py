"""Scores against their definitions, on runs made by hand."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from mist.validate.baselines import constant_utilisation, flops_and_bubble
from mist.validate.results import RunPrediction
from mist.validate.scores import errors, feasibility, is_regular, kendall, regret, scored
from tests.validate.rows import predicted


def test_errors() -> None:
    found = errors([(1.1, 1.0), (0.8, 1.0), (3.0, 2.0), (None, 1.0), (1.0, None)])
    assert found is not None
    assert (found.count, found.median, found.signed) == pytest.approx((3, 0.2, 0.1))
    assert found.p90 == pytest.approx(0.2 + 0.8 * 0.3)
    assert errors([]) is None


def test_regret_is_of_the_first_choice_and_ties_share() -> None:
    measured = np.array([2.0, 1.0, 4.0])
    assert regret(np.array([1.0, 2.0, 3.0]), measured) == 1.0
    assert regret(np.array([1.0, 1.0, 3.0]), measured) == 0.5
    assert regret(np.array([3.0, 2.0, 1.0]), measured, picks=2) == 0.0


def test_kendall_counts_pairs() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        a, b = generator.integers(0, 5, (2, 8)).astype(float)
        signs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in combinations(range(8), 2)]
        untied = [sum(pair[side] != 0 for pair in signs) for side in (0, 1)]
        expected = sum(x * y for x, y in signs) / np.sqrt(untied[0] * untied[1])
        assert kendall(a, b) == pytest.approx(expected)
    assert kendall(np.ones(3), np.arange(3.0)) == 0.0


def test_feasibility_is_of_runs_out_of_memory() -> None:
    rows = [predicted(1.0, outcome=outcome) for outcome in ("oom", "oom", "ok", "crashed_or_oom")]
    said = [False, True, False, False]
    rows = [type(row)(**{**_fields(row), "fits": fits})
            for row, fits in zip(rows, said, strict=True)]  # fmt: skip
    assert feasibility(rows) == (0.5, 0.5)
    assert feasibility(rows[2:]) == (None, None)


def _fields(row: object) -> dict[str, object]:
    return {name: getattr(row, name) for name in row.__slots__}  # type: ignore[attr-defined]


def test_what_is_refused_counts_and_was_wrong_where_it_ran() -> None:
    rows = [
        RunPrediction(run=replace(predicted(1.0).run, run_id=outcome, outcome=outcome),
                      status="refused", fits=False)
        for outcome in ("ok", "oom", "crashed_or_oom")
    ]  # fmt: skip
    (score,) = scored(rows, {})
    assert (score.predicted, score.precision, score.recall) == (3, 0.5, 1.0)
    assert (score.time, score.kept_ratio) == (None, 0.0)


def test_stalled_and_full_runs_are_not_judged_by_time() -> None:
    assert is_regular(predicted(1.0))
    assert not is_regular(predicted(1.0, mfu=4.0))
    assert not is_regular(predicted(1.0, peak_memory_gib=75.0))


def test_a_source_is_scored_by_its_good_runs() -> None:
    rows = [
        predicted(1.0 + 0.1 * i, run_id=str(i), step_time_s=1.0 + 0.2 * i, ranking_group="g")
        for i in range(4)
    ]
    rows.append(predicted(9.0, run_id="c", tier="C"))
    (score,) = scored(rows, {})
    assert (score.runs, score.predicted) == (5, 5)
    assert score.time is not None and score.time.count == 4
    assert score.ranking is not None
    assert (score.ranking.count, score.ranking.mean_regret, score.ranking.tau) == (1, 0.0, 1.0)


def test_baselines() -> None:
    rows = [predicted(1.0, run_id=str(i), n_gpus=8 * i, step_time_s=1.0 / i) for i in (1, 2, 4)]
    constant = constant_utilisation(rows)
    assert [constant[str(i)] for i in (1, 2, 4)] == pytest.approx([1.0, 0.5, 0.25])
    plain, piped = (flops_and_bubble([predicted(1.0, pp=pp, grad_accum=4)])["one"] for pp in (1, 3))
    assert piped / plain == pytest.approx(1 + 2 / 4)
