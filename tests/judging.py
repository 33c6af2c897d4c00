"""`estimate`, quick enough to try every layout of a toy.

An oracle asks for thousands of layouts that differ in few ways. Here the terms of a strategy (what
its blocks cost under a platform's laws) are evaluated once, for all mixes of memory levels and all
neighbours in a pipeline; and nobody asks how far a law was read beyond its measurements.
"""

from collections.abc import Mapping
from dataclasses import replace
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from mist.plans.plan import Estimate, Layout
from mist.symbolic import estimate as estimating
from mist.symbolic.job import Job
from mist.symbolic.pipeline_costs import stage_outputs

Columns = dict[str, NDArray[np.float64]]
_QUICK: dict[int, tuple[Job, Job]] = {}  # with the job, whose identity is the key


class Remembered:
    """The programs of a model, whose terms are evaluated once for each strategy."""

    def __init__(self, cost: object) -> None:
        self._cost = cost
        self._terms: dict[tuple[bytes, ...], Columns] = {}

    def __getattr__(self, name: str) -> object:
        return getattr(self._cost, name)

    def terms(self, strategy: Mapping[str, object]) -> Columns:
        key = tuple(np.asarray(strategy[name]).tobytes() for name in sorted(strategy))
        if key not in self._terms:
            self._terms[key] = self._cost.terms(strategy)  # type: ignore[attr-defined]
        return self._terms[key]


def _quick(job: Job) -> Job:
    if id(job) not in _QUICK:
        _QUICK[id(job)] = job, replace(job, cost=Remembered(job.cost))  # type: ignore[arg-type]
    return _QUICK[id(job)][1]


def judged(job: Job, layout: Layout) -> Estimate:
    """What `estimate` says, without what it has extrapolated."""
    with patch.object(estimating, "extrapolations", lambda *_: ()):
        return estimating.estimate(_quick(job), layout)


def outputs(job: Job, layout: Layout) -> Columns:
    """What `stage_outputs` says."""
    return stage_outputs(_quick(job), layout)
