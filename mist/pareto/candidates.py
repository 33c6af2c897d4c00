"""Every stage that a group allows, one position of the pipeline at a time.

What a stage may have of memory levels is in `mist.pareto.stage_mixes`.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import combinations
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mist.pareto.layer_ranges import Ranges, kinds_of, placed
from mist.pareto.level_choice import allowed_levels, fastest_levels, useful_levels
from mist.pareto.linear_cost import Held, StageLines
from mist.pareto.offload_ratios import within_caps
from mist.pareto.stage_mixes import Mixes, StagePosition, Within, in_cache
from mist.pareto.strategies import (
    Floats,
    Group,
    Ints,
    Strategies,
    expressible,
    levels_under,
    priced,
)
from mist.pareto.unequal_meshes import NodePosition
from mist.plans.plan import Limits, Schedule
from mist.plans.schedules import layers_more
from mist.plans.search_space import SearchSpace
from mist.plans.workload import MemoryLevel
from mist.rules.between_stages import divides_ends
from mist.rules.levels import may_mix
from mist.symbolic.columns import Placement, pipeline_of, position_columns
from mist.symbolic.job import Job

Ties = Mapping[tuple[int, ...] | None, NDArray[np.bool_]]
"""Which strategies [K] divide a shared weight in each way; None: no weight is shared."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageTable:
    """F stages that are computed together, K strategies each.

    `stages` [F]: each with all that differ from it in their layers only.
    """

    stages: list[Ints]
    lines: StageLines
    held: Held


