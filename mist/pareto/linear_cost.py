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

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Held:
    """What F stages hold: micro-batches in flight [F], and how many more an average layer [F, R].

    R: layer ranges (`mist.plans.schedules.layers_more`); 1 where it is the same for all of them.
    """

    in_flight: Floats
    layers_more: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageLines:
    """Lines of K strategies at one kind of position, O outputs each.

    `inputs` [N, K]: of the formulas, by their `names`. `slope` [3, O, X, K]: per layer of
    x = level * kinds + kind, not a number at levels that were not asked for. `bases`: b_P [3, O, K]
    by the bits of P, as they are asked for. The three: without a micro-batch in flight, for each of
    them, and for each that layers hold more. `parts`: of `stacked` lines those of each stage.
    """

    job: Job
    names: tuple[str, ...]
    inputs: Floats
    slope: Floats
    bases: dict[int, Floats] = field(default_factory=dict)
    parts: tuple["StageLines", ...] = ()

    @classmethod
    def of(
        cls, job: Job, terms: Mapping[str, Floats], position: Mapping[str, ArrayLike]
    ) -> "StageLines":
        """Read the lines off the formulas. `terms` [K]; `position`: numbers, nothing of `_HELD`."""
        return next(cls.of_each(job, terms, [position], job.levels))

    @classmethod
    def of_each(
        cls,
        job: Job,
        terms: Mapping[str, Floats],
        positions: Sequence[Mapping[str, ArrayLike]],
        levels: Collection[MemoryLevel],
        pairs: Iterable[tuple[MemoryLevel, MemoryLevel]] = (),
    ) -> Iterator["StageLines"]:
        """The lines at each of several positions, read off together: numpy's calls take the time.

        `terms` [K]; positions: numbers, nothing of `_HELD`. `levels` that layers may have, `pairs`
        of them that stages may mix.
        """
        size = len(next(iter(terms.values())))
        places = np.array([list(each.values()) for each in positions], dtype=np.float64).T
        inputs = np.concatenate(
            [np.tile(list(terms.values()), len(positions)), np.repeat(places, size, axis=1)]
        )
        names = (*terms, *positions[0])
        kinds = range(job.facts.num_kinds)
        rows = [len(kinds) * job.levels.index(level) + kind for level in levels for kind in kinds]
        asked = [1 << row for row in rows]  # each alone, then the pairs of one kind
        if len(kinds) == 1:
            asked += [sum(1 << job.levels.index(level) for level in pair) for pair in pairs]
        counts = _counts(job, asked)
        # From one layer to two no new kind of layer appears: the difference is the slope alone.
        points = np.concatenate([counts, 2 * counts[: len(rows)]])
        found = _evaluated(job, dict(zip(names, inputs, strict=True)), points)
        rise = _lines(found[:, :, len(asked) :] - found[:, :, : len(rows)])
        bases = _lines(found[:, :, : len(asked)]) - counts[:, rows] @ rise
        slope = np.full((*rise.shape[:2], counts.shape[1], rise.shape[3]), np.nan)
        slope[:, :, rows] = rise
        known = dict(zip(asked, np.moveaxis(bases, 2, 0), strict=True))
        whole = cls(job=job, names=names, inputs=inputs, slope=slope, bases=known)
        for first in range(0, size * len(positions), max(size, 1)):
            yield whole.take(slice(first, first + size)) if len(positions) > 1 else whole

    @classmethod
    def stacked(cls, parts: Sequence["StageLines"]) -> "StageLines":
        """Lines of F stages in one table, F K: numpy's calls take the time, not its numbers."""
        first, *others = parts
        if all(other is first for other in others):
            return first
        slope = np.concatenate([part.slope for part in parts], axis=-1)
        inputs = np.empty((0, slope.shape[-1]))
        return cls(job=first.job, names=(), inputs=inputs, slope=slope, parts=tuple(parts))

    def take(self, rows: NDArray[np.bool_] | slice) -> "StageLines":
        """The lines of some of the strategies."""
        return StageLines(
            job=self.job,
            names=self.names,
            inputs=self.inputs[:, rows],
            slope=self.slope[..., rows],
            bases={bits: base[..., rows] for bits, base in self.bases.items()},
        )

    def rise(self, name: str, row: int, held: Held) -> Floats:
        """What one more layer of a row adds, [F K, R]."""
        return np.asarray(self.rises((name,), np.array([row]), held)[0, 0])

    def rises(self, names: Sequence[str], rows: NDArray[np.int64], held: Held) -> Floats:
        """What one more layer of each row adds to each of I outputs, [I, *rows, F K, R]."""
        outputs = np.reshape([OUTPUTS.index(name) for name in names], (-1, *[1] * rows.ndim))
        fixed, each, more = self._by_stage(self.slope[:, outputs, rows])[..., None]
        per_layer = fixed + held.in_flight[:, None, None] * each
        per_layer = per_layer + held.layers_more[:, None, :] * more
        return np.asarray(per_layer.reshape(*per_layer.shape[:-3], -1, per_layer.shape[-1]))

    def base(self, name: str, present: int, held: Held) -> Floats:
        """b_P of the rows whose bits are set in `present`, [F K]."""
        return np.asarray(self.constants((name,), [present], held)[0, 0])

    def constants(self, names: Sequence[str], present: Sequence[int], held: Held) -> Floats:
        """b_P of I outputs for each P of `present`, [I, P, F K]."""
        outputs = [OUTPUTS.index(name) for name in names]
        self._find_bases(present)
        lines = np.stack([self.bases[bits][:2, outputs] for bits in present], axis=2)
        fixed, each = self._by_stage(lines)
        constants = fixed + held.in_flight[:, None] * each
        return np.asarray(constants.reshape(*constants.shape[:2], -1))

    @property
    def num_strategies(self) -> int:
        """K."""
        return int(self.slope.shape[-1]) // max(1, len(self.parts))

    def _by_stage(self, lines: Floats) -> Floats:
        """Lines [..., F K] by stage, [..., F, K]; F = 1 where all stages have the same."""
        return np.reshape(lines, (*lines.shape[:-1], max(1, len(self.parts)), -1))

    def _find_bases(self, present: Sequence[int]) -> None:
        """Evaluate b_P where it is not known, for all P together: numpy's calls take the time."""
        missing = [bits for bits in dict.fromkeys(present) if bits not in self.bases]
        if not missing:
            return
        if self.parts:
            for part in self.parts:
                part._find_bases(missing)
            for bits in missing:
                of_parts = [part.bases[bits] for part in self.parts]
                self.bases[bits] = np.concatenate(of_parts, axis=-1)
            return
        counts = _counts(self.job, missing)
        columns = dict(zip(self.names, self.inputs, strict=True))
        found = _lines(_evaluated(self.job, columns, counts))
        for index, bits in enumerate(missing):
            slopes = self.slope[:, :, counts[index] > 0].sum(axis=2)
            self.bases[bits] = found[:, :, index] - slopes


