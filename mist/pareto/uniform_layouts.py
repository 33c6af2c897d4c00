"""Layouts whose stages are alike: an upper bound for the search, or all that a framework can run.

`even_layouts`: one strategy for every stage, layers and recomputation as suits each stage best.
`alike_layouts`: every stage alike in all it does, layers dealt out by the runtime's own rule.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mist.pareto.bounds import window
from mist.pareto.candidates import GroupModel
from mist.pareto.capacity import capacity
from mist.pareto.default_partition import dealt_layers
from mist.pareto.frontier_points import Points, StageMixes
from mist.pareto.layer_partition import even_split
from mist.pareto.layer_ranges import Ranges, layer_ranges, placed
from mist.pareto.layouts import Picked, PricedLayout, alike_pipelines, layout_of
from mist.pareto.strategies import Floats, Ints
from mist.plans.plan import Limits
from mist.plans.schedules import fill_time, spare_time, step_time
from mist.plans.workload import MemoryLevel

Measure = Literal["stable_s", "peak_bytes"]


def even_layouts(
    model: GroupModel,
    limits: Limits,
    *,
    least: Measure = "stable_s",
    within_s: float = math.inf,
) -> Iterator[PricedLayout]:
    """For each strategy the layout that uses it in every stage, split so that the worst is best.

    The worst is the slowest stage, or with `least` "peak_bytes" the fullest. Those that take longer
    than `within_s` are left out.
    """
    ranges = layer_ranges(model.job, model.group.num_stages, least=model.group.schedule.vpp)
    if within_s < math.inf:
        model = model.take(capacity(model, ranges, limits, within_s, coarse=True).alone)
    ranges = _within(model, ranges, within_s)
    if len(ranges):
        tables = _tables(model, ranges, limits)
        picks = _picks(model, tables, ranges, least)
        yield from _even(model, ranges, [picks], within_s=within_s)


def landscape_layouts(
    model: GroupModel, limits: Limits, *, within_s: float
) -> Iterator[PricedLayout]:
    """The same of strategies that offload nothing: all layers at each level, then what fits.

    The first have no limits of memory. One table has the stages of all of them.
    """
    ranges = layer_ranges(model.job, model.group.num_stages, least=model.group.schedule.vpp)
    ranges = _within(model, ranges, within_s)
    if not len(ranges):
        return
    tables = _tables(model, ranges, limits)
    picks = [
        _picks(model, [_whole(table, level, model) for table in tables], ranges, "stable_s")
        for level in model.levels
    ]
    picks.append(_picks(model, tables, ranges, "stable_s"))
    yield from _even(model, ranges, picks, within_s=within_s)


def _within(model: GroupModel, ranges: Ranges, within_s: float) -> Ranges:
    """The ranges of layouts that take no longer than `within_s`; none where there is no strategy.

    A layout uses no other range, so that those left out do not change how its layers are split.
    """
    some = len(model.strategies) > 0
    return ranges.take(window(model, ranges, within_s) if some else np.zeros(len(ranges), np.bool_))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Table:
    """Stages that differ in more than their layers [F], and all their mixes [N].

    `weights_s` [F, R]. `slot` [N]: which stage and strategy a mix has, f K + k. `among` [N]: mixes
    to choose from, whether they fit or not; None: those that fit.
    """

    stages: list[Ints]
    weights_s: Floats
    mixes: StageMixes
    slot: Ints
    among: NDArray[np.bool_] | None = None

    def best(self, measure: Measure, placeable: NDArray[np.bool_]) -> tuple[Floats, Ints]:
        """The least value, inf where nothing fits, and its mix: [F, K, R]; `placeable` [F, R]."""
        mixes, num_slots = self.mixes, int(self.slot.max()) + 1
        fits = mixes.fits if self.among is None else self.among[:, None]
        shape = (len(self.stages), -1, placeable.shape[1])
        allowed = fits & placeable[self.slot // (num_slots // len(self.stages))]
        measured = np.where(allowed, getattr(mixes, measure), np.inf)
        # Every slot has a mix at least, with all layers at one level.
        order = np.argsort(self.slot, kind="stable")
        begins = np.flatnonzero(np.diff(self.slot[order], prepend=-1))
        measured = measured[order]
        value = np.minimum.reduceat(measured, begins, axis=0)
        is_least = measured == value[self.slot[order]]
        at = np.where(is_least, np.arange(len(order))[:, None], len(order))
        rows = order[np.minimum.reduceat(at, begins, axis=0)]
        return value.reshape(shape), rows.reshape(shape)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pick:
    """Of each strategy and range the least value of a stage, and which mix has it: [K, R]."""

    value: Floats
    mix: Ints
    mixes: StageMixes

    def points(self, strategies: Ints, columns: Ints) -> Points:
        """Strategies and their ranges, both [P], as points."""
        return self.mixes.points(self.mix[strategies, columns], columns)


def _even(
    model: GroupModel, ranges: Ranges, picks: Sequence[Sequence[_Pick]], *, within_s: float
) -> Iterator[PricedLayout]:
    """Of each strategy the best split of the layers, for every choice [S] of what stages may be."""
    value = np.stack([[pick.value for pick in stages] for stages in picks])
    num_choices, num_stages, num_strategies, num_ranges = value.shape
    # Choices and strategies are split together: numpy's calls take the time.
    rows = value.swapaxes(1, 2).reshape(-1, num_stages, num_ranges)
    chosen = even_split(ranges, model.job.num_layers, rows)
    for stages, columns in zip(
        picks, chosen.reshape(num_choices, num_strategies, num_stages), strict=True
    ):
        strategies = np.flatnonzero(columns[:, 0] >= 0)
        own = columns[strategies]
        points = [pick.points(strategies, at) for pick, at in zip(stages, own.T, strict=True)]
        counts = ranges.count[own]
        found = alike_pipelines(model.group, model.strategies, strategies, points, counts)
        yield from (layout for layout in found if layout.step_s <= within_s)


def _picked(model: GroupModel, count: int, points: Points) -> Picked:
    return Picked(
        count=count,
        strategies=model.strategies,
        points=points,
        point=0,
    )


def _tables(model: GroupModel, ranges: Ranges, limits: Limits) -> list[_Table]:
    """The mixes of all stages; those with the same lines share a table."""
    tables = []
    for own, mixes in model.by_line(ranges, limits):
        weights_s = model.weights_s(own.lines, ranges)
        table = StageMixes.of(mixes, weights_s[0])
        tables.append(
            _Table(
                stages=own.stages,
                weights_s=np.broadcast_to(weights_s, (len(own.stages), len(ranges))),
                mixes=replace(table, row=table.row % len(model.strategies)),
                slot=table.row,
            )
        )
    return tables


def _whole(table: _Table, level: MemoryLevel, model: GroupModel) -> _Table:
    """The stages with all layers at one level, where strategies may have it."""
    mixes = table.mixes
    own = (mixes.upper == level) & (mixes.lower == level) & model.allowed[level][mixes.row]
    return replace(table, among=own)


def _picks(
    model: GroupModel, tables: Sequence[_Table], ranges: Ranges, least: Measure
) -> list[_Pick]:
    """The best mixes of every stage, first stage first."""
    num_layers, num_stages = model.job.num_layers, model.group.num_stages
    picks: dict[int, _Pick] = {}
    for table in tables:
        # Stages that differ in their layers only differ in the ranges that they may take.
        for turn in range(max(map(len, table.stages))):
            stages = [own[min(turn, len(own) - 1)] for own in table.stages]
            placeable = [placed(ranges, num_layers, num_stages, stage) for stage in stages]
            value, mix = table.best(least, np.stack(placeable))
            for index, own in enumerate(table.stages):
                # Where layers are alike all of them may take the same: one turn is enough.
                taken = own if ranges.alike else own[turn : turn + 1]
                mixes = replace(table.mixes, weight_s=table.weights_s[index])
                pick = _Pick(value=value[index], mix=mix[index], mixes=mixes)
                picks |= dict.fromkeys(taken.tolist(), pick)
            if ranges.alike:
                break
    return [picks[stage] for stage in range(num_stages)]


def alike_layouts(
    model: GroupModel, limits: Limits, *, least: Measure = "stable_s"
) -> Iterator[PricedLayout]:
    """The layouts of a framework whose stages are alike: of each kind and mix of levels.

    Of each kind (`Layout.kind`) only the fastest, or with `least` "peak_bytes" the one whose
    fullest stage holds least: offload ratios make thousands of the same kind.
    """
    counts = stage_layers(model)
    if counts is None:
        return
    ranges = Ranges(first=np.cumsum(counts) - counts, count=counts, alike=False)
    for levels in [(level, level) for level in model.levels] + list(model.pairs):
        yield from _alike(model, ranges, limits, levels, least=least)


def stage_layers(model: GroupModel) -> Ints | None:
    """Layers of each stage as the runtime deals them out, [S]; None where it cannot."""
    job, group = model.job, model.group
    num_stages, chunks = group.num_stages, group.schedule.vpp
    parts = dealt_layers(job, num_stages * chunks)
    return None if parts is None else np.reshape(parts, (chunks, num_stages)).sum(axis=0)


def _alike(
    model: GroupModel,
    ranges: Ranges,
    limits: Limits,
    levels: tuple[MemoryLevel, MemoryLevel],
    *,
    least: Measure,
) -> Iterator[PricedLayout]:
    """Layouts of one mix of levels, with the least recomputation that fits every stage."""
    num_stages = model.group.num_stages
    num_lower = np.max(
        [model.least(stage, ranges, limits, *levels)[:, stage] for stage in range(num_stages)],
        axis=0,
    )
    chunks = model.group.schedule.vpp  # one number for all: so many layers of each chunk
    num_lower = -(-num_lower // chunks) * chunks
    columns = np.broadcast_to(num_lower[:, None], (len(num_lower), num_stages))
    tables = [
        StageMixes.of(
            model.mix(stage, ranges, limits, *levels, num_lower=columns),
            model.weight_s(stage, ranges),
        )
        for stage in range(num_stages)
    ]
    fits = np.all([table.fits[:, stage] for stage, table in enumerate(tables)], axis=0)
    for k in _best_of_kinds(model, tables, np.flatnonzero(fits), least):
        yield layout_of(model.job, model.group, _stages(model, ranges, tables, int(k)))


def _best_of_kinds(
    model: GroupModel, tables: Sequence[StageMixes], rows: Ints, least: Measure
) -> Ints:
    """Of strategies `rows` the best of each kind, in their order."""
    if least == "peak_bytes":
        value = np.max([table.peak_bytes[rows, i] for i, table in enumerate(tables)], axis=0)
    else:
        value = _step_s(model, tables, rows)
    own = model.strategies.take(rows)
    away = [own[name] > 0 for name in ("weights", "optimizer", "activations")]
    # In the order of values, the first index of each kind is that of its best row.
    order = np.argsort(value, kind="stable")
    kinds = np.stack([own["tp"], own["zero"], *away], axis=-1)[order]
    _, first = np.unique(kinds, axis=0, return_index=True)
    return rows[np.sort(order[first])]


def _step_s(model: GroupModel, tables: Sequence[StageMixes], rows: Ints) -> Floats:
    """Seconds per step with one of strategies `rows` in every stage."""
    stable_s, lone_s = (
        np.stack([getattr(table, name)[rows, i] for i, table in enumerate(tables)], axis=-1)
        for name in ("stable_s", "lone_s")
    )
    weight_s = np.array([table.weight_s[i] for i, table in enumerate(tables)])
    schedule = model.group.schedule
    spare_s = spare_time(schedule.kind, weight_s)
    fill_s = fill_time(stable_s, spare_s, chunks=schedule.vpp)
    return step_time(model.group.num_micro_batches, stable_s, lone_s, fill_s)


def _stages(
    model: GroupModel, ranges: Ranges, tables: Sequence[StageMixes], k: int
) -> list[Picked]:
    rows = np.array([k])
    return [
        _picked(model, int(ranges.count[stage]), table.points(rows, np.array([stage])))
        for stage, table in enumerate(tables)
    ]
