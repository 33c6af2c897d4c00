"""The stage formulas as straight lines in the numbers of layers: exact, and cheap to search.

For one kind of position in the pipeline, K strategies, and n_x layers of each kind and level x,

    output = b_P + sum_x n_x a_x,   P = { x : n_x > 0 }

because times and kept bytes add up over layers, while the working set and the last collectives are
those of the worst layer that the stage has at all. Outputs are straight lines in the micro-batches
in flight, too. The lines are read off the compiled formulas at a few points, so there is one cost
model; `StageLines` holds them and says what any mix of layers costs.
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


Line = tuple[Floats, Floats]  # without and for each micro-batch in flight


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageLines:
    """Lines of K strategies at one kind of position.

    `slope[output]` [X, K] each: per layer of x = level * kinds + kind. `bases`: b_P [K] by the bits
    of P, as they are asked for.
    """

    job: Job
    columns: Mapping[str, ArrayLike]
    slope: Mapping[str, Line]
    bases: dict[int, Mapping[str, Line]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, job: Job, terms: Mapping[str, Floats], position: Mapping[str, ArrayLike]
    ) -> "StageLines":
        """Read the lines off the formulas. `terms` [K]; `position`: numbers, but for in_flight."""
        columns = {name: np.asarray(term) for name, term in terms.items()} | dict(position)
        ones = np.eye(len(LEVELS) * job.facts.num_kinds)
        once, twice = (_evaluated(job, columns, points) for points in (ones, 2 * ones))
        slope = {name: _line(twice[name] - once[name]) for name in OUTPUTS}
        return cls(job=job, columns=columns, slope=slope)

    def rise(self, name: str, row: int, in_flight: float) -> Floats:
        """What one more layer of a row adds, [K]."""
        fixed, each = self.slope[name]
        return np.asarray(fixed[row] + in_flight * each[row])

    def base(self, name: str, present: int, in_flight: float) -> Floats:
        """b_P of the rows whose bits are set in `present`, [K]."""
        if present not in self.bases:
            self.bases[present] = self._bases_of(present)
        fixed, each = self.bases[present][name]
        return np.asarray(fixed + in_flight * each)

    def _bases_of(self, present: int) -> Mapping[str, Line]:
        num_rows = len(LEVELS) * self.job.facts.num_kinds
        counts = np.array([[float(present >> row & 1) for row in range(num_rows)]])
        found = _evaluated(self.job, self.columns, counts)
        bases = {}
        for name in OUTPUTS:
            fixed, each = _line(found[name][:, 0])
            slope, slope_each = self.slope[name]
            bases[name] = (fixed - counts[0] @ slope, each - counts[0] @ slope_each)
        return bases


def _line(values: Floats) -> Line:
    """Values with 0 and 1 micro-batches in flight as a line."""
    return values[0], values[1] - values[0]


def _evaluated(job: Job, columns: Mapping[str, ArrayLike], points: Floats) -> dict[str, Floats]:
    """The outputs [2, P, K] at `points` [P, X] layers, with 0 and 1 micro-batches in flight."""
    rows = product((level.value for level in LEVELS), range(job.facts.num_kinds))
    counts = {
        f"{level}_{kind}": points[None, :, index, None] for index, (level, kind) in enumerate(rows)
    }
    in_flight = np.array([0.0, 1.0])[:, None, None]
    return job.cost.search({**columns, **counts, "in_flight": in_flight})
