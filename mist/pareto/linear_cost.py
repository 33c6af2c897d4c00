"""The stage formulas as straight lines in the numbers of layers: exact, and cheap to search.

For one kind of position in the pipeline, K strategies, and n_x layers of each kind and level x,

    output = b_P + sum_x n_x a_x,   P = { x : n_x > 0 }

because times and kept bytes add up over layers, while the working set and the last collectives are
those of the worst layer that the stage has at all. Outputs are straight lines in the micro-batches
in flight, too, and slopes in those that an average layer holds more. The peak is the largest of
four lines: bytes as backward passes begin, as they end, at the end of a step, and as the optimizer
steps. The lines are read off the compiled formulas at a few points, so there is one cost model;
`StageLines` holds them and says what any mix of layers costs.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mist.pareto.strategies import Floats
from mist.plans.workload import MemoryLevel
from mist.platform import Runtime
from mist.symbolic.job import Job

INSTANTS = ("begin_bytes", "end_bytes", "last_bytes", "step_bytes")
OUTPUTS = ("stable_s", "lone_s", "weight_s", *INSTANTS, "host_bytes")


def instants(runtime: Runtime) -> tuple[str, ...]:
    """The lines whose largest is the peak: a step that makes nothing never is."""
    steps = runtime.transients.optimizer_bytes_per_param.value > 0
    return INSTANTS if steps else INSTANTS[:-1]


Line = tuple[Floats, Floats, Floats]
"""Without a micro-batch in flight, for each of them, and for each that layers hold more."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Held:
    """What F stages hold: micro-batches in flight [F], and how many more an average layer [F, R].

    R: layer ranges (`mist.plans.schedules.layers_more`); 1 where it is the same for all of them.
    """

    in_flight: Floats
    layers_more: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageLines:
    """Lines of K strategies at one kind of position.

    `slope[output]` [X, K] each: per layer of x = level * kinds + kind. `bases`: b_P [K] by the bits
    of P, as they are asked for.
    """

    job: Job
    columns: Mapping[str, Floats]
    slope: Mapping[str, Line]
    bases: dict[int, Mapping[str, Line]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, job: Job, terms: Mapping[str, Floats], position: Mapping[str, ArrayLike]
    ) -> "StageLines":
        """Read the lines off the formulas. `terms` [K]; `position`: numbers, nothing of `_HELD`."""
        return next(cls.of_each(job, terms, [position]))

    @classmethod
    def of_each(
        cls,
        job: Job,
        terms: Mapping[str, Floats],
        positions: Sequence[Mapping[str, ArrayLike]],
        pairs: Iterable[tuple[MemoryLevel, MemoryLevel]] = (),
    ) -> Iterator["StageLines"]:
        """The lines at each of several positions, read off together: numpy's calls take the time.

        `terms` [K]; positions: numbers, nothing of `_HELD`. `pairs`: levels that stages may mix.
        """
        size = len(next(iter(terms.values())))
        columns = {name: np.tile(term, len(positions)) for name, term in terms.items()}
        for name in positions[0]:
            columns[name] = np.repeat([float(np.asarray(each[name])) for each in positions], size)
        num_rows = len(job.levels) * job.facts.num_kinds
        asked = [1 << row for row in range(num_rows)]  # each alone, then the pairs of one kind
        if job.facts.num_kinds == 1:
            asked += [sum(1 << job.levels.index(level) for level in pair) for pair in pairs]
        counts = _counts(job, asked)
        # From one layer to two no new kind of layer appears: the difference is the slope alone.
        found = _evaluated(job, columns, np.concatenate([counts, 2 * counts[:num_rows]]))
        slope = {
            name: _line(found[name][:, len(asked) :] - found[name][:, :num_rows])
            for name in OUTPUTS
        }
        bases = dict(zip(asked, _bases(found, slope, counts), strict=True))
        whole = cls(job=job, columns=columns, slope=slope, bases=bases)
        for first in range(0, size * len(positions), max(size, 1)):
            yield whole.take(slice(first, first + size)) if len(positions) > 1 else whole

    def take(self, rows: NDArray[np.bool_] | slice) -> "StageLines":
        """The lines of some of the strategies."""
        columns = {name: column[rows] for name, column in self.columns.items()}
        slope = {name: _rows(line, rows) for name, line in self.slope.items()}
        bases: dict[int, Mapping[str, Line]] = {
            bits: {name: _rows(line, rows) for name, line in base.items()}
            for bits, base in self.bases.items()
        }
        return StageLines(job=self.job, columns=columns, slope=slope, bases=bases)

    def rise(self, name: str, row: int, held: Held) -> Floats:
        """What one more layer of a row adds, [F K, R]."""
        fixed, each, more = (part[row][:, None] for part in self.slope[name])
        per_layer = fixed + held.in_flight[:, None, None] * each
        per_layer = per_layer + held.layers_more[:, None, :] * more
        return np.asarray(per_layer.reshape(-1, per_layer.shape[-1]))

    def base(self, name: str, present: int, held: Held) -> Floats:
        """b_P of the rows whose bits are set in `present`, [F K]."""
        if present not in self.bases:
            counts = _counts(self.job, [present])
            found = _evaluated(self.job, self.columns, counts)
            (self.bases[present],) = _bases(found, self.slope, counts)
        fixed, each, _ = self.bases[present][name]
        return np.asarray(fixed + held.in_flight[:, None] * each).ravel()


