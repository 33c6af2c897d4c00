"""The method on one screen: search parallelism, memory and layers together, and prove the answer.

For every group (S stages, G micro-batches, schedule), most promising first, and those with stages
of unequal size last:

1. bound     no plan of the group is faster than `lower_bound_s`; a group whose bound is not below
             the best plan is pruned;
2. enumerate every strategy x position x layer range x mix of memory levels
             (mist.pareto.candidates), first without offloading, then with every offload tuple where
             memory binds;
3. frontier  per position and range, the points that none beats in (stable, lone);
4. join      one point per stage, by the exact dynamic program (mist.milp);
5. share     again, with host memory shared by the stages of a node, where an equal share for each
             rank may have kept out a faster plan: the mixed-integer program where the limit binds.

The winner is confirmed by the mixed-integer program through PuLP and HiGHS, and its offload ratios
are refined between those of the grid (mist.search.refine_offload). Its gap is against the
least of what the programs prove, and of the bounds of groups that were not searched (--time-limit,
Ctrl-C). The programs do not see what transfers between neighbours unlike in dp and tp add: layouts
are compared with it, and the gap covers it. Bounds never change the optimum.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import NoReturn

import numpy as np

from mist.errors import Infeasible, InputError
from mist.milp import InterStageSolution, Method, Solver
from mist.pareto.candidates import GroupModel
from mist.pareto.capacity import capacity
from mist.pareto.layer_ranges import layer_ranges
from mist.pareto.layouts import PricedLayout
from mist.pareto.offload_ratios import MostOffloaded, lean_ratios, offloading
from mist.pareto.shared_host_memory import shared, stages_per_node
from mist.pareto.strategies import (
    Group,
    expressible,
    groups,
    levels_under,
    with_least_batches,
    with_least_memory,
)
from mist.pareto.uniform_layouts import Measure, alike_layouts, even_layouts, landscape_layouts
from mist.plans.plan import Limits
from mist.plans.search_space import SearchSpace
from mist.progress import is_due
from mist.search.empty_space import no_group_words
from mist.search.refine_offload import refined
from mist.search.stage_frontiers import Bounds, CellStore, GroupProblem, joined, problem_of
from mist.search.state_room import state_room
from mist.search.visits import Visit, in_order, listed_groups
from mist.symbolic.job import Job
from mist.symbolic.load_programs import Progress

COUNTED = ("groups", "groups_pruned", "groups_solved", "groups_left", "stages_evaluated", "points")


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The fastest layout, the proof, other kinds of layout by step time, and what was searched.

    `pool`: the best of every kind that the search met, with and without refined ratios.
    `shares_host`: in it the stages of a node share its memory, as equal shares do not allow.
    `solver`: what found it. `grid_step_s`: of the best with the space's own offload ratios, which
    the bound is of; `best` may have finer ones.
    """

    best: PricedLayout
    grid_step_s: float
    shares_host: bool
    solver: Solver
    lower_bound_s: float
    others: tuple[PricedLayout, ...]
    pool: tuple[PricedLayout, ...]
    statistics: dict[str, int]
    listed: tuple[Visit, ...]


