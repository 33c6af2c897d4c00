"""From a group of layouts to its inter-stage problem: the frontiers of every stage as cells.

For each size that a stage may have: the layer ranges that a plan within the bound can give it
(`mist.pareto.bounds`), its strategies with offloading where memory binds, and per position, place
and range the points that none beats. Points that alone exceed the bound are left out.

Where stages differ in size, one of n devices in the same position from the end is the same in
pipelines of any length: its frontiers are kept in a `CellStore`. A bound that has become tighter
since only means that they hold more than needed.

Where stages share the host memory of their nodes (`mist.pareto.shared_host_memory`), frontiers are
also in what a point holds there, and the problem has a limit for each node.

Where embedding and head are one matrix, the first and the last stage must divide it alike
(`mist.rules.between_stages.divides_ends`): they have frontiers of their own for each way, as the
`tie` of a cell.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from mist.milp import Cell, InterStageProblem, InterStageSolution, Method, Shared, solve
from mist.pareto.bounds import least_step_s, window
from mist.pareto.candidates import GroupModel, Ties
from mist.pareto.capacity import capacity
from mist.pareto.frontier_points import Points, StageMixes
from mist.pareto.layer_ranges import Ranges, layer_ranges, placed
from mist.pareto.layouts import Picked, PricedLayout, layout_of
from mist.pareto.level_choice import allowed_levels, fastest_s
from mist.pareto.offload_ratios import MostOffloaded, offloading
from mist.pareto.shared_host_memory import crowded_out, has_room, stages_per_node
from mist.pareto.stage_mixes import Mixes
from mist.pareto.strategies import Floats, Ints, Strategies
from mist.pareto.unequal_meshes import NodePosition, depths, places
from mist.plans.plan import Limits
from mist.plans.schedules import forward_first, spare_time


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a plan must keep: bytes, and a step no slower than `step_s`."""

    limits: Limits
    step_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupProblem:
    """The inter-stage problem of a group, and what its cells' points stand for.

    `num_stages_tried`: strategies times ranges, over all positions and mixes. `num_crowded_out`:
    strategies times ranges that an equal share of host memory may have kept out.
    """

    model: GroupModel
    problem: InterStageProblem
    points: tuple[tuple[Points, Strategies], ...]
    num_stages_tried: int
    num_crowded_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sized:
    """Stages of one size: their strategies, and the ranges that they may take."""

    size: int
    model: GroupModel
    ranges: Ranges


_Found = tuple[Cell, Points, Strategies]


@dataclass(slots=True)
class CellStore:
    """Frontiers of stages of unequal pipelines, by all that they depend on.

    How many stages were tried, and of how many equal shares of host memory may have kept some out.
    """

    num_tried: int = 0
    num_crowded_out: int = 0
    sized: dict[tuple[int, int], _Sized] = field(default_factory=dict)
    cells: dict[tuple[object, ...], list[_Found]] = field(default_factory=dict)


def problem_of(
    base: GroupModel, bounds: Bounds, store: CellStore, most: GroupModel | None = None
) -> GroupProblem:
    """The frontiers of every stage of a group, as the inter-stage problem.

    `most`: the group with few strategies that stand for all offload ratios (`MostOffloaded`), where
    they are priced already.
    """
    before, crowded = store.num_tried, store.num_crowded_out
    if len(base.group.sizes) > 1:
        cells = _unequal_cells(base, bounds, store)
    else:
        cells = _equal_cells(base, most, bounds, store)
    problem = _problem(base, list(cells), bounds.limits)
    return replace(
        problem,
        num_stages_tried=store.num_tried - before,
        num_crowded_out=store.num_crowded_out - crowded,
    )


def _problem(base: GroupModel, found: Sequence[_Found], limits: Limits) -> GroupProblem:
    """The inter-stage problem of these cells, as nothing was looked at for it."""
    job, group = base.job, base.group
    problem = InterStageProblem(
        num_layers=job.num_layers,
        num_stages=group.num_stages,
        num_micro_batches=group.num_micro_batches,
        cells=tuple(cell for cell, _, _ in found),
        num_chunks=group.schedule.vpp,
        num_units=job.platform.num_gpus // group.sizes[0] if len(group.sizes) > 1 else None,
        shared=_shared(base, limits),
    )
    return GroupProblem(
        model=base,
        problem=problem,
        points=tuple((points, strategies) for _, points, strategies in found),
        num_stages_tried=0,
        num_crowded_out=0,
    )