def _rows(line: Line, rows: NDArray[np.bool_] | slice) -> Line:
    fixed, each, more = (part[..., rows] for part in line)
    return fixed, each, more


def _counts(job: Job, bits: Sequence[int]) -> Floats:
    """One layer of each row whose bit is set, [P, X]."""
    num_rows = len(job.levels) * job.facts.num_kinds
    return np.array([[float(each >> row & 1) for row in range(num_rows)] for each in bits])


def _bases(
    found: Mapping[str, Floats], slope: Mapping[str, Line], counts: Floats
) -> list[Mapping[str, Line]]:
    """What of the outputs at each of the first points the slopes do not account for."""
    whole = {
        name: [
            part - _sums(counts, rising)
            for part, rising in zip(_line(found[name][:, : len(counts)]), slope[name], strict=True)
        ]
        for name in OUTPUTS
    }
    return [
        {name: (fixed[i], each[i], more[i]) for name, (fixed, each, more) in whole.items()}
        for i in range(len(counts))
    ]


def _sums(counts: Floats, rising: Floats) -> Floats:
    """Sums over rows [X] of counts [P, X] times slopes [X, K]; a vector's keeps its rounding."""
    return counts @ rising if len(counts) > 1 else (counts[0] @ rising)[None]


def _line(values: Floats) -> Line:
    """Values at the points of `_HELD` as a line; layers of one chunk hold no more: two points."""
    more = values[2] - values[0] if len(values) > 2 else np.zeros_like(values[0])
    return values[0], values[1] - values[0], more


# Three points fix a plane: its value at zero, and one step along each variable.
_HELD: Final = {"in_flight": np.array([0.0, 1.0, 0.0]), "layers_more": np.array([0.0, 0.0, 1.0])}


def _evaluated(job: Job, columns: Mapping[str, ArrayLike], points: Floats) -> dict[str, Floats]:
    """The outputs [3, P, K] at `points` [P, X] layers, by `_HELD`; [2, P, K] of one chunk."""
    rows = product((level.column for level in job.levels), range(job.facts.num_kinds))
    counts = {
        f"{level}_{kind}": points[None, :, index, None] for index, (level, kind) in enumerate(rows)
    }
    count = 3 if np.max(columns["chunks"], initial=1) > 1 else 2
    held = {name: values[:count, None, None] for name, values in _HELD.items()}
    return job.cost.search({**columns, **counts, **held})