@dataclass(slots=True)
class _Search:
    """Best layout so far and what found it, the best of each kind, and counts.

    `relaxed_s`: the least that any group's dynamic program proved, which does not see what
    transfers between unlike neighbours add. `finalists`: the best with stages of one size (False)
    and of several, whose ratios are refined: so the space that has both is never the slower one.
    `fits_from_s`: of groups without room for a plan of fewer seconds, these. `within_s`: slower
    ones are not looked for.
    """

    job: Job
    space: SearchSpace
    num_alternatives: int
    most_offloaded: MostOffloaded
    within_s: float
    best: PricedLayout | None = None
    best_visit: Visit | None = None
    best_solver: Solver = "dp"
    relaxed_s: float = math.inf
    store: CellStore = field(default_factory=CellStore)
    by_kind: dict[tuple[object, ...], PricedLayout] = field(default_factory=dict)
    finalists: dict[bool, tuple[PricedLayout, Visit]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))
    fits_from_s: dict[Group, float] = field(default_factory=dict)

    @property
    def unlike_stages(self) -> bool:
        """Whether stages may be unlike, in the space and under the runtime."""
        return expressible(self.space, self.job.platform.runtime).unlike_stages

    @property
    def upper_bound_s(self) -> float:
        return self.best.step_s if self.best else self.within_s

    @property
    def horizon_s(self) -> float:
        """Step time beyond which a group can neither win nor be among the alternatives."""
        steps = sorted(layout.step_s for layout in self.by_kind.values())
        return steps[self.num_alternatives] if len(steps) > self.num_alternatives else self.within_s

    def count(self, problem: GroupProblem) -> None:
        """Note how much was looked at."""
        self.counts["stages_evaluated"] += problem.num_stages_tried
        self.counts["points"] += sum(len(points) for points, _ in problem.points)

    def offer(self, layout: PricedLayout, visit: Visit, solver: Solver = "dp") -> None:
        """Keep a layout if it is the best, or the best of its kind."""
        if layout.step_s < self.upper_bound_s:
            self.best, self.best_visit, self.best_solver = layout, visit, solver
        unequal = len(visit.group.sizes) > 1
        if unequal not in self.finalists or layout.step_s < self.finalists[unequal][0].step_s:
            self.finalists[unequal] = layout, visit
        known = self.by_kind.get(layout.kind)
        if known is None or layout.step_s < known.step_s:
            self.by_kind[layout.kind] = layout


def tune(  # noqa: PLR0913 - what is searched, and how
    job: Job,
    space: SearchSpace,
    *,
    limits: Limits,
    num_alternatives: int,
    progress: Progress,
    is_late: Callable[[], bool] = _never,
    is_over: Callable[[], bool] = _never,
    method: Method = "both",
    listed: Sequence[Visit] = (),
    within_s: float = math.inf,
) -> Tuned:
    """Find the fastest layout whose every stage stays within the limits.

    `is_late` ends the search at the next group with the best layout so far, as Ctrl-C does, once
    there is one; `is_over` ends it without one, and the listing of groups before it. `method`: what
    solves and confirms the winner. `listed`: the groups to search, where another search knows them;
    else all of the space. `within_s`: only layouts that are faster. Raises Infeasible when none
    fits, InputError when the space is empty or nothing was found in time.
    """
    state_room(job, limits).refuse()
    known, is_whole = listed_groups(job, space, limits, is_over, listed)
    if not known:
        raise InputError(no_group_words(job, space))
    work = in_order(known)
    most_offloaded = MostOffloaded(job, space, [visit.group for visit in work])
    search = _Search(job, space, num_alternatives, most_offloaded, within_s)
    # Of groups that were not even listed nothing is known: no step is too short for them.
    num_groups, left_s = len(work), math.inf if is_whole else 0.0
    try:
        for done, visit in enumerate(work):  # it grows: some groups are visited twice
            if (is_over if search.best is None else is_late)():
                is_whole, left_s = False, min(left_s, _least_bound(work[done:]))
                break
            _put(work, _visit(search, visit))
            if is_due(done + 1, len(work)):
                progress(_progress_words(search, done + 1, len(work)))
    except KeyboardInterrupt:
        if search.best is None:
            raise
        left_s = min(left_s, _least_bound(work[done:]))
    search.counts["groups_left"] = num_groups - search.counts["groups"]
    if search.best is None:
        _refuse(job, search, len(work), is_whole=is_whole)
    tuned = _prove(search, search.best, left_s, method)
    found = [replace(one, fits_from_s=search.fits_from_s.get(one.group, 0.0)) for one in known]
    return _refined(search, replace(tuned, listed=tuple(found)))


def _refuse(job: Job, search: _Search, num_groups: int, *, is_whole: bool) -> NoReturn:
    """Nothing fits, or nothing was found in time: these are two answers."""
    if is_whole:
        raise Infeasible(f"{job.facts.name} does not fit.")
    raise InputError(
        f"--time-limit: no layout of {job.facts.name} that fits was found in time, in "
        f"{search.counts['groups']} of {num_groups} groups of layouts or more. Allow more time, or "
        "restrict more."
    )


