"""The chance that a predicted peak fits: how far measured peaks lie from predicted ones.

The logarithm of what the allocator reserves over what is predicted is taken as normal around 0, and
eight of ten runs within `memory_ratio` of the prediction:

    P(fits) = Phi(log(usable / peak) / s),    s = log(1 + memory_ratio) / 1.2816
"""

import math
from typing import Final

EIGHT_OF_TEN: Final = 1.2816  # standard deviations either way that hold 80 % of a normal variable


SURE: Final = 0.98  # the least chance to fit of a plan under the default margin
SURE_DEVIATIONS: Final = 2.0537  # Phi of which it is


def sure_margin(memory_ratio: float) -> float:
    """The share of usable bytes that must stay free for a chance of `SURE` to fit, rounded up."""
    spread = math.log1p(memory_ratio) / EIGHT_OF_TEN
    return math.ceil(1000 * -math.expm1(-SURE_DEVIATIONS * spread)) / 1000


def fit_probability(peak_bytes: float, usable_bytes: float, memory_ratio: float) -> float:
    """The chance, 0..1, that a peak predicted to +-`memory_ratio` is within the usable bytes."""
    spread = math.log1p(memory_ratio) / EIGHT_OF_TEN
    if spread == 0 or peak_bytes == 0:
        return float(peak_bytes <= usable_bytes)
    if usable_bytes <= 0:
        return 0.0
    score = math.log(usable_bytes / peak_bytes) / spread
    return (1 + math.erf(score / math.sqrt(2))) / 2