def _shared(model: GroupModel, limits: Limits) -> tuple[Shared, ...]:
    """What the stages of each node may hold together in its memory, if they share it."""
    stages, each = range(model.group.num_stages), stages_per_node(model.job, model.group)
    return tuple(
        Shared(stages=tuple(stages[first : first + each]), limit_bytes=limits.host_bytes)
        for first in (stages[::each] if limits.shares_host else ())
    )


def _equal_cells(
    base: GroupModel, most: GroupModel | None, bounds: Bounds, store: CellStore
) -> Iterator[_Found]:
    """The frontiers of stages that all have the same devices."""
    group = base.group
    ranges = layer_ranges(base.job, group.num_stages, least=group.schedule.vpp)
    ranges = ranges.take(window(base, ranges, bounds.step_s))
    if not len(ranges):
        return
    # No time falls with an offload ratio: what fits everywhere as it is needs no offloading.
    short = np.flatnonzero(base.short(ranges, bounds.limits))
    few = _offloaded(base, most, ranges, bounds)
    if few is None:
        return
    away = offloading(base.job, group, base.space, short, few)
    model = _with(base, away, ranges, bounds.step_s)
    sufficient = _sufficient(model, ranges, bounds)
    if sufficient is None:
        return
    model, ranges, placeable = sufficient
    # Ranges with the same sequence of kinds are looked at once.
    distinct, like = ranges.distinct(base.job)
    copies = np.bincount(like, minlength=len(distinct))
    limits, stages = bounds.limits, range(group.num_stages)
    standing = [placed(ranges, base.job.num_layers, group.num_stages, stage) for stage in stages]
    allowed = placeable & np.stack(standing)
    positions: Iterable[_Position] = _positions(base, model, distinct, bounds)
    if limits.shares_host:
        positions = _within_nodes(list(positions), base, ranges, allowed, limits)
    for position in positions:
        own, table = position.sized.model, position.table
        store.num_tried += len(table.row) * len(ranges) * len(position.stages)
        store.num_crowded_out += int((_crowded_out(position, bounds) * copies).sum())
        known: dict[tuple[bool, bytes], list[_Found]] = {}
        for stage in position.stages.tolist():
            # Stages of one place that agree in ranges and tie have the same frontiers.
            key = (own.is_tied(stage), allowed[stage].tobytes())
            if key not in known:
                looked_at = np.isin(np.arange(len(distinct)), like[allowed[stage]])
                ties = own.ties(stage)
                useful = position.useful & looked_at
                found = _frontiers(position.sized, table, useful, limits, ties)
                known[key] = list(_everywhere(list(found), distinct, ranges, like, allowed[stage]))
            for cell, points, strategies in known[key]:
                yield replace(cell, stage=stage), points, strategies


@dataclass(frozen=True, slots=True, kw_only=True)
class _Position:
    """Stages of one place and all their mixes; `useful` [N, R]: those within the bounds."""

    sized: _Sized
    stages: Ints
    table: StageMixes
    least_s: Floats
    useful: NDArray[np.bool_]


def _positions(
    base: GroupModel, model: GroupModel, ranges: Ranges, bounds: Bounds
) -> Iterator[_Position]:
    """The positions of a group, each with the mixes of its stages; `base`: nothing offloaded."""
    for own, stages, mixes in _by_place(model, ranges, bounds.limits):
        table = StageMixes.of(mixes, own.weight_s(int(stages[0]), ranges))
        least_s = least_step_s(base, ranges, table.stable_s, table.lone_s)
        yield _Position(
            sized=_Sized(size=base.group.sizes[0], model=own, ranges=ranges),
            stages=stages,
            table=table,
            least_s=least_s,
            useful=table.fits & (least_s <= bounds.step_s),
        )


