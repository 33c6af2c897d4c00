"""Every stage that a group allows, one position of the pipeline at a time.

A stage of l layers has them at one memory level, or the first l - c at one and the last c at a
deeper one. Per strategy, layer range and pair of levels, both times are straight lines in c, and
memory falls with c (beyond the first layer, which adds the working set of a recomputation). So

    both times rise with c     the least c that fits                          (found by bisection)
    both fall                  all layers at the deeper level, which is a mix of its own
    one rises, one falls       every c from the least that fits on

and nothing else can be on a frontier. Where stages share host memory, bytes there count like a
time: offloaded activations fall with c, and every c may be needed. Where unlike layers follow each
other the peak may rise again as recomputation reaches another kind: the least c is looked for
between such numbers one by one. What fits is always checked, never inferred.
"""

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import combinations
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mist.pareto.layer_ranges import Ranges, kinds_of, placed
from mist.pareto.linear_cost import LEVELS, Held, StageLines, instants
from mist.pareto.strategies import (
    Floats,
    Group,
    Ints,
    Strategies,
    expressible,
    levels_under,
    within_caps,
)
from mist.pareto.unequal_meshes import NodePosition
from mist.plans.plan import Limits
from mist.plans.schedules import layers_more
from mist.plans.search_space import SearchSpace
from mist.plans.workload import MemoryLevel
from mist.rules.between_stages import divides_ends
from mist.rules.levels import may_have, may_mix
from mist.rules.rule import Columns
from mist.symbolic.columns import pipeline_of, position_columns
from mist.symbolic.job import Job