def _put(work: list[Visit], more: Sequence[Visit]) -> None:
    """Further visits, before the groups with stages of several sizes."""
    at = next((i for i, visit in enumerate(work) if len(visit.group.sizes) > 1), len(work))
    work[at:at] = more


def _least_bound(work: Sequence[Visit]) -> float:
    return min((visit.bound_s for visit in work), default=math.inf)


def _progress_words(search: _Search, done: int, total: int) -> str:
    found = f"best {search.best.step_s:.4g} s per step" if search.best else "nothing fits yet"
    return f"group {done} of {total} ({search.counts['groups_pruned']} pruned): {found}"


def _visit(search: _Search, visit: Visit) -> list[Visit]:
    """Search a group unless it can neither win nor give an alternative.

    Returns what is to be visited later: the same group with host memory shared, where equal shares
    may have kept out what is faster.
    """
    group = visit.group
    if visit.limits.shares_host:
        if visit.bound_s < search.upper_bound_s:
            _share(search, visit)
        return []
    search.counts["groups"] += 1
    if visit.least_s >= max(search.upper_bound_s, search.horizon_s):
        search.counts["groups_pruned"] += 1
        return []
    if not search.unlike_stages:
        _search_alike(search, visit)
        return []
    models = _offer_even(search, visit)
    if models is None:
        search.counts["groups_pruned"] += 1
        return []
    problem = _join(search, visit, models)
    search.counts["groups_solved" if problem.num_stages_tried else "groups_pruned"] += 1
    if not problem.num_crowded_out:
        return []
    return [replace(visit, limits=shared(visit.limits, stages_per_node(search.job, group)))]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Models:
    """A group with its strategies, and with few of them that stand for all offload ratios.

    Of groups with stages of several sizes there is no `most`.
    """

    own: GroupModel
    most: GroupModel | None


def _offer_even(search: _Search, visit: Visit) -> _Models | None:
    """Offer layouts with one strategy for all stages; None if no other is faster than the best.

    Before any of them is priced few strategies stand for all offload ratios.
    """
    job, group = search.job, visit.group
    if len(group.sizes) > 1:
        if visit.bound_s >= search.upper_bound_s:
            return None
        return _Models(own=GroupModel(job, group, group.strategies, search.space), most=None)
    most = GroupModel(job, group, search.most_offloaded.of(group), search.space)
    horizon_s = max(search.upper_bound_s, search.horizon_s)
    if not _has_room(most, visit.limits, horizon_s):
        search.fits_from_s[group] = horizon_s
        return None
    own = GroupModel(job, group, group.strategies, search.space)
    for layout in even_layouts(own, visit.limits, within_s=horizon_s):
        search.offer(layout, visit)
    step_s = search.upper_bound_s
    if visit.bound_s >= step_s:
        return None
    if step_s == horizon_s or _has_room(most, visit.limits, step_s):
        return _Models(own=own, most=most)
    search.fits_from_s[group] = step_s
    return None


def _has_room(most: GroupModel, limits: Limits, step_s: float) -> bool:
    """Whether a layout of a group may be within the limits in a step of so many seconds.

    `most`: the group with few strategies that stand for all offload ratios.
    """
    group = most.group
    ranges = layer_ranges(most.job, group.num_stages, least=group.schedule.vpp)
    return capacity(most, ranges, limits, step_s, coarse=True).suffices


def groups_within(
    job: Job, space: SearchSpace, listed: Sequence[Visit], step_s: float
) -> Iterator[Visit]:
    """Those of the listed groups that may have a layout of at most so many seconds a step."""
    near = [visit for visit in listed if visit.least_s <= step_s]
    if not expressible(space, job.platform.runtime).unlike_stages:
        yield from near
        return
    most_offloaded = MostOffloaded(job, space, [visit.group for visit in near])
    for visit in near:
        group = visit.group
        # Of stages of several sizes nothing but the bound is known before they are searched.
        if len(group.sizes) > 1 or _has_room(
            GroupModel(job, group, most_offloaded.of(group), space), visit.limits, step_s
        ):
            yield visit