def _crowded_out(position: _Position, bounds: Bounds) -> NDArray[np.bool_]:
    """What an equal share of host memory may keep out, where stages may share: [K, R]."""
    model, limits = position.sized.model, bounds.limits
    if limits.shares_host or stages_per_node(model.job, model.group) == 1:
        return np.zeros((len(model.strategies), len(position.sized.ranges)), dtype=bool)
    return crowded_out(
        position.table,
        position.least_s,
        len(model.strategies),
        step_s=bounds.step_s,
        limits=limits,
    )


def _within_nodes(
    positions: Sequence[_Position],
    base: GroupModel,
    ranges: Ranges,
    allowed: NDArray[np.bool_],
    limits: Limits,
) -> Sequence[_Position]:
    """Those positions; none where no split of the layers as `allowed` [S, R] fits all hosts."""
    _, like = ranges.distinct(base.job)
    least = np.full(allowed.shape, np.inf)
    for each in positions:
        host_bytes = np.where(each.useful, each.table.host_bytes, np.inf).min(axis=0)
        least[each.stages] = host_bytes[like]
    least[~allowed] = np.inf
    total_bytes = limits.host_bytes * len(_shared(base, limits))
    return positions if has_room(ranges, base.job.num_layers, least, total_bytes) else ()


def _by_place(
    model: GroupModel, ranges: Ranges, limits: Limits
) -> Iterator[tuple[GroupModel, Ints, Mixes]]:
    """The stages of each place with their mixes, and the model of these; heads of the last only."""
    last = model.group.num_stages - 1
    headless = model.without_head()
    parts = [(headless, range(last)), (model, range(last, last + 1))]
    for own, among in [(model, None)] if headless is model else parts:
        for stages, mixes in own.by_place(ranges, limits, among) if among != range(0) else ():
            yield own, stages, mixes


def _offloaded(
    base: GroupModel, most: GroupModel | None, ranges: Ranges, bounds: Bounds
) -> Strategies | None:
    """Few strategies that stand for all tuples of ratios that a plan within the bounds may use.

    None where no plan is.
    """
    job, group, space = base.job, base.group, base.space
    if most is None:
        most = GroupModel(job, group, MostOffloaded(job, space, [group]).of(group), space)
    room = capacity(most, ranges, bounds.limits, bounds.step_s, coarse=True)
    return most.strategies.take(room.useful) if room.suffices else None


def _everywhere(
    found: Sequence[_Found],
    distinct: Ranges,
    ranges: Ranges,
    like: Ints,
    allowed: NDArray[np.bool_],
) -> Iterator[_Found]:
    """The frontiers of distinct ranges as cells of each allowed range [R] that is like one."""
    if ranges.alike:
        yield from found
        return
    column = {
        each: index
        for index, each in enumerate(
            zip(distinct.first.tolist(), distinct.count.tolist(), strict=True)
        )
    }
    known = {(each[0].tie, column[each[0].first, each[0].count]): each for each in found}
    for tie in dict.fromkeys(cell.tie for cell, _, _ in found):
        for row in np.flatnonzero(allowed).tolist():
            if (tie, int(like[row])) in known:
                cell, points, strategies = known[tie, int(like[row])]
                yield replace(cell, first=int(ranges.first[row])), points, strategies


def _sufficient(
    model: GroupModel, ranges: Ranges, bounds: Bounds
) -> tuple[GroupModel, Ranges, NDArray[np.bool_]] | None:
    """What a plan within the bounds may use: strategies, ranges, and where each may stand [S, R].

    None where no plan is. A coarse look leaves few strategies for the fine one.
    """
    for coarse in (True, False):
        room = capacity(model, ranges, bounds.limits, bounds.step_s, coarse=coarse)
        if not room.suffices:
            return None
        model = model.take(room.useful)
    placeable = room.placeable
    possible = np.asarray(placeable.any(axis=0))
    if not placeable.any(axis=1).all():
        return None
    return model, ranges.take(possible), placeable[:, possible]


