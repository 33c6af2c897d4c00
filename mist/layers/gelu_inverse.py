"""The slope of GELU from its output: Tempo's in-place GELU, by a table that is accurate.

GELU falls to its minimum (xm, ym) and rises behind it, so y and the side tell x. Around the minimum
x is like a root of y - ym; in the far left it is like a logarithm of -y. In

    u = +-sqrt(y - ym),    v = sqrt((u - u_low) / (u_high - u_low)),    u_low = -sqrt(-ym)

the slope is smooth, and a table that is even in v is dense where y tends to 0. Above u_high the
slope is 1 to fp32. (The polynomials that were published with the paper are off by up to 2.69: a
sign in one of their four regimes.)

The table is accurate to 1e-7, which fp32 is not beyond. In fp64 a second one gives x, which Newton
steps mend: of GELU(x) = y right of the minimum, of log(-GELU(x)) = log(-y) left of it, where
logarithms of y are nearly parabolas of x and steps from far away still arrive.
"""

import math
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mist.layers.norm_kernels import wide

SIZE: Final = 2**15
Y_HIGH: Final = 8.0
# Left of it GELU is less than fp32's least normal number: nothing is lost.
X_LOW: Final = -13.0
# Of y from 1e-9 on the table begins close enough for two; the least y of fp64 takes six.
NEWTON_STEPS: Final = 6
NUM_POINTS: Final = 200_001
TANH_SCALE: Final = math.sqrt(2 / math.pi)
TANH_CUBE: Final = 0.044715  # Hendrycks and Gimpel 2016, section 2


def _erf_value(x: Any, ops: Any) -> tuple[Any, Any]:
    """GELU and its slope at x, a number or a tensor; `ops`: `math` or `torch`, as x is."""
    below = 0.5 * ops.erfc(-x / math.sqrt(2))
    return x * below, below + x * ops.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _tanh_value(x: Any, ops: Any) -> tuple[Any, Any]:
    """GELU by tanh, and its slope."""
    inner = TANH_SCALE * (x + TANH_CUBE * x**3)
    below = 1 / (1 + ops.exp(-2 * inner))
    return x * below, below + x * 2 * below * (1 - below) * TANH_SCALE * (1 + 3 * TANH_CUBE * x * x)


VALUES: Final = {"gelu": _erf_value, "gelu-tanh": _tanh_value}


@lru_cache
def minimum(name: str) -> tuple[float, float]:
    """Where the slope is 0, by bisection: (x, y)."""
    low, high = -1.0, -0.5
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if VALUES[name](middle, math)[1] > 0 else (middle, high)
    return high, VALUES[name](high, math)[0]


@lru_cache
def _tables(name: str) -> NDArray[np.float64]:
    """x and the slope at SIZE even steps of v from 0 to 1. NumPy: no fake tensor is cached."""
    (turn, low), high = minimum(name), Y_HIGH
    side = np.linspace(0, 1, NUM_POINTS) ** 2  # dense around the minimum
    x = np.concatenate([(turn + (X_LOW - turn) * side)[::-1], turn + (high + 1 - turn) * side[1:]])
    y, slope = np.array([VALUES[name](each, math) for each in x]).T
    root = np.sqrt(np.maximum(y - low, 0))
    # As in `_place`: differences of roots lose the digits of a small y.
    u = np.where(x < turn, -y / (math.sqrt(-low) + root), math.sqrt(-low) + root)
    v = np.sqrt(np.maximum(u, 0) / (math.sqrt(-low) + math.sqrt(high - low)))
    steps = np.linspace(0, 1, SIZE)
    return np.array([np.interp(steps, v, x), np.interp(steps, v, slope)])


def right_of_minimum(x: Tensor, name: str) -> Tensor:
    """By element, whether x is at the minimum or right of it."""
    return x >= minimum(name)[0]


def slope_from_output(y: Tensor, right: Tensor, name: str) -> Tensor:
    """The slope of GELU where it gave y, in fp32 or fp64; `right`: the side of the minimum."""
    start, table = torch.as_tensor(_tables(name), dtype=wide(y[:0]).dtype, device=y.device)
    place = _place(wide(y), right, minimum(name)[1]).mul_(SIZE - 1).clamp_(max=SIZE - 1.001)
    if y.dtype == torch.float64:
        x = _mended(_between(start, place), y, right, name)
        # Beyond the table GELU is its input.
        return torch.where(y < Y_HIGH, VALUES[name](x, torch)[1], 1.0)
    return _between(table, place)


def _between(table: Tensor, place: Tensor) -> Tensor:
    """What a table has at fractional places, by straight lines."""
    index = place.to(torch.int64)
    before = table[index]
    return before + (table[index + 1] - before) * (place - index)


def _mended(x: Tensor, y: Tensor, right: Tensor, name: str) -> Tensor:
    """x of GELU(x) = y by Newton steps from x."""
    turn = minimum(name)[0]
    for _ in range(NEWTON_STEPS):
        value, slope = VALUES[name](x, torch)
        step = torch.where(right, value - y, value * (value / y).log()) / slope
        # At the minimum itself the slope is 0, and y does not tell x better than the table.
        sure = ((x - turn).abs() > torch.finfo(y.dtype).eps ** 0.5) & step.isfinite()
        x = torch.where(sure, x - step, x)
    return x


def _place(y: Tensor, right: Tensor, low: float) -> Tensor:
    """v of y, 0 where it tends to 0 from the left side."""
    root = (y - low).clamp_(min=0).sqrt_()
    depth = math.sqrt(-low)
    u = torch.where(right, root + depth, (-y / (root + depth)).clamp(min=0))
    return u.div_(depth + math.sqrt(Y_HIGH - low)).sqrt_()