def _share(search: _Search, visit: Visit) -> None:
    """Offer the best layout of a group with host memory shared.

    A first look lets every stage have all of its node, for which frontiers in time do.
    """
    search.counts["groups_shared"] = search.counts.get("groups_shared", 0) + 1
    group = visit.group
    own = GroupModel(search.job, group, group.strategies, search.space)
    models = _Models(own=own, most=None)
    alone = replace(visit, limits=replace(visit.limits, shares_host=False))
    if _joined(search, alone, models)[1] is not None:
        _join(search, visit, models)


def _join(search: _Search, visit: Visit, models: _Models) -> GroupProblem:
    """Offer the best layout of a group."""
    problem, found = _joined(search, visit, models)
    if found is not None:
        search.relaxed_s = min(search.relaxed_s, found[1].lower_bound_s)
        search.offer(found[0], visit, found[1].solver)
    return problem


def _joined(
    search: _Search, visit: Visit, models: _Models
) -> tuple[GroupProblem, tuple[PricedLayout, InterStageSolution] | None]:
    """The problem of a group, and what of it beats the best so far."""
    bounds = Bounds(limits=visit.limits, step_s=search.upper_bound_s)
    problem = problem_of(models.own, bounds, search.store, models.most)
    search.count(problem)
    return problem, joined(problem, bounds, "dp")


def _search_alike(search: _Search, visit: Visit) -> None:
    """Every layout with stages alike."""
    group = visit.group
    search.counts["groups_solved"] += 1
    rows = np.arange(len(group.strategies))
    away = offloading(search.job, group, search.space, rows)
    model = GroupModel(search.job, group, group.strategies.joined(away), search.space)
    search.counts["stages_evaluated"] += len(model.strategies)
    for layout in alike_layouts(model, visit.limits):
        search.offer(layout, visit)


def _prove(search: _Search, best: PricedLayout, left_s: float, method: Method) -> Tuned:
    """Confirm the winner's group with the mixed-integer program; pruned groups cannot beat it.

    A winner that this program found has its proof, in `relaxed_s`.
    """
    layout, proven_s, visit = best, best.step_s, search.best_visit
    assert visit is not None
    if search.unlike_stages and search.best_solver == "dp":
        slack = 1.0 + 1e-9  # the bound is the winner itself: rounding must not cut it off
        model = GroupModel(search.job, visit.group, visit.group.strategies, search.space)
        bounds = Bounds(limits=visit.limits, step_s=best.step_s * slack)
        problem = problem_of(model, bounds, search.store)
        search.count(problem)
        found = joined(problem, bounds, method)
        assert found is not None, "the winner vanished from its own group"
        proven_s = found[1].lower_bound_s
        if found[0].step_s <= best.step_s:
            layout = found[0]
    others = sorted(
        (other for kind, other in search.by_kind.items() if kind != layout.kind),
        key=lambda other: other.step_s,
    )
    return Tuned(
        best=layout,
        grid_step_s=layout.step_s,
        # Each of these proofs covers some of the groups: the least of them covers all.
        lower_bound_s=min(proven_s, search.relaxed_s, left_s, layout.step_s),
        shares_host=visit.limits.shares_host,
        solver=search.best_solver,
        others=tuple(others[: search.num_alternatives]),
        pool=tuple(search.by_kind.values()),
        statistics=search.counts,
        listed=(),
    )


def _refined(search: _Search, tuned: Tuned) -> Tuned:
    """The same with the finer offload ratios of the finalist that they make fastest."""
    space, job = search.space, search.job
    if not (space.refines and search.unlike_stages):
        return tuned
    for layout, visit in search.finalists.values():
        found = refined(job, visit.group, space, layout, visit.limits)
        if found is not None and found.step_s < tuned.best.step_s:
            tuned = replace(
                tuned,
                best=found,
                shares_host=visit.limits.shares_host,
                lower_bound_s=min(tuned.lower_bound_s, found.step_s),
                others=tuple(other for other in tuned.others if other.kind != found.kind),
                pool=(*tuned.pool, found),
            )
    return tuned