def _unequal_cells(base: GroupModel, bounds: Bounds, store: CellStore) -> Iterator[_Found]:
    """The frontiers of stages of several sizes, in every place that each may have."""
    group, platform = base.group, base.job.platform
    for size in group.sizes:
        sized = _stored_size(base, size, bounds, store)
        model = GroupModel(base.job, group, sized.model.strategies, base.space)
        last, headless = replace(sized, model=model), replace(sized, model=model.without_head())
        for stage in range(group.num_stages) if len(model.strategies) else ():
            sized = last if stage == group.num_stages - 1 else headless
            for place in places(
                stage, group.num_stages, (group.sizes[0], size),
                num_gpus=platform.num_gpus, per_node=platform.gpus_per_node,
            ):  # fmt: skip
                if size in place.begins:
                    known = _stored_cells(sized, stage, place, (bounds, store))
                    yield from _stood(known, base, stage, size, place)


def _stood(
    known: list[_Found], base: GroupModel, stage: int, size: int, place: NodePosition
) -> Iterator[_Found]:
    """Frontiers as cells of a stage of this pipeline, which leaves a layer to each other stage."""
    group, most = base.group, base.job.num_layers - base.group.num_stages + 1
    units, begins = size // group.sizes[0], place.begins[size]
    for cell, points, strategies in known:
        if cell.count <= most:
            yield replace(cell, stage=stage, units=units, offsets=begins), points, strategies


def _stored_size(base: GroupModel, size: int, bounds: Bounds, store: CellStore) -> _Sized:
    """The strategies of a size, with every offloading that is fast enough."""
    key = (size, base.group.num_micro_batches)
    if key not in store.sized or base.job.facts.num_kinds > 1:
        own = base.strategies
        rows = np.flatnonzero(own.num_devices == size)
        model = GroupModel(base.job, base.group, own.take(rows), base.space)
        # Two stages leave the longest ranges; `_stood` drops those too long for deeper pipelines.
        ranges = layer_ranges(base.job, 2)
        if len(rows):
            ranges = ranges.take(window(model, ranges, bounds.step_s, alone=True))
            away = offloading(base.job, base.group, base.space, rows)
            model = _with(model, away, ranges, bounds.step_s)
        store.sized[key] = _Sized(size=size, model=model, ranges=ranges)
    return store.sized[key]


def _stored_cells(
    sized: _Sized, stage: int, place: NodePosition, within: tuple[Bounds, CellStore]
) -> list[_Found]:
    """The frontiers of a size at a position from the end, between these borders."""
    bounds, store = within
    model, ranges = sized.model, sized.ranges
    group = model.group
    ends = (stage == 0, stage == group.num_stages - 1)
    borders = (place.prev_crosses, place.next_crosses)
    fixed = (sized.size, group.num_micro_batches, ends, borders)
    key = (*fixed, model.in_flight(stage))
    if ranges.alike and key in store.cells:
        return store.cells[key]
    for held, mixes in model.mixes(stage, _in_flight(sized, stage), ranges, bounds.limits, place):
        table = StageMixes.of(mixes, model.weight_s(stage, ranges))
        least_s = (group.num_micro_batches - 1) * table.stable_s + table.lone_s
        useful = table.fits & (least_s <= bounds.step_s)
        useful &= placed(ranges, model.job.num_layers, group.num_stages, stage)
        store.num_tried += useful.size
        ties = model.ties(stage)
        store.cells[*fixed, held] = list(_frontiers(sized, table, useful, bounds.limits, ties))
    return store.cells[key]


def _in_flight(sized: _Sized, stage: int) -> Floats:
    """Micro-batches that a stage may hold in any pipeline with stages of this size.

    Those with the same lines are looked at together: with the same ends, and all or not all of the
    step's micro-batches. Where layers differ, places do: its own only.
    """
    model, group, job = sized.model, sized.model.group, sized.model.job
    if not sized.ranges.alike or stage == group.num_stages - 1:
        return np.array([model.in_flight(stage)])
    platform = job.platform
    found = depths(platform.num_gpus, job.num_layers, platform.gpus_per_node, sized.size)
    held = found if stage == 0 else range(2, max(found))
    most = group.num_micro_batches
    counts = np.unique(np.minimum(held, most).astype(np.float64))
    alike = forward_first(counts, most) == forward_first(model.in_flight(stage), most)
    return np.asarray(counts[alike])


