"""How far a measured step may lie from the predicted one, run by run.

The logarithm of measured over predicted steps is taken to have the standard deviation

    sqrt(g' C g + r^2)

    g [K]      how the logarithm of the predicted step changes with that of each constant
    C [K, K]   covariance of the logarithms of the constants, as the calibration has it
    r          what no constant explains

So a run that waits for a network that nobody measured is less sure than one that computes. Steps
have kinks: a host that is nearly as slow as the GPU costs nothing until it is slower. So g is a
difference over a standard deviation of each constant, and there are two: of what makes steps
longer, for the end above the prediction, and of what makes them shorter, for the one below.

The interval of eight of ten runs reaches from `low` deviations below to `high` above; both come
from runs of sources that were left out of the fit (`benchmarks/calibrations/fit.py`).
"""

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mist.platform.calibration import Calibration, scaled
from mist.platform.device import Device
from mist.platform.quantity import Quantity
from mist.platform.runtime import Runtime

TINY: Final = 1e-9  # in place of 0, to divide by

Floats = NDArray[np.float64]
LogSteps = Callable[[Mapping[str, Quantity]], Floats]


def deviations(
    steps: Floats, smaller: Floats, larger: Floats, covariance: Floats
) -> tuple[Floats, Floats]:
    """sqrt(g' C g) [N] below and above predicted steps.

    `steps` [N]: their logarithms. `smaller`, `larger` [K, N]: those where each constant is a
    standard deviation smaller or larger. `covariance`: C [K, K], or of each run [N, K, K].
    """
    each = np.broadcast_to(covariance, (len(steps), *covariance.shape[-2:]))
    widths = np.sqrt(np.einsum("nkk->kn", each)) + TINY
    forward, backward = (larger - steps) / widths, (steps - smaller) / widths
    rises = forward + backward > 0
    below, above = np.where(rises, backward, forward), np.where(rises, forward, backward)
    found = [np.sqrt(np.einsum("kn,nkl,ln->n", g, each, g)) for g in (below, above)]
    return found[0], found[1]


def expected_error(device: Device, runtime: Runtime) -> Quantity:
    """The relative error of a step to expect where no calibration says better."""
    figures = runtime.uncertainty
    return figures.step_ratio if device.is_measured else figures.step_unmeasured_device_ratio


def step_interval(
    known: Calibration | Quantity, figures: Mapping[str, Quantity], log_steps: LogSteps
) -> tuple[Floats, Floats]:
    """Ends [N] of measured over predicted steps of N runs.

    `known`: a calibration, or the relative error to expect where there is none.
    `figures`: its constants as the runs have them, by path; those left out are sure.
    `log_steps`: the logarithms [N] of predicted steps where some of them are others.
    """
    steps = log_steps({})
    if isinstance(known, Quantity):
        return np.full_like(steps, 1.0 - known.value), np.full_like(steps, 1.0 + known.value)
    paths = [path for path in known.values if path in figures]
    rows = [[*known.values].index(path) for path in paths]
    covariance = known.matrix[np.ix_(rows, rows)]
    widths = dict(zip(paths, np.sqrt(np.diag(covariance)).tolist(), strict=True))

    def moved(sign: int) -> Floats:
        each = (
            log_steps({path: scaled(path, figures[path], np.exp(sign * width))})
            for path, width in widths.items()
        )
        return np.array([*each]).reshape(-1, len(steps))

    below, above = deviations(steps, moved(-1), moved(1), covariance)
    rest = known.rest_deviation.value
    low = known.low_deviations.value * np.hypot(below, rest)
    high = known.high_deviations.value * np.hypot(above, rest)
    return np.exp(-low), np.exp(high)
