"""The stage formulas as straight lines in the numbers of layers: exact, and cheap to search.

For one kind of position in the pipeline, K strategies, and n_x layers of each kind and level x,

    stable_s, lone_s, weight_s, host_bytes = a_0 + sum_x n_x a_x
    peak_bytes                             = b_P + sum_x n_x b_x,  P = { x : n_x > 0 }

because times and kept bytes add up over layers, and the working set is that of the worst layer that
the stage has at all. Bytes are straight lines in the micro-batches in flight, too. The lines are
read off the compiled formulas at a few points, so there is one cost model; `StageLines` holds them
and says what any mix of layers costs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from numpy.typing import ArrayLike

from mist.estimate import Job
from mist.pareto.space import Floats
from mist.spec import MemoryLevel

OUTPUTS = ("stable_s", "lone_s", "weight_s", "peak_bytes", "host_bytes")
LEVELS = tuple(MemoryLevel)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageLines:
    """Lines of K strategies at one kind of position.

    `slope[output]` [X, K]: per layer of each x = level * kinds + kind, with nothing in flight, and
    `slope_each` for each micro-batch in flight; `start`, `start_each` [K]: without layers.
    """

    job: Job
    columns: Mapping[str, ArrayLike]
    slope: Mapping[str, Floats]
    slope_each: Mapping[str, Floats]
    start: Mapping[str, Floats]
    start_each: Mapping[str, Floats]
    peaks: dict[int, tuple[Floats, Floats]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, job: Job, terms: Mapping[str, Floats], position: Mapping[str, ArrayLike]
    ) -> "StageLines":
        """Read the lines off the formulas. `terms` [K]; `position`: numbers, but for in_flight."""
        num_rows = len(LEVELS) * job.facts.num_kinds
        columns = {name: np.asarray(term) for name, term in terms.items()} | dict(position)
        ones = np.eye(num_rows)
        once, twice = (_evaluated(job, columns, points) for points in (ones, 2 * ones))
        slope, each, start, start_each = {}, {}, {}, {}
        for name in OUTPUTS:
            rise = twice[name] - once[name]  # [in flight 0 and 1, X, K]
            slope[name], each[name] = rise[0], rise[1] - rise[0]
            level = once[name] - rise
            start[name], start_each[name] = level[0, 0], level[1, 0] - level[0, 0]
        return cls(
            job=job,
            columns=columns,
            slope=slope,
            slope_each=each,
            start=start,
            start_each=start_each,
        )

    def rise(self, name: str, row: int, in_flight: float) -> Floats:
        """What one more layer of a row adds, [K]."""
        return np.asarray(self.slope[name][row] + in_flight * self.slope_each[name][row])

    def base(self, name: str, in_flight: float) -> Floats:
        """An output but for its layers, [K]; not for peak_bytes, which depends on the mix."""
        return np.asarray(self.start[name] + in_flight * self.start_each[name])

    def peak_base(self, present: int, in_flight: float) -> Floats:
        """b_P of the rows whose bits are set in `present`, [K]."""
        if present not in self.peaks:
            self.peaks[present] = self._peak_of(present)
        fixed, each = self.peaks[present]
        return np.asarray(fixed + in_flight * each)

    def _peak_of(self, present: int) -> tuple[Floats, Floats]:
        num_rows = len(self.slope["peak_bytes"])
        counts = np.array([[float(present >> row & 1) for row in range(num_rows)]])
        peak = _evaluated(self.job, self.columns, counts)["peak_bytes"][:, 0]
        both = np.stack([peak[0], peak[1] - peak[0]])
        lines = (self.slope["peak_bytes"], self.slope_each["peak_bytes"])
        fixed, each = (whole - counts[0] @ line for whole, line in zip(both, lines, strict=True))
        return fixed, each


def _evaluated(job: Job, columns: Mapping[str, ArrayLike], points: Floats) -> dict[str, Floats]:
    """The outputs [2, P, K] at `points` [P, X] layers, with 0 and 1 micro-batches in flight."""
    rows = product((level.value for level in LEVELS), range(job.facts.num_kinds))
    counts = {
        f"{level}_{kind}": points[None, :, index, None] for index, (level, kind) in enumerate(rows)
    }
    in_flight = np.array([0.0, 1.0])[:, None, None]
    return job.cost.search({**columns, **counts, "in_flight": in_flight})