Ties = Mapping[tuple[int, ...] | None, NDArray[np.bool_]]
"""Which strategies [K] divide a shared weight in each way; None: no weight is shared."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mixes:
    """Stages with layers at `upper` and the first `num_lower` at `lower`: arrays [K, R].

    `row`: the strategy of each k. Times in s. `fits`: within the limits, and `num_lower` possible.
    """

    upper: MemoryLevel
    lower: MemoryLevel
    row: Ints
    num_lower: Ints
    stable_s: Floats
    lone_s: Floats
    peak_bytes: Floats
    host_bytes: Floats
    fits: NDArray[np.bool_]

    def part(self, first: int, count: int) -> "Mixes":
        """Those of the strategies [first, count], which are numbered anew."""
        own = slice(*np.searchsorted(self.row, (first, first + count)))
        columns = {item.name: getattr(self, item.name)[own] for item in fields(self)[2:]}
        columns["row"] = columns["row"] - first
        return Mixes(upper=self.upper, lower=self.lower, **columns)


class GroupModel:
    """A group's strategies and stage formulas, position by position."""

    def __init__(self, job: Job, group: Group, strategies: Strategies, space: SearchSpace) -> None:
        """`strategies`: priced."""
        self.job, self.group, self.strategies = job, group, strategies
        space = expressible(space, job.platform.runtime)
        self.space = replace(space, levels=levels_under(space, group.schedule.kind))
        starts = np.arange(group.num_stages) * group.sizes[0]
        devices = np.stack([starts, np.full_like(starts, group.sizes[0])], axis=-1)
        micro = group.num_micro_batches
        columns = position_columns(job.placement, devices, 0, micro, group.schedule)
        self._pipeline = pipeline_of(group.schedule, group.num_stages, micro)
        self._in_flight = np.asarray(columns.pop("in_flight"))
        del columns["layers_more"]  # of each range its own: `_held`
        self._names = tuple(columns)
        rows = np.stack([np.asarray(column) for column in columns.values()], axis=-1)
        self._places: list[tuple[float, ...]] = [tuple(map(float, row)) for row in rows.tolist()]
        self._lines: dict[tuple[float, ...], StageLines] = {}

    def lines(self, stage: int, place: NodePosition | None = None) -> StageLines:
        """The lines at a position; `place`: where it stands between nodes, of unequal meshes."""
        key = self._places[stage]
        if place is not None:
            borders = {
                "prev_crosses_node": float(place.prev_crosses),
                "next_crosses_node": float(place.next_crosses),
            }
            key = tuple((dict(zip(self._names, key, strict=True)) | borders).values())
        if key not in self._lines:
            self._read(list(dict.fromkeys(self._places)) if place is None else [key])
        return self._lines[key]

    def _read(self, places: list[tuple[float, ...]]) -> None:
        """Lines at several places, as many together as the cache of a processor likes."""
        each = max(1, _TOGETHER // max(1, len(self.strategies)))
        for first in range(0, len(places), each):
            some = places[first : first + each]
            positions = [dict(zip(self._names, place, strict=True)) for place in some]
            found = StageLines.of_each(self.job, self.strategies.terms, positions)
            self._lines |= dict(zip(some, found, strict=True))

    def take(self, rows: NDArray[np.bool_]) -> "GroupModel":
        """The model of some of the strategies, with the lines that are known."""
        if rows.all():
            return self
        model = copy(self)
        model.strategies = self.strategies.take(rows)
        model._lines = {key: lines.take(rows) for key, lines in self._lines.items()}
        return model

    def under(self, space: SearchSpace) -> "GroupModel":
        """The model with the memory levels of another space, with the lines that are known."""
        model = copy(self)
        levels = levels_under(space, self.group.schedule.kind)
        model.space = replace(expressible(space, self.job.platform.runtime), levels=levels)
        return model

    @property
    def pairs(self) -> tuple[tuple[MemoryLevel, MemoryLevel], ...]:
        """The pairs of memory levels that layers of one stage may have."""
        runtime = self.job.platform.runtime
        pairs = combinations(self.space.levels, 2) if self.space.some_layers else ()
        return tuple(pair for pair in pairs if may_mix(runtime, pair))

    def is_tied(self, stage: int) -> bool:
        """Whether a position shares a weight with another stage."""
        ends = (0, self.group.num_stages - 1)
        return self.job.facts.tied and self.group.num_stages > 1 and stage in ends

    def ties(self, stage: int) -> Ties:
        """The strategies of a position by how they divide a weight that it shares."""
        if not self.is_tied(stage):
            return {None: np.ones(len(self.strategies), dtype=np.bool_)}
        ways = np.stack(divides_ends(self.strategies.columns), axis=-1)
        return {tuple(way.tolist()): (ways == way).all(axis=1) for way in np.unique(ways, axis=0)}

    def in_flight(self, stage: int) -> float:
        """Micro-batches that a position holds."""
        return float(self._in_flight[stage])

    def weight_s(self, stage: int, ranges: Ranges) -> Floats:
        """Seconds of gradients of weights, [R], of the first strategy.

        They count where stages are alike in dp and tp, and then all strategies have the same.
        """
        lines, kinds = self.lines(stage), kinds_of(self.job, ranges)
        none = Held(in_flight=np.zeros(1), layers_more=np.zeros((1, 1)))  # it does not depend on it
        each = [lines.rise("weight_s", kind, none)[0] for kind in range(len(kinds))]
        return np.asarray(lines.base("weight_s", 1, none)[0] + np.ravel(each) @ kinds)

    def mixes(
        self,
        stage: int,
        in_flight: Floats,
        ranges: Ranges,
        limits: Limits,
        place: NodePosition | None = None,
    ) -> Iterator[tuple[float, list[Mixes]]]:
        """Every mix of levels at a position, for each number of micro-batches in flight [F].

        There are several only where stages have one chunk.
        """
        lines = self.lines(stage, place)
        for some in _chunks(in_flight, len(self.strategies) * len(ranges)):
            held = self._held(np.full(len(some), stage), some, ranges)
            mixes = list(self._mixes(_Position(self, lines, held, ranges, limits)))
            for index, own in enumerate(some.tolist()):
                yield own, self._part(mixes, index, ranges)

    def _mixes(self, position: "_Position") -> Iterator[Mixes]:
        for level in self.space.levels:
            yield position.whole(level)
        for upper, lower in self.pairs:
            yield from position.mixed(upper, lower)

    def by_line(self, ranges: Ranges, limits: Limits) -> Iterator[tuple[list[Ints], list[Mixes]]]:
        """Stages with the same lines, by their micro-batches in flight [F], and their mixes [F K].

        Those that differ only in their micro-batches in flight are computed together: for a
        pipeline of many stages and few strategies numpy's calls, not its numbers, take the time.
        """
        for stages, held in self.together(len(self.strategies) * len(ranges), ranges):
            position = _Position(self, self.lines(int(stages[0])), held, ranges, limits)
            own = [stages[self._in_flight[stages] == each] for each in held.in_flight]
            yield own, list(self._mixes(position))

    def by_place(self, ranges: Ranges, limits: Limits) -> Iterator[tuple[Ints, list[Mixes]]]:
        """Stages that differ in nothing but their layers, and the mixes of each of them."""
        for each, mixes in self.by_line(ranges, limits):
            for index, stages in enumerate(each):
                yield stages, self._part(mixes, index, ranges)

    def _part(self, mixes: list[Mixes], index: int, ranges: Ranges) -> list[Mixes]:
        """The possible mixes for one of the numbers of micro-batches in flight."""
        num_rows = len(self.strategies)
        parts = (mix.part(index * num_rows, num_rows) for mix in mixes)
        return [p for p in parts if p.upper is p.lower or (p.num_lower < ranges.count).any()]

    def short(self, ranges: Ranges, limits: Limits) -> NDArray[np.bool_]:
        """Strategies that do not fit everywhere with all layers at the first level, [K]."""
        num_rows, level = len(self.strategies), self.space.levels[0]
        short = np.zeros(num_rows, dtype=np.bool_)
        for stages, held in self.together(num_rows * len(ranges), ranges):
            position = _Position(self, self.lines(int(stages[0])), held, ranges, limits)
            fits = position.whole(level).fits.reshape(len(held.in_flight), num_rows, len(ranges))
            for stage in stages:
                (own,) = fits[held.in_flight == self._in_flight[stage]]
                allowed = placed(ranges, self.job.num_layers, self.group.num_stages, stage)
                short |= ~own[:, allowed].all(axis=1)
        return short

    def together(self, size: int, ranges: Ranges) -> Iterator[tuple[Ints, Held]]:
        """Stages with the same lines, and what is held by those of them that differ, in chunks."""
        for place in dict.fromkeys(self._places):
            stages = np.array([i for i, other in enumerate(self._places) if other == place])
            for some in _chunks(np.unique(self._in_flight[stages]), size):
                first = [stages[self._in_flight[stages] == each][0] for each in some]
                held = self._held(np.array(first), some, ranges)
                yield stages[np.isin(self._in_flight[stages], some)], held

    def _held(self, stages: Ints, in_flight: Floats, ranges: Ranges) -> Held:
        """What stages [F] hold."""
        if self.group.schedule.vpp == 1:
            return Held(in_flight=in_flight, layers_more=np.zeros((len(stages), 1)))
        return Held(in_flight=in_flight, layers_more=self._layers_more[stages][:, ranges.count])

    @cached_property
    def _layers_more(self) -> Floats:
        """Micro-batches that an average layer of each stage holds more, by layers: [S, L + 1]."""
        counts = np.arange(self.job.num_layers + 1)[None, :]
        return layers_more(self.group.schedule.kind, layers=counts, **self._pipeline)

    def least(
        self, stage: int, ranges: Ranges, limits: Limits, upper: MemoryLevel, lower: MemoryLevel
    ) -> Ints:
        """The least number of lower layers that fits, [K, R]; 0 where the levels are one."""
        if upper is lower:
            return np.zeros((len(self.strategies), len(ranges)), dtype=np.int64)
        rows = np.arange(len(self.strategies))
        return self._position(stage, ranges, limits).least(upper, lower, rows)

    def mix(  # noqa: PLR0913 - a position and a mix
        self,
        stage: int,
        ranges: Ranges,
        limits: Limits,
        upper: MemoryLevel,
        lower: MemoryLevel,
        *,
        num_lower: Ints,
    ) -> Mixes:
        """One mix with these numbers of lower layers, [K, R]."""
        rows = np.arange(len(self.strategies))
        return self._position(stage, ranges, limits).mix(upper, lower, rows, num_lower)

    def _position(
        self, stage: int, ranges: Ranges, limits: Limits, place: NodePosition | None = None
    ) -> "_Position":
        held = self._held(np.array([stage]), self._in_flight[stage : stage + 1], ranges)
        return _Position(self, self.lines(stage, place), held, ranges, limits)


_TOGETHER: Final = 1 << 10  # strategies at places whose lines are read together
_CHUNK: Final = 1 << 16  # stages computed together: what a processor's cache holds


def _chunks(in_flight: Floats, size: int) -> Iterator[Floats]:
    """As many at a time as are computed together, for `size` stages each."""
    chunk = max(1, _CHUNK // max(size, 1))
    for start in range(0, len(in_flight), chunk):
        yield in_flight[start : start + chunk]


_TIMES: Final = ("stable_s", "lone_s")
_BYTES: Final = slice(len(_TIMES), None)  # of the outputs of a position: times, then bytes
_Parts = tuple[tuple[MemoryLevel, list[Ints]], ...]  # layers of each kind at one or two levels


class _Position:
    """All mixes at one position: straight lines in the layers of each kind and level.

    Its rows are the strategies for each of the micro-batches in flight [F], strategies innermost.
    """

    def __init__(
        self,
        model: GroupModel,
        lines: StageLines,
        held: Held,
        ranges: Ranges,
        limits: Limits,
    ) -> None:
        self._job, self._lines, self._held = model.job, lines, held
        self._ranges, self._limits = ranges, limits
        self._outputs = (*_TIMES, *instants(model.job.platform.runtime), "host_bytes")
        self._kinds = kinds_of(model.job, ranges)
        self._schedule = model.group.schedule.kind.value
        self._away = np.tile(model.strategies["activations"], len(held.in_flight))
        capped = within_caps(
            model.space, model.job.platform.runtime, model.strategies, ranges.count
        )
        self._within_caps = np.tile(capped, (len(held.in_flight), 1))
        self._row = np.arange(len(held.in_flight) * lines.slope.shape[-1])
        self._allowed: dict[MemoryLevel, NDArray[np.bool_]] = {}
        self._rises: dict[tuple[MemoryLevel, int], Floats] = {}
        self._constants: dict[int, Floats] = {}

    def whole(self, level: MemoryLevel) -> Mixes:
        """All layers at one level."""
        none = np.zeros((len(self._row), len(self._ranges)), dtype=np.int64)
        return self.mix(level, level, self._row, none)

    def mixed(self, upper: MemoryLevel, lower: MemoryLevel) -> Iterator[Mixes]:
        """Some layers at each of two levels, where both times do not fall together."""
        counted = [0, 1, *([-1] if self._limits.shares_host else [])]
        rises = self._differs(upper, lower)[:, counted]
        rising, falling = (rises >= 0).all(axis=(0, 1, 3)), (rises <= 0).all(axis=(0, 1, 3))
        rows = np.flatnonzero(rising | ~falling)
        if not rows.size:
            return
        least = self.least(upper, lower, rows)
        yield self.mix(upper, lower, rows, least)
        open_rows = np.flatnonzero(~rising & ~falling)
        further = least[np.searchsorted(rows, open_rows)] + 1
        while open_rows.size and (further < self._ranges.count).any():
            yield self.mix(upper, lower, open_rows, further)
            further = further + 1

    def _differs(self, upper: MemoryLevel, lower: MemoryLevel) -> Floats:
        """How much a layer of each kind takes more at the lower level, [Q, I, F K, R] or R = 1."""
        kinds = range(len(self._kinds))
        return np.stack([self._rise(lower, kind) - self._rise(upper, kind) for kind in kinds])

    def _rise(self, level: MemoryLevel, kind: int) -> Floats:
        """What one more layer adds to every output, [I, F K, R] or R = 1."""
        if (level, kind) not in self._rises:
            row = np.array(LEVELS.index(level) * len(self._kinds) + kind)
            self._rises[level, kind] = self._lines.rises(self._outputs, row, self._held)
        return self._rises[level, kind]

    def least(self, upper: MemoryLevel, lower: MemoryLevel, rows: Ints) -> Ints:
        """The least number of lower layers, 1 to count - 1, that fits; count - 1 if none does.

        Memory falls with each of them as long as the kinds at either level stay the same.
        """
        if len(self._kinds) == 1:
            return self._bisected(upper, lower, rows, *self._bracket(upper, lower, rows))
        last = np.maximum(self._ranges.count - 1, 1)
        found = np.zeros((len(rows), len(self._ranges)), dtype=np.int64)
        for low, high in self._runs(last):
            tried = self._bisected(upper, lower, rows, low, np.maximum(low, high))
            fits = self._fits(*self._bytes(self._parts(upper, lower, tried), rows))
            found = np.where((found == 0) & fits & (low <= high), tried, found)
        return np.where(found == 0, last, found)

    def _runs(self, last: Ints) -> Iterator[tuple[Ints, Ints]]:
        """Numbers of lower layers, from and to [R], between which no kind comes or goes."""
        start, stop = self._ranges.first, self._ranges.first + self._ranges.count
        changes = [np.ones_like(start)]
        for prefix in self._job.kind_prefix:
            changes.append(np.searchsorted(prefix, prefix[start], side="right") - start)
            changes.append(np.searchsorted(prefix, prefix[stop]) - start)
        begins = np.sort(np.clip(changes, 1, last + 1), axis=0)
        yield from zip(begins, [*(begins[1:] - 1), last], strict=True)

    def _bisected(
        self, upper: MemoryLevel, lower: MemoryLevel, rows: Ints, low: Ints, high: Ints
    ) -> Ints:
        """The least number of lower layers between two that fits; the higher if none does."""
        low, high = (np.broadcast_to(each, (len(rows), len(self._ranges))) for each in (low, high))
        while (low < high).any():
            middle = (low + high) // 2
            fits = self._fits(*self._bytes(self._parts(upper, lower, middle), rows))
            low, high = np.where(fits, low, middle + 1), np.where(fits, middle, high)
            # Entries that are done may pass `high` by one while others still search.
            low = np.minimum(low, high)
        return np.asarray(high)

    def _bracket(self, upper: MemoryLevel, lower: MemoryLevel, rows: Ints) -> tuple[Ints, Ints]:
        """Where the least number of lower layers lies, both ends included, [rows, R].

        Layers that are alike save the same each: a division tells, but for its rounding.
        """
        last = np.maximum(self._ranges.count - 1, 1)
        one = np.ones((len(rows), len(self._ranges)), dtype=np.int64)
        last = np.broadcast_to(last, one.shape)
        num_instants = len(self._outputs) - len(_TIMES) - 1
        most = [*[self._limits.device_bytes] * num_instants, self._limits.host_bytes]
        over = self._values(_BYTES, self._parts(upper, lower, one), rows) - np.reshape(
            most, (-1, 1, 1)
        )
        saved = -self._differs(upper, lower)[0, _BYTES][:, rows]
        with np.errstate(divide="ignore", invalid="ignore"):
            more = np.where(over > 0, np.where(saved > 0, over / saved, np.inf), 0.0)
        guess = more.max(axis=0)
        around = np.ceil(np.minimum(guess, last)).astype(np.int64)
        return np.clip(around, 1, last), np.clip(around + 2, 1, last)

    def mix(self, upper: MemoryLevel, lower: MemoryLevel, rows: Ints, num_lower: Ints) -> Mixes:
        """What stages with these mixes cost; `num_lower` [len(rows), R]."""
        parts = self._parts(upper, lower, num_lower)
        peak_bytes, host_bytes = self._bytes(parts, rows)
        stable_s, lone_s = self._values(slice(len(_TIMES)), parts, rows)
        inside = (num_lower > 0) & (num_lower < self._ranges.count)
        possible = inside if upper is not lower else num_lower == 0
        for level in {upper, lower}:
            possible = possible & self._may_have(level)[rows, None]
        possible = possible & self._within_caps[rows]
        return Mixes(
            upper=upper,
            lower=lower,
            row=rows,
            num_lower=num_lower,
            stable_s=stable_s,
            lone_s=lone_s,
            peak_bytes=peak_bytes,
            host_bytes=host_bytes,
            fits=self._fits(peak_bytes, host_bytes) & possible,
        )

    def _may_have(self, level: MemoryLevel) -> NDArray[np.bool_]:
        """Rows whose layers may have a level."""
        if level not in self._allowed:
            columns: Columns = {"activations": self._away, "schedule": self._schedule}
            self._allowed[level] = may_have(level, columns)
        return self._allowed[level]

    def _fits(self, peak_bytes: Floats, host_bytes: Floats) -> NDArray[np.bool_]:
        limits = self._limits
        return (peak_bytes <= limits.device_bytes) & (host_bytes <= limits.host_bytes)

    def _parts(self, upper: MemoryLevel, lower: MemoryLevel, num_lower: Ints) -> _Parts:
        """Layers of each kind at the two levels, the first `num_lower` of a range at the lower."""
        num_lower = np.minimum(num_lower, self._ranges.count)
        start = self._ranges.first
        below = [num_lower]
        if len(self._kinds) > 1:
            below = [prefix[start + num_lower] - prefix[start] for prefix in self._job.kind_prefix]
        above = [kinds - each for kinds, each in zip(self._kinds, below, strict=True)]
        return ((upper, above), (lower, below)) if upper is not lower else ((upper, above),)

    def _bytes(self, parts: _Parts, rows: Ints) -> tuple[Floats, Floats]:
        """Peak on the device and bytes in host memory."""
        *instants_bytes, host_bytes = self._values(_BYTES, parts, rows)
        return np.max(instants_bytes, axis=0), host_bytes

    def _values(self, outputs: slice, parts: _Parts, rows: Ints) -> Floats:
        """Outputs of mixes with these layers at each level, [I, rows, R]."""
        own = rows if len(rows) < len(self._row) else slice(None)  # a view where all are asked for
        total = np.zeros(1)
        for level, kinds in parts:
            for kind, layers in enumerate(kinds):
                total = total + layers * self._rise(level, kind)[outputs][:, own]
        return np.asarray(self._base(outputs, parts, rows) + total)

    def _base(self, outputs: slice, parts: _Parts, rows: Ints) -> Floats:
        """The part of outputs that depends on which kinds and levels a stage has at all."""
        num_kinds = len(self._kinds)
        bits = [
            (1 << (LEVELS.index(level) * num_kinds + kind), layers)
            for level, kinds in parts
            for kind, layers in enumerate(kinds)
        ]
        if num_kinds == 1:  # every possible mix has a layer at each of its levels
            return self._constant(sum(bit for bit, _ in bits))[outputs][:, rows, None]
        held = np.zeros((len(rows), len(self._ranges)), dtype=np.int64)
        for bit, layers in bits:
            held |= np.where(layers > 0, bit, 0)
        base = np.empty((len(self._outputs[outputs]), *held.shape))
        for each in np.unique(held):
            at = held == each
            line = self._constant(int(each))[outputs][:, rows, None]
            base[:, at] = np.broadcast_to(line, base.shape)[:, at]
        return base

    def _constant(self, present: int) -> Floats:
        """b_P of every output, [I, F K]."""
        if present not in self._constants:
            found = self._lines.constants(self._outputs, [present], self._held)
            self._constants[present] = found[:, 0]
        return self._constants[present]
