"""The constants of all runs together: of software, of silicon, of clusters, pooled in part.

The logarithm of a constant of a run is a sum of effects:

    log constant = what is expected + of all runs + of its runtime + of its GPU's family + ...

Each effect is known beforehand to lie around 0 with a width (`CONSTANTS`). An effect that few runs
speak of stays near 0, and what a run says of one combination reaches all that share an effect with
it. A combination that no run is of has the effects that are known of its parts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from step_slopes import (
    ATTENTION,
    HOP,
    LAYER,
    MEMORY,
    MICRO_BATCH,
    NETWORK,
    PATHS,
    PIPELINE_LAUNCH,
    SCORES,
    SPEED,
    STEP,
    TENSOR,
    TENSOR_LAUNCH,
)
from step_times import StepTimes

from mist.calibrate.fit import Posterior, Prior, Runs, fitted

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """What is known of a constant before any run: `mean`, and the width of each of its effects."""

    mean: float
    widths: Mapping[str, float]


CONSTANTS = {
    # Tables of single products are bursts; 10 to 30 % is lost under sustained power.
    # Builds with fp8 fuse the quantisation, and more.
    SPEED: Constant(
        mean=1.12,
        widths={"all": 0.1, "family": 0.12, "runtime": 0.1, "source": 0.08, "precision": 0.2},
    ),
    # Fused kernels and eager ones differ by a factor of two.
    MEMORY: Constant(
        mean=1.0, widths={"all": 0.2, "runtime": 0.3, "family": 0.15, "precision": 0.3}
    ),
    # Builds of FlashAttention differ by a factor of 1.5 (its README).
    ATTENTION: Constant(mean=1.1, widths={"all": 0.1, "runtime": 0.3}),
    SCORES: Constant(mean=1.0, widths={"all": 0.3, "runtime": 0.3}),
    # A hundred kernels a layer at 7 to 30 us of host time each.
    LAYER: Constant(mean=1.5e-3, widths={"all": 0.3, "runtime": 0.4}),
    TENSOR_LAUNCH: Constant(mean=2e-3, widths={"all": 0.7, "runtime": 0.3}),
    PIPELINE_LAUNCH: Constant(mean=1e-3, widths={"all": 0.7}),
    MICRO_BATCH: Constant(mean=1e-3, widths={"all": 1.0}),
    STEP: Constant(mean=0.03, widths={"all": 0.7}),
    # Published collectives are alone; in a layer copies, waits and dispatches come on top.
    TENSOR: Constant(mean=1.4, widths={"all": 0.3, "runtime": 0.4}),
    # Public clusters reach .3 to .4 of line rate; vendors show .85 and more.
    NETWORK: Constant(mean=0.5, widths={"all": 0.3, "cluster": 0.35}),
    HOP: Constant(mean=2e-5, widths={"all": 0.6, "cluster": 0.4}),
}
# The clock goes with power to 1/2 or 1/3: dynamic power with the second to third power of it.
POWER, POWER_MEAN, POWER_WIDTH = "power exponent", 0.4, 0.15
# Watts over those of the part that the law was measured on.
POWER_RATIO = {"h100-sxm-500w-hbm2e": 500 / 700}
FAMILIES = {
    "a100": "Ampere", "a10g": "Ampere", "a40": "Ampere", "a30": "Ampere", "h100": "Hopper",
    "h200": "Hopper", "h800": "Hopper", "h20": "Hopper", "gh200": "Hopper", "b200": "Blackwell",
    "gb200": "Blackwell", "b300": "Blackwell", "gb300": "Blackwell", "l4": "Ada", "l40s": "Ada",
    "rtx": "Ada", "v100": "Volta", "mi300x": "CDNA",
}  # fmt: skip
STACKS = {"torchtitan": "torch"}  # one set of kernels: both are FSDP2 in eager PyTorch
CLUSTERS = {"fms-fsdp-eager": "fms-fsdp", "torchtitan-log": "torchtitan"}
# A source of many runs repeats its own faults: no more than this many count in full.
MOST_RUNS = 30
MOST_FITTED = 100
Effect = tuple[str, str, str]  # path, level, key


def family(device: str) -> str:
    """The family of a GPU."""
    return FAMILIES[device.split("-", 1)[0]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """What a run, or a plan, is of; `source` is empty for one that no run is of."""

    runtime: str
    device: str
    source: str = ""
    fp8: bool = False

    def key(self, level: str) -> str:
        """Which effect of a level it has."""
        if level == "family":
            return family(self.device)
        return {
            "all": "",
            "precision": "fp8" if self.fp8 else "",
            "runtime": STACKS.get(self.runtime, self.runtime),
            "source": self.source,
            "cluster": CLUSTERS.get(self.source, self.source),
        }[level]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchy:
    """Effects [K] and how they sum up: `design` [P, N, K], behind `offset` [P]."""

    effects: tuple[Effect, ...]
    prior: Prior
    design: NDArray[np.float32]
    offset: Floats

    def values(self, point: Floats, rows: Counts) -> Floats:
        """Constants [N, P] of combinations at effects [K]."""
        return np.exp(self.offset + (self.design[:, rows] @ point).T)

    def covariance(self, posterior: Posterior, row: int) -> Floats:
        """Of the logarithms of a combination's constants, [P, P]."""
        parts = self.design[:, row].astype(float)
        return parts @ posterior.covariance @ parts.T

    def fit(self, times: StepTimes, rows: Counts, listed: Sequence[str]) -> Posterior:
        """The effects after the runs of these rows; sources that are not listed say nothing."""
        rows = thinned(times.sources, rows)
        some, design = times.only(rows), self.design[:, rows]

        def errors(point: Floats) -> Floats:
            return some.errors(self.values(point, rows))

        def slopes(point: Floats, now: Floats) -> Floats:
            each = some.slopes(self.values(point, rows), now)
            return sum(each[:, [column]] * part for column, part in enumerate(design))

        runs = Runs(errors=errors, slopes=slopes, weights=weights_of(some.sources, listed))
        return fitted(runs, self.prior)


