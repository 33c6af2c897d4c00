"""The fit finds constants that made the data, within bounds, and lets no single run decide."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mist.calibrate.fit import (
    SOFTNESS,
    Posterior,
    Range,
    Runs,
    fitted,
    loss,
    of_names,
    prior_of,
)
from mist.calibrate.logs import read_log
from mist.errors import InputError

SIZES = np.array([[1.0, 8.0], [4.0, 2.0], [9.0, 1.0], [3.0, 3.0], [0.5, 7.0], [6.0, 5.0]])
TRUTH = {"a": 1.7, "b": 0.4}
WIDE = {"a": Range(start=1.0, least=0.1, most=10.0), "b": Range(start=1.0, least=0.1, most=10.0)}


def seconds(values: Mapping[str, float]) -> NDArray[np.float64]:
    """Two parts that add up, and a floor that one of them may hide behind."""
    return np.maximum(SIZES @ np.array([values["a"], values["b"]]), 2.0)


def errors_of(
    measured: NDArray[np.float64],
) -> Callable[[Mapping[str, float]], NDArray[np.float64]]:
    return lambda values: np.log(seconds(values) / measured)


def fit(
    errors_at: Callable[[Mapping[str, float]], NDArray[np.float64]], ranges: Mapping[str, Range]
) -> Posterior:
    return fitted(of_names(errors_at, tuple(ranges)), prior_of(ranges))


def test_constants_are_recovered() -> None:
    found = fit(errors_of(seconds(TRUTH)), WIDE)
    assert found.values == pytest.approx(TRUTH, rel=1e-3)
    assert loss(found.errors) < 1e-4


def test_one_bad_run_does_not_decide() -> None:
    measured = seconds(TRUTH) * np.array([1, 1, 1, 1, 1, 8.0])
    found = fit(errors_of(measured), WIDE).values
    assert found == pytest.approx(TRUTH, rel=0.05)


def test_what_is_known_beforehand_is_weighed_by_the_number_of_runs() -> None:
    """Normal errors and a normal prior: the posterior mean is known in closed form."""
    count, off, width = 4, 0.02, 0.03  # small errors, where soft-L1 is a square
    found = fit(
        lambda values: np.full(count, np.log(values["a"]) - off),
        {"a": Range(start=1.0, least=0.5, most=2.0, width=width)},
    )
    runs, before = count / SOFTNESS**2, 1 / width**2
    # 1 % of the shift: what the square leaves out of soft-L1 at errors of a tenth of its softness.
    assert np.log(found.values["a"]) == pytest.approx(off * runs / (runs + before), rel=0.03)
    # And its variance: the inverse of the sum of precisions.
    assert found.covariance[0, 0] == pytest.approx(1 / (runs + before), rel=0.1)


def test_a_constant_without_runs_stays_where_it_was_expected() -> None:
    known = {**WIDE, "c": Range(start=1.3, least=0.5, most=4.0, width=0.2)}
    found = fit(errors_of(seconds(TRUTH)), known).values
    assert found["c"] == pytest.approx(1.3) and found["a"] == pytest.approx(TRUTH["a"], rel=1e-3)


def test_a_run_of_weight_two_is_two_runs() -> None:
    errors = errors_of(seconds(TRUTH) * 1.02)
    twice = Runs(
        errors=lambda point: np.tile(errors(dict(zip(WIDE, np.exp(point), strict=True))), 2)
    )
    once = Runs(errors=of_names(errors, tuple(WIDE)).errors, weights=np.full(len(SIZES), 2.0))
    known = prior_of({name: replace(each, width=0.3) for name, each in WIDE.items()})
    assert fitted(twice, known).point == pytest.approx(fitted(once, known).point)


def test_a_constant_stays_within_its_bounds() -> None:
    bounds = {**WIDE, "a": Range(start=1.0, least=0.5, most=1.2)}
    found = fit(errors_of(seconds(TRUTH)), bounds).values
    assert found["a"] == pytest.approx(1.2)


def log(path: Path, times: list[object]) -> Path:
    path.write_text(json.dumps({"steps": [{"step": i, "seconds": t} for i, t in enumerate(times)]}))
    return path


def test_the_first_steps_of_a_log_are_left_out(tmp_path: Path) -> None:
    assert read_log(log(tmp_path / "a.json", [30.0, 9.0, 1.0, 2.0, 3.0])).step_s == 2.0
    assert read_log(log(tmp_path / "b.json", [3.0, 1.0])).step_s == 2.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "is no log of a run"),
        ("not json", "is no log of a run"),
        ('{"steps": []}', "has no steps with seconds above 0"),
        ('{"steps": [{"seconds": 0}]}', "has no steps with seconds above 0"),
        ('{"steps": [{"seconds": "soon"}]}', "is no log of a run"),
    ],
)
def test_what_is_no_log_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_log(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_log(tmp_path / "none.json")
