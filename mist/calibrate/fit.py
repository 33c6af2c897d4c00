"""Constants that bring predictions to measurements: damped Gauss-Newton in their logarithms.

The sum of soft-L1 losses of log(predicted / measured) is minimised between bounds; errors well
above `SOFTNESS` count linearly, so that single bad runs do not decide. A constant that something is
known of beforehand has a width: its start is then the mean of a normal distribution of its
logarithm, and the constants found are those of the largest posterior density.
"""

import math
from collections.abc import Callable, Mapping
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


def loss(errors: Floats) -> float:
    """Soft-L1 of log errors."""
    return float(np.sum(np.sqrt(1 + (errors / SOFTNESS) ** 2) - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    """What is known of the logarithms of all constants before any run: means and widths."""

    mean: Floats
    width: Floats

    def loss(self, point: Floats) -> float:
        """Half the squared distance in widths, on the scale of `loss`."""
        return float(np.sum(((point - self.mean) / self.width) ** 2) / 2)


def fitted(
    errors_at: Callable[[Values], Floats], constants: Mapping[str, Range]
) -> tuple[dict[str, float], Floats]:
    """The constants that fit best, and the log errors that they leave.

    `errors_at`: log(predicted / measured) of every run at given constants.
    """
    names = list(constants)
    # Logarithms keep constants positive and make steps relative.
    point, low, high = (
        np.log([getattr(constants[name], end) for name in names])
        for end in ("start", "least", "most")
    )

    def errors(at: Floats) -> Floats:
        return errors_at(dict(zip(names, np.exp(at), strict=True)))

    prior = Prior(mean=point, width=np.array([each.width for each in constants.values()]))
    residuals, damping = errors(point), 1e-2
    for _ in range(MAX_STEPS):
        move = _step(errors, point, residuals, prior)
        for _ in range(MAX_TRIES):
            tried = np.clip(point + move(damping), low, high)
            after = errors(tried)
            before = loss(residuals) + prior.loss(point)
            if loss(after) + prior.loss(tried) < before * (1 - GAIN):
                point, residuals, damping = tried, after, damping / 3
                break
            # Levenberg-Marquardt: a failed step is tried again, shorter and nearer to steepest
            # descent.
            damping *= 4
        else:
            break
    return dict(zip(names, np.exp(point).tolist(), strict=True)), residuals


def _step(
    errors: Callable[[Floats], Floats], point: Floats, residuals: Floats, prior: Prior
) -> Callable[[float], Floats]:
    """The move from a point as a function of the damping."""
    slopes = np.array(
        # Finite differences, one prediction of all runs per constant.
        [(errors(point + STEP * unit) - residuals) / STEP for unit in np.eye(len(point))]
    ).T
    # The weights of soft-L1: runs with large errors count less.
    weights = 1 / np.sqrt(1 + (residuals / SOFTNESS) ** 2)
    normal, pull = (slopes.T * weights) @ slopes, (slopes.T * weights) @ residuals
    # `loss` of small errors is half their square over SOFTNESS squared: so is that of the prior.
    pulls = (SOFTNESS / prior.width) ** 2
    normal, pull = normal + np.diag(pulls), pull + pulls * (point - prior.mean)

    def move(damping: float) -> Floats:
        # The small term keeps a constant without influence from making the matrix singular.
        scaled = normal + damping * np.diag(np.diag(normal) + 1e-6)
        return np.clip(np.linalg.solve(scaled, -pull), -LONGEST_MOVE, LONGEST_MOVE)

    return move