def landscape(  # noqa: PLR0913 - what is drawn, and how far
    job: Job,
    space: SearchSpace,
    *,
    limits: Limits,
    within_s: float,
    is_over: Callable[[], bool] = _never,
    listed: Sequence[Visit] = (),
) -> Iterator[PricedLayout]:
    """Uniform layouts of every schedule searched, as far as `within_s`, nothing offloaded.

    With all layers at each memory level, and with as much recomputation as fits the limits. Of an
    interleaved pipeline only the one with most chunks: it fills fastest and holds least. Ends when
    `is_over`. `listed`: as in `tune`.
    """
    anything = Limits(device_bytes=math.inf, host_bytes=math.inf)
    space = expressible(replace(space, unequal_meshes=False), job.platform.runtime)
    deepest: dict[tuple[object, ...], Group] = {}
    alike = [visit for visit in listed if len(visit.group.sizes) == 1]
    known, _ = listed_groups(job, space, limits, is_over, alike)
    for visit in sorted(known, key=lambda visit: visit.group.schedule.vpp):
        if visit.bound_s <= within_s:
            group = visit.group
            key = (group.num_stages, group.num_micro_batches, group.schedule.kind)
            deepest[*key, *group.strategies["tp"]] = group
    for group in takewhile(lambda _: not is_over(), deepest.values()):
        model = GroupModel(job, group, group.strategies, space)
        if model.space.unlike_stages:
            yield from landscape_layouts(model, limits, within_s=within_s)
            continue
        levels = levels_under(space, group.schedule.kind)
        whole = [(replace(space, levels=(level,)), anything) for level in levels]
        for allowed, within in [*whole, (space, limits)]:
            yield from _uniform(model.under(allowed), within, within_s=within_s)


def _uniform(
    model: GroupModel, limits: Limits, *, least: Measure = "stable_s", within_s: float = math.inf
) -> Iterator[PricedLayout]:
    """Layouts with one strategy for all stages, which a runtime may ask to be alike in all else."""
    if model.space.unlike_stages:
        return even_layouts(model, limits, least=least, within_s=within_s)
    found = alike_layouts(model, limits, least=least)
    return (layout for layout in found if layout.step_s <= within_s)


def smallest_peak(
    job: Job, space: SearchSpace, *, host_bytes: float = math.inf, enough_bytes: float = 0.0
) -> PricedLayout:
    """The layout whose fullest device holds least, of those with room in host memory.

    States are offloaded as far as they may be, or not at all. A group without room for less than
    what was found so far is left out, and what holds no more than `enough_bytes` ends the search.
    Raises InputError when the space is empty.
    """
    space = with_least_memory(space)
    lean = replace(space, offload=lean_ratios(space))
    every = with_least_batches(list(groups(job, replace(space, unequal_meshes=False))))
    most_offloaded = MostOffloaded(job, lean, every)
    anywhere = Limits(device_bytes=math.inf, host_bytes=host_bytes)
    best: PricedLayout | None = None
    for group in every:
        few = GroupModel(job, group, most_offloaded.of(group), lean)
        within = anywhere if best is None else replace(anywhere, device_bytes=best.peak_bytes)
        if few.space.unlike_stages and not _has_room(few, within, math.inf):
            continue
        away = offloading(job, group, lean, np.arange(len(group.strategies)))
        model = GroupModel(job, group, group.strategies.joined(away), space)
        layouts = [*_uniform(model, anywhere, least="peak_bytes"), *([best] if best else [])]
        best = min(layouts, key=lambda each: (each.peak_bytes, each.step_s), default=None)
        if best is not None and best.peak_bytes <= enough_bytes:
            break
    if best is None:
        raise InputError(no_group_words(job, space))
    return best