def _with(model: GroupModel, away: Strategies, ranges: Ranges, step_s: float) -> GroupModel:
    """A model with strategies that offload, without those that are too slow for any range."""
    least, kinds = int(ranges.count.min(initial=0)), range(model.job.facts.num_kinds)
    allowed = allowed_levels(away, model.space.levels, model.group.schedule.kind)
    seconds = [fastest_s(away, allowed, kind, "stable_s") for kind in kinds]
    # No stage with the strategy is faster, and a step takes at least G times its slowest stage.
    useful = model.group.num_micro_batches * least * np.min(seconds, axis=0) <= step_s
    strategies = model.strategies.joined(away.take(useful))
    return GroupModel(model.job, model.group, strategies, model.space)


def _frontiers(
    sized: _Sized,
    table: StageMixes,
    useful: NDArray[np.bool_],
    limits: Limits,
    ties: Ties,
) -> Iterator[_Found]:
    """Non-empty frontiers of the useful points [N, R] of a position, as cells of stage 0."""
    for tie, rows in ties.items():
        own = useful if tie is None else useful & rows[table.row][:, None]
        for cell, points, strategies in _untied_frontiers(sized, table, own, limits):
            yield replace(cell, tie=tie), points, strategies


def _untied_frontiers(
    sized: _Sized, table: StageMixes, useful: NDArray[np.bool_], limits: Limits
) -> Iterator[_Found]:
    """The same of strategies that are compared with each other."""
    ranges, model = sized.ranges, sized.model
    points_of = table.lean_frontier if limits.shares_host else table.frontier
    kind = model.group.schedule.kind
    for column in np.flatnonzero(useful.any(axis=0)):
        points = points_of(int(column), useful[:, column])
        cell = Cell(
            stage=0,
            first=None if ranges.alike else int(ranges.first[column]),
            count=int(ranges.count[column]),
            stable_s=points.stable_s,
            lone_s=points.lone_s,
            spare_s=float(spare_time(kind, table.weight_s[column])),
            host_bytes=points.host_bytes if limits.shares_host else None,
        )
        yield cell, points, model.strategies


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedStage:
    """A stage whose layers and devices are given: its strategies, its one range, its place."""

    model: GroupModel
    ranges: Ranges
    place: NodePosition | None


def fixed_problem(stages: Sequence[FixedStage], limits: Limits) -> GroupProblem:
    """The frontiers of given stages as the inter-stage problem."""
    found: list[_Found] = []
    for index, stage in enumerate(stages):
        model, ranges = stage.model, stage.ranges
        in_flight = np.array([model.in_flight(index)])
        ((_, mixes),) = model.mixes(index, in_flight, ranges, limits, stage.place)
        table = StageMixes.of(mixes, model.weight_s(index, ranges))
        sized = _Sized(size=0, model=model, ranges=ranges)
        units = int(model.strategies.num_devices[0]) // model.group.sizes[0]
        ties = model.ties(index)
        for cell, points, strategies in _frontiers(sized, table, table.fits, limits, ties):
            found.append((replace(cell, stage=index, units=units), points, strategies))
    return _problem(stages[0].model, found, limits)


def joined(
    found: GroupProblem, bounds: Bounds, method: Method
) -> tuple[PricedLayout, InterStageSolution] | None:
    """The best mix of stages that beats the bound, by the exact or the mixed-integer program."""
    solution = solve(found.problem, upper_bound_s=bounds.step_s, method=method)
    if solution is None:
        return None
    picked = [
        Picked(
            count=found.problem.cells[choice.cell].count,
            strategies=found.points[choice.cell][1],
            points=found.points[choice.cell][0],
            point=choice.point,
        )
        for choice in solution.choices
    ]
    return layout_of(found.model.job, found.model.group, picked), solution