def thinned(sources: NDArray[np.str_], rows: Counts) -> Counts:
    """Rows of which no source has more than `MOST_FITTED`, evenly spaced."""
    kept = []
    for source in np.unique(sources[rows]):
        own = rows[sources[rows] == source]
        kept.append(own[np.linspace(0, len(own) - 1, min(len(own), MOST_FITTED)).astype(int)])
    return np.concatenate(kept)


def weights_of(sources: NDArray[np.str_], listed: Sequence[str]) -> Floats:
    """How much each run counts."""
    names, counts = np.unique(sources, return_counts=True)
    count = dict(zip(names, counts, strict=True))
    return np.array([min(1.0, MOST_RUNS / count[s]) * (s in listed) for s in sources])


def hierarchy_of(combinations: Sequence[Combination]) -> Hierarchy:
    """The effects of combinations."""
    effects: dict[Effect, tuple[float, float]] = {}
    terms: dict[tuple[int, int, Effect], float] = {}
    for row, each in enumerate(combinations):
        for column, path in enumerate(PATHS):
            for level, width in CONSTANTS[path].widths.items():
                if level == "precision" and not each.fp8:
                    continue  # what products in 16 bits are is what all runs share
                effect = (path, level, each.key(level))
                effects[effect] = (0.0, width)
                terms[column, row, effect] = 1.0
        power = (SPEED, POWER, "")
        effects[power] = (POWER_MEAN, POWER_WIDTH)
        terms[PATHS.index(SPEED), row, power] = -np.log(POWER_RATIO.get(each.device, 1.0))
    place = {effect: k for k, effect in enumerate(effects)}
    design = np.zeros((len(PATHS), len(combinations), len(effects)), np.float32)
    for (column, row, effect), value in terms.items():
        design[column, row, place[effect]] = value
    mean, width = np.array(list(effects.values())).T
    prior = Prior(
        names=tuple(" ".join(effect) for effect in effects),
        mean=mean,
        precision=np.diag(width**-2.0),
        low=np.full(len(mean), -np.inf),
        high=np.full(len(mean), np.inf),
    )
    offset = np.log([CONSTANTS[path].mean for path in PATHS])
    return Hierarchy(effects=tuple(effects), prior=prior, design=design, offset=offset)