class GroupModel:
    """A group's strategies and stage formulas, position by position."""

    def __init__(self, job: Job, group: Group, strategies: Strategies, space: SearchSpace) -> None:
        """`strategies`: priced."""
        self.job, self.group, self.strategies = job, group, strategies
        self._take_space(space)
        micro = group.num_micro_batches
        self._pipeline = pipeline_of(group.schedule, group.num_stages, micro)
        self._names, self._places, self._in_flight = _places(
            job.placement, group.num_stages, group.sizes[0], micro, group.schedule
        )
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
            found = StageLines.of_each(
                self.job, self.strategies.terms, positions, self.levels, self.pairs
            )
            self._lines |= dict(zip(some, found, strict=True))

    def take(self, rows: NDArray[np.bool_]) -> "GroupModel":
        """The model of some of the strategies, with the lines that are known."""
        if rows.all():
            return self
        model = copy(self)
        model.strategies = self.strategies.take(rows)
        model.allowed, model.useful = (
            {level: own[rows] for level, own in each.items()}
            for each in (self.allowed, self.useful)
        )
        model._choose_levels()
        model._lines = {key: lines.take(rows) for key, lines in self._lines.items()}
        return model

    def under(self, space: SearchSpace) -> "GroupModel":
        """The model with the memory levels of another space."""
        model = copy(self)
        model._take_space(space)
        model._lines = {}  # of the levels of this space
        return model

    def _take_space(self, space: SearchSpace) -> None:
        """What of a space the group can have, and which of its levels each strategy needs."""
        kind = self.group.schedule.kind
        space = priced(expressible(space, self.job.platform.runtime), self.job)
        levels = levels_under(space, kind)
        self.space = replace(space, levels=levels)
        self.allowed = allowed_levels(self.strategies, levels, kind)
        self.useful = useful_levels(self.strategies, self.allowed, self.job.facts.num_kinds)
        self._choose_levels()

    def _choose_levels(self) -> None:
        """The levels, and pairs of them in one stage, that are useful for a strategy."""
        runtime = self.job.platform.runtime
        levels = tuple(level for level in self.space.levels if self.useful[level].any())
        self.levels = (
            levels or self.space.levels[:1]
        )  # of no strategy: tables have rows all the same
        self.pairs = tuple(
            (upper, lower)
            for upper, lower in (combinations(self.levels, 2) if self.space.some_layers else ())
            if may_mix(runtime, (upper, lower)) and (self.useful[upper] & self.useful[lower]).any()
        )

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
        (weight_s,) = self.weights_s(self.lines(stage), ranges)
        return np.asarray(weight_s)

    def weights_s(self, lines: StageLines, ranges: Ranges) -> Floats:
        """The same of every stage of a table of lines, [F, R]; one row where all are the same."""
        kinds = kinds_of(self.job, ranges)
        none = Held(in_flight=np.zeros(1), layers_more=np.zeros((1, 1)))  # it does not depend on it
        own = slice(None, None, len(self.strategies))
        first = self.job.levels.index(self.levels[0]) * len(kinds)  # every level has the same
        rows = range(first, first + len(kinds))
        each = [np.ravel(lines.rise("weight_s", row, none))[own] for row in rows]
        base_s = lines.base("weight_s", 1 << first, none)[own, None]
        return np.asarray(base_s + np.stack(each, -1) @ kinds)

    def mixes(
        self,
        stage: int,
        in_flight: Floats,
        ranges: Ranges,
        limits: Limits,
        place: NodePosition | None = None,
    ) -> Iterator[tuple[float, Mixes]]:
        """Every mix of levels at a position, for each number of micro-batches in flight [F].

        There are several only where stages have one chunk.
        """
        lines = self.lines(stage, place)
        for some in in_cache(in_flight, len(self.strategies) * len(ranges)):
            held = self._held(np.full(len(some), stage), some, ranges)
            mixes = self._mixes(self._of(lines, held, ranges, limits, self.levels))
            for index, own in enumerate(some.tolist()):
                yield own, self._part(mixes, index, ranges)

    def _mixes(self, position: StagePosition) -> Mixes:
        return Mixes.joined(list(position.mixes(self.levels, self.pairs)))

    def without_head(self) -> "GroupModel":
        """The model of stages without a head: of strategies alike but for the head, one each."""
        columns = self.strategies.columns
        if len(np.unique(columns["head"])) < 2:
            return self
        others = np.stack([columns[name] for name in columns if name != "head"], axis=-1)
        _, first = np.unique(others, axis=0, return_index=True)
        return self.take(np.isin(np.arange(len(self.strategies)), first))

    def by_line(
        self, ranges: Ranges, limits: Limits, among: Collection[int] | None = None
    ) -> Iterator[tuple[StageTable, Mixes]]:
        """Tables of stages that differ in more than layers, and their mixes [F K].

        For a pipeline of few strategies numpy's calls, not its numbers, take the time. `among`:
        the stages to look at; None for all.
        """
        for table in self.together(len(self.strategies) * len(ranges), ranges, among):
            position = self._of(table.lines, table.held, ranges, limits, self.levels)
            yield table, self._mixes(position)

    def by_place(
        self, ranges: Ranges, limits: Limits, among: Collection[int] | None = None
    ) -> Iterator[tuple[Ints, Mixes]]:
        """Stages that differ in nothing but their layers, and the mixes of each of them."""
        for table, mixes in self.by_line(ranges, limits, among):
            for index, stages in enumerate(table.stages):
                yield stages, self._part(mixes, index, ranges)

    def _part(self, mixes: Mixes, index: int, ranges: Ranges) -> Mixes:
        """The possible mixes for one of the numbers of micro-batches in flight."""
        copy_of, row = np.divmod(mixes.row, max(1, len(self.strategies)))
        possible = (mixes.num_lower < ranges.count).any(axis=1)
        return replace(mixes, row=row).take((copy_of == index) & possible)

    def short(self, ranges: Ranges, limits: Limits) -> NDArray[np.bool_]:
        """Strategies that do not fit everywhere with all layers at their fastest level, [K]."""
        short = np.ones(len(self.strategies), dtype=np.bool_)
        kinds = self.job.facts.num_kinds
        for level, rows in fastest_levels(self.strategies, self.useful, kinds).items():
            if rows.any():
                short &= ~rows | self._short_at(level, ranges, limits)
        return short

    def _short_at(self, level: MemoryLevel, ranges: Ranges, limits: Limits) -> NDArray[np.bool_]:
        """Strategies that do not fit everywhere with all layers at a level, [K]."""
        num_rows = len(self.strategies)
        short = np.zeros(num_rows, dtype=np.bool_)
        for table in self.together(num_rows * len(ranges), ranges):
            position = self._of(table.lines, table.held, ranges, limits, (level,))
            (whole,) = position.mixes((level,), ())
            fits = whole.fits.reshape(len(table.stages), num_rows, len(ranges))
            for own, stages in zip(fits, table.stages, strict=True):
                for stage in stages.tolist():
                    allowed = placed(ranges, self.job.num_layers, self.group.num_stages, stage)
                    short |= ~own[:, allowed].all(axis=1)
        return short

    def together(
        self, size: int, ranges: Ranges, among: Collection[int] | None = None
    ) -> Iterator[StageTable]:
        """Stages that differ, in tables of as many as are computed together; the first one alone.

        `size`: numbers of one stage. Stages that agree in lines and micro-batches in flight differ
        in their layers only.
        """
        alike: dict[tuple[int, float], list[int]] = {}
        rank = {place: index for index, place in enumerate(dict.fromkeys(self._places))}
        for stage, place in enumerate(self._places):
            if among is None or stage in among:
                alike.setdefault((rank[place], self.in_flight(stage)), []).append(stage)
        first, *others = [np.array(alike[key]) for key in sorted(alike)]
        for stages in ([first], *in_cache(others, size)):
            leading = np.array([own[0] for own in stages])
            lines = StageLines.stacked([self.lines(int(stage)) for stage in leading])
            held = self._held(leading, self._in_flight[leading], ranges)
            yield StageTable(stages=stages, lines=lines, held=held)

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
        return self._position(stage, ranges, limits, (upper, lower)).least((upper, lower))

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
        position = self._position(stage, ranges, limits, (upper, lower))
        return position.mix([(upper, lower)], num_lower)

    def _position(
        self, stage: int, ranges: Ranges, limits: Limits, levels: Sequence[MemoryLevel]
    ) -> StagePosition:
        held = self._held(np.array([stage]), self._in_flight[stage : stage + 1], ranges)
        return self._of(self.lines(stage), held, ranges, limits, levels)

    def _of(
        self,
        lines: StageLines,
        held: Held,
        ranges: Ranges,
        limits: Limits,
        levels: Sequence[MemoryLevel],
    ) -> StagePosition:
        caps = within_caps(self.space, self.job.platform.runtime, self.strategies, ranges.count)
        allowed, useful = (
            {level: of[level] for level in levels} for of in (self.allowed, self.useful)
        )
        within = Within(limits=limits, caps=caps, allowed=allowed, useful=useful)
        return StagePosition(self.job, lines, held, ranges, within)


@lru_cache(maxsize=1024)
def _places(
    placement: Placement, num_stages: int, size: int, num_micro_batches: int, schedule: Schedule
) -> tuple[tuple[str, ...], list[tuple[float, ...]], Floats]:
    """Names of the columns of a position, these columns of each, and micro-batches in flight [S].

    Several models of a group, in several searches, ask for the same.
    """
    starts = np.arange(num_stages) * size
    devices = np.stack([starts, np.full_like(starts, size)], axis=-1)
    columns = position_columns(placement, devices, 0, num_micro_batches, schedule)
    in_flight = np.asarray(columns.pop("in_flight"))
    del columns["layers_more"]  # of each range its own: `_held`
    rows = np.stack([np.asarray(column) for column in columns.values()], axis=-1)
    return tuple(columns), [tuple(map(float, row)) for row in rows.tolist()], in_flight


_TOGETHER: Final = 1 << 10  # strategies at places whose lines are read together