def _counts(job: Job, bits: Sequence[int]) -> Floats:
    """One layer of each row whose bit is set, [P, X]."""
    num_rows = len(job.levels) * job.facts.num_kinds
    return np.array([[float(each >> row & 1) for row in range(num_rows)] for each in bits])


def _lines(values: Floats) -> Floats:
    """Values at the points of `_HELD` as lines; layers of one chunk hold no more: two points."""
    more = values[2] - values[0] if len(values) > 2 else np.zeros_like(values[0])
    return np.stack([values[0], values[1] - values[0], more])


# Three points fix a plane: its value at zero, and one step along each variable.
_HELD: Final = {"in_flight": np.array([0.0, 1.0, 0.0]), "layers_more": np.array([0.0, 0.0, 1.0])}


def _evaluated(job: Job, columns: Mapping[str, ArrayLike], points: Floats) -> Floats:
    """The outputs [3, O, P, K] at `points` [P, X] layers, by `_HELD`; [2, O, P, K] of one chunk."""
    rows = product((level.column for level in job.levels), range(job.facts.num_kinds))
    counts = {
        f"{level}_{kind}": points[None, :, index, None] for index, (level, kind) in enumerate(rows)
    }
    count = 3 if np.max(columns["chunks"], initial=1) > 1 else 2
    held = {name: values[:count, None, None] for name, values in _HELD.items()}
    found = job.cost.search({**columns, **counts, **held})
    return np.stack([found[name] for name in OUTPUTS], axis=1)
