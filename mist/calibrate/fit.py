"""Constants that bring predictions to measurements: damped Gauss-Newton in their logarithms.

    least  sum of w_i * softL1(log(predicted_i / measured_i))  +  (x - m)' P (x - m) / 2

over the logarithms x of the constants, between bounds. Errors well above `SOFTNESS` count linearly,
so that single bad runs do not decide. What is known of a constant beforehand is a normal
distribution of its logarithm with mean m and precision P: the constants found are then those of the
largest posterior density, and the curvature there gives their covariance (Laplace).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Values = Mapping[str, float]

SOFTNESS: Final = 0.05
STEP: Final = 0.05  # of a logarithm, for slopes
LONGEST_MOVE: Final = 0.7
MAX_STEPS: Final = 12
MAX_TRIES: Final = 6
GAIN: Final = 1e-4  # relative; less ends the search


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Where a constant starts, and between which values it may end.

    `width`: standard deviation of its logarithm around that of the start, as known beforehand;
    infinite where nothing is.
    """

    start: float
    least: float
    most: float
    width: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    """What is known of the logarithms of K constants before any run.

    `mean` [K], `precision` [K, K] (the inverse of their covariance), bounds `low` and `high` [K].
    """

    names: tuple[str, ...]
    mean: Floats
    precision: Floats
    low: Floats
    high: Floats

    def loss(self, point: Floats) -> float:
        """Half the squared distance in standard deviations, on the scale of `loss`."""
        off = point - self.mean
        return float(off @ self.precision @ off / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Posterior:
    """The constants after the runs: logarithms [K], their covariance [K, K], and errors [N]."""

    names: tuple[str, ...]
    point: Floats
    covariance: Floats
    errors: Floats

    @property
    def values(self) -> dict[str, float]:
        """The constants by name."""
        return dict(zip(self.names, np.exp(self.point).tolist(), strict=True))


def prior_of(constants: Mapping[str, Range]) -> Prior:
    """Constants that are known independently of each other."""
    mean, low, high = (
        np.log([getattr(each, end) for each in constants.values()])
        for end in ("start", "least", "most")
    )
    width = np.array([each.width for each in constants.values()])
    return Prior(
        names=tuple(constants), mean=mean, precision=np.diag(width**-2.0), low=low, high=high
    )


def loss(errors: Floats, weights: Floats | float = 1.0) -> float:
    """Soft-L1 of log errors."""
    return float(np.sum(weights * (np.sqrt(1 + (errors / SOFTNESS) ** 2) - 1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """Runs as functions of the logarithms of the constants.

    `errors` [N]: log(predicted / measured). `slopes` [N, K]: of the errors; none for finite
    differences, one prediction of all runs for each constant. `weights` [N]: how much each counts.
    """

    errors: Callable[[Floats], Floats]
    slopes: Callable[[Floats, Floats], Floats] | None = None
    weights: Floats | float = 1.0


def fitted(runs: Runs, prior: Prior) -> Posterior:
    """The constants of the largest posterior density, searched for from the prior's mean."""
    point = prior.mean
    errors, damping = runs.errors(point), 1e-2
    for _ in range(MAX_STEPS):
        move = _step(runs, point, errors, prior)
        before = loss(errors, runs.weights) + prior.loss(point)
        for _ in range(MAX_TRIES):
            tried = np.clip(point + move(damping), prior.low, prior.high)
            after = runs.errors(tried)
            if loss(after, runs.weights) + prior.loss(tried) < before * (1 - GAIN):
                point, errors, damping = tried, after, damping / 3
                break
            # Levenberg-Marquardt: a failed step is tried again, shorter and nearer to steepest
            # descent.
            damping *= 4
        else:
            break
    normal, _ = _normal(runs, point, errors, prior)
    # A constant that nothing is known of, before or after, has no variance: a small one in place
    # of a matrix that has no inverse.
    covariance = np.asarray(np.linalg.pinv(normal / SOFTNESS**2, hermitian=True), np.float64)
    return Posterior(names=prior.names, point=point, covariance=covariance, errors=errors)


def _slopes(runs: Runs, point: Floats, errors: Floats) -> Floats:
    if runs.slopes is not None:
        return runs.slopes(point, errors)
    return np.array(
        [(runs.errors(point + STEP * unit) - errors) / STEP for unit in np.eye(len(point))]
    ).T


def _normal(runs: Runs, point: Floats, errors: Floats, prior: Prior) -> tuple[Floats, Floats]:
    """The normal equations around a point, times SOFTNESS squared: their matrix and right side."""
    slopes = _slopes(runs, point, errors)
    # The weights of soft-L1: runs with large errors count less.
    weights = runs.weights / np.sqrt(1 + (errors / SOFTNESS) ** 2)
    pulls = SOFTNESS**2 * prior.precision
    normal = (slopes.T * weights) @ slopes + pulls
    return normal, (slopes.T * weights) @ errors + pulls @ (point - prior.mean)


def _step(runs: Runs, point: Floats, errors: Floats, prior: Prior) -> Callable[[float], Floats]:
    """The move from a point as a function of the damping."""
    normal, pull = _normal(runs, point, errors, prior)

    def move(damping: float) -> Floats:
        # The small term keeps a constant without influence from making the matrix singular.
        scaled = normal + damping * np.diag(np.diag(normal) + 1e-6)
        return np.clip(np.linalg.solve(scaled, -pull), -LONGEST_MOVE, LONGEST_MOVE)

    return move


def of_names(errors_at: Callable[[Values], Floats], names: Sequence[str]) -> Runs:
    """Runs whose errors are asked for by the names of constants."""
    return Runs(errors=lambda point: errors_at(dict(zip(names, np.exp(point), strict=True))))
